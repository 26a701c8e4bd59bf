"""Cross-entropy of probabilities: docstrings, and a walk over blocks of rows that validates, takes logarithms and adds.

Plain NumPy, in float64, on one thread. A block is small enough that memory does not grow with the batch.
"""

import math

import numpy as np

from fastce import _checks, _engine

__all__ = ["binary_cross_entropy_from_probs", "cross_entropy_from_probs"]

# Elements taken at a time: at most eight float64 temporaries of this size, 1 MB together, are held at once.
BLOCK_ELEMENTS = 16384
# The relative spacing of every dtype that probabilities may have.
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def cross_entropy_from_probs(
    probs,
    targets,
    *,
    axis=-1,
    weight=None,
    sample_weight=None,
    ignore_index=-100,
    reduction="mean",
    denominator=None,
    num_threads=None,
):
    r"""Cross-entropy of probabilities against class ids or distributions, in nats.

    The loss of a row with probabilities :math:`p` is

    .. math:: -s\, w_t \log p_t \qquad\text{or}\qquad -s \sum_c w_c\, q_c \log p_c

    for a class id :math:`t` or a distribution :math:`q`, with class weights :math:`w` and the row's sample weight
    :math:`s`. Where logits are at hand, :func:`fastce.cross_entropy` is the better choice: it is faster, and rounding
    a probability to nearly 1 has lost digits of the loss that nothing brings back.

    Parameters
    ----------
    probs : array_like of float16, bfloat16, float32 or float64, shape (..., C, ...)
        Probabilities in [0, 1] that sum to 1 along `axis` within the square root of the dtype's epsilon (float64
        1.5e-8, float32 3.5e-4, float16 0.031, bfloat16 0.088). They are neither clipped nor renormalised. Any strides,
        alignment and byte order.
    targets : array_like of int, shape of `probs` without `axis`, or of float, shape of `probs`
        Class ids in [0, C) or among `ignore_index`; or a distribution per row, finite and >= 0, whose sum need not
        be 1.
    axis : int, default -1
        The class axis of `probs` (and of distributions).
    weight : array_like of float, shape (C,), optional
        Weights of the classes, finite and >= 0. A weight of 0 makes an infinite loss 0.
    sample_weight : array_like of float, shape of the rows, optional
        Weights of the rows, finite, of any sign. The probabilities and distributions of a row of weight 0 are not
        read; its class id must be in range nevertheless.
    ignore_index : int, sequence of int or None, default -100
        Class ids whose rows count for nothing: their probabilities are not read, their loss is 0. None ignores
        nothing. With distributions only None and the default; leave rows out with `sample_weight` 0.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides the sum of the rows' losses by `denominator`, "none" returns them row by row.
    denominator : float, optional
        Finite and > 0, only with "mean". By default the sum of the rows' :math:`s\,w_t` for class ids (ignored rows
        left out), of their :math:`s` for distributions.
    num_threads : int, optional
        Checked, as everywhere in this package, but without effect: this function uses one thread.

    Returns
    -------
    float or ndarray
        "mean" and "sum": a Python float, reduced in float64. "none": an array of the rows' shape and of the dtype of
        `probs`, float32 for the half types. A mean whose denominator is 0 (all ignored, no rows, or weights that add
        up to 0) is nan, its sum what it is.

    Raises
    ------
    TypeError
        A dtype or kind that cannot be right: integer `probs`, float class ids, a non-integer `ignore_index`, a
        masked array with masked entries.
    ValueError
        Shapes that do not fit, an axis or option out of range, weights that are not finite, rows that are not
        probabilities (the message names the first), distributions that are negative or not finite.
    IndexError
        A class id that is neither in [0, C) nor ignored; the message names the first such row.

    Notes
    -----
    A target of probability 0 has the loss inf; 0 log 0 is 0. Logarithms are taken in float64, so that losses are those
    of the probabilities given within 2e-15 relatively, before they are rounded once to the dtype returned. They are
    never negative, and never -0.0, where the weights are not negative. Memory does not grow with N times C. The
    formula is that of the log score [1]_.

    References
    ----------
    .. [1] I. J. Good, "Rational decisions", Journal of the Royal Statistical Society B 14 (1952).

    Examples
    --------
    The loss depends on the probability of the true class alone, here 0.1, however the rest is split:

    >>> from fastce.probabilities import cross_entropy_from_probs
    >>> cross_entropy_from_probs([0.1, 0.9, 0.0, 0.0], 0)
    2.302585...
    >>> cross_entropy_from_probs([0.1, 0.3, 0.3, 0.3], 0)
    2.302585...

    Two rows, then a distribution as the target:

    >>> cross_entropy_from_probs([[0.5, 0.5], [0.75, 0.25]], [0, 1], reduction="none").round(6)
    array([0.693147, 1.386294])
    >>> print(f"{cross_entropy_from_probs([0.75, 0.25], [0.5, 0.5]):.6f}")
    0.836988
    """
    probs = _checks.as_floating_array("probs", probs)
    axis = _checks.as_probs_axis(axis, probs.shape)
    row_shape = probs.shape[:axis] + probs.shape[axis + 1 :]
    _checks.check_reduction(reduction)
    _checks.as_num_threads(num_threads)
    if denominator is not None:
        denominator = _checks.as_denominator(denominator, reduction)
    weight = _checks.as_class_weight(weight, probs.shape[axis])
    sample_weight = _checks.as_sample_weight(sample_weight, row_shape)
    ids, distributions = _checks.as_probs_targets(targets, probs.shape, axis, ignore_index)
    rows = np.moveaxis(probs, axis, -1)
    if ids is not None:
        blocks = _class_id_blocks(rows, ids, weight, sample_weight)
    else:
        blocks = _distribution_blocks(rows, np.moveaxis(distributions, axis, -1), weight, sample_weight)
    return _reduce(blocks, row_shape, probs.dtype, reduction, denominator)


