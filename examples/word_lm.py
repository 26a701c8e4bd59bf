"""Train a small word-level language model, in plain NumPy, on the documentation that comes with Python itself.

Usage: python examples/word_lm.py [--quick] [--seed S] [--out DIR]
Needs: pip install ".[demo]" (the text is pydoc_data.topics, what help() shows; nothing is downloaded)

It shows a loss over thousands of classes: every word of the text is one. The embeddings of the previous CONTEXT
words feed a hidden layer, and that the logits over the whole vocabulary. The logits are the largest array by far,
so there is one of them for the whole training, and fastce writes the gradient over it. Then a few steps are measured
with fastce.reference, the plain NumPy definition of the same loss, and the model writes some text of its own.
"""

import argparse
import math
import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from time import perf_counter

import numpy as np
from report import Timed, draw_curve, draw_level, draw_times, in_words, new_picture, save_picture, time_in_words
from tqdm import tqdm

import fastce
import fastce.reference

CONTEXT = 4
EMBEDDING = 64
HIDDEN = 128
BATCH = 256
LEARNING_RATE = 0.05
FULL_EPOCHS = 3
MEASURED_STEPS = 10
END_OF_PARAGRAPH = "\n"


@dataclass
class Text:
    """A window (CONTEXT + 1,) holds the ids of some words and of the word that follows them."""

    vocabulary: list
    train_windows: np.ndarray
    validation_windows: np.ndarray


def read_paragraphs():
    """Return each paragraph of Python's documentation once (many are printed under several topics), as words.

    A word here is a word or a mark of punctuation with the blank before it, so that joining words gives the text back.
    """
    paragraphs = (" ".join(paragraph.split()) for topic in topics.values() for paragraph in topic.split("\n\n"))
    without_rulings = (re.sub(r"([*=~^+-])\1{3,}", "", paragraph).strip() for paragraph in paragraphs)
    distinct = filter(None, dict.fromkeys(without_rulings))
    return [[*re.findall(r" ?\w+| ?[^\w\s]", paragraph), END_OF_PARAGRAPH] for paragraph in distinct]


def load_text():
    """Keep every tenth paragraph for validation; the vocabulary is that of the whole text, most frequent first."""
    paragraphs = read_paragraphs()
    frequencies = Counter(word for paragraph in paragraphs for word in paragraph)
    vocabulary = [word for word, _ in frequencies.most_common()]
    ids = {word: number for number, word in enumerate(vocabulary)}

    def windows(chosen):
        # The first paragraph begins as all others do: after the end of one.
        words = CONTEXT * [END_OF_PARAGRAPH] + [word for paragraph in chosen for word in paragraph]
        return np.lib.stride_tricks.sliding_window_view(np.array([ids[word] for word in words]), CONTEXT + 1)

    training = [paragraph for number, paragraph in enumerate(paragraphs) if number % 10 != 9]
    return Text(vocabulary, windows(training), windows(paragraphs[9::10]))


def log_frequencies(text):
    """Return log of each word's share (V,) of the training text; adding one to each count leaves no word at 0."""
    counts = np.bincount(text.train_windows[:, -1], minlength=len(text.vocabulary)) + 1.0
    return np.log(counts / counts.sum())


def new_model(log_prior, generator):
    """Return [E (V, EMBEDDING), W1 (CONTEXT * EMBEDDING, HIDDEN), b1, W2 (HIDDEN, V), b2].

    With W2 near 0 and b2 = log_prior the untrained model already predicts each word by its frequency alone.
    """
    width, classes = CONTEXT * EMBEDDING, len(log_prior)

    def normal(shape, deviation):
        return generator.standard_normal(shape, dtype=np.float32) * np.float32(deviation)

    return [
        normal((classes, EMBEDDING), 0.1),
        normal((width, HIDDEN), math.sqrt(1 / width)),
        np.zeros(HIDDEN, np.float32),
        normal((HIDDEN, classes), 0.01),
        log_prior.astype(np.float32),
    ]


def forward(model, contexts, logits_buffer):
    """Return the input x (N, CONTEXT * EMBEDDING), the hidden layer h (N, HIDDEN), the logits (N, V) in the buffer."""
    embeddings, w1, b1, w2, b2 = model
    x = embeddings[contexts].reshape(len(contexts), -1)
    # h = tanh(x W1 + b1)
    hidden = np.tanh(x @ w1 + b1)
    # z = h W2 + b2; the last batch may be shorter, and so is its part of the buffer
    logits = np.matmul(hidden, w2, out=logits_buffer[: len(contexts)])
    logits += b2
    return x, hidden, logits


