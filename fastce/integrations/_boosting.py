"""What the objectives and metrics of the boosting libraries share: softmax cross-entropy with a diagonal Hessian."""

from collections.abc import Callable

import numpy as np

from fastce import _checks
from fastce.focal import focus
from fastce.integrations._labels import as_class_ids
from fastce.losses import cross_entropy, cross_entropy_with_grad_hess
from fastce.targets import SparseTargets

# What each library's own objective multiplies the second derivative p (1 - p) by, given the number of classes.
HESSIAN_FACTORS: dict[str, Callable[[int], float]] = {
    "exact": lambda n_classes: 1.0,
    "xgboost": lambda n_classes: 2.0,
    "lightgbm": lambda n_classes: n_classes / (n_classes - 1),
}


class SoftmaxObjective:
    """An objective that a boosting library calls with (scores, data set) or, by its scikit-learn API, with arrays.

    It can be pickled and copied, as scikit-learn does with the parameters of an estimator. Subclasses say what a
    library's errors are, and what Hessian it takes at the least.
    """

    least_hessian = 0.0

    def __init__(
        self, n_classes, *, hessian, label_smoothing=0.0, weight=None, focal_gamma=0.0, targets=None, num_threads=None
    ):
        self.n_classes = _checks.as_integer("n_classes", "an integer", n_classes)
        if self.n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, got {self.n_classes}")
        if not (isinstance(hessian, str) and hessian in HESSIAN_FACTORS):
            raise ValueError(f"hessian must be one of {tuple(HESSIAN_FACTORS)}, got {_checks.shown(hessian)}")
        self.hessian = hessian
        self.label_smoothing = _checks.as_fraction("label_smoothing", label_smoothing)
        self.weight = _checks.as_class_weight(weight, self.n_classes)
        self.focal_gamma = _checks.as_non_negative("focal_gamma", focal_gamma)
        self.targets = as_distributions(targets, self.n_classes)
        self.num_threads = _checks.as_num_threads(num_threads)
        if self.focal_gamma and (self.label_smoothing or targets is not None):
            raise ValueError("focal_gamma goes only with class ids: leave label_smoothing and targets out")

    def __repr__(self):
        return f"{type(self).__module__}.softmax_objective({self.n_classes}, hessian={self.hessian!r})"

    def __call__(self, y_true, y_pred, sample_weight=None):
        """Return (grad, hess), both (n, n_classes), given (scores, data set) or (labels, scores, weights)."""
        labels, scores, sample_weight = as_arrays(y_true, y_pred, sample_weight)
        check_scores(scores, self.n_classes, self.error)
        targets = as_targets(labels, scores, self.error) if self.targets is None else self.targets
        n_targets = np.shape(targets.indices if isinstance(targets, SparseTargets) else targets)[0]
        if n_targets != len(scores):
            raise self.error(f"targets of softmax_objective are of {n_targets} samples, the data set has {len(scores)}")
        try:
            return self.derivatives(scores, targets, sample_weight)
        except IndexError as error:  # of a class id out of range
            raise self.error(as_label_error(error, self.n_classes)) from None

    @property
    def factor(self):
        """What the second derivative is multiplied by."""
        return HESSIAN_FACTORS[self.hessian](self.n_classes)

    def error(self, message):
        """Return the exception that the library raises about data."""
        return ValueError(message)

    def derivatives(self, scores, targets, sample_weight):
        """Return (grad, hess) in float32 and the layout of the scores."""
        grad = np.empty_like(scores, dtype=np.float32)
        # Multiplied by a power of two, float32 stays exact; by another factor it would be rounded twice.
        exact = self.factor in (1.0, 2.0)
        curvature = np.empty_like(scores, dtype=np.float32 if exact else np.float64)
        options = {"sample_weight": sample_weight, "label_smoothing": self.label_smoothing, "reduction": "sum"}
        if self.focal_gamma:
            options |= {"reduction": "none", "grad_output": self.focal_factors(scores, targets)}
        cross_entropy_with_grad_hess(
            scores, targets, weight=self.weight, num_threads=self.num_threads, out=grad, hess_out=curvature, **options
        )
        hess = curvature if exact else np.empty_like(grad)
        if self.factor != 1.0:
            np.multiply(curvature, self.factor, out=hess, casting="same_kind")
        if self.least_hessian:
            np.maximum(hess, self.least_hessian, out=hess)
        return grad, hess

    def focal_factors(self, scores, targets):
        """Return what focal loss multiplies each row's gradient of cross-entropy by."""
        losses = cross_entropy(scores, targets, reduction="none", num_threads=self.num_threads)
        return focus(losses.astype(np.float64), self.focal_gamma)


