"""Train XGBoost to read 1,797 handwritten digits with fastce's objective: the built-in one's trees, and others.

Usage: python examples/xgboost_digits.py [--quick]
Needs: pip install ".[demo,xgboost]" (scikit-learn brings the digits; nothing is downloaded)

First the built-in objective and fastce's, which grow the same trees. Then what the built-in objective has no option
for: some of the training digits get a wrong label, and objectives that trust labels less are trained on them. It ends
with exit code 1 if the trees differ.
"""

import argparse
import re
import sys
from time import perf_counter

import numpy as np
import xgboost
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastce
from fastce.integrations.xgboost import base_score, log_loss_metric, softmax_objective

CLASSES = 10
WRONG = 0.2  # the share of the training labels that are replaced
ROUNDS = {"full": 60, "quick": 5}
OBJECTIVES = {
    "cross-entropy": {},
    "label smoothing 0.2": {"label_smoothing": 0.2},
    "focal, gamma 2": {"focal_gamma": 2.0},
}


def train(images, labels, rounds, objective=None):
    """Return (model, seconds); every model begins with the frequencies of the classes."""
    parameters = {"objective": "multi:softprob", "num_class": CLASSES, "max_depth": 4, "eta": 0.2}
    parameters["base_score"] = base_score(labels, CLASSES)
    data = xgboost.DMatrix(images, label=labels)
    begin = perf_counter()
    model = xgboost.train(parameters, data, rounds, obj=objective)
    return model, perf_counter() - begin


def splits(model):
    """Return the shapes, features and thresholds of all trees, as text without the values of the leaves."""
    return [re.sub("leaf=.*", "leaf", tree) for tree in model.get_dump()]


def with_wrong_labels(labels, generator):
    """Return a copy in which a share of the labels is drawn anew."""
    labels = labels.copy()
    chosen = generator.random(len(labels)) < WRONG
    labels[chosen] = generator.integers(0, CLASSES, np.count_nonzero(chosen))
    return labels


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{ROUNDS['quick']} rounds instead of {ROUNDS['full']}")
    rounds = ROUNDS["quick" if parser.parse_args().quick else "full"]
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    test = xgboost.DMatrix(test_images, label=test_labels)
    print(f"{len(train_labels)} digits to learn from, {len(test_labels)} to be tested on, {rounds} rounds of 10 trees")
    print(f"No knowledge: log {CLASSES} = {np.log(CLASSES):.3f} nats.\n")

    built_in, built_in_seconds = train(train_images, train_labels, rounds)
    model, seconds = train(train_images, train_labels, rounds, softmax_objective(CLASSES))
    same = splits(model) == splits(built_in)
    _, loss = log_loss_metric(model.predict(test, output_margin=True), test)
    print(f"multi:softprob      {built_in_seconds:6.2f} s")
    print(f"softmax_objective   {seconds:6.2f} s, test loss {loss:.3f} nats")
    print(f"The trees are {'the same' if same else 'DIFFERENT'}.\n")

    wrong = with_wrong_labels(train_labels, np.random.default_rng(0))
    print(f"With {np.count_nonzero(wrong != train_labels)} wrong training labels:")
    for name, options in OBJECTIVES.items():
        model, _ = train(train_images, wrong, rounds, softmax_objective(CLASSES, **options))
        scores = model.predict(test, output_margin=True)
        right = np.mean(scores.argmax(axis=1) == test_labels)
        print(f"  {name:20s} test loss {fastce.cross_entropy(scores, test_labels):.3f} nats, {100 * right:.1f} % right")
    if not same:
        sys.exit("fastce's objective has grown other trees than the built-in one.")


if __name__ == "__main__":
    main()
