"""Train a two-layer network on handwritten digits with JAX, with optax's cross-entropy and with fastce's.

Usage: python examples/jax_digits.py [--quick] [--seed S]
Needs: pip install ".[jax]" optax scikit-learn (which brings the digits; nothing is downloaded)

It shows that the compiled training step is the same but for the name of the loss. With ten classes that does not pay:
see docs/trainers.md for when it does.
"""

import argparse
import math
from functools import partial
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fastce.integrations.jax import cross_entropy

HIDDEN = 128
BATCH = 128
LEARNING_RATE = 0.2


def load_data():
    images, labels = load_digits(return_X_y=True)
    return train_test_split((images / 16).astype(np.float32), labels, test_size=0.25, stratify=labels, random_state=0)


def new_network(seed):
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "w1": jax.random.normal(first, (64, HIDDEN)) / 8,
        "b1": jnp.zeros(HIDDEN),
        "w2": 0.01 * jax.random.normal(second, (HIDDEN, 10)),
        "b2": jnp.zeros(10),
    }


def logits_of(network, images):
    hidden = jax.nn.relu(images @ network["w1"] + network["b1"])
    return hidden @ network["w2"] + network["b2"]


@partial(jax.jit, static_argnames="row_losses")
def step(network, images, labels, row_losses):
    """Return (the loss of a batch, the network after a step of gradient descent)."""
    loss, gradient = jax.value_and_grad(lambda net: row_losses(logits_of(net, images), labels).mean())(network)
    return loss, jax.tree.map(lambda parameter, slope: parameter - LEARNING_RATE * slope, network, gradient)


def train(name, row_losses, epochs, seed):
    """Train a new network; return its losses and print what it can."""
    train_images, test_images, train_labels, test_labels = load_data()
    generator, network, losses, begin = np.random.default_rng(seed), new_network(seed), [], None
    for _ in range(epochs):
        order = generator.permutation(len(train_labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            loss, network = step(network, train_images[chosen], train_labels[chosen], row_losses)
            losses.append(float(loss))
            begin = begin or perf_counter()  # the first step is compiled
    seconds = (perf_counter() - begin) / (len(losses) - 1)
    accuracy = float((logits_of(network, test_images).argmax(1) == test_labels).mean())
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
    losses = train("optax", optax.softmax_cross_entropy_with_integer_labels, epochs, arguments.seed)
    fast_losses = train("fastce", cross_entropy, epochs, arguments.seed)
    apart = max(abs(one - other) for one, other in zip(losses, fast_losses, strict=True))
    print(f"The losses of the two trainings are at most {apart:.0e} nats apart.")


if __name__ == "__main__":
    main()
