"""Train a two-layer ReLU network, in plain NumPy, to read 1,797 real handwritten digits, with fastce as its loss.

Usage: python examples/train_digits.py [--quick] [--epochs E] [--seed S] [--out DIR]
Needs: pip install ".[demo]" (scikit-learn brings the digits; nothing is downloaded)

The same training then runs with fastce.reference, the plain NumPy definition of the same loss, to compare results
and time. A full run that reads fewer than 97 % of the test digits ends with exit code 1.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from report import Timed, draw_curve, draw_level, draw_times, in_words, new_picture, save_picture, time_in_words
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import fastce
import fastce.reference

CLASSES = 10
HIDDEN = 256
BATCH = 16
LEARNING_RATE = 0.1
MOMENTUM = 0.9
FULL_EPOCHS = 30
QUICK_EPOCHS = 3
WANTED_ACCURACY = 0.97


@dataclass
class Digits:
    """Images are float32 rows (N, 64) of pixels from 0 to 1, labels are class ids (N,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@dataclass
class Training:
    """What one training leaves behind; the curves start at epoch 0, before the first step."""

    train_losses: list
    test_losses: list
    accuracies: list
    test_answers: np.ndarray
    loss_seconds: float
    loss_calls: int
    seconds: float


def load_data():
    """Split the digits into 3/4 for training and 1/4 for testing, the same split for every seed of the network."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    return Digits(train_images, train_labels, test_images, test_labels)


def new_network(generator):
    """Return [W1 (64, HIDDEN), b1, W2 (HIDDEN, CLASSES), b2]; small W2, so that training starts near log CLASSES."""
    w1 = generator.standard_normal((64, HIDDEN), dtype=np.float32) * np.float32(math.sqrt(2 / 64))
    w2 = generator.standard_normal((HIDDEN, CLASSES), dtype=np.float32) * np.float32(0.01)
    return [w1, np.zeros(HIDDEN, np.float32), w2, np.zeros(CLASSES, np.float32)]


def forward(network, images):
    """Return the hidden layer (N, HIDDEN) and the logits (N, CLASSES)."""
    w1, b1, w2, b2 = network
    # h = max(0, x W1 + b1)
    hidden = np.maximum(images @ w1 + b1, 0)
    # z = h W2 + b2
    return hidden, hidden @ w2 + b2


def backward(network, images, hidden, grad_logits):
    """Return the gradient of every parameter, given dL/dz (N, CLASSES)."""
    _, _, w2, _ = network
    # dL/dh = dL/dz W2^T, where the ReLU let h through
    grad_hidden = (grad_logits @ w2.T) * (hidden > 0)
    # dL/dW = input^T dL/doutput,  dL/db = sum over the batch of dL/doutput
    return [images.T @ grad_hidden, grad_hidden.sum(axis=0), hidden.T @ grad_logits, grad_logits.sum(axis=0)]


def momentum_step(network, velocities, grads, learning_rate):
    """Move the parameters in place: v = MOMENTUM v - learning_rate g,  w = w + v."""
    for parameter, velocity, grad in zip(network, velocities, grads, strict=True):
        velocity *= MOMENTUM
        velocity -= learning_rate * grad
        parameter += velocity


def train_step(network, velocities, images, labels, loss_and_grad, grad_buffer, learning_rate):
    """Learn from one batch: forward, loss and dL/dz into the buffer, backward, step."""
    hidden, logits = forward(network, images)
    # The last batch of an epoch is shorter, and so is its part of the buffer.
    _, grad_logits = loss_and_grad(logits, labels, out=grad_buffer[: len(labels)])
    grads = backward(network, images, hidden, grad_logits)
    momentum_step(network, velocities, grads, learning_rate)


def train(losses, data, epochs, seed, show_epochs):
    """Train a new network with `losses`, which is fastce or fastce.reference: both have the same functions."""
    generator = np.random.default_rng(seed)
    network = new_network(generator)
    velocities = [np.zeros_like(parameter) for parameter in network]
    loss_and_grad = Timed(losses.cross_entropy_with_grad)
    grad_buffer = np.empty((BATCH, CLASSES), np.float32)  # one for the whole training, written anew at every step

    samples = len(data.train_labels)
    starts = range(0, samples, BATCH)
    # The learning rate falls in a straight line, to 0 after the last step.
    learning_rates = iter(np.linspace(LEARNING_RATE, 0, epochs * len(starts), endpoint=False, dtype=np.float32))
    seconds = 0.0
    curves = [evaluate(losses, network, data)]
    if show_epochs:
        print_epoch(0, *curves[0])
    with tqdm(total=epochs * len(starts), desc=losses.__name__, unit="step", leave=False) as progress:
        for epoch in range(1, epochs + 1):
            begin = perf_counter()
            order = generator.permutation(samples)
            for start in starts:
                chosen = order[start : start + BATCH]
                images, labels = data.train_images[chosen], data.train_labels[chosen]
                train_step(network, velocities, images, labels, loss_and_grad, grad_buffer, next(learning_rates))
                progress.update()
            seconds += perf_counter() - begin
            curves.append(evaluate(losses, network, data))
            if show_epochs:
                print_epoch(epoch, *curves[-1])

    train_losses, test_losses, accuracies = (list(curve) for curve in zip(*curves, strict=True))
    answers = forward(network, data.test_images)[1].argmax(axis=1)
    return Training(train_losses, test_losses, accuracies, answers, loss_and_grad.seconds, loss_and_grad.calls, seconds)


def evaluate(losses, network, data):
    """Return the loss on all training digits, the loss on all test digits, and the share of test digits read right."""
    _, train_logits = forward(network, data.train_images)
    _, test_logits = forward(network, data.test_images)
    return (
        losses.cross_entropy(train_logits, data.train_labels),
        losses.cross_entropy(test_logits, data.test_labels),
        float(np.mean(test_logits.argmax(axis=1) == data.test_labels)),
    )


def print_epoch(epoch, train_loss, test_loss, accuracy):
    """Print one line per epoch above the progress bar."""
    tqdm.write(
        f"epoch {epoch:3d}   training loss {train_loss:.4f}   test loss {test_loss:.4f}"
        f"   test accuracy {100 * accuracy:5.1f} %"
    )


def print_result(training):
    """Say what the final loss means."""
    print(f"\nNo knowledge: log {CLASSES} = {in_words(math.log(CLASSES))}.")
    print(f"Training set: {in_words(training.train_losses[-1])}.")
    print(f"Test set:     {in_words(training.test_losses[-1])}.")
    right = round(training.accuracies[-1] * len(training.test_answers))
    print(f"The network reads {right} of {len(training.test_answers)} test digits right.")


def print_comparison(training, reference):
    """Compare the training with fastce and the training with fastce.reference: time, then results."""
    print("\nThe same training with both losses:")
    for name, run in (("fastce", training), ("fastce.reference", reference)):
        print(time_in_words(name, run.loss_seconds, run.loss_calls, run.seconds))
    print(
        f"  The loss is {reference.loss_seconds / training.loss_seconds:.1f} times faster,"
        f" the whole training {reference.seconds / training.seconds:.1f} times."
    )
    digits = len(training.test_answers)
    differing = np.count_nonzero(training.test_answers != reference.test_answers)
    apart = np.abs(np.subtract(training.test_losses, reference.test_losses))
    # Gradients that differ in the last bit of a float32 lead to slightly different networks after many steps.
    verdict = "agree" if apart[-1] < 0.01 and differing <= digits / 100 else "DIFFER"
    print(
        f"  The two trainings {verdict}: {differing} of {digits} test digits are read differently; the test losses are"
        f" {apart[-1]:.0e} nats\n  apart at the end and at most {apart.max():.0e} at any epoch (float32 rounding,"
        f" amplified by {training.loss_calls:,} steps)."
    )


def draw(training, reference, folder):
    """Save the picture of the loss curves, the accuracy and the time in the loss."""
    accuracies = [100 * share for share in training.accuracies]
    figure, (loss_panel, accuracy_panel, time_panel) = new_picture(
        f"Handwritten digits: {accuracies[-1]:.1f} % of {len(training.test_answers)} test digits read right",
        (5.4, 4.4, 3.6),
    )

    loss_panel.set_title("cross-entropy (nats, log scale)", loc="left", fontsize=11)
    loss_panel.set_yscale("log")
    loss_panel.yaxis.set_major_formatter("{x:g}")
    draw_level(loss_panel, math.log(CLASSES), f"no knowledge: log {CLASSES} = {math.log(CLASSES):.3f}")
    draw_curve(loss_panel, training.train_losses, f"training {training.train_losses[-1]:.2g}", "tab:blue")
    draw_curve(loss_panel, training.test_losses, f"test {training.test_losses[-1]:.2g}", "tab:orange")

    accuracy_panel.set_title("accuracy (%)", loc="left", fontsize=11)
    # The untrained network's 10 % or so would press all the others together: the axis starts below epoch 1.
    accuracy_panel.set_ylim(min(accuracies[1:]) - 2, 100)
    draw_level(accuracy_panel, 100 * WANTED_ACCURACY, f"wanted: {100 * WANTED_ACCURACY:.0f} %", above=False)
    draw_curve(accuracy_panel, accuracies, f"test {accuracies[-1]:.1f} %", "tab:orange")

    draw_times(
        time_panel,
        {"fastce": 1e3 * training.loss_seconds, "fastce.reference": 1e3 * reference.loss_seconds},
        f"time in the loss, {training.loss_calls:,} steps",
    )
    save_picture(figure, folder, "train_digits.png")


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs, any accuracy accepted")
    parser.add_argument("--epochs", type=int, help=f"default {FULL_EPOCHS}; with fewer, any accuracy is accepted")
    parser.add_argument("--seed", type=int, default=0, help="of the network and the order of the digits")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of the picture")
    arguments = parser.parse_args()
    if arguments.epochs is None:
        arguments.epochs = QUICK_EPOCHS if arguments.quick else FULL_EPOCHS
    if arguments.epochs < 1 or arguments.seed < 0:
        parser.error("--epochs must be at least 1 and --seed at least 0")
    return arguments


def main():
    arguments = read_arguments()
    data = load_data()
    print(f"{len(data.train_labels)} digits to learn from, {len(data.test_labels)} to be tested on")
    training = train(fastce, data, arguments.epochs, arguments.seed, show_epochs=True)
    reference = train(fastce.reference, data, arguments.epochs, arguments.seed, show_epochs=False)
    print_result(training)
    print_comparison(training, reference)
    draw(training, reference, arguments.out)

    accuracy = training.accuracies[-1]
    if arguments.epochs >= FULL_EPOCHS and accuracy < WANTED_ACCURACY:
        sys.exit(f"The test accuracy is {100 * accuracy:.1f} %, below the {100 * WANTED_ACCURACY:.0f} % of a full run.")


if __name__ == "__main__":
    main()
