"""Distil a network into a smaller one, in plain NumPy: soft targets teach more than the labels of the same digits.

Usage: python examples/distill_digits.py [--quick] [--seed S] [--out DIR]
Needs: pip install ".[demo]" (scikit-learn brings the digits; nothing is downloaded)

The teacher learns from all training digits. Students see a few of them: one learns their labels, its twin what the
teacher thinks of them: a distribution, in which a 3 may be a bit of an 8. A temperature brings out such small
probabilities; for the student it is logit_scale=1/TEMPERATURE. The networks are those of train_digits.py. If the
teacher's student is not the better one on digits that no network has seen, the exit code is 1.
"""

import math
import sys

import numpy as np
from report import draw_level, in_words, new_picture, read_options, save_picture
from tqdm import tqdm
from train_digits import CLASSES, backward, forward, load_data, momentum_step

import fastce

TEACHER_HIDDEN, STUDENT_HIDDEN = 256, 32
TEMPERATURE = 4.0
LEARNING_RATE = 0.05
BATCH = 32
STEPS, QUICK_STEPS = 600, 100
SEEN, QUICK_SEEN = (30, 50, 100, 200, 400), (50,)  # numbers of digits that students see
TWINS, QUICK_TWINS = 3, 1  # pairs of students to each number


def new_network(hidden, generator):
    """Return [W1 (64, hidden), b1, W2 (hidden, CLASSES), b2], as train_digits.py has them."""
    w1 = generator.standard_normal((64, hidden), dtype=np.float32) * np.float32(math.sqrt(2 / 64))
    w2 = generator.standard_normal((hidden, CLASSES), dtype=np.float32) * np.float32(0.01)
    return [w1, np.zeros(hidden, np.float32), w2, np.zeros(CLASSES, np.float32)]


def train(hidden, images, targets, steps, seed, **options):
    """Return a network that has learnt the targets, labels or distributions; the options are those of the loss."""
    generator = np.random.default_rng(seed)
    network = new_network(hidden, generator)
    velocities = [np.zeros_like(parameter) for parameter in network]
    for learning_rate in np.linspace(LEARNING_RATE, 0, steps, endpoint=False, dtype=np.float32):
        chosen = generator.integers(len(images), size=BATCH)
        hidden_layer, logits = forward(network, images[chosen])
        _, grad = fastce.cross_entropy_with_grad(logits, targets[chosen], **options)
        momentum_step(network, velocities, backward(network, images[chosen], hidden_layer, grad), learning_rate)
    return network


def examine(network, data):
    """Return the share of test digits read right, and the loss on them."""
    _, logits = forward(network, data.test_images)
    right = logits.argmax(axis=1) == data.test_labels
    return right.mean(), fastce.cross_entropy(logits, data.test_labels)


def compare(data, soft_targets, numbers, twins, steps, seed):
    """Return accuracy and loss of all students: (len(numbers), twins, labels or soft targets, accuracy or loss)."""
    results = np.empty((len(numbers), twins, 2, 2))
    # The gradient shrinks with the temperature, the student's distance from the teacher too: T^2 makes up for it.
    soft = {"logit_scale": 1 / TEMPERATURE, "grad_output": TEMPERATURE**2}
    for place in tqdm(list(np.ndindex(len(numbers), twins)), desc="students", unit="pair", leave=False):
        twin = seed + place[1]
        seen = np.random.default_rng(twin).permutation(len(data.train_labels))[: numbers[place[0]]]
        images = data.train_images[seen]
        by_labels = train(STUDENT_HIDDEN, images, data.train_labels[seen], steps, twin)
        by_teacher = train(STUDENT_HIDDEN, images, soft_targets[seen], steps, twin, **soft)
        results[place] = examine(by_labels, data), examine(by_teacher, data)
    return results


def draw(data, soft_targets, numbers, accuracies, teacher_accuracy, folder):
    """Save the picture of a digit and its soft target, and of the students' accuracy."""
    figure, (digit_panel, target_panel, accuracy_panel) = new_picture("What a teacher adds", (3, 4.2, 5.6))
    unsure = np.argsort(soft_targets.max(axis=1))[len(soft_targets) // 50]
    label = data.train_labels[unsure]
    digit_panel.set_title(f"a digit, labelled {label}", loc="left", fontsize=11)
    digit_panel.imshow(data.train_images[unsure].reshape(8, 8), cmap="gray_r")
    digit_panel.set_axis_off()
    target_panel.set_title(f"the teacher's target for it (temperature {TEMPERATURE:g})", loc="left", fontsize=11)
    colours = ["tab:blue" if number == label else "0.7" for number in range(CLASSES)]
    target_panel.bar(range(CLASSES), soft_targets[unsure], color=colours)
    target_panel.set_xticks(range(CLASSES))

    accuracy_panel.set_title("test digits read right (%), a dot for each student", loc="left", fontsize=11)
    for kind, (name, colour) in enumerate((("labels", "tab:orange"), ("soft targets", "tab:blue"))):
        percent = 100 * accuracies[:, :, kind]
        accuracy_panel.plot(numbers, percent.mean(axis=1), color=colour, linewidth=2, label=name)
        accuracy_panel.plot(numbers, percent, ".", color=colour)
    draw_level(accuracy_panel, 100 * teacher_accuracy, "the teacher, who has seen all", above=True)
    accuracy_panel.set_xscale("log")
    accuracy_panel.set_xticks(numbers, [str(number) for number in numbers], minor=False)
    accuracy_panel.minorticks_off()
    accuracy_panel.set_xlabel("digits seen")
    accuracy_panel.margins(y=0.1)
    accuracy_panel.legend(frameon=False, labelcolor="linecolor", loc="lower right")
    save_picture(figure, folder, "distill_digits.png")


def main():
    options = read_options(__doc__.partition("\n")[0], "fewer students, steps and digits")
    steps, numbers, twins = (QUICK_STEPS, QUICK_SEEN, QUICK_TWINS) if options.quick else (STEPS, SEEN, TWINS)
    data = load_data()
    teacher = train(TEACHER_HIDDEN, data.train_images, data.train_labels, steps, options.seed)
    teacher_accuracy, teacher_loss = examine(teacher, data)
    soft_targets = fastce.softmax(forward(teacher, data.train_images)[1] / np.float32(TEMPERATURE))
    results = compare(data, soft_targets, numbers, twins, steps, options.seed)

    print(f"No knowledge: log {CLASSES} = {in_words(math.log(CLASSES))}.")
    print(f"Teacher:      {in_words(teacher_loss)}; {teacher_accuracy:.1%} of the test digits read right.")
    means = results.mean(axis=1)
    for number, ((label_accuracy, label_loss), (soft_accuracy, soft_loss)) in zip(numbers, means, strict=True):
        print(
            f"{number:4d} digits seen: labels {label_accuracy:.1%} right, {label_loss:.3f} nats;"
            f" soft targets {soft_accuracy:.1%}, {soft_loss:.3f} nats"
        )
    draw(data, soft_targets, numbers, results[..., 0], teacher_accuracy, options.out)
    if np.any(means[:, 1, 0] <= means[:, 0, 0]) or np.any(means[:, 1, 1] >= means[:, 0, 1]):
        sys.exit("Soft targets have not taught more than labels.")


if __name__ == "__main__":
    main()
