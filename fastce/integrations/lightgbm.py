"""LightGBM at its own convention: softmax objectives, their metric, and the scores it would have begun with.

>>> from fastce.integrations.lightgbm import init_score, log_loss_metric, softmax_objective
>>> parameters = {"objective": softmax_objective(10), "num_class": 10}
>>> # lgb.train(parameters, lgb.Dataset(images, label=labels, init_score=init_score(labels, 10)), feval=log_loss_metric)
>>> # LGBMClassifier(objective=softmax_objective(10), metric="None").fit(..., eval_metric=log_loss_metric)
"""

import numpy as np

from fastce import _checks, _engine
from fastce.integrations import _boosting
from fastce.integrations._library import require
from fastce.losses import cross_entropy_with_grad

__all__ = ["init_score", "log_loss_metric", "softmax_objective"]

# Parameters took objectives, and objectives got (n, n_classes) matrices, with 4.0; 4.7 was tried.
require("lightgbm", "lightgbm", "lightgbm", "4.5")

# What LightGBM takes the frequency of a class for that has no samples.
LEAST_FREQUENCY = float(np.float32(1e-15))


def softmax_objective(
    n_classes, *, hessian="lightgbm", label_smoothing=0.0, weight=None, focal_gamma=0.0, targets=None, num_threads=None
):
    r"""Softmax cross-entropy as an objective, for ``params["objective"]`` and ``LGBMClassifier(objective=...)``.

    With the probabilities :math:`p` of a sample and its target's weighted mass :math:`a` (see
    :func:`fastce.cross_entropy_with_grad`), LightGBM is given the sums

    .. math:: g_c = p_c \sum_k a_k - a_c, \qquad h_c = f \, p_c (1 - p_c) \sum_k a_k

    times the sample's weight, not divided by the number of samples. With the defaults the trees are those of the
    built-in ``multiclass``, to the bit, if both begin with the same :func:`init_score`.

    Parameters
    ----------
    n_classes : int
        At least 2; the same number belongs into the parameter ``num_class``.
    hessian : {"lightgbm", "xgboost", "exact"}, default "lightgbm"
        The factor f: ``n_classes / (n_classes - 1)`` as in ``multiclass`` [1]_, 2 as in XGBoost, or 1, the second
        derivative itself.
    label_smoothing : float, default 0.0
        In [0, 1]: the part of each target that is spread over all classes evenly.
    weight : array_like of float, shape (n_classes,), optional
        Weights of the classes, finite and >= 0. They come beside the samples' weights of the data set.
    focal_gamma : float, default 0.0
        Finite and >= 0: the focusing exponent of :func:`fastce.focal_loss`. The gradient is that of the focal loss.
        Its second derivative may be negative, which no tree can use: h is f p (1 - p) times the factor by which
        focusing multiplies the gradient.
    targets : array_like of float, shape (n, n_classes), or SparseTargets, optional
        A distribution a sample of the training set, instead of its labels.
    num_threads : int, optional
        As in :func:`fastce.cross_entropy`.

    Returns
    -------
    callable
        Takes (scores, Dataset) or (labels, scores, weights) and returns (grad, hess), two float32 arrays of shape
        (n, n_classes) in Fortran order, which LightGBM reads where they lie. It can be pickled.

    Raises
    ------
    TypeError, ValueError
        An option of a wrong kind or out of range. The objective itself raises ``lightgbm.basic.LightGBMError`` for
        labels and scores that do not fit.

    Notes
    -----
    LightGBM does not average the labels into its first scores (``boost_from_average``) for an objective that is not
    its own. :func:`init_score` does, and is to be added to predictions: ``booster.predict(..., raw_score=True)`` gives
    scores without it, :func:`fastce.softmax` makes probabilities of their sum. With such an objective ``predict`` and
    ``predict_proba`` of ``LGBMClassifier`` give scores too: ``argmax(axis=1)`` of them are the classes.

    The scores come in Fortran order. Class ids without smoothing, of at most 96 classes, are read as they lie; other
    targets pass through buffers, which takes some five times as long.

    References
    ----------
    .. [1] https://github.com/lightgbm-org/LightGBM/blob/master/src/objective/multiclass_objective.hpp

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.integrations.lightgbm import softmax_objective
    >>> objective = softmax_objective(3)
    >>> labels, scores = np.array([0.0, 2.0]), np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], order="F")
    >>> grad, hess = objective(labels, scores)
    >>> grad.round(4)
    array([[-0.213 ,  0.1065,  0.1065],
           [ 0.3333,  0.3333, -0.6667]], dtype=float32)
    >>> hess.round(4)
    array([[0.2515, 0.1427, 0.1427],
           [0.3333, 0.3333, 0.3333]], dtype=float32)
    """
    return SoftmaxObjective(
        n_classes, hessian=hessian, label_smoothing=label_smoothing, weight=weight, focal_gamma=focal_gamma,
        targets=targets, num_threads=num_threads,
    )


