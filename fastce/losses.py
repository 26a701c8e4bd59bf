"""Softmax cross-entropy: docstrings, options turned into numbers, reduction. Checks, allocates, one call, returns."""

import numpy as np

from fastce import _checks, _engine

__all__ = ["cross_entropy", "cross_entropy_with_grad"]

AXIS = -1
IGNORE_INDEX = -100
MEAN = "mean"


def cross_entropy(
    logits,
    targets,
    *,
    axis=AXIS,
    ignore_index=IGNORE_INDEX,
    reduction=MEAN,
    denominator=None,
    num_threads=None,
):
    r"""Softmax cross-entropy of logits against class ids, in nats.

    The loss of a row with logits :math:`z` and class :math:`t` is

    .. math:: -\log p_t, \qquad p_j = e^{z_j} / \sum_k e^{z_k},

    computed as :math:`\log(1 + \sum_{j \ne t} e^{z_j - z_t})` wherever that is small, so that a confident row keeps
    all digits of its tiny loss.

    Parameters
    ----------
    logits : array_like of float32 or float64, shape (..., C, ...)
        Unnormalised scores, at least one class along `axis`. Any strides, alignment and byte order; rows that lie
        contiguous in memory are used where they lie, also with a padded row stride.
    targets : array_like of int, shape of `logits` without `axis`
        Class ids in [0, C) or among `ignore_index`, of any integer dtype.
    axis : int, default -1
        The class axis of `logits`.
    ignore_index : int, sequence of int or None, default -100
        Class ids whose rows count for nothing: their logits are not read, their loss is 0. None ignores nothing.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides the sum of the rows' losses by `denominator`, "none" returns them row by row.
    denominator : float, optional
        Finite and > 0, only with "mean"; by default the number of rows that are not ignored.
    num_threads : int, optional
        At most this many threads. By default ``FASTCE_NUM_THREADS``, else OpenMP's own limit, capped by the CPUs
        this process may use; small batches stay on the calling thread. The result has the same bits for any number.

    Returns
    -------
    float or ndarray
        "mean" and "sum": a Python float, reduced in float64. "none": an array of the rows' shape and of the logits'
        dtype. The mean of no rows (all ignored, or none given) is nan, their sum 0.0.

    Raises
    ------
    TypeError
        A dtype or kind that cannot be right: integer logits, float class ids, a non-integer `ignore_index`.
    ValueError
        Shapes that do not fit, an axis or option out of range.
    IndexError
        A class id that is neither in [0, C) nor ignored; the message names the first such row.

    Notes
    -----
    A row with a nan, a +inf or nothing but -inf has the loss nan; a target whose logit is -inf has the loss inf.
    Every finite loss is within 5e-7 (float32) or 2e-15 (float64) of the exact value, relatively, down to the smallest
    normal number, and never negative. The log-sum-exp form is that of [1]_; the log1p form follows from leaving the
    target out of the sum.

    References
    ----------
    .. [1] P. Blanchard, D. J. Higham, N. J. Higham, "Accurately computing the log-sum-exp and softmax functions",
       IMA Journal of Numerical Analysis 41 (2021).

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> fastce.cross_entropy(logits, [0, 2], reduction="none").round(6)
    array([0.239545, 1.098612])
    >>> print(f"{fastce.cross_entropy(logits, [0, 2]):.6f}")
    0.669079

    A confident row, where log(softmax) gives 0:

    >>> print(f"{fastce.cross_entropy(np.array([20.0, 0.0]), 0):.7e}")
    2.0611536e-09
    """
    if is_plain(axis, ignore_index, reduction, denominator, num_threads):
        plain = _engine.plain_cross_entropy(logits, targets, None, False)
        if plain is not None:
            return plain[0]
    loss, _ = _cross_entropy(
        logits, targets, axis, ignore_index, reduction, denominator, num_threads, None, None, with_grad=False
    )
    return loss


