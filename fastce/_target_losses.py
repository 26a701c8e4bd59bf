"""Losses of the target's probability alone: their gradient is that of cross-entropy, times a factor of each row."""

from dataclasses import replace
from functools import partial

import numpy as np

from fastce import _engine
from fastce._problem import deliver, gradient_array, may_be_plain, pose


def target_loss(
    kind, parameter, logits, targets, axis, weight, sample_weight, ignore_index, reduction, denominator, num_threads,
    grad_output=None, out=None, *, with_grad=False,
):
    """Return (loss, gradient or None) of a loss f(p_t) of class ids, `kind` in the kernels' table of TARGET_LOSSES."""
    kind = _engine.kernels.TARGET_LOSSES[kind]
    if may_be_plain(logits, axis, reduction):
        plain = _engine.kernels.plain_cross_entropy(
            logits, targets, out, with_grad, None, False, weight, sample_weight, ignore_index, 0.0, 1.0, None, 0.0,
            None, reduction, denominator, num_threads, grad_output, _engine.SERIAL_ELEMENTS, _engine.default_threads,
            kind, parameter,
        )
        if plain is not None:
            return plain
    problem = pose(
        logits, targets, axis, num_threads, reduction=reduction, denominator=denominator, weight=weight,
        sample_weight=sample_weight, ignore_index=ignore_index, grad_output=grad_output, buffers={"out": out},
    )
    if problem.ids is None:
        raise TypeError("targets must be class ids: this loss is one of the probability of a single class")
    grad = gradient_array(problem, out) if with_grad else None
    return deliver(problem, grad, fill=partial(_fill, kind, parameter)), grad


def _fill(kind, parameter, problem, losses, scale, grad):
    """Fill `losses` (N,) in a first pass over logits and, unless it is None, `grad` in a second."""
    unweighted = replace(problem, ids=problem.ids_that_count(), weight=None, sample_weight=None)
    unweighted.fill(losses)
    # All that takes memory comes before the gradient is written.
    row_losses, factors = np.empty_like(losses), np.empty_like(losses)
    for part in _engine.slices(len(losses), _engine.SLAB_ELEMENTS):
        _engine.kernels.target_losses(
            kind, parameter, losses[part], row_losses[part], factors[part], problem.ids[part], problem.weight,
            _engine.part_of(problem.sample_weight, part),
        )
    if grad is not None:
        with np.errstate(all="ignore"):
            factors *= scale
        problem.fill(losses, factors, grad)
    losses[:] = row_losses  # takes no memory
