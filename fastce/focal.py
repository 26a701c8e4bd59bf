"""Focal loss: cross-entropy that well classified rows hardly take part in."""

import numpy as np

from fastce import _checks, _engine
from fastce._problem import AXIS, IGNORE_INDEX
from fastce._target_losses import target_loss

__all__ = ["focal_loss", "focal_loss_with_grad"]


def focal_loss(
    logits,
    targets,
    *,
    gamma=2.0,
    axis=AXIS,
    weight=None,
    sample_weight=None,
    ignore_index=IGNORE_INDEX,
    reduction="mean",
    denominator=None,
    num_threads=None,
):
    r"""Softmax focal loss of logits against class ids, in nats.

    The loss of a row of class :math:`t` is :math:`-w_t (1 - p_t)^\gamma \log p_t`; `gamma` 0 gives cross-entropy.

    Parameters
    ----------
    logits : array_like of float, shape (..., C, ...)
        As in :func:`cross_entropy`.
    targets : array_like of int
        Class ids; soft targets are a TypeError.
    gamma : float, default 2.0
        The focusing exponent, finite and >= 0.
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
    Lin, Goyal, Girshick, He, Dollar, "Focal loss for dense object detection" (2017), for the softmax. Both factors are
    exact for confident rows: :math:`1 - p_t` is computed from the cross-entropy by expm1.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> fastce.focal_loss(logits, [0, 2], reduction="none").round(6)
    array([0.010869, 0.488272])
    """
    return _focal(
        logits, targets, gamma, axis, weight, sample_weight, ignore_index, reduction, denominator, num_threads
    )[0]


def focal_loss_with_grad(
    logits,
    targets,
    *,
    gamma=2.0,
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
    r"""Softmax focal loss, and its gradient with respect to the logits.

    The gradient is that of cross-entropy, :math:`p_c - [c = t]`, times
    :math:`w_t (1 - p_t)^\gamma (1 - \gamma p_t \log p_t / (1 - p_t))`. The logits are read twice.

    Parameters
    ----------
    logits, targets, gamma, axis, weight, sample_weight, ignore_index, reduction, denominator, num_threads
        As in :func:`focal_loss`.
    grad_output, out
        As in :func:`cross_entropy_with_grad`.

    Returns
    -------
    loss : float or ndarray
        As in :func:`focal_loss`.
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
    >>> loss, grad = fastce.focal_loss_with_grad(np.array([2.0, 0.0, 0.0]), 0)
    >>> grad.round(6)
    array([-0.026774,  0.013387,  0.013387])
    """
    return _focal(
        logits, targets, gamma, axis, weight, sample_weight, ignore_index, reduction, denominator, num_threads,
        grad_output, out, with_grad=True,
    )


def _focal(logits, targets, gamma, *arguments, with_grad=False):
    gamma = _checks.as_non_negative("gamma", gamma)
    return target_loss("focal", gamma, logits, targets, *arguments, with_grad=with_grad)


def focus(cross_entropies, gamma):
    """Return what rows' focal losses multiply the gradient of cross-entropy by, for cross-entropies in flat float64."""
    losses, factors = np.empty_like(cross_entropies), np.empty_like(cross_entropies)
    kernels = _engine.kernels
    kernels.target_losses(kernels.TARGET_LOSSES["focal"], gamma, cross_entropies, losses, factors)
    return factors