def as_distributions(targets, n_classes):
    """Return soft targets as an array (n, n_classes), None and SparseTargets as they are."""
    if targets is None or isinstance(targets, SparseTargets):
        return targets
    array = np.asarray(targets)
    if array.ndim != 2 or array.shape[1] != n_classes:
        raise ValueError(f"targets must be distributions of shape (n, {n_classes}), got shape {array.shape}")
    return array


def as_arrays(y_true, y_pred, sample_weight):
    """Return (labels, scores, weights or None), given them, or given (scores, data set of the library)."""
    if hasattr(y_pred, "get_label"):
        scores, data = y_true, y_pred
        return data.get_label(), scores, weights_or_none(data.get_weight())
    return y_true, y_pred, weights_or_none(sample_weight)


def weights_or_none(weights):
    """Return None for the empty array by which XGBoost says that there are no weights."""
    return None if weights is None or np.size(weights) == 0 else weights


def check_scores(scores, n_classes, error):
    """Raise unless the library has given one score a sample and class."""
    shape = np.shape(scores)
    if len(shape) != 2 or shape[1] != n_classes:
        raise error(
            f"softmax_objective({n_classes}) expects scores of shape (n, {n_classes}), got {shape}; set "
            f"num_class={n_classes} in the parameters, or n_classes of the objective to that number"
        )


def as_targets(labels, scores, error):
    """Return a data set's labels as what fastce takes: class ids (n,), or a distribution a sample as it is."""
    labels = np.asarray(labels)
    return labels if labels.shape == np.shape(scores) else as_class_ids("label", labels, len(scores), error)


def as_label_error(error, n_classes):
    """Return the message of an IndexError about class ids in the words of a data set."""
    message = str(error).replace("targets", "label", 1).replace("pass targets - 1", "pass label - 1")
    return f"{message}; labels are class ids from 0 to {n_classes - 1}, as LabelEncoder makes them"


def mean_log_loss(labels, scores, sample_weight, error):
    """Return the mean cross-entropy of a data set, in nats."""
    shape = np.shape(scores)
    if len(shape) != 2:
        raise error(f"log_loss_metric expects scores of shape (n, n_classes), got {shape}")
    try:
        return cross_entropy(scores, as_targets(labels, scores, error), sample_weight=sample_weight)
    except IndexError as bad:
        raise error(as_label_error(bad, shape[1])) from None


def log_priors(labels, n_classes, sample_weight, least, error):
    """Return the logarithms (n_classes,) of the classes' weighted frequencies, of `least` where these are below it."""
    n_classes = _checks.as_integer("n_classes", "an integer", n_classes)
    ids = as_class_ids("label", labels, len(labels), error)
    weights = _checks.as_sample_weight(weights_or_none(sample_weight), ids.shape)
    if ids.size == 0:
        raise error("label must have one class id a sample, got none")
    if ids.max() >= n_classes:
        raise error(f"label must be class ids from 0 to {n_classes - 1}, got {ids.max()}")
    if weights is not None:
        if (weights < 0).any() or not weights.any():
            raise error("sample_weight must be >= 0, and not 0 for all samples, to weigh the frequencies of classes")
        weights = weights.astype(np.float32)  # as the libraries keep them
    counts = np.bincount(ids, weights, minlength=n_classes)
    return np.log(np.maximum(counts / counts.sum(), least))
