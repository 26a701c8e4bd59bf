"""scikit-learn at the convention of its own losses, which LogisticRegression and gradient boosting compute with.

>>> from fastce.integrations.sklearn import MultinomialLoss
>>> # sklearn.linear_model._linear_loss.LinearModelLoss(base_loss=MultinomialLoss(10), fit_intercept=True)
"""

from itertools import combinations

import numpy as np

from fastce import _checks
from fastce.activations import softmax
from fastce.integrations._labels import as_class_ids
from fastce.integrations._library import require
from fastce.losses import cross_entropy, cross_entropy_with_grad, cross_entropy_with_grad_hess

__all__ = ["MultinomialLoss"]

require("sklearn", "sklearn", "scikit-learn", "1.4")


class MultinomialLoss:
    r"""Softmax cross-entropy with the methods of scikit-learn's private ``HalfMultinomialLoss``.

    With raw predictions z and :math:`p = \mathrm{softmax}(z)`, a sample of class y and weight s has the loss
    :math:`-s \log p_y`, the gradient :math:`s (p_c - [c = y])` and the diagonal Hessian :math:`s p_c (1 - p_c)`, in
    nats and not averaged.

    All methods take

    y_true : array_like of shape (n,)
        Class ids, as integers or, as scikit-learn has them, as floats of the dtype of the raw predictions.
    raw_prediction : array_like of float, shape (n, n_classes)
        In any layout: gradient boosting keeps them in Fortran order.
    sample_weight : array_like of float, shape (n,), optional
        Finite.
    n_threads : int, default 1
        At most so many threads, as scikit-learn means it; None lets fastce choose.

    and buffers (``loss_out``, ``gradient_out``, ``hessian_out``, ``proba_out``) for what they return. Buffers may have
    any floating dtype and any strides; ``gradient_out`` of the dtype of the raw predictions may be these themselves.
    New results have the dtype and, as far as NumPy can, the layout of the raw predictions.

    Parameters
    ----------
    n_classes : int, default 3
        At least 2.

    Raises
    ------
    TypeError, ValueError
        From the methods: what is of a wrong kind, shape or range, labels that are no class ids included.

    Notes
    -----
    scikit-learn's methods are not part of its public interface; these are those of versions 1.4 to 1.9 [1]_.

    References
    ----------
    .. [1] https://github.com/scikit-learn/scikit-learn/blob/main/sklearn/_loss/loss.py

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.integrations.sklearn import MultinomialLoss
    >>> loss = MultinomialLoss(n_classes=3)
    >>> y_true, raw_prediction = np.array([0.0, 2.0]), np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> losses, gradient = loss.loss_gradient(y_true, raw_prediction)
    >>> losses.round(6)
    array([0.239545, 1.098612])
    >>> gradient.round(6)
    array([[-0.213014,  0.106507,  0.106507],
           [ 0.333333,  0.333333, -0.666667]])
    """

    is_multiclass = True
    differentiable = True
    approx_hessian = False
    constant_hessian = False

    def __init__(self, n_classes=3):
        self.n_classes = _checks.as_integer("n_classes", "an integer", n_classes)
        if self.n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, got {self.n_classes}")

    def __call__(self, y_true, raw_prediction, sample_weight=None, n_threads=1):
        """Return the mean loss, weighted by `sample_weight`, as a float."""
        return self._compute(cross_entropy, y_true, raw_prediction, sample_weight, n_threads, reduction="mean")

    def loss(self, y_true, raw_prediction, sample_weight=None, loss_out=None, n_threads=1):
        """Return each sample's loss (n,)."""
        _check_buffers(raw_prediction, loss_out=loss_out)
        losses = self._compute(cross_entropy, y_true, raw_prediction, sample_weight, n_threads)
        return _delivered(losses, loss_out)

    def loss_gradient(
        self, y_true, raw_prediction, sample_weight=None, loss_out=None, gradient_out=None, n_threads=1
    ):
        """Return each sample's loss (n,) and gradient (n, n_classes)."""
        _check_buffers(raw_prediction, loss_out=loss_out, gradient_out=gradient_out)
        losses, gradient = self._gradient(y_true, raw_prediction, sample_weight, gradient_out, n_threads)
        return _delivered(losses, loss_out), gradient

    def gradient(self, y_true, raw_prediction, sample_weight=None, gradient_out=None, n_threads=1):
        """Return each sample's gradient (n, n_classes)."""
        _check_buffers(raw_prediction, gradient_out=gradient_out)
        return self._gradient(y_true, raw_prediction, sample_weight, gradient_out, n_threads, reduction="sum")[1]

    def gradient_hessian(
        self, y_true, raw_prediction, sample_weight=None, gradient_out=None, hessian_out=None, n_threads=1
    ):
        """Return each sample's gradient and diagonal Hessian, both (n, n_classes)."""
        raw_prediction = np.asanyarray(raw_prediction)
        _check_buffers(raw_prediction, gradient_out=gradient_out, hessian_out=hessian_out)
        given = next((out for out in (gradient_out, hessian_out) if out is not None), raw_prediction)
        gradient_out, hessian_out = (
            np.empty_like(given, dtype=given.dtype.newbyteorder("=")) if out is None else out
            for out in (gradient_out, hessian_out)
        )
        _, gradient, hessian = self._compute(
            cross_entropy_with_grad_hess, y_true, raw_prediction, sample_weight, n_threads, reduction="sum",
            out=gradient_out, hess_out=hessian_out,
        )
        return gradient, hessian

    def gradient_proba(
        self, y_true, raw_prediction, sample_weight=None, gradient_out=None, proba_out=None, n_threads=1
    ):
        """Return each sample's gradient and probabilities, both (n, n_classes)."""
        raw_prediction = np.asanyarray(raw_prediction)
        _check_buffers(raw_prediction, gradient_out=gradient_out, proba_out=proba_out)
        if gradient_out is not None and np.may_share_memory(gradient_out, raw_prediction):
            raise ValueError("gradient_out must not overlap raw_prediction, which the probabilities need")
        gradient = self.gradient(y_true, raw_prediction, sample_weight, gradient_out, n_threads)
        proba = softmax(raw_prediction, out=_buffer(proba_out, raw_prediction), num_threads=n_threads)
        return gradient, _delivered(proba, proba_out)

    def predict_proba(self, raw_prediction):
        """Return the probabilities (n, n_classes)."""
        return softmax(raw_prediction)

    def _gradient(self, y_true, raw_prediction, sample_weight, gradient_out, n_threads, reduction="none"):
        """Return (losses, gradient)."""
        raw_prediction = np.asanyarray(raw_prediction)
        losses, gradient = self._compute(
            cross_entropy_with_grad, y_true, raw_prediction, sample_weight, n_threads, reduction=reduction,
            out=_buffer(gradient_out, raw_prediction),
        )
        return losses, _delivered(gradient, gradient_out)

    def _compute(self, function, y_true, raw_prediction, sample_weight, n_threads, reduction="none", **buffers):
        """Return what a function of fastce returns for arguments that are named as scikit-learn names them."""
        shape = np.shape(raw_prediction)
        if len(shape) != 2 or shape[1] != self.n_classes:
            raise ValueError(f"raw_prediction must have the shape (n_samples, {self.n_classes}), got {shape}")
        ids = as_class_ids("y_true", y_true, shape[0], ValueError)
        try:
            return function(
                raw_prediction, ids, sample_weight=sample_weight, reduction=reduction, num_threads=n_threads, **buffers
            )
        except IndexError as error:
            raise ValueError(str(error).replace("targets", "y_true")) from None