def cross_entropy_with_grad(
    logits,
    targets,
    *,
    axis=AXIS,
    ignore_index=IGNORE_INDEX,
    reduction=MEAN,
    denominator=None,
    num_threads=None,
    grad_output=None,
    out=None,
):
    r"""Softmax cross-entropy of logits against class ids, and its gradient with respect to the logits.

    The gradient of a row's loss is :math:`p_j - [j = t]`, computed at the target from the other classes, so that it
    keeps its digits where :math:`p_t` rounds to 1. It belongs to the loss that is returned: for "mean" it is divided
    by the denominator, for "none" it is each row's own.

    Parameters
    ----------
    logits, targets, axis, ignore_index, reduction, denominator, num_threads
        As in :func:`cross_entropy`.
    grad_output : float or array_like of the rows' shape, optional
        Multiplies the gradient (the chain rule's incoming factor); an array goes only with reduction "none". It is
        data: it may be negative, infinite or nan.
    out : ndarray, optional
        Buffer for the gradient, of logits' shape and dtype, with any strides. It may be `logits` itself, which are
        then overwritten (any other overlap is refused). Reusing one buffer saves the system from handing out fresh
        pages at every call, which costs more than the computation.

    Returns
    -------
    loss : float or ndarray
        As in :func:`cross_entropy`, the same bits.
    grad : ndarray
        `out` if it was given, else a new array of logits' shape and dtype. Ignored rows are exactly 0.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in :func:`cross_entropy`; all of them before anything is written.

    Notes
    -----
    Every entry with p >= 2^-126 (float32) is within 4.8e-7 of the exact value, relatively, also at the target;
    float64 within 2e-15. Special rows: nan, +inf or all -inf make the whole row nan and touch no other; a logit of
    -inf has the gradient 0; a target at -inf has -1. The gradient of a mean over no rows is 0.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> loss, grad = fastce.cross_entropy_with_grad(logits, [0, 2], reduction="sum")
    >>> print(f"{loss:.6f}")
    1.338157
    >>> grad.round(6)
    array([[-0.213014,  0.106507,  0.106507],
           [ 0.333333,  0.333333, -0.666667]])
    """
    if grad_output is None and is_plain(axis, ignore_index, reduction, denominator, num_threads):
        plain = _engine.plain_cross_entropy(logits, targets, out, True)
        if plain is not None:
            return plain
    return _cross_entropy(
        logits, targets, axis, ignore_index, reduction, denominator, num_threads, grad_output, out, with_grad=True
    )


def is_plain(axis, ignore_index, reduction, denominator, num_threads):
    """Return whether the options are the defaults, by identity: what only compares equal goes through the checks."""
    return (
        axis is AXIS
        and ignore_index is IGNORE_INDEX
        and reduction is MEAN
        and denominator is None
        and num_threads is None
    )


def _cross_entropy(
    logits, targets, axis, ignore_index, reduction, denominator, num_threads, grad_output, out, *, with_grad
):
    logits = _checks.as_logits(logits)
    axis = _checks.as_axis(axis, logits.shape)
    _checks.check_reduction(reduction)
    num_threads = _checks.as_num_threads(num_threads)
    ignored = _checks.as_ignored(ignore_index)
    row_shape = logits.shape[:axis] + logits.shape[axis + 1 :]
    scale = _checks.as_grad_output(grad_output, reduction, row_shape)
    if out is not None:
        _checks.check_out(out, logits, [("logits", logits), ("grad_output", grad_output)])
    ids, n_live = _checks.as_class_ids(targets, logits.shape, axis, ignored)
    divisor = _checks.as_denominator(denominator, reduction, n_live)
    if reduction == "mean":
        scale = scale / divisor if divisor else 0.0

    losses = np.empty(len(ids))
    loss = np.empty(row_shape, logits.dtype.newbyteorder("=")) if reduction == "none" else None
    grad = None
    if with_grad:
        grad = np.empty(logits.shape, logits.dtype.newbyteorder("=")) if out is None else out
    _engine.cross_entropy_rows(classes_last(logits, axis), ids, losses, scale, classes_last(grad, axis), num_threads)
    return _reduce(losses, loss, reduction, divisor), grad


def classes_last(array, axis):
    """Return a plain view of `array` (or None for None) with its class axis last."""
    if array is None:
        return None
    if type(array) is not np.ndarray:
        array = array.view(np.ndarray)
    return array if axis == array.ndim - 1 else np.moveaxis(array, axis, -1)


def _reduce(losses, loss, reduction, divisor):
    """Return the rows' losses, in the array `loss`, their sum, or their sum by `divisor`."""
    if reduction == "none":
        with np.errstate(over="ignore", under="ignore"):
            np.copyto(loss, losses.reshape(loss.shape), casting="same_kind")
        return loss
    total = _engine.kernels.sum_losses(losses)
    if reduction == "sum":
        return total
    return total / divisor if divisor else float("nan")
