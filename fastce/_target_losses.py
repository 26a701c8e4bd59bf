"""Losses of the target's probability alone: their gradient is that of cross-entropy, times a factor of each row."""

from dataclasses import replace

import numpy as np

from fastce import _checks
from fastce._problem import given_arrays, gradient_array, loss_arrays, pose, reduce_losses


def target_loss(
    loss_and_factor, logits, targets, axis, weight, sample_weight, ignore_index, reduction, denominator, num_threads,
    grad_output=None, out=None, *, with_grad=False,
):
    """Return (loss, gradient or None) of a loss f(p_t) of class ids.

    `loss_and_factor` maps the rows' cross-entropies -log p_t (float64) to f(p_t) and to -p_t f'(p_t): since
    dp_t/dz_c = p_t ([c = t] - p_c), the gradient of f is p_c - [c = t] times that factor. The first pass over logits
    gives the cross-entropies, the second, which a gradient needs, the gradients.
    """
    _checks.check_reduction(reduction)
    divisor = _checks.as_denominator(denominator, reduction)
    scales = []

    def check_buffer(problem):
        scales.append(_checks.as_grad_output(grad_output, reduction, problem.row_shape))
        if out is not None:
            given = given_arrays(
                logits=problem.logits, grad_output=grad_output, targets=targets, weight=weight,
                sample_weight=sample_weight,
            )
            _checks.check_out(out, problem.logits, given)

    problem = pose(
        logits, targets, axis, num_threads, weight=weight, sample_weight=sample_weight, ignore_index=ignore_index,
        before_targets=check_buffer,
    )
    if problem.ids is None:
        raise TypeError("targets must be class ids: this loss is one of the probability of a single class")
    if divisor is None and reduction == "mean":
        divisor = problem.total_weight()
    losses, loss = loss_arrays(problem, reduction)
    grad = gradient_array(problem, out) if with_grad else None
    if reduction == "mean" and divisor == 0.0:
        if grad is not None:
            grad[...] = 0
        return float("nan"), grad
    unweighted = replace(problem, ids=problem.ids_that_count(), weight=None, sample_weight=None)
    unweighted.fill(losses)
    row_losses, factors = loss_and_factor(losses)
    if with_grad:
        factors *= scales[0] / divisor if reduction == "mean" else scales[0]
        problem.fill(losses, factors, grad)
    _weigh(row_losses, problem)
    return reduce_losses(row_losses, reduction, divisor, loss), grad


def _weigh(losses, problem):
    """Multiply the losses by the weights of their rows; a weight of 0 makes an infinite loss 0."""
    for weights in (None if problem.weight is None else problem.weight[problem.ids], problem.sample_weight):
        if weights is not None:
            losses[(weights == 0) & np.isposinf(losses)] = 0.0
            losses *= weights
