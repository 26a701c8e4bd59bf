"""Cross-entropy for HIPS autograd: a primitive whose gradient fastce computes."""

import fastce
from fastce.integrations._library import require

require("autograd", "autograd", "autograd", "1.6")

from autograd.extend import defvjp, primitive  # noqa: E402 - only now is it known to be there
from autograd.tracer import isbox  # noqa: E402 - only now is it known to be there

__all__ = ["cross_entropy"]


def cross_entropy(logits, targets, **options):
    """Softmax cross-entropy of logits that :func:`autograd.grad` differentiates.

    Parameters
    ----------
    logits, targets
        As in :func:`fastce.cross_entropy`; `logits` is what the gradient is with respect to.
    **options
        All options of :func:`fastce.cross_entropy`, among them `axis`, `weight` and `reduction`.

    Returns
    -------
    float or ndarray
        As :func:`fastce.cross_entropy` does.

    Raises
    ------
    TypeError, ValueError, IndexError
        As :func:`fastce.cross_entropy` does, when the function is called, not when it is differentiated.
    NotImplementedError
        Derivatives with respect to `targets` or to options, and second derivatives: write such a loss with
        ``autograd.scipy.special.logsumexp``.

    Notes
    -----
    The loss is one pass over the logits, the gradient, with the factor that comes in, another one.

    Examples
    --------
    >>> import autograd.numpy as np
    >>> from autograd import grad
    >>> from fastce.integrations.autograd import cross_entropy
    >>> x, y = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1])
    >>> loss = lambda w: cross_entropy(np.dot(x, w), y)
    >>> grad(loss)(np.zeros((2, 2)))
    array([[-0.25,  0.25],
           [ 0.25, -0.25]])
    """
    for name, value in {"targets": targets, **options}.items():
        if isbox(value):
            raise NotImplementedError(f"{name} has no derivative here; {REMEDY}")
    return loss(logits, targets, options)


REMEDY = "write the loss with autograd.scipy.special.logsumexp where such a derivative is wanted"


@primitive
def loss(logits, targets, options):
    return fastce.cross_entropy(logits, targets, **options)


@primitive
def gradient(factor, logits, targets, options):
    return fastce.cross_entropy_with_grad(logits, targets, grad_output=factor, **options)[1]


def no_second_derivative(*arguments):
    raise NotImplementedError(f"the gradient of fastce's cross-entropy has no derivative here; {REMEDY}")


defvjp(
    loss,
    lambda value, logits, targets, options: lambda factor: gradient(factor, logits, targets, options),
    argnums=[0],
)
defvjp(gradient, no_second_derivative, no_second_derivative, argnums=[0, 1])