class SoftmaxObjective(_boosting.SoftmaxObjective):
    """What :func:`softmax_objective` returns."""

    def error(self, message):
        return lightgbm_error(message)

    def derivatives(self, scores, targets, sample_weight):
        """As those of all objectives; class ids have a shorter way, because LightGBM's scores lie class by class.

        A gradient g of cross-entropy is p, or p - 1 at the target: p (1 - p) is |g| (1 - |g|) for both. The gradient
        in Fortran order is one pass over the scores, which an exact Hessian would not be.
        """
        dtype = scores.dtype.newbyteorder("=")
        if self.label_smoothing or np.ndim(targets) != 1 or dtype not in (np.float32, np.float64):
            return super().derivatives(scores, targets, sample_weight)
        sample_weight = _checks.as_sample_weight(sample_weight, np.shape(targets))
        slopes = np.empty(scores.shape, dtype, order="F")
        cross_entropy_with_grad(scores, targets, reduction="sum", num_threads=self.num_threads, out=slopes)
        weights = self.row_weights(scores, targets, sample_weight)
        return _engine.newton_terms(slopes, self.factor, weights, self.num_threads)

    def row_weights(self, scores, targets, sample_weight):
        """Return what each sample's derivatives are multiplied by, float64 (n,), or None for 1."""
        factors = [] if sample_weight is None else [sample_weight]
        if self.weight is not None:
            factors.append(self.weight[targets])
        if self.focal_gamma:
            factors.append(self.focal_factors(scores, targets))
        return np.prod(factors, axis=0, dtype=np.float64) if factors else None


def log_loss_metric(y_true, y_pred, sample_weight=None):
    r"""Mean softmax cross-entropy of scores, in nats: a metric to go with :func:`softmax_objective`.

    Parameters
    ----------
    y_true, y_pred : ndarray, Dataset
        As ``lgb.train(feval=...)`` calls it: the scores (n, n_classes), then the data set. As
        ``LGBMClassifier.fit(eval_metric=...)`` does: the labels, then the scores.
    sample_weight : ndarray of shape (n,), optional
        With arrays; a data set has its own.

    Returns
    -------
    tuple of (str, float, bool)
        ``("log_loss", value, False)``: lower is better.

    Raises
    ------
    lightgbm.basic.LightGBMError
        Labels or scores that do not fit.

    Notes
    -----
    LightGBM gives a metric the scores when the objective is not its own; to its own objective belongs its own
    ``multi_logloss``. That one cuts probabilities off at 1e-15; this one does not.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.integrations.lightgbm import log_loss_metric
    >>> log_loss_metric(np.array([0.0, 2.0]), np.zeros((2, 3)))
    ('log_loss', 1.0986122886681098, False)
    """
    labels, scores, sample_weight = _boosting.as_arrays(y_true, y_pred, sample_weight)
    return "log_loss", _boosting.mean_log_loss(labels, scores, sample_weight, lightgbm_error), False


def init_score(labels, n_classes, sample_weight=None):
    r"""Return the scores that LightGBM's ``multiclass`` begins with: the logarithms of the classes' frequencies.

    LightGBM computes them for its own objectives only (``boost_from_average``). A model that was given them as
    ``init_score`` does not contain them: add ``init_score(...)[0]`` to its raw predictions.

    Parameters
    ----------
    labels : array_like of shape (n,)
        Class ids, integers or floats.
    n_classes : int
        At least as many as there are in the labels.
    sample_weight : array_like of shape (n,), optional
        Weights of the samples.

    Returns
    -------
    ndarray of shape (n, n_classes)
        In float64, every row the same (and read-only, since they share their memory). A class without samples has
        log 1e-15, as in LightGBM.

    Raises
    ------
    lightgbm.basic.LightGBMError
        Labels that are no class ids, or none.

    Examples
    --------
    >>> from fastce.integrations.lightgbm import init_score
    >>> init_score([0, 0, 1, 2], 3)[0].round(4)
    array([-0.6931, -1.3863, -1.3863])
    """
    priors = _boosting.log_priors(labels, n_classes, sample_weight, LEAST_FREQUENCY, lightgbm_error)
    return np.broadcast_to(priors, (len(labels), n_classes))


def lightgbm_error(message):
    from lightgbm.basic import LightGBMError

    return LightGBMError(message)
