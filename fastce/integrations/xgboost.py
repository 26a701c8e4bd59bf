"""XGBoost at its own convention: softmax objectives, their metric, and the intercept it would have begun with.

>>> from fastce.integrations.xgboost import log_loss_metric, softmax_objective
>>> parameters = {"objective": "multi:softprob", "num_class": 10}  # the objective says what predictions are
>>> # xgb.train(parameters, dtrain, obj=softmax_objective(10), custom_metric=log_loss_metric, ...)
>>> # XGBClassifier(objective=softmax_objective(10), eval_metric=log_loss_metric, ...)
"""

from fastce.integrations import _boosting
from fastce.integrations._library import require

__all__ = ["base_score", "log_loss_metric", "softmax_objective"]

# What XGBoost takes the frequency of a class for that has no samples.
LEAST_FREQUENCY = 1e-6

# Gradients came as (n, n_classes) matrices with 2.1.
require("xgboost", "xgboost", "xgboost", "2.1")


def softmax_objective(
    n_classes, *, hessian="xgboost", label_smoothing=0.0, weight=None, focal_gamma=0.0, targets=None, num_threads=None
):
    r"""Softmax cross-entropy as an objective for ``xgb.train(obj=...)`` and ``XGBClassifier(objective=...)``.

    With the probabilities :math:`p` of a sample and its target's weighted mass :math:`a` (see
    :func:`fastce.cross_entropy_with_grad`), XGBoost is given the sums

    .. math:: g_c = p_c \sum_k a_k - a_c, \qquad h_c = f \, p_c (1 - p_c) \sum_k a_k

    times the sample's weight, not divided by the number of samples. With the defaults the trees are those of the
    built-in ``multi:softprob``, if both begin with the same `base_score`.

    Parameters
    ----------
    n_classes : int
        At least 2; the same number belongs into the parameter ``num_class``.
    hessian : {"xgboost", "lightgbm", "exact"}, default "xgboost"
        The factor f: 2 as in ``multi:softprob`` [1]_, ``n_classes / (n_classes - 1)`` as in LightGBM, or 1, the second
        derivative itself. As in the built-in objective, h is at least 1e-16.
    label_smoothing : float, default 0.0
        In [0, 1]: the part of each target that is spread over all classes evenly.
    weight : array_like of float, shape (n_classes,), optional
        Weights of the classes, finite and >= 0. They come beside the samples' weights of the data set.
    focal_gamma : float, default 0.0
        Finite and >= 0: the focusing exponent of :func:`fastce.focal_loss`. The gradient is that of the focal loss.
        Its second derivative may be negative, which no tree can use: h is f p (1 - p) times the factor by which
        focusing multiplies the gradient.
    targets : array_like of float, shape (n, n_classes), or SparseTargets, optional
        A distribution a sample of the training set, instead of its labels. A ``DMatrix`` may also hold them itself, as
        a label of that shape; then leave ``num_class`` out.
    num_threads : int, optional
        As in :func:`fastce.cross_entropy`.

    Returns
    -------
    callable
        Takes (scores, DMatrix) or (labels, scores, sample_weight) and returns (grad, hess), two float32 arrays of
        shape (n, n_classes). It can be pickled.

    Raises
    ------
    TypeError, ValueError
        An option of a wrong kind or out of range. The objective itself raises ``xgboost.core.XGBoostError``, which is
        a ValueError, for labels and scores that do not fit.

    Notes
    -----
    Beside ``obj``, the parameter ``objective`` still says what ``Booster.predict`` returns and what XGBoost's own
    metrics are given: with ``"multi:softprob"`` probabilities. ``XGBClassifier`` sets it.

    Samples whose scores are all below -104, which the built-in objective of XGBoost 3.2 learns nothing from, are no
    exception here.

    References
    ----------
    .. [1] https://xgboost.readthedocs.io/en/stable/tutorials/custom_metric_obj.html

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.integrations.xgboost import softmax_objective
    >>> objective = softmax_objective(3)
    >>> labels, scores = np.array([0.0, 2.0]), np.array([[2, 0, 0], [0, 0, 0]], np.float32)
    >>> grad, hess = objective(labels, scores)
    >>> grad.round(4)
    array([[-0.213 ,  0.1065,  0.1065],
           [ 0.3333,  0.3333, -0.6667]], dtype=float32)
    >>> hess.round(4)
    array([[0.3353, 0.1903, 0.1903],
           [0.4444, 0.4444, 0.4444]], dtype=float32)
    """
    return SoftmaxObjective(
        n_classes, hessian=hessian, label_smoothing=label_smoothing, weight=weight, focal_gamma=focal_gamma,
        targets=targets, num_threads=num_threads,
    )


class SoftmaxObjective(_boosting.SoftmaxObjective):
    """What :func:`softmax_objective` returns."""

    least_hessian = 1e-16

    def error(self, message):
        return xgboost_error(message)


def log_loss_metric(y_true, y_pred, sample_weight=None):
    r"""Mean softmax cross-entropy of scores, in nats: a metric to go with :func:`softmax_objective`.

    Parameters
    ----------
    y_true, y_pred : ndarray, DMatrix
        As ``xgb.train(custom_metric=...)`` calls it: the scores (n, n_classes), then the data set. As
        ``XGBClassifier(eval_metric=...)`` does: the labels, then the scores.
    sample_weight : ndarray of shape (n,), optional
        With arrays; a data set has its own.

    Returns
    -------
    tuple of (str, float), or float
        ``("log_loss", value)`` for a data set, the value alone for arrays. Lower is better.

    Raises
    ------
    xgboost.core.XGBoostError
        Labels or scores that do not fit.

    Notes
    -----
    XGBoost gives a metric the scores when the objective is not its own; to its own objectives belongs its own
    ``mlogloss``. That one cuts probabilities off at 1e-16; this one does not.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.integrations.xgboost import log_loss_metric
    >>> print(f"{log_loss_metric(np.array([0.0, 2.0]), np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])):.6f}")
    0.669079
    """
    labels, scores, sample_weight = _boosting.as_arrays(y_true, y_pred, sample_weight)
    value = _boosting.mean_log_loss(labels, scores, sample_weight, xgboost_error)
    return value if scores is y_pred else ("log_loss", value)


def base_score(labels, n_classes, sample_weight=None):
    r"""Return the intercept that XGBoost's ``multi:softprob`` begins with, for the parameter ``base_score``.

    XGBoost estimates it for its own objectives only and begins others at 0.5 for every class. It is
    :math:`\log f_c - \frac{1}{K} \sum_k \log f_k` for the weighted frequencies f of K classes.

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
    list of float
        As long as there are classes; one without samples has f = 1e-6, as in XGBoost. XGBoost takes a list from
        version 3.1 on; before, give ``np.tile(base_score(...), (n, 1))`` as ``base_margin`` of each data set.

    Raises
    ------
    xgboost.core.XGBoostError
        Labels that are no class ids, or none.

    Examples
    --------
    >>> from fastce.integrations.xgboost import base_score
    >>> [round(score, 4) for score in base_score([0, 0, 1, 2], 3)]
    [0.4621, -0.231, -0.231]
    """
    priors = _boosting.log_priors(labels, n_classes, sample_weight, LEAST_FREQUENCY, xgboost_error)
    return [float(score) for score in priors - priors.mean()]


def xgboost_error(message):
    from xgboost.core import XGBoostError

    return XGBoostError(message)
