"""Train LightGBM to read 1,797 handwritten digits with fastce's objective: the built-in one's trees, and others.

Usage: python examples/lightgbm_digits.py [--quick]
Needs: pip install ".[demo,lightgbm]" (scikit-learn brings the digits; nothing is downloaded)

First the built-in objective and fastce's, which grow the same trees to the bit. Then soft targets, which LightGBM has
no labels for: a first model's opinion of every digit teaches a second, much smaller one. It ends with exit code 1 if
the trees differ.
"""

import argparse
import sys
from time import perf_counter

import lightgbm
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastce
from fastce.integrations.lightgbm import init_score, softmax_objective

CLASSES = 10
ROUNDS = {"full": 60, "quick": 5}
SMALL = {"num_leaves": 4}


def train(images, labels, rounds, objective, start=None, **shape):
    """Return (model, seconds); only the built-in objective finds its `start`, the init score, by itself."""
    data = lightgbm.Dataset(images, label=labels, init_score=start)
    parameters = {"objective": objective, "num_class": CLASSES, "verbose": -1, "learning_rate": 0.2, **shape}
    parameters |= {"deterministic": True, "force_row_wise": True}
    begin = perf_counter()
    return lightgbm.train(parameters, data, rounds), perf_counter() - begin


def splits(model):
    """Return the shapes, features and thresholds of all trees, as lines of text."""
    kept = ("left_child=", "right_child=", "split_feature=", "threshold=")
    return [line for line in model.model_to_string().splitlines() if line.startswith(kept)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{ROUNDS['quick']} rounds instead of {ROUNDS['full']}")
    rounds = ROUNDS["quick" if parser.parse_args().quick else "full"]
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    print(f"{len(train_labels)} digits to learn from, {len(test_labels)} to be tested on, {rounds} rounds of 10 trees")
    print(f"No knowledge: log {CLASSES} = {np.log(CLASSES):.3f} nats.\n")

    start = init_score(train_labels, CLASSES)
    built_in, built_in_seconds = train(train_images, train_labels, rounds, "multiclass")
    model, seconds = train(train_images, train_labels, rounds, softmax_objective(CLASSES), start)
    same = splits(model) == splits(built_in)

    def test_result(model):
        # The model does not contain the scores that it began with.
        scores = model.predict(test_images, raw_score=True) + start[0]
        right = np.mean(scores.argmax(axis=1) == test_labels)
        return f"test loss {fastce.cross_entropy(scores, test_labels):.3f} nats, {100 * right:.1f} % right"

    print(f"multiclass          {built_in_seconds:6.2f} s")
    print(f"softmax_objective   {seconds:6.2f} s, {test_result(model)}")
    print(f"The trees are {'the same' if same else 'DIFFERENT'}.\n")

    # At temperature 2, the teacher tells more of what else a digit looks like.
    opinions = fastce.softmax((model.predict(train_images, raw_score=True) + start[0]) / 2)
    print(f"Trees of {SMALL['num_leaves']} leaves:")
    for name, targets in (("taught by labels", None), ("taught by the model", opinions)):
        objective = softmax_objective(CLASSES, targets=targets)
        small, _ = train(train_images, train_labels, rounds, objective, start, **SMALL)
        print(f"  {name:20s} {test_result(small)}")
    if not same:
        sys.exit("fastce's objective has grown other trees than the built-in one.")


if __name__ == "__main__":
    main()
