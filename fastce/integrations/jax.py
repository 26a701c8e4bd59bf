"""Cross-entropy for JAX on the CPU: a loss a row as optax gives it, under jit, grad and vmap, computed by fastce."""

import operator
from dataclasses import dataclass
from functools import partial

import numpy as np

import fastce
from fastce.integrations._library import require

require("jax", "jax", "jax", "0.4.38")

import jax  # noqa: E402 - only now is it known to be there
import jax.numpy as jnp  # noqa: E402 - only now is it known to be there

__all__ = ["cross_entropy"]


def cross_entropy(logits, labels, *, axis=-1, where=None, ignore_index=-100, label_smoothing=0.0):
    r"""Softmax cross-entropy of every row, in nats, by a call from the compiled program back to fastce.

    The formula is that of :func:`fastce.cross_entropy`. As with optax's losses [1]_ there is one number a row, and the
    mean, weights and masks are taken of it: ``cross_entropy(logits, labels).mean()``.

    Parameters
    ----------
    logits : array_like of float32, float64, float16 or bfloat16, shape (..., C, ...)
        Unnormalised scores. The half types are computed in float32.
    labels : array_like
        Integers of the shape of `logits` without `axis` are class ids in [0, C) or `ignore_index`. Floats of the shape
        of `logits` are a distribution a row, finite and >= 0.
    axis : int, default -1
        The class axis of `logits`.
    where : array_like of bool, optional
        Of the rows' shape: False leaves a row out, with loss and gradient 0. Of a shape that broadcasts to `logits`:
        False takes a class out of a row, a label on it has the loss inf, and a row without any is left out.
    ignore_index : int, default -100
        Rows with this class id are left out.
    label_smoothing : float, default 0.0
        In [0, 1]: the part of each label that is spread over all classes evenly.

    Returns
    -------
    jax.Array
        The losses, of the rows' shape and the dtype of `logits`.

    Raises
    ------
    TypeError
        Logits that are not floating, and derivatives with respect to `labels`, which have none here.
    ValueError
        Shapes that do not fit, an option out of range.
    NotImplementedError
        A program that is compiled for another device than the CPU.
    jax.errors.JaxRuntimeError
        What is found only when the program runs: a class id out of range, a negative or infinite distribution. The
        message holds that of fastce.

    Notes
    -----
    The call costs some tenths of a millisecond and copies logits and gradient, which XLA's own loss does not: as a rule
    a compiled step is slower with it, see the figures in ``docs/trainers.md``. Under differentiation the gradient is
    computed in the same pass as the loss. Second derivatives are not defined.

    References
    ----------
    .. [1] https://optax.readthedocs.io/en/latest/api/losses.html

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from fastce.integrations.jax import cross_entropy
    >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> mean_loss = lambda logits: cross_entropy(logits, jnp.array([0, 2])).mean()
    >>> loss, grad = jax.jit(jax.value_and_grad(mean_loss))(logits)
    >>> print(f"{loss:.6f}")
    0.669079
    >>> print((grad * 1e4).astype(int))
    [[-1065   532   532]
     [ 1666  1666 -3333]]
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating, got {logits.dtype}; convert with .astype(jnp.float32)")
    if logits.ndim == 0 or not -logits.ndim <= axis < logits.ndim:
        raise ValueError(f"axis must be one of the {logits.ndim} axes of logits, got {axis}")
    axis = axis % logits.ndim - logits.ndim  # from behind: vmap puts its axes in front
    row_shape = without_axis(logits.shape, axis)
    is_ids = jnp.issubdtype(labels.dtype, jnp.integer)
    if labels.shape != (row_shape if is_ids else logits.shape):
        raise ValueError(
            f"labels must be integers of shape {row_shape} or floats of shape {logits.shape}, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if where is not None:
        where = jnp.asarray(where, bool)
        if where.shape != row_shape:
            where = jnp.broadcast_to(where, logits.shape)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    return losses(Options(axis, operator.index(ignore_index), float(label_smoothing)), logits, labels, where)


def without_axis(shape, axis):
    return tuple(length for number, length in enumerate(shape) if number != axis % len(shape))


@dataclass(frozen=True)
class Options:
    """What is known when a program is compiled."""

    axis: int
    ignore_index: int
    label_smoothing: float


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def losses(options, logits, labels, where):
    return call_fastce(options, logits, labels, where, with_grad=False)


def forward(options, logits, labels, where):
    """Return the losses, and the gradients of the rows as what backward needs."""
    if labels.perturbed:
        raise TypeError(
            "labels have no derivative here; use optax.softmax_cross_entropy, or jax.lax.stop_gradient(labels)"
        )
    where = None if where is None else where.value
    return call_fastce(options, logits.value, labels.value, where, with_grad=True)


def backward(options, gradients, factors):
    return gradients * jnp.expand_dims(factors, options.axis).astype(gradients.dtype), None, None


losses.defvjp(forward, backward, symbolic_zeros=True)


def call_fastce(options, logits, labels, where, *, with_grad):
    """Return the losses of all rows and, `with_grad`, their gradients, from the program that JAX is tracing."""
    rows = jax.ShapeDtypeStruct(without_axis(logits.shape, options.axis), logits.dtype)
    results = (rows, jax.ShapeDtypeStruct(logits.shape, logits.dtype)) if with_grad else rows
    call = partial(compute, options, with_grad)
    # Only for the CPU: elsewhere a callback would carry the logits to the host and back without a word.
    on_cpu = partial(jax.pure_callback, call, results, vmap_method="broadcast_all")
    return jax.lax.platform_dependent(logits, labels, where, cpu=on_cpu)


def compute(options, with_grad, logits, labels, where):
    """Return what call_fastce does, of real arrays, in NumPy: JAX must not be called from here."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    given = {"axis": options.axis, "label_smoothing": options.label_smoothing, "reduction": "none"}
    if labels.dtype.kind in "iu":
        given["ignore_index"] = options.ignore_index
    if where is not None:
        where = np.asarray(where)
        if where.ndim == logits.ndim:
            given["class_mask"] = where
            where = where.any(options.axis)
        given["sample_weight"] = where.astype(np.float32)
        if labels.dtype.kind in "iu":
            labels = np.where(where, labels, 0)  # ids of padding are checked by fastce, here they may be anything
    if not with_grad:
        return fastce.cross_entropy(logits, labels, **given).astype(logits.dtype, copy=False)
    losses, gradients = fastce.cross_entropy_with_grad(logits, labels, **given)
    return losses.astype(logits.dtype, copy=False), gradients
