"""Train a two-layer network on handwritten digits with HIPS autograd, its loss by hand and then by fastce.

Usage: python examples/autograd_digits.py [--quick] [--seed S]
Needs: pip install ".[autograd]" scikit-learn (which brings the digits; nothing is downloaded)

autograd differentiates plain NumPy. fastce's loss is one more function that it knows the derivative of.
"""

import argparse
import math
from time import perf_counter

import autograd.numpy as np
from autograd import value_and_grad
from autograd.scipy.special import logsumexp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fastce.integrations.autograd import cross_entropy

HIDDEN = 128
BATCH = 128
LEARNING_RATE = 0.2


def load_data():
    images, labels = load_digits(return_X_y=True)
    return train_test_split(images / 16, labels, test_size=0.25, stratify=labels, random_state=0)


def new_network(generator):
    """Return [W1 (64, HIDDEN), b1, W2 (HIDDEN, 10), b2]."""
    w1, w2 = generator.standard_normal((64, HIDDEN)) / 8, 0.01 * generator.standard_normal((HIDDEN, 10))
    return [w1, np.zeros(HIDDEN), w2, np.zeros(10)]


def logits_of(network, images):
    w1, b1, w2, b2 = network
    return np.dot(np.maximum(np.dot(images, w1) + b1, 0), w2) + b2


def by_hand(logits, labels):
    return np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels])


def train(name, loss_of, epochs, seed):
    """Train a new network; return its losses and print what it can."""
    train_images, test_images, train_labels, test_labels = load_data()
    generator = np.random.default_rng(seed)
    network = new_network(generator)
    loss_and_gradient = value_and_grad(lambda network, images, labels: loss_of(logits_of(network, images), labels))
    losses, begin = [], perf_counter()
    for _ in range(epochs):
        order = generator.permutation(len(train_labels))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            loss, gradient = loss_and_gradient(network, train_images[chosen], train_labels[chosen])
            network = [w - LEARNING_RATE * slope for w, slope in zip(network, gradient, strict=True)]
            losses.append(float(loss))
    seconds = (perf_counter() - begin) / len(losses)
    accuracy = np.mean(logits_of(network, test_images).argmax(1) == test_labels)
    print(f"{name:7s} loss {losses[0]:.4f} -> {losses[-1]:.4f} nats, ", end="")
    print(f"{100 * accuracy:.1f} % of the test digits read right, {1e6 * seconds:.0f} us a step")
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 epochs instead of 30")
    parser.add_argument("--seed", type=int, default=0, help="of the network and the order of the digits")
    arguments = parser.parse_args()
    epochs = 3 if arguments.quick else 30
    print(f"No knowledge: log 10 = {math.log(10):.4f} nats.")
    losses = train("by hand", by_hand, epochs, arguments.seed)
    fast_losses = train("fastce", cross_entropy, epochs, arguments.seed)
    apart = max(abs(one - other) for one, other in zip(losses, fast_losses, strict=True))
    print(f"The losses of the two trainings are at most {apart:.0e} nats apart.")


if __name__ == "__main__":
    main()
