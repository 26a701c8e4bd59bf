"""Poly-1 loss: cross-entropy with another weight on the first term of its expansion in 1 - p."""

import math

from fastce import _checks
from fastce._problem import AXIS, IGNORE_INDEX
from fastce._target_losses import target_loss

__all__ = ["poly_loss", "poly_loss_with_grad"]


def poly_loss(
    logits,
    targets,
    *,
    epsilon=1.0,
    axis=AXIS,
    weight=None,
    sample_weight=None,
    ignore_index=IGNORE_INDEX,
    reduction="mean",
    denominator=None,
    num_threads=None,
):
    r"""Poly-1 loss of logits against class ids, in nats.

    The loss of a row of class :math:`t` is :math:`w_t (-\log p_t + \epsilon (1 - p_t))`, with `epsilon` 0
    cross-entropy.

    Parameters
    ----------
    logits : array_like of float, shape (..., C, ...)
        As in :func:`cross_entropy`.
    targets : array_like of int
        Class ids; soft targets are a TypeError.
    epsilon : float, default 1.0
        Finite and >= -1: below, the loss would fall with the probability of the target somewhere.
    axis, weight, sample_weight, ignore_index, reduction, denominator, num_threads
        As in :func:`cross_entropy`; a mean divides by the same denominator.

    Returns
    -------
    float or ndarray
        As in :func:`cross_entropy`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in :func:`cross_entropy`.

    Notes
    -----
    Leng et al., "PolyLoss: a polynomial expansion perspective of classification loss functions" (2022).

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> fastce.poly_loss(logits, [0, 2], reduction="none").round(6)
    array([0.452559, 1.765279])
    """
    return _poly(
        logits, targets, epsilon, axis, weight, sample_weight, ignore_index, reduction, denominator, num_threads
    )[0]


def poly_loss_with_grad(
    logits,
    targets,
    *,
    epsilon=1.0,
    axis=AXIS,
    weight=None,
    sample_weight=None,
    ignore_index=IGNORE_INDEX,
    reduction="mean",
    denominator=None,
    num_threads=None,
    grad_output=None,
    out=None,
):
    r"""Poly-1 loss, and its gradient with respect to the logits.

    The gradient is that of cross-entropy, :math:`p_c - [c = t]`, times :math:`w_t (1 + \epsilon p_t)`. The logits are
    read twice.

    Parameters
    ----------
    logits, targets, epsilon, axis, weight, sample_weight, ignore_index, reduction, denominator, num_threads
        As in :func:`poly_loss`.
    grad_output, out
        As in :func:`cross_entropy_with_grad`.

    Returns
    -------
    loss : float or ndarray
        As in :func:`poly_loss`.
    grad : ndarray
        As in :func:`cross_entropy_with_grad`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in :func:`cross_entropy_with_grad`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> loss, grad = fastce.poly_loss_with_grad(np.array([2.0, 0.0, 0.0]), 0)
    >>> grad.round(6)
    array([-0.380653,  0.190326,  0.190326])
    """
    return _poly(
        logits, targets, epsilon, axis, weight, sample_weight, ignore_index, reduction, denominator, num_threads,
        grad_output, out, with_grad=True,
    )


def _poly(logits, targets, epsilon, *arguments, with_grad=False):
    epsilon = _checks.as_number("epsilon", epsilon, "finite and >= -1", lambda number: -1 <= number < math.inf)
    return target_loss("poly", epsilon, logits, targets, *arguments, with_grad=with_grad)
