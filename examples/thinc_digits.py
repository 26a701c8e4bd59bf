"""Train a two-layer network on handwritten digits with thinc: Softmax and its own loss, then Linear and fastce's.

Usage: python examples/thinc_digits.py [--quick] [--seed S]
Needs: pip install ".[thinc]" scikit-learn (which brings the digits; nothing is downloaded)

thinc reports the sum of the squared gradient as its loss; fastce reports the cross-entropy, in nats.
"""

import argparse
import math
from time import perf_counter

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from thinc.api import SGD, CategoricalCrossentropy, Linear, Relu, Softmax, chain, fix_random_seed

from fastce.integrations.thinc import CrossEntropy

HIDDEN = 128
BATCH = 128
LEARNING_RATE = 0.2


def load_data():
    images, labels = load_digits(return_X_y=True)
    return train_test_split((images / 16).astype(np.float32), labels, test_size=0.25, stratify=labels, random_state=0)


def train(name, last_layer, loss, epochs, seed):
    """Train a new network and say what became of it; return its answers to the test digits."""
    train_images, test_images, train_labels, test_labels = load_data()
    fix_random_seed(seed)
    model = chain(Relu(HIDDEN, 64), last_layer(10, HIDDEN, init_W=small))
    model.initialize()
    optimizer = SGD(LEARNING_RATE)
    losses, begin = [], perf_counter()
    for _ in range(epochs):
        for images, labels in model.ops.multibatch(BATCH, train_images, train_labels, shuffle=True):
            guesses, backprop = model.begin_update(images)
            d_guesses, value = loss(guesses, labels)
            backprop(d_guesses)
            model.finish_update(optimizer)
            losses.append(value)
    seconds = (perf_counter() - begin) / len(losses)
    answers = model.predict(test_images).argmax(1)
    accuracy = (answers == test_labels).mean()
    print(f"{name:7s} loss {losses[0]:.4f} -> {losses[-1]:.4f}, ", end="")
    print(f"{100 * accuracy:.1f} % of the test digits read right, {1e6 * seconds:.0f} us a step")
    return answers


def small(ops, shape):
    """Return the first weights of the last layer, the same for either."""
    return np.float32(0.01) * np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 epochs instead of 30")
    parser.add_argument("--seed", type=int, default=0, help="of the network and the order of the digits")
    arguments = parser.parse_args()
    epochs = 3 if arguments.quick else 30
    print(f"No knowledge: log 10 = {math.log(10):.4f} nats.")
    answers = train("thinc", Softmax, CategoricalCrossentropy(), epochs, arguments.seed)
    fast_answers = train("fastce", Linear, CrossEntropy(), epochs, arguments.seed)
    print(f"The two networks read {(answers != fast_answers).sum()} of {len(answers)} test digits differently.")


if __name__ == "__main__":
    main()