def backward(model, contexts, x, hidden, grad_logits):
    """Return the gradient of every parameter, given dL/dz (N, V)."""
    embeddings, w1, _, w2, _ = model
    # dL/dh = dL/dz W2^T, and tanh' = 1 - tanh^2
    grad_hidden = (grad_logits @ w2.T) * (1 - hidden * hidden)
    # An embedding gathers the gradients of all the places where its word stands.
    grad_embeddings = np.zeros_like(embeddings)
    np.add.at(grad_embeddings, contexts, (grad_hidden @ w1.T).reshape(*contexts.shape, EMBEDDING))
    # dL/dW = input^T dL/doutput,  dL/db = sum over the batch of dL/doutput
    return [
        grad_embeddings,
        x.T @ grad_hidden,
        grad_hidden.sum(axis=0),
        hidden.T @ grad_logits,
        grad_logits.sum(axis=0),
    ]


def adagrad_step(model, squares, grads, learning_rate):
    """Move the parameters in place, those of rare words further: s = s + g^2,  w = w - learning_rate g / sqrt(s)."""
    for parameter, square, grad in zip(model, squares, grads, strict=True):
        square += grad * grad
        parameter -= learning_rate * grad / (np.sqrt(square) + np.float32(1e-8))


def train_step(model, squares, windows, loss_and_grad, logits_buffer, learning_rate):
    """Learn from one batch of windows (N, CONTEXT + 1) and return its loss."""
    contexts, targets = windows[:, :-1], windows[:, -1]
    x, hidden, logits = forward(model, contexts, logits_buffer)
    # In place: from here on the buffer holds dL/dz.
    loss, grad_logits = loss_and_grad(logits, targets, out=logits)
    grads = backward(model, contexts, x, hidden, grad_logits)
    adagrad_step(model, squares, grads, learning_rate)
    return loss


def validate(model, windows, logits_buffer):
    """Return the mean loss over the windows, one batch after the other through the same buffer."""
    total = 0.0
    for start in tqdm(range(0, len(windows), BATCH), desc="without learning", unit="batch", leave=False):
        batch = windows[start : start + BATCH]
        _, _, logits = forward(model, batch[:, :-1], logits_buffer)
        total += fastce.cross_entropy(logits, batch[:, -1], reduction="sum")
    return total / len(windows)


def train(model, text, epochs, generator):
    """Train the model in place; return the training and validation loss of each epoch, those of epoch 0 first.

    The training loss of an epoch is the mean over its batches, each taken just before the step that learns from it.
    """
    squares = [np.zeros_like(parameter) for parameter in model]
    logits_buffer = np.empty((BATCH, len(text.vocabulary)), np.float32)
    samples = len(text.train_windows)
    starts = range(0, samples, BATCH)
    # The learning rate falls in a straight line, to 0 after the last step.
    learning_rates = iter(np.linspace(LEARNING_RATE, 0, epochs * len(starts), endpoint=False, dtype=np.float32))

    untrained_loss = validate(model, text.train_windows, logits_buffer)
    curves = [(untrained_loss, validate(model, text.validation_windows, logits_buffer))]
    print_epoch(0, *curves[0])
    for epoch in range(1, epochs + 1):
        order = generator.permutation(samples)
        total = 0.0
        for start in tqdm(starts, desc=f"epoch {epoch} of {epochs}", unit="step", leave=False):
            batch = text.train_windows[order[start : start + BATCH]]
            loss = train_step(
                model, squares, batch, fastce.cross_entropy_with_grad, logits_buffer, next(learning_rates)
            )
            total += loss * len(batch)
        curves.append((total / samples, validate(model, text.validation_windows, logits_buffer)))
        print_epoch(epoch, *curves[-1])
    train_losses, validation_losses = (list(curve) for curve in zip(*curves, strict=True))
    return train_losses, validation_losses


def print_epoch(epoch, train_loss, validation_loss):
    """Print one line per epoch."""
    print(
        f"epoch {epoch:2d}   training loss {train_loss:.4f}   validation loss {validation_loss:.4f}"
        f"   validation perplexity {math.exp(validation_loss):7,.1f}",
        flush=True,
    )


def measure(losses, text, log_prior, seed):
    """Run MEASURED_STEPS steps of a new model; return the timed loss, the seconds of all and the last loss."""
    generator = np.random.default_rng(seed)
    model = new_model(log_prior, generator)
    squares = [np.zeros_like(parameter) for parameter in model]
    logits_buffer = np.empty((BATCH, len(text.vocabulary)), np.float32)
    batches = generator.permutation(len(text.train_windows))[: MEASURED_STEPS * BATCH].reshape(MEASURED_STEPS, BATCH)
    loss_and_grad = Timed(losses.cross_entropy_with_grad)
    begin = perf_counter()
    for chosen in tqdm(batches, desc=losses.__name__, unit="step", leave=False):
        last = train_step(model, squares, text.train_windows[chosen], loss_and_grad, logits_buffer, LEARNING_RATE)
    return loss_and_grad, perf_counter() - begin, last


