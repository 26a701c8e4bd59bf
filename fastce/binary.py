"""Sigmoid cross-entropy: docstrings, options turned into numbers, reduction. Checks, allocates, one call, returns."""

import numpy as np

from fastce import _checks, _engine

__all__ = ["binary_cross_entropy", "binary_cross_entropy_with_grad"]

LABEL_SMOOTHING = 0.0
MEAN = "mean"


def binary_cross_entropy(
    logits,
    targets,
    *,
    pos_weight=None,
    sample_weight=None,
    label_smoothing=LABEL_SMOOTHING,
    reduction=MEAN,
    denominator=None,
    num_threads=None,
):
    r"""Sigmoid cross-entropy of logits against targets in [0, 1], in nats: one yes-or-no question per entry.

    The loss of an entry with logit :math:`x` and target :math:`y` is

    .. math:: w \, [ -c \, y' \log \sigma(x) - (1 - y') \log \sigma(-x) ], \qquad y' = (1 - \epsilon) y + \epsilon / 2,

    with :math:`\sigma(x) = 1 / (1 + e^{-x})`, `pos_weight` :math:`c`, `sample_weight` :math:`w` and `label_smoothing`
    :math:`\epsilon`. It is computed from :math:`-\log \sigma(x) = \max(-x, 0) + \log(1 + e^{-|x|})`, so that it neither
    overflows nor loses a digit for any logit.

    Parameters
    ----------
    logits : array_like of float16, bfloat16, float32 or float64, any shape
        Unnormalised scores, of any strides, alignment and byte order. The half types are computed in float32.
    targets : array_like, broadcastable to the shape of `logits`
        Floats in [0, 1], integers 0 and 1, or bool.
    pos_weight : array_like, broadcastable to the shape of `logits`, optional
        Multiplies the loss of the positive part; finite and >= 0. Shape (C,) for C questions along the last axis.
    sample_weight : array_like, broadcastable to the shape of `logits`, optional
        Multiplies the loss of an entry; finite, of any sign. Entries with weight 0 count for nothing: whatever their
        logit and target hold, their loss is 0.
    label_smoothing : float, default 0.0
        In [0, 1]: moves the targets towards 1/2, before `pos_weight` is applied.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides the sum of the losses by `denominator`, "none" returns them entry by entry.
    denominator : float, optional
        Finite and > 0, only with "mean"; by default the sum of `sample_weight` over all entries, without it their
        number.
    num_threads : int, optional
        As in :func:`fastce.cross_entropy`. The result has the same bits for any number.

    Returns
    -------
    float or ndarray
        "mean" and "sum": a Python float, reduced in float64. "none": an array of the logits' shape and dtype (float32
        for the half types). The mean over a denominator of 0 (no entries, weights that add up to 0) is nan.

    Raises
    ------
    TypeError
        A dtype or kind that cannot be right: integer logits, complex targets.
    ValueError
        Shapes that do not fit, targets outside [0, 1], weights or options out of range.

    Notes
    -----
    A logit of +inf with the target 1, or -inf with 0, has the loss 0, the opposite +inf; nan stays nan. Every loss,
    before `sample_weight` multiplies it, is within 5e-7 (float32) or 2e-15 (float64) of the exact value, relatively,
    down to the smallest normal number; it is never negative, nor -0.0, if the weights are not. The formula with
    `pos_weight` and weights is that of PyTorch's ``binary_cross_entropy_with_logits``, whose mean divides by the number
    of entries even with weights: pass that as `denominator` to get its value.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([2.0, 0.0, -1.0])
    >>> fastce.binary_cross_entropy(logits, [1, 0, 1], reduction="none").round(6)
    array([0.126928, 0.693147, 1.313262])
    >>> print(f"{fastce.binary_cross_entropy(logits, [1, 0, 1]):.6f}")
    0.711112

    A confident entry, where log(sigmoid) gives 0:

    >>> print(f"{fastce.binary_cross_entropy(np.array([50.0]), [1]):.7e}")
    1.9287498e-22
    """
    if is_plain(pos_weight, sample_weight, label_smoothing, reduction, denominator, num_threads):
        plain = _engine.plain_binary(logits, targets, None, False)
        if plain is not None:
            return plain[0]
    loss, _ = _binary_cross_entropy(
        logits, targets, pos_weight, sample_weight, label_smoothing, reduction, denominator, num_threads, None, None,
        with_grad=False,
    )  # fmt: skip
    return loss


