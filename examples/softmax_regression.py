"""Softmax regression by SciPy's L-BFGS with fastce as its loss: the coefficients of LogisticRegression, in less time.

Usage: python examples/softmax_regression.py [--quick]
Needs: pip install ".[demo,sklearn]" (nothing is downloaded)

Two problems: handwritten digits, and a wide one of many classes. Both are fitted by scikit-learn's LogisticRegression
and by the few lines below, to the same tolerance. It ends with exit code 1 if the coefficients differ.
"""

import argparse
import sys
from time import perf_counter

import numpy as np
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from fastce.integrations.sklearn import MultinomialLoss

TOLERANCE = 1e-6  # of the gradient, where both stop
AGREEMENT = 1e-5  # of the coefficients, relatively to the largest


def digits():
    """Return the digits' pixels from 0 to 1, (1797, 64), and labels, 10 classes."""
    images, labels = load_digits(return_X_y=True)
    return images / 16, labels


def wide(samples, features, classes):
    """Return samples of a random softmax model and their labels, every class at least once."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((samples, features))
    scores = x @ generator.standard_normal((features, classes))
    labels = (scores + generator.gumbel(size=scores.shape)).argmax(axis=1)
    labels[:classes] = np.arange(classes)
    return x, labels


def fit(x, labels, regularisation):
    """Return coefficients (classes, features) and intercepts (classes,) that minimise

    mean(cross-entropy) + regularisation / 2 * sum(coefficients^2).
    """
    (samples, features), classes = x.shape, labels.max() + 1
    loss = MultinomialLoss(classes)
    logits = np.empty((samples, classes))  # and their gradient: written anew at every step
    losses = np.empty(samples)

    def objective(parameters):
        weights = parameters.reshape(features + 1, classes)
        np.matmul(x, weights[:-1], out=logits)
        np.add(logits, weights[-1], out=logits)
        loss.loss_gradient(labels, logits, loss_out=losses, gradient_out=logits, n_threads=None)
        grad = np.empty_like(weights)
        np.matmul(x.T, logits, out=grad[:-1])
        np.sum(logits, axis=0, out=grad[-1])
        grad /= samples
        grad[:-1] += regularisation * weights[:-1]
        return losses.mean() + regularisation / 2 * np.sum(weights[:-1] ** 2), grad.ravel()

    start = np.zeros((features + 1) * classes)
    options = {"maxiter": 10_000, "maxfun": 100_000, "gtol": TOLERANCE, "ftol": 64 * np.finfo(float).eps, "maxls": 50}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    weights = found.x.reshape(features + 1, classes)
    # A number added to all intercepts changes nothing; the mean of LogisticRegression's is 0, of its coefficients too.
    return weights[:-1].T, weights[-1], found.nit


def compare(name, x, labels, regularisation):
    """Fit both ways, print times, and return whether the coefficients agree."""
    begin = perf_counter()
    coefficients, intercepts, steps = fit(x, labels, regularisation)
    seconds = perf_counter() - begin
    model = LogisticRegression(
        solver="lbfgs", C=1 / (regularisation * len(labels)), tol=TOLERANCE, max_iter=10_000
    )
    begin = perf_counter()
    model.fit(x, labels)
    their_seconds = perf_counter() - begin
    apart = max(np.abs(coefficients - model.coef_).max(), np.abs(intercepts - model.intercept_).max())
    largest = np.abs(model.coef_).max()
    print(f"{name}: {len(labels):,} samples, {x.shape[1]} features, {labels.max() + 1} classes")
    print(f"  LogisticRegression {their_seconds:7.2f} s, {model.n_iter_.max()} steps")
    print(f"  fastce and SciPy   {seconds:7.2f} s, {steps} steps, {their_seconds / seconds:.1f} times faster")
    print(f"  coefficients up to {largest:.3g}, at most {apart:.1g} apart\n")
    return apart <= AGREEMENT * largest


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small wide problem")
    quick = parser.parse_args().quick
    same = compare("digits", *digits(), regularisation=1e-2)
    same &= compare("wide", *(wide(400, 10, 40) if quick else wide(5000, 40, 500)), regularisation=1e-3)
    if not same:
        sys.exit("The coefficients differ from those of LogisticRegression.")


if __name__ == "__main__":
    main()