def binary_cross_entropy_from_probs(
    probs, targets, *, sample_weight=None, reduction="mean", denominator=None, num_threads=None
):
    r"""Binary cross-entropy of probabilities, in nats.

    The loss of an entry with probability :math:`p`, target :math:`y` and weight :math:`s` is

    .. math:: -s\,(y \log p + (1 - y) \log(1 - p)),

    where the second logarithm is taken as log1p(-p). Where logits are at hand, a loss that takes them is the better
    choice: rounding a probability to nearly 1 has lost digits that nothing brings back.

    Parameters
    ----------
    probs : array_like of float16, bfloat16, float32 or float64, any shape
        Probabilities of the class 1, in [0, 1]; they are not clipped. Any strides, alignment and byte order.
    targets : array_like of bool, int or float, broadcastable to `probs`
        Targets in [0, 1]; integers and bools count as 0 and 1.
    sample_weight : array_like of float, broadcastable to `probs`, optional
        Weights of the entries, finite, of any sign. The probability and target of an entry of weight 0 are not read.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides the sum of the losses by `denominator`, "none" returns them one by one.
    denominator : float, optional
        Finite and > 0, only with "mean". By default the sum of `sample_weight`, without it the number of entries.
    num_threads : int, optional
        Checked, as everywhere in this package, but without effect: this function uses one thread.

    Returns
    -------
    float or ndarray
        "mean" and "sum": a Python float, reduced in float64. "none": an array of the shape and dtype of `probs`,
        float32 for the half types. A mean whose denominator is 0 is nan.

    Raises
    ------
    TypeError
        A dtype or kind that cannot be right: integer `probs`, complex targets, a masked array with masked entries.
    ValueError
        Shapes that do not broadcast to that of `probs`, options out of range, `sample_weight` not finite, `probs` or
        `targets` outside [0, 1] (the message names the first).

    Notes
    -----
    0 log 0 is 0; p = 0 with y > 0 and p = 1 with y < 1 have the loss inf. Computed in float64, so that losses are
    those of the probabilities given within 2e-15 relatively, before they are rounded once to the dtype returned; never
    negative, and never -0.0, where the weights are not negative. Memory does not grow with the batch. The formula is
    the negative log-likelihood of a Bernoulli variable [1]_.

    References
    ----------
    .. [1] D. R. Cox, "The regression analysis of binary sequences", Journal of the Royal Statistical Society B 20
       (1958).

    Examples
    --------
    The textbook cost, -y log h - (1 - y) log(1 - h) of a hypothesis h:

    >>> import math
    >>> from fastce.probabilities import binary_cross_entropy_from_probs
    >>> h, y = 0.9, 1
    >>> math.isclose(binary_cross_entropy_from_probs(h, y), -y * math.log(h) - (1 - y) * math.log(1 - h))
    True
    >>> binary_cross_entropy_from_probs([0.9, 0.9], [1, 0], reduction="none").round(6)
    array([0.105361, 2.302585])
    """
    probs = _checks.as_floating_array("probs", probs)
    _checks.check_reduction(reduction)
    _checks.as_num_threads(num_threads)
    if denominator is not None:
        denominator = _checks.as_denominator(denominator, reduction)
    targets = _checks.as_binary_targets(targets, probs.shape)
    sample_weight = _checks.as_binary_sample_weight(sample_weight, probs.shape)
    blocks = _binary_blocks(probs, targets, sample_weight)
    return _reduce(blocks, probs.shape, probs.dtype, reduction, denominator)


# ---- blocks of rows: each generator yields (index, losses, weights in the mean's denominator) ----------------------


def _class_id_blocks(probs, ids, weight, sample_weight):
    for index, first, stop in _row_blocks(probs.shape):
        t = ids[first:stop]
        live = t >= 0
        factors = live.astype(np.float64) if weight is None else np.where(live, weight[t], 0.0)
        if sample_weight is not None:
            live &= sample_weight[first:stop] != 0
            factors *= sample_weight[first:stop]
        yield index, _losses(_log_of_target(_tiles(probs, index, first, live), t[live]), factors, live), factors