def _check_buffers(raw_prediction, **buffers):
    """Raise unless the buffers can take the results and lie apart, while nothing is written yet."""
    shape = np.shape(raw_prediction)
    given = {name: out for name, out in buffers.items() if out is not None}
    for name, out in given.items():
        expected = shape[:1] if name == "loss_out" else shape
        if not isinstance(out, np.ndarray) or out.dtype.kind != "f":
            raise TypeError(f"{name} must be a floating array, got {getattr(out, 'dtype', type(out).__name__)}")
        if out.shape != expected:
            raise ValueError(f"{name} must have the shape {expected}, got {out.shape}")
        if not out.flags.writeable:
            raise ValueError(f"{name} is read-only")
        if name == "loss_out":
            _checks.check_apart(out, [("raw_prediction", raw_prediction)], name, besides_logits=False)
    for (name, out), (other, value) in combinations(given.items(), 2):
        _checks.check_apart(out, [(other, value)], name, besides_logits=False)


def _buffer(out, raw_prediction):
    """Return `out` if fastce can compute a gradient in it, else an array that it can."""
    native = raw_prediction.dtype.newbyteorder("=")
    return out if out is not None and out.dtype == native else np.empty_like(raw_prediction, dtype=native)


def _delivered(result, out):
    """Return `result`, or `out` that holds it."""
    if out is None or out is result:
        return result
    np.copyto(out, result, casting="same_kind")
    return out
