"""Kullback-Leibler divergence of a softmax from given distributions, or from the softmax of other logits."""

import numpy as np

from fastce import _engine
from fastce._problem import AXIS, IGNORE_INDEX, MEAN, classes_last, deliver, gradient_array, may_be_plain, pose

__all__ = ["kl_divergence", "kl_divergence_with_grad"]


def kl_divergence(
    logits,
    targets,
    *,
    axis=AXIS,
    from_logits=False,
    sample_weight=None,
    reduction=MEAN,
    denominator=None,
    num_threads=None,
):
    r"""Kullback-Leibler divergence :math:`\sum_c q_c \log (q_c / p_c)` of targets q from p = softmax(logits), in nats.

    This is cross-entropy less the entropy of the targets: what a model could still gain. It differs from cross-entropy
    by a constant of the logits, so the gradients are the same.

    Parameters
    ----------
    logits : array_like of float, shape (..., C, ...)
        As in :func:`cross_entropy`.
    targets : array_like of float, shape of `logits`
        Distributions, finite and >= 0, whose sum need not be 1; with `from_logits` the logits whose softmax they are
        (a teacher's, for distillation).
    axis : int, default -1
        The class axis of both.
    from_logits : bool, default False
        Whether `targets` are logits.
    sample_weight : array_like of float, the rows' shape, optional
        As in :func:`cross_entropy`.
    reduction, denominator, num_threads
        As in :func:`cross_entropy`; a mean divides by the sum of `sample_weight`, or by the number of rows.

    Returns
    -------
    float or ndarray
        As in :func:`cross_entropy`. Never negative for rows that sum to 1 or come from logits. A class with q = 0
        counts 0; q > 0 where p = 0 gives inf.

    Raises
    ------
    TypeError, ValueError
        As in :func:`cross_entropy`.

    Notes
    -----
    The sum is computed as :math:`\sum_c (p_c - q_c + q_c \log (q_c / p_c)) + \sum_c q_c - 1`, in float64 whatever the
    dtype: no term of the first sum is negative, and where p and q are near each other what is computed of them does
    not cancel, so that a small divergence keeps its digits. A p that float64 cannot hold enters by its logarithm.
    Kullback and Leibler, "On information and sufficiency" (1951).

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([2.0, 0.0, 0.0])
    >>> print(f"{fastce.kl_divergence(logits, np.array([0.8, 0.1, 0.1])):.6f}")
    0.000513
    >>> fastce.kl_divergence(logits, logits, from_logits=True)
    0.0
    """
    return _divergence(logits, targets, axis, from_logits, sample_weight, reduction, denominator, num_threads)[0]


def kl_divergence_with_grad(
    logits,
    targets,
    *,
    axis=AXIS,
    from_logits=False,
    sample_weight=None,
    reduction=MEAN,
    denominator=None,
    num_threads=None,
    grad_output=None,
    out=None,
):
    r"""Kullback-Leibler divergence, and its gradient :math:`p_c \sum_k q_k - q_c` with respect to the logits.

    Parameters
    ----------
    logits, targets, axis, from_logits, sample_weight, reduction, denominator, num_threads
        As in :func:`kl_divergence`.
    grad_output, out
        As in :func:`cross_entropy_with_grad`.

    Returns
    -------
    loss : float or ndarray
        As in :func:`kl_divergence`.
    grad : ndarray
        As in :func:`cross_entropy_with_grad`.

    Raises
    ------
    TypeError, ValueError
        As in :func:`cross_entropy_with_grad`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> loss, grad = fastce.kl_divergence_with_grad(np.array([2.0, 0.0, 0.0]), np.array([0.8, 0.1, 0.1]))
    >>> grad.round(6)
    array([-0.013014,  0.006507,  0.006507])
    """
    return _divergence(
        logits, targets, axis, from_logits, sample_weight, reduction, denominator, num_threads, grad_output, out,
        with_grad=True,
    )


def _divergence(
    logits, targets, axis, from_logits, sample_weight, reduction, denominator, num_threads, grad_output=None, out=None,
    *, with_grad=False,
):
    if may_be_plain(logits, axis, reduction):
        plain = _plain(
            logits, targets, from_logits, sample_weight, reduction, denominator, num_threads, grad_output, out,
            with_grad,
        )
        if plain is not None:
            return plain
    problem = pose(
        logits, targets, axis, num_threads, reduction=reduction, denominator=denominator, sample_weight=sample_weight,
        ignore_index=None, from_logits=from_logits,
    )
    targets = problem.target_logits if from_logits else problem.distribution
    if targets is None:
        raise TypeError("targets must be distributions, floats of the logits' shape; class ids go to cross_entropy")
    # Not by pose: `out` must not overlap the array of targets, whatever object it was made from.
    problem.take_gradient(grad_output, {"out": out}, targets=targets, sample_weight=sample_weight)
    grad = gradient_array(problem, out) if with_grad else None
    return deliver(problem, grad, fill=_fill), grad


def _plain(
    logits, targets, from_logits, sample_weight, reduction, denominator, num_threads, grad_output, out, with_grad
):
    """Return (loss, gradient or None) of a call without options on plain arrays, or None if it is not one."""
    threads = num_threads, grad_output, _engine.SERIAL_ELEMENTS, _engine.default_threads
    plain = _engine.divergence.plain_divergence(
        logits, targets, out, with_grad, from_logits, sample_weight, reduction, denominator, *threads
    )
    if plain is None or not with_grad or from_logits:
        return plain
    # The gradient against distributions is that of cross-entropy.
    with_gradient = _engine.soft.plain_general(
        logits, targets, None, None, out, True, None, False, None, None, IGNORE_INDEX, 0.0, 1.0, None, 0.0, None,
        reduction, denominator, *threads,
    )
    return with_gradient and (plain[0], with_gradient[1])


def _fill(problem, losses, scale, grad):
    """Fill `losses` (N,) and, unless it is None, `grad`; no array is as large as the logits.

    Where the gradient is that of cross-entropy, all losses come first: gradients may be written over the logits.
    """
    from_logits = problem.distribution is None
    arrays = problem.logits, problem.target_logits if from_logits else problem.distribution, grad
    logits, targets, grad = (classes_last(array, problem.axis) for array in arrays)
    weight = problem.sample_weight
    _engine.divergence_rows(
        logits, targets, from_logits, losses, weight, scale, grad if from_logits else None, problem.num_threads
    )
    if grad is not None and not from_logits:
        constants = {"weight": None, "scale": 1.0 if isinstance(scale, np.ndarray) else scale}
        per_row = {"sample_weight": weight, "scales": scale}
        _engine.soft_rows(
            logits, np.empty(len(losses)), grad, None, targets, None, per_row, constants, problem.num_threads
        )
