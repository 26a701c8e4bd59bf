"""Cross-entropy of probabilities: docstrings, options turned into numbers, reduction, and words for what is refused.

The kernels validate what they read and say which row is the first that is not in order, but not why.
"""

import math

import numpy as np

from fastce import _checks, _engine
from fastce._problem import AXIS, IGNORE_INDEX, MEAN, NONE, SUM, classes_last, is_word, may_be_plain

__all__ = ["binary_cross_entropy_from_probs", "cross_entropy_from_probs"]

# How far from 1 the sums of rows may be: the root of the relative spacing of every dtype that probabilities may have.
TOLERANCE32, TOLERANCE64 = math.sqrt(2.0**-23), math.sqrt(2.0**-52)
TOLERANCE16 = {"float16": math.sqrt(2.0**-10), "bfloat16": math.sqrt(2.0**-7)}


def cross_entropy_from_probs(
    probs,
    targets,
    *,
    axis=AXIS,
    weight=None,
    sample_weight=None,
    ignore_index=IGNORE_INDEX,
    reduction=MEAN,
    denominator=None,
    num_threads=None,
):
    r"""Cross-entropy of probabilities against class ids or distributions, in nats.

    The loss of a row with probabilities :math:`p` is

    .. math:: -s\, w_t \log p_t \qquad\text{or}\qquad -s \sum_c w_c\, q_c \log p_c

    for a class id :math:`t` or a distribution :math:`q`, with class weights :math:`w` and the row's sample weight
    :math:`s`. Where logits are at hand, :func:`fastce.cross_entropy` is the better choice: rounding a probability to
    nearly 1 has lost digits of the loss that nothing brings back.

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
        As in :func:`fastce.cross_entropy`. The result has the same bits for any number.

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
    if may_be_plain(probs, axis, reduction):
        plain = _engine.probabilities.plain_probabilities(
            probs, targets, weight, sample_weight, ignore_index, reduction, denominator, num_threads, TOLERANCE32,
            TOLERANCE64, _engine.SERIAL_ELEMENTS, _engine.default_threads,
        )  # fmt: skip
        if plain is not None:
            return plain
    probs = _checks.as_floating_array("probs", probs)
    axis = _checks.as_probs_axis(axis, probs.shape)
    row_shape = probs.shape[:axis] + probs.shape[axis + 1 :]
    _checks.check_reduction(reduction)
    num_threads = _checks.as_num_threads(num_threads)
    divisor = _checks.as_denominator(denominator, reduction)
    weight = _checks.as_class_weight(weight, probs.shape[axis])
    sample_weight = _checks.as_sample_weight(sample_weight, row_shape)
    ids, distributions = _checks.as_probs_targets(targets, probs.shape, axis, ignore_index)
    probs, distributions = classes_last(probs, axis), classes_last(distributions, axis)
    losses = np.empty(math.prod(row_shape))
    factors = np.empty(len(losses)) if reduction == MEAN and divisor is None else None
    tolerance = tolerance_of(probs.dtype)
    bad = _engine.probability_rows(
        probs, ids, distributions, weight, sample_weight, tolerance, losses, factors, num_threads
    )
    if bad >= 0:
        _refuse_row(bad, probs, distributions, tolerance)
    if reduction == NONE:
        by_row = np.empty(row_shape, _engine.computing_dtype(probs.dtype))
        _engine.round_numbers(losses, by_row)
        return by_row
    if factors is not None:
        divisor = _engine.kernels.sum_losses(factors)
    return _reduced(_engine.kernels.sum_losses(losses), divisor, reduction)


def binary_cross_entropy_from_probs(
    probs, targets, *, sample_weight=None, reduction=MEAN, denominator=None, num_threads=None
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
        As in :func:`fastce.cross_entropy`. The result has the same bits for any number.

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
    if is_word(reduction):
        plain = _engine.binary.plain_probabilities(
            probs, targets, sample_weight, reduction, denominator, num_threads, _engine.SERIAL_ELEMENTS,
            _engine.default_threads,
        )  # fmt: skip
        if plain is not None:
            return plain
    probs = _checks.as_floating_array("probs", probs)
    _checks.check_reduction(reduction)
    num_threads = _checks.as_num_threads(num_threads)
    divisor = _checks.as_denominator(denominator, reduction)
    targets = _checks.as_binary_targets(targets, probs.shape)
    sample_weight = _checks.as_binary_sample_weight(sample_weight, probs.shape)
    losses = np.empty(probs.shape, _engine.computing_dtype(probs.dtype)) if reduction == NONE else None
    total, total_weight, in_order = _engine.binary_probabilities(probs, targets, sample_weight, losses, num_threads)
    if not in_order:
        _refuse_entry(probs, targets, sample_weight, num_threads)
    if losses is not None:
        return losses
    return _reduced(total, total_weight if divisor is None else divisor, reduction)


def tolerance_of(dtype):
    """Return how far from 1 the sums of rows of this dtype may be."""
    if dtype.itemsize == 2:
        return TOLERANCE16[dtype.name]
    return TOLERANCE32 if dtype.itemsize == 4 else TOLERANCE64


def _reduced(total, divisor, reduction):
    """Return the sum of the losses or their mean, nan if it is one of nothing."""
    if reduction == SUM:
        return total
    return total / divisor if divisor else math.nan


# ---- what is refused -----------------------------------------------------------------------------------------------
# Only private copies are looked at: other threads may write to the caller's arrays. If a copy is in order, one has done
# so since a kernel read the numbers; the call is refused nevertheless, as the losses are those of other numbers.

ROW_REMEDY = "for logits call cross_entropy; nothing is clipped here"
ENTRY_REMEDY = "for logits call binary_cross_entropy; nothing is clipped here"


def _refuse_row(number, probs, distributions, tolerance):
    """Raise for the row of this number, class axis last."""
    shape = probs.shape[:-1]
    index = np.unravel_index(number, shape)
    place = _checks.places(shape, number, np.ones(1, bool), "row")
    p = _private(probs[index])
    _checks.check_unit_interval("probs", p, place, ROW_REMEDY)
    if distributions is not None:
        _checks.check_distributions(_private(distributions[index]), place)
    total = _engine.probabilities.row_total(p[0])
    _checks.check_sum_to_one(np.array([total]), tolerance, place)
    _checks.raise_changed(place(0))


def _refuse_entry(probs, targets, sample_weight, num_threads):
    """Raise for the first entry that is not in order."""
    shape, largest = probs.shape, _checks.LARGEST
    with np.errstate(all="ignore"):
        found = [
            _engine.first_outside(values, sample_weight, shape, 0.0, 1.0, num_threads) for values in (probs, targets)
        ]
        if sample_weight is not None:
            found.append(_engine.first_outside(sample_weight, None, shape, -largest, largest, num_threads))
    number = min((at for at in found if at >= 0), default=-1)
    if number < 0:
        _checks.raise_changed("some entry")
    index = np.unravel_index(number, shape)
    place = _checks.places(shape, number, np.ones(1, bool), "entry")
    if sample_weight is not None:
        _checks.check_finite("sample_weight", _private(sample_weight[index])[0], place)
    _checks.check_unit_interval("probs", _private(probs[index]), place, ENTRY_REMEDY)
    _checks.check_unit_interval("targets", _private(targets[index]), place, "leave entries out with sample_weight 0")
    _checks.raise_changed(place(0))


def _private(numbers):
    """Return a row, or a number, of any dtype as a copy (1, C) in float64."""
    with np.errstate(all="ignore"):
        return np.array(numbers, np.float64, ndmin=2, order="C")
