"""What the tests of both boosting libraries share: digits, the truth about derivatives, and the options to try."""

import numpy as np
from scipy.special import log_softmax, softmax
from sklearn.datasets import load_digits

import fastce

CLASSES = 10
GAMMA = 1.7
WEIGHT = np.linspace(0.5, 2.0, CLASSES)
FACTORS = {"xgboost": 2.0, "lightgbm": CLASSES / (CLASSES - 1), "exact": 1.0}


def digits(samples=600):
    """Return (images (n, 64), labels (n,)) of the first digits."""
    images, labels = load_digits(return_X_y=True)
    return images[:samples], labels[:samples]


def sample_weights(samples):
    """Return weights that float32, in which the libraries keep them, holds exactly."""
    return np.random.default_rng(5).uniform(0.5, 2.0, samples).astype(np.float32)


def distributions(labels):
    """Return the labels as distributions (n, CLASSES) in which the next class has a share."""
    return 0.8 * np.eye(CLASSES)[labels] + 0.2 * np.eye(CLASSES)[(labels + 1) % CLASSES]


def sparse(labels):
    """Return the same distributions, each as two classes."""
    indices = np.stack([labels, (labels + 1) % CLASSES], axis=1)
    return fastce.SparseTargets(indices, np.broadcast_to([0.8, 0.2], indices.shape))


# Options of softmax_objective for given labels, and the targets' weighted mass (n, CLASSES) that they mean.
OPTIONS = {
    "plain": lambda labels: ({}, np.eye(CLASSES)[labels]),
    "weight": lambda labels: ({"weight": WEIGHT}, WEIGHT * np.eye(CLASSES)[labels]),
    "label_smoothing": lambda labels: ({"label_smoothing": 0.2}, 0.8 * np.eye(CLASSES)[labels] + 0.02),
    "weighted smoothing": lambda labels: (
        {"label_smoothing": 0.2, "weight": WEIGHT}, WEIGHT * (0.8 * np.eye(CLASSES)[labels] + 0.02),
    ),
    "targets": lambda labels: ({"targets": distributions(labels)}, distributions(labels)),
    "sparse targets": lambda labels: ({"targets": sparse(labels)}, distributions(labels)),
}  # fmt: skip


def derivatives(scores, mass, factor):
    """Return the gradient and factor * the second derivative of -sum(mass * log softmax(scores)), by SciPy."""
    p, total = softmax(np.asarray(scores, np.float64), axis=1), mass.sum(axis=1, keepdims=True)
    return p * total - mass, factor * p * (1 - p) * total


def focal_losses(scores, labels):
    log_p = log_softmax(scores, axis=1)[np.arange(len(labels)), labels]
    return -((1 - np.exp(log_p)) ** GAMMA) * log_p


def focal_gradient(scores, labels, step=1e-5):
    """Return the gradient of the focal loss by central differences."""
    scores = np.asarray(scores, np.float64)
    columns = []
    for c in range(scores.shape[1]):
        shift = step * np.eye(scores.shape[1])[c]
        columns.append((focal_losses(scores + shift, labels) - focal_losses(scores - shift, labels)) / (2 * step))
    return np.stack(columns, axis=1)