def write_text(model, text, words, generator, temperature=0.7):
    """Let the model continue an empty page, one word after the other."""
    ids = CONTEXT * [text.vocabulary.index(END_OF_PARAGRAPH)]
    logits_buffer = np.empty((1, len(text.vocabulary)), np.float32)
    for _ in range(words):
        _, _, logits = forward(model, np.array([ids[-CONTEXT:]]), logits_buffer)
        # Adding Gumbel noise and taking the largest draws from softmax(z / temperature).
        ids.append(int(np.argmax(logits[0] / temperature + generator.gumbel(size=len(text.vocabulary)))))
    return "".join(text.vocabulary[number] for number in ids[CONTEXT:])


def print_result(loss, unigram_loss, classes):
    """Say what the final loss means."""
    print(f"\nNo knowledge:     log {classes:,} = {in_words(math.log(classes))}.")
    print(f"Word frequencies: {in_words(unigram_loss)}.")
    print(f"This model:       {in_words(loss)} (validation).")


def print_comparison(measured):
    """Compare the few measured steps with both losses: time, then results."""
    print(f"\nThe first {MEASURED_STEPS} steps again, with both losses:")
    for name, (timed, seconds, _) in measured.items():
        print(time_in_words(name, timed.seconds, timed.calls, seconds))
    (fast, fast_all, fast_last), (slow, slow_all, slow_last) = measured.values()
    print(
        f"  The loss is {slow.seconds / fast.seconds:.1f} times faster,"
        f" the whole step {slow_all / fast_all:.1f} times.\n"
        f"  The loss of the last step is {fast_last:.6f} with fastce and {slow_last:.6f} with fastce.reference."
    )


def draw(curves, unigram_loss, classes, measured, folder):
    """Save the picture of the loss curves and of the time in the loss."""
    train_losses, validation_losses = curves
    figure, (loss_panel, time_panel) = new_picture(
        f"Which of {classes:,} words comes next? Perplexity {math.exp(validation_losses[-1]):.0f}", (7, 4)
    )
    loss_panel.set_title("cross-entropy (nats), and perplexity on the right", loc="left", fontsize=11)
    draw_level(loss_panel, math.log(classes), f"no knowledge: log {classes:,} = {math.log(classes):.2f}")
    draw_level(loss_panel, unigram_loss, f"word frequencies alone: {unigram_loss:.2f}")
    draw_curve(loss_panel, train_losses, f"training {train_losses[-1]:.2f}", "tab:blue")
    draw_curve(loss_panel, validation_losses, f"validation {validation_losses[-1]:.2f}", "tab:orange")
    loss_panel.margins(y=0.1)
    perplexities = [10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
    right_axis = loss_panel.twinx()
    right_axis.spines["top"].set_visible(False)
    right_axis.set_yticks(np.log(perplexities), [f"{perplexity:,}" for perplexity in perplexities])
    right_axis.set_ylim(loss_panel.get_ylim())

    draw_times(
        time_panel,
        {name: 1e3 * timed.seconds / timed.calls for name, (timed, _, _) in measured.items()},
        f"time in the loss per step, {BATCH} x {classes:,}",
    )
    save_picture(figure, folder, "word_lm.png")


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one epoch on an eighth of the windows")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the order of the words and the sample")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of the picture")
    arguments = parser.parse_args()
    if arguments.seed < 0:
        parser.error("--seed must be at least 0")
    return arguments


def main():
    arguments = read_arguments()
    text = load_text()
    epochs = FULL_EPOCHS
    if arguments.quick:
        epochs, text = 1, Text(text.vocabulary, text.train_windows[::8], text.validation_windows[::8])
    log_prior = log_frequencies(text)
    classes = len(log_prior)
    print(
        f"{len(text.train_windows):,} words to learn from, {len(text.validation_windows):,} for validation,"
        f" {classes:,} different ones"
    )

    generator = np.random.default_rng(arguments.seed)
    model = new_model(log_prior, generator)
    curves = train(model, text, epochs, generator)
    measured = {
        "fastce": measure(fastce, text, log_prior, arguments.seed),
        "fastce.reference": measure(fastce.reference, text, log_prior, arguments.seed),
    }

    unigram_loss = -log_prior[text.validation_windows[:, -1]].mean()
    print_result(curves[1][-1], unigram_loss, classes)
    print_comparison(measured)
    print("\nThe model writes:\n")
    for paragraph in write_text(model, text, 120, generator).split(END_OF_PARAGRAPH):
        print(textwrap.fill(paragraph.strip(), 100, initial_indent="  ", subsequent_indent="  "))
    draw(curves, unigram_loss, classes, measured, arguments.out)


if __name__ == "__main__":
    main()
