"""Losses of the target's probability alone: their gradient is that of cross-entropy, times a factor of each row."""

from dataclasses import replace
from functools import partial

import numpy as np

from fastce import _engine
from fastce._problem import deliver, gradient_array, pose


def target_loss(
    loss_and_factor, logits, targets, axis, weight, sample_weight, ignore_index, reduction, denominator, num_threads,
    grad_output=None, out=None, *, with_grad=False,
):
    """Return (loss, gradient or None) of a loss f(p_t) of class ids.

    `loss_and_factor` maps the rows' cross-entropies -log p_t (float64) to f(p_t) and to -p_t f'(p_t): since
    dp_t/dz_c = p_t ([c = t] - p_c), the gradient of f is p_c - [c = t] times that factor.
    """
    problem = pose(
        logits, targets, axis, num_threads, reduction=reduction, denominator=denominator, weight=weight,
        sample_weight=sample_weight, ignore_index=ignore_index, grad_output=grad_output, buffers={"out": out},
    )
    if problem.ids is None:
        raise TypeError("targets must be class ids: this loss is one of the probability of a single class")
    grad = gradient_array(problem, out) if with_grad else None
    return deliver(problem, grad, fill=partial(_fill, loss_and_factor)), grad


def _fill(loss_and_factor, problem, losses, scale, grad):
    """Fill `losses` (N,) in a first pass over logits and, unless it is None, `grad` in a second."""
    unweighted = replace(problem, ids=problem.ids_that_count(), weight=None, sample_weight=None)
    unweighted.fill(losses)
    # All that takes memory comes before the gradient is written.
    row_losses, factors = np.empty_like(losses), np.empty_like(losses)
    for part in _engine.slices(len(losses), _engine.BUFFER_ELEMENTS):
        row_losses[part], factors[part] = loss_and_factor(losses[part])
        _weigh(row_losses[part], problem, part)
    if grad is not None:
        with np.errstate(all="ignore"):
            factors *= scale
        problem.fill(losses, factors, grad)
    losses[:] = row_losses  # takes no memory


def _weigh(losses, problem, part):
    """Multiply the losses of a part of the rows by their weights; a weight of 0 makes an infinite loss 0."""
    of_classes = None if problem.weight is None else problem.weight[problem.ids[part]]
    for weights in (of_classes, _engine.part_of(problem.sample_weight, part)):
        if weights is not None:
            losses[(weights == 0) & np.isposinf(losses)] = 0.0
            with np.errstate(all="ignore"):
                losses *= weights