def binary_cross_entropy_with_grad(
    logits,
    targets,
    *,
    pos_weight=None,
    sample_weight=None,
    label_smoothing=LABEL_SMOOTHING,
    reduction=MEAN,
    denominator=None,
    num_threads=None,
    grad_output=None,
    out=None,
):
    r"""Sigmoid cross-entropy of logits against targets in [0, 1], and its gradient with respect to the logits.

    The gradient of an entry's loss is :math:`w \, [ (1 - y') \sigma(x) - c \, y' \sigma(-x) ]`, with the names of
    :func:`binary_cross_entropy`; without options :math:`\sigma(x) - y`. It belongs to the loss that is returned: for
    "mean" it is divided by the denominator, for "none" it is each entry's own.

    Parameters
    ----------
    logits, targets, pos_weight, sample_weight, label_smoothing, reduction, denominator, num_threads
        As in :func:`binary_cross_entropy`.
    grad_output : float or array_like of the logits' shape, optional
        Multiplies the gradient (the chain rule's incoming factor); an array goes only with reduction "none". It is
        data: it may be negative, infinite or nan.
    out : ndarray, optional
        Buffer for the gradient, of logits' shape and dtype, with any strides. It may be `logits` itself, which are
        then overwritten (any other overlap is refused). Reusing one buffer saves the system from handing out fresh
        pages at every call, which costs more than the computation.

    Returns
    -------
    loss : float or ndarray
        As in :func:`binary_cross_entropy`, the same bits.
    grad : ndarray
        `out` if it was given, else a new array of logits' shape and dtype.

    Raises
    ------
    TypeError, ValueError
        As in :func:`binary_cross_entropy`; all of them before anything is written.

    Notes
    -----
    Every entry is within 4.8e-7 (float32) or 2e-15 (float64) of the exact value, relatively to the sum of the
    magnitudes of its two terms (of which a target 0 or 1 has only one), as long as :math:`e^{-|x|}` is a normal number;
    also where the probability rounds to 1. The half types are rounded once. A logit of +inf with the target 1, or -inf
    with 0, has the gradient 0. Where the mean's denominator is 0 the gradient is 0.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([2.0, 0.0, -1.0])
    >>> loss, grad = fastce.binary_cross_entropy_with_grad(logits, [1, 0, 1], reduction="sum")
    >>> print(f"{loss:.6f}")
    2.133337
    >>> grad.round(6)
    array([-0.119203,  0.5     , -0.731059])
    """
    if grad_output is None and is_plain(
        pos_weight, sample_weight, label_smoothing, reduction, denominator, num_threads
    ):
        plain = _engine.plain_binary(logits, targets, out, True)
        if plain is not None:
            return plain
    return _binary_cross_entropy(
        logits, targets, pos_weight, sample_weight, label_smoothing, reduction, denominator, num_threads, grad_output,
        out, with_grad=True,
    )  # fmt: skip


def is_plain(pos_weight, sample_weight, label_smoothing, reduction, denominator, num_threads):
    """Return whether the options are the defaults, by identity: what only compares equal goes through the checks."""
    return (
        pos_weight is None
        and sample_weight is None
        and label_smoothing is LABEL_SMOOTHING
        and reduction is MEAN
        and denominator is None
        and num_threads is None
    )


def _binary_cross_entropy(
    logits, targets, pos_weight, sample_weight, label_smoothing, reduction, denominator, num_threads, grad_output, out,
    *, with_grad,
):  # fmt: skip
    logits = _checks.as_floating_array("logits", logits)
    shape = logits.shape
    _checks.check_reduction(reduction)
    num_threads = _checks.as_num_threads(num_threads)
    smoothing = _checks.as_fraction("label_smoothing", label_smoothing)
    scale, factors = _checks.as_entry_factors(grad_output, reduction, shape)
    targets = _checks.as_entry_targets(targets, shape)
    pos_weight = _checks.as_entry_weight("pos_weight", pos_weight, shape)
    sample_weight = _checks.as_entry_weight("sample_weight", sample_weight, shape)
    given = {"logits": logits, "targets": targets, "pos_weight": pos_weight, "sample_weight": sample_weight}
    factor = grad_output if factors is None else factors
    # The arrays that are read, whatever objects they were made from.
    grad = None if out is None else _checks.check_out(out, logits, [*given.items(), ("grad_output", factor)])
    pos_weight, wide = _checks.as_pos_weight(pos_weight, shape, num_threads)
    sample_weight, total_weight = _checks.as_entry_sample_weight(sample_weight, shape, num_threads)
    divisor = _checks.as_denominator(denominator, reduction)
    if divisor is None:
        divisor = total_weight
    no_mean = reduction == MEAN and not divisor
    if out is not None or no_mean:  # before anything of the caller's is written
        _checks.check_entry_targets(targets, sample_weight, shape, num_threads)

    dtype = logits.dtype.newbyteorder("=")
    losses = np.empty(shape, np.float32 if dtype.itemsize == 2 else dtype) if reduction == "none" else None
    if with_grad and out is None:
        grad = out = np.empty(shape, dtype)
    if no_mean:
        if with_grad:
            _engine.copy_in_blocks(grad, 0)
        return float("nan"), out
    loss_scale = 1.0 / divisor if reduction == MEAN else 1.0
    scale = scale / divisor if reduction == MEAN else scale
    total, inside = _engine.binary_entries(
        logits, targets, pos_weight, sample_weight, factors, smoothing, scale, loss_scale, wide, losses, grad,
        num_threads,
    )  # fmt: skip
    if not inside:  # nothing of the caller's was written, or else the targets had been checked before
        _checks.check_entry_targets(targets, sample_weight, shape, num_threads)
    if reduction == "none":
        return losses, out
    return total / divisor if reduction == MEAN else total, out
