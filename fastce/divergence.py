"""Kullback-Leibler divergence of a softmax from given distributions, or from the softmax of other logits."""

import numpy as np

from fastce import _engine
from fastce._problem import AXIS, classes_last, deliver, gradient_array, pose

__all__ = ["kl_divergence", "kl_divergence_with_grad"]


def kl_divergence(
    logits,
    targets,
    *,
    axis=AXIS,
    from_logits=False,
    sample_weight=None,
    reduction="mean",
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
    With :math:`\delta_c = \log p_c - \log q_c` the sum is computed as
    :math:`\sum_{q_c > 0} q_c (e^{\delta_c} - 1 - \delta_c) + \sum_{q_c = 0} p_c + \sum_c q_c - 1`, in float64: no term
    of the first two sums is negative, so that a small divergence keeps its digits. Kullback and Leibler, "On
    information and sufficiency" (1951).

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
    reduction="mean",
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


def _fill(problem, losses, scale, grad):
    """Fill `losses` (N,), in blocks, then, unless it is None, `grad`; no array is as large as the logits.

    All losses come first: they take memory, which may fail, and gradients may be written over the logits.
    """
    from_logits = problem.distribution is None
    arrays = problem.logits, problem.target_logits if from_logits else problem.distribution, grad
    logits, targets, grad = (classes_last(array, problem.axis) for array in arrays)
    step = max(1, _engine.BUFFER_ELEMENTS // logits.shape[-1])
    for index, first, stop in _engine.row_blocks(logits.shape[:-1], step):
        log_p = _activated(logits[index], problem.num_threads, logarithm=True)
        log_q, q = None, targets[index]
        if from_logits:
            # Not e^log_q: the rounding of a large logarithm would be the error of q.
            log_q, q = (_activated(q, problem.num_threads, logarithm=logarithm) for logarithm in (True, False))
        # A row longer than a block is summed part by part, between which Ctrl-C is noticed.
        excess, mass = np.float64(0.0), np.float64(0.0)
        for classes in _engine.slices(logits.shape[-1], _engine.BUFFER_ELEMENTS):
            of_part = _divergences(log_p[..., classes], None if log_q is None else log_q[..., classes], q[..., classes])
            excess, mass = excess + of_part[0], mass + of_part[1]
        # Distributions from logits sum to 1 by their making, others to what they do.
        losses[first:stop] = (excess if from_logits else excess + (mass - 1.0)).reshape(-1)
    weight = problem.sample_weight
    if weight is not None:
        with np.errstate(all="ignore"):
            losses *= weight
        losses[weight == 0] = 0.0
    if grad is not None:
        q = _engine.Softened(targets, problem.num_threads) if from_logits else targets
        constants = {"weight": None, "scale": 1.0 if isinstance(scale, np.ndarray) else scale}
        per_row = {"sample_weight": weight, "scales": scale}
        cross_entropies = np.empty(len(losses))
        _engine.soft_rows(logits, cross_entropies, grad, None, q, None, per_row, constants, problem.num_threads)


def _activated(logits, num_threads, *, logarithm):
    """Return the softmax of a block, or its logarithm, in float64 and C order."""
    with np.errstate(all="ignore"):
        logits = _engine.flat_copy(logits, np.float64).reshape(logits.shape)
        if logarithm:
            _engine.log_softmax_rows(logits, logits, None, num_threads)
        else:
            _engine.softmax_rows(logits, logits, num_threads)
    return logits


def _divergences(log_p, log_q, q):
    """Return, of each row's classes, (sum of q log(q/p) - q + p, sum of q); the logarithms of `q` may be given."""
    q = q.astype(np.float64, order="C", copy=False)  # NumPy's sums have the bits of the layout
    with np.errstate(all="ignore"):
        delta = log_p - (np.log(q) if log_q is None else log_q)
        p = np.exp(log_p)
        # e^delta = p/q leaves the range of float64 where q does; p itself does not.
        terms = np.where(q > 0, np.where(delta > 600, p - q * (1.0 + delta), q * _excess(delta)), p)
        terms = np.where(np.isnan(q) | np.isnan(log_p), np.nan, terms)
        return terms.sum(axis=-1), q.sum(axis=-1)


def _excess(delta):
    """Return e^delta - 1 - delta, by its series where that would cancel (12 terms: below 2^-60 for |delta| <= 0.5)."""
    series = np.ones_like(delta)
    for k in range(14, 2, -1):
        series = 1.0 + series * delta / k
    return np.where(np.abs(delta) <= 0.5, 0.5 * delta * delta * series, np.expm1(delta) - delta)
