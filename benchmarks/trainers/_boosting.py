"""The data that boosting is measured on, and the NumPy objectives that the libraries' documents show, in our words."""

from functools import cache

import numpy as np
from sklearn.datasets import load_digits, make_classification

# Samples, features and classes of the synthetic tasks: many samples, and many classes.
SIZES = {"tabular": (50_000, 20, 7), "many classes": (10_000, 20, 64)}
QUICK_SIZES = {"tabular": (500, 20, 7), "many classes": (500, 20, 12)}
# Trees a class in a training.
ROUNDS = {"digits": 20, "tabular": 5, "many classes": 3}


@cache
def data(quick):
    """Return, by task, (features, labels, number of classes)."""
    tasks = {"digits": (*load_digits(return_X_y=True), 10)}
    for name, (samples, features, classes) in (QUICK_SIZES if quick else SIZES).items():
        features, labels = make_classification(
            samples, features, n_informative=features // 2, n_classes=classes, n_clusters_per_class=1, flip_y=0.1,
            random_state=0,
        )  # fmt: skip
        tasks[name] = features.astype(np.float32), labels, classes
    return tasks


def titled(name, features, classes, what):
    return f"{name} ({len(features):,} samples, {classes} classes), {what}"


def numpy_derivatives(scores, labels, factor):
    """Whole arrays at a time: what people write who have read a library's example."""
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    p = exponentials / exponentials.sum(axis=1, keepdims=True)
    grad = p.copy()
    grad[np.arange(len(labels)), labels.astype(np.int64)] -= 1
    return grad, factor * p * (1 - p)


def looped_derivatives(scores, labels, factor):
    """One number at a time, as in the example of XGBoost's documents."""
    grad, hess = np.zeros(scores.shape), np.zeros(scores.shape)
    for row in range(len(scores)):
        exponentials = np.exp(scores[row] - scores[row].max())
        p = exponentials / exponentials.sum()
        for c in range(scores.shape[1]):
            grad[row, c] = p[c] - 1.0 if c == labels[row] else p[c]
            hess[row, c] = max(factor * p[c] * (1.0 - p[c]), 1e-6)
    return grad, hess
