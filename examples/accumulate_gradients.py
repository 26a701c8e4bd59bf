"""Accumulate gradients over micro-batches, in plain NumPy: with `denominator` they add up to those of the whole batch.

Usage: python examples/accumulate_gradients.py [--quick] [--seed S] [--out DIR]
Needs: pip install ".[demo]" (the text is pydoc_data.topics, what help() shows; nothing is downloaded)

A batch of paragraphs, padded to the longest, is said to be too large for the memory; so it comes in micro-batches. They
differ in their number of letters. The mean of their means, a frequent mistake, lets a letter of a small micro-batch
count for more than one of a large one. Divided by the number of letters in all of them, every letter counts the same.
The model says which letter follows which. Exit code 1 if the gradients differ, or if the mistake makes no difference.
"""

import math
import re
import sys
from pydoc_data.topics import topics

import numpy as np
from report import in_words, new_picture, read_options, save_picture
from tqdm import trange

import fastce

ALPHABET = " abcdefghijklmnopqrstuvwxyz"
CLASSES = len(ALPHABET)
IGNORED = -100  # pads the targets; it is what ignore_index is by default
MICRO_BATCHES = (2, 3, 4, 5, 6)  # paragraphs in each
LEARNING_RATE = 10.0
STEPS, QUICK_STEPS = 40, 5
LAST_BITS = 2e-6  # of the largest entry: what is left of adding some thousand float32 in another order


def load_batch(generator):
    """Return the letters of paragraphs as one-hot vectors (N, T, CLASSES), and the ids of those that follow (N, T)."""
    paragraphs = [paragraph for topic in topics.values() for paragraph in topic.lower().split("\n\n")]
    chosen = generator.choice(paragraphs, sum(MICRO_BATCHES), replace=False)
    texts = [" ".join(re.findall("[a-z]+", paragraph)) for paragraph in chosen]
    ids = np.full((len(texts), max(map(len, texts))), IGNORED)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = [ALPHABET.index(letter) for letter in text]
    inputs, targets = ids[:, :-1], ids[:, 1:]
    return np.eye(CLASSES, dtype=np.float32)[np.where(inputs == IGNORED, 0, inputs)], targets


def gradient(w, inputs, targets, **options):
    """Return the loss, its gradient with respect to the logits, and that with respect to the model w."""
    loss, grad_logits = fastce.cross_entropy_with_grad(inputs @ w, targets, ignore_index=IGNORED, **options)
    return loss, grad_logits, np.tensordot(inputs, grad_logits, axes=([0, 1], [0, 1]))


def add_up(parts):
    """Return the loss and the gradients of micro-batches as those of one batch."""
    losses, grads_logits, grads_w = zip(*parts, strict=True)
    return sum(losses), np.concatenate(grads_logits), sum(grads_w)


def whole_batch(w, batches):
    """What is wanted: one batch, one mean."""
    return gradient(w, *(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))


def accumulated(w, batches):
    """The right way: every micro-batch is divided by the number of letters in all of them."""
    letters = sum(np.count_nonzero(targets != IGNORED) for _, targets in batches)
    return add_up(gradient(w, *batch, denominator=letters) for batch in batches)


def mean_of_means(w, batches):
    """The mistake: every micro-batch is divided by its own number of letters, their sum by that of micro-batches."""
    share = 1 / len(batches)
    parts = [gradient(w, *batch, grad_output=share) for batch in batches]
    return add_up((share * loss, *grads) for loss, *grads in parts)


def draw(wanted, right, wrong, letters, folder):
    """Save the picture of both gradients over that of the whole batch, and of how much a letter counts."""
    figure, (grad_panel, weight_panel) = new_picture("One batch in micro-batches", (5.6, 5.6))
    grad_panel.set_title("every entry of the gradient, over that of the whole batch", loc="left", fontsize=11)
    grad_panel.axline((0, 0), slope=1, color="0.7", linewidth=1)
    for name, grad, colour in (("mean of means", wrong, "tab:orange"), ("with denominator", right, "tab:blue")):
        grad_panel.plot(wanted.ravel(), grad.ravel(), ".", color=colour, markersize=6, label=name)
    grad_panel.set_xlabel("whole batch")
    grad_panel.legend(frameon=False, labelcolor="linecolor")

    weight_panel.set_title("how much one letter counts in each micro-batch", loc="left", fontsize=11)
    weights = sum(letters) / (len(letters) * np.array(letters))
    bars = weight_panel.bar([f"{count:,}\nletters" for count in letters], weights, color="tab:orange", width=0.6)
    weight_panel.bar_label(bars, labels=[f"{weight:.2g}" for weight in weights], padding=2)
    weight_panel.axhline(1, color="tab:blue", linewidth=2, label="with denominator")
    weight_panel.legend(frameon=False, labelcolor="linecolor")
    weight_panel.margins(y=0.15)
    save_picture(figure, folder, "accumulate_gradients.png")


def main():
    options = read_options(__doc__.partition("\n")[0], f"{QUICK_STEPS} steps before the comparison")
    inputs, targets = load_batch(np.random.default_rng(options.seed))
    cuts = np.cumsum(MICRO_BATCHES)[:-1]
    batches = list(zip(np.split(inputs, cuts), np.split(targets, cuts), strict=True))
    letters = [np.count_nonzero(targets != IGNORED) for _, targets in batches]
    print(f"Micro-batches of {', '.join(f'{count:,}' for count in letters)} letters, in rows of {targets.shape[1]}")

    w = np.zeros((CLASSES, CLASSES), np.float32)
    for _ in trange(QUICK_STEPS if options.quick else STEPS, desc="learning", unit="step", leave=False):
        w -= LEARNING_RATE * accumulated(w, batches)[2]

    loss, grad_logits, grad = whole_batch(w, batches)
    right_loss, right_logits, right = accumulated(w, batches)
    wrong_loss, _, wrong = mean_of_means(w, batches)
    same = np.array_equal(right_logits, grad_logits)
    right_off, wrong_off = (float(np.abs(other - grad).max() / np.abs(grad).max()) for other in (right, wrong))
    print(f"No knowledge: log {CLASSES} = {in_words(math.log(CLASSES))}.")
    print(f"Whole batch:  {in_words(loss)}.")
    print("Off from that, the gradient as a part of its largest entry:")
    print(f"  with denominator: loss {abs(right_loss - loss):.0e}, gradient {right_off:.0e};", end=" ")
    print(f"the gradient of the logits {'is the same to the bit' if same else 'DIFFERS'}.")
    print(f"  mean of means:    loss {abs(wrong_loss - loss):.0e}, gradient {wrong_off:.0e}: a mistake.")
    draw(grad, right, wrong, letters, options.out)
    if not same or right_off > LAST_BITS or abs(right_loss - loss) > 1e-14:
        sys.exit("The accumulated gradient is not that of the whole batch.")
    if wrong_off < 0.01:
        sys.exit("The mean of means makes no difference here.")


if __name__ == "__main__":
    main()