def _distribution_blocks(probs, distributions, weight, sample_weight):
    for index, first, stop in _row_blocks(probs.shape):
        factors = np.ones(stop - first) if sample_weight is None else sample_weight[first:stop]
        live = factors != 0
        logs = np.zeros(np.count_nonzero(live))
        for classes, p in _tiles(probs, index, first, live):
            q = _float64_rows(distributions[index][..., classes], live)
            _checks.check_distributions(q, _checks.places(probs.shape[:-1], first, live, "row"))
            counts = q != 0 if weight is None else (q != 0) & (weight[classes] != 0)
            terms = np.where(counts, p, 1.0)  # log 1 in place of a logarithm that counts 0 times
            np.log(terms, out=terms)
            terms *= q
            if weight is not None:
                terms *= weight[classes]
            logs += terms.sum(axis=1)
        yield index, _losses(logs, factors, live), factors


def _binary_blocks(probs, targets, sample_weight):
    for index, first, stop in _engine.row_blocks(probs.shape, BLOCK_ELEMENTS):
        factors, live = np.ones(stop - first), np.ones(stop - first, bool)
        if sample_weight is not None:
            factors = _float64_rows(sample_weight[index][..., None], live)[:, 0]
            _checks.check_finite("sample_weight", factors, _checks.places(probs.shape, first, live, "entry"))
            live = factors != 0
        place = _checks.places(probs.shape, first, live, "entry")
        yield index, _losses(_binary_logs(probs[index], targets[index], live, place), factors, live), factors


def _binary_logs(probs, targets, live, place):
    """Return y log p + (1 - y) log(1 - p) of the live entries (n,) of a block, after validation."""
    p, y = (_float64_rows(array[..., None], live) for array in (probs, targets))
    _checks.check_unit_interval("probs", p, place, "for logits call binary_cross_entropy; nothing is clipped here")
    _checks.check_unit_interval("targets", y, place, "leave entries out with sample_weight 0")
    logs = np.where(y != 0, p, 1.0)  # log 1, and below log1p(0), in place of a logarithm that counts 0 times
    np.log(logs, out=logs)
    logs *= y
    rest = np.where(y != 1, p, 0.0)
    np.negative(rest, out=rest)
    np.log1p(rest, out=rest)
    rest *= 1.0 - y
    logs += rest
    return logs[:, 0]


def _row_blocks(shape):
    """Return the blocks of rows of an array of this shape (..., C), as of :func:`fastce._engine.row_blocks`."""
    return _engine.row_blocks(shape[:-1], max(1, BLOCK_ELEMENTS // shape[-1]))


def _tiles(probs, index, first, live):
    """Yield (classes, p): the live rows of a block in float64, a slice of the classes at a time, after validation."""
    n_classes = probs.shape[-1]
    place = _checks.places(probs.shape[:-1], first, live, "row")
    totals = np.zeros(np.count_nonzero(live))
    for start in range(0, n_classes, BLOCK_ELEMENTS):
        classes = slice(start, min(start + BLOCK_ELEMENTS, n_classes))
        p = _float64_rows(probs[index][..., classes], live)
        _checks.check_unit_interval("probs", p, place, "for logits call cross_entropy; nothing is clipped here")
        totals += p.sum(axis=1)
        yield classes, p
    _checks.check_sum_to_one(totals, math.sqrt(EPSILON[probs.dtype.name]), place)


def _float64_rows(block, live):
    """Return the live rows of `block` (..., m) as float64 (n, m) in C order; the others are not read."""
    rows = block if live.all() else block[live.reshape(block.shape[:-1])]
    return np.ascontiguousarray(rows, np.float64).reshape(-1, block.shape[-1])


def _log_of_target(tiles, t):
    """Return log p[t] of each row (n,)."""
    p_target = np.empty(len(t))
    for classes, p in tiles:
        here = np.flatnonzero((t >= classes.start) & (t < classes.stop))
        p_target[here] = p[here, t[here] - classes.start]
    return np.log(p_target)


def _losses(logs, factors, live):
    """Return -factors * logs at the live rows and 0 at the others; a factor 0 makes an infinite logarithm 0."""
    losses = np.zeros(len(factors))
    factors = factors[live]
    products = np.where(factors != 0, logs, 0.0)
    products *= factors
    losses[live] = np.subtract(0.0, products, out=products)  # not a negation, which would turn 0 into -0
    return losses


def _reduce(blocks, shape, dtype, reduction, denominator):
    """Return the losses of all blocks, in an array of this shape, their sum, or their mean."""
    losses = None
    if reduction == "none":
        losses = np.empty(shape, dtype.newbyteorder("=") if dtype.itemsize > 2 else np.float32)
    sums, weights = [], []
    with np.errstate(all="ignore"):
        for index, block_losses, block_weights in blocks:
            if losses is not None:
                losses[index] = block_losses.reshape(losses[index].shape)
            else:
                sums.append(_engine.kernels.sum_losses(block_losses))
                # Weights may be the caller's own numbers, at any address; the kernel takes them aligned.
                weights.append(_engine.kernels.sum_losses(np.require(block_weights, np.float64, ["C", "A"])))
    if losses is not None:
        return losses
    total = _engine.kernels.sum_losses(np.array(sums))
    if reduction == "sum":
        return total
    divisor = _engine.kernels.sum_losses(np.array(weights)) if denominator is None else denominator
    return total / divisor if divisor else float("nan")
