"""Find shapes in noise, pixel by pixel, with convolutions in plain NumPy: class axis 1, ignored borders.

Usage: python examples/segment_shapes.py [--quick] [--seed S] [--out DIR]
Needs: pip install ".[demo]" (the images are computed; nothing is downloaded)

Discs, squares and triangles differ from the background, and from one another, by their stripes only. Where two classes
meet, the truth is not known to the pixel: such pixels are labelled 255 and ignored. The logits (images, classes,
height, width) go into the loss as they lie. If a border pixel has a gradient, or if the shapes found on new images
overlap too little with the true ones, the exit code is 1.
"""

import math
import sys

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.lib.stride_tricks import sliding_window_view
from report import Timed, in_words, read_options, save_picture
from tqdm import trange

import fastce
import fastce.reference

NAMES = ("background", "disc", "square", "triangle")
BORDER = 255
SIZE = 48
NOISE = 0.7  # standard deviation; the stripes go from -1 to 1
HIDDEN = 12
BATCH = 4
LEARNING_RATE, MOMENTUM = 0.1, 0.9
STEPS, QUICK_STEPS = 100, 12
WANTED_OVERLAP, QUICK_WANTED_OVERLAP = 0.8, 0.3  # intersection over union, mean of the classes


def draw_scene(generator):
    """Return an image (SIZE, SIZE) of one disc, one square and one triangle in noise, and the classes of its pixels."""
    y, x = np.mgrid[:SIZE, :SIZE]
    classes = np.zeros((SIZE, SIZE), np.int64)
    for shape in generator.permutation([1, 2, 3]):
        (down, right), radius = generator.uniform(8, SIZE - 8, 2), generator.uniform(8, 12)
        v, u = (y - down) / radius, (x - right) / radius
        inside = (u * u + v * v < 1, np.maximum(abs(u), abs(v)) < 0.9, (v < 0.8) & (v > 2 * abs(u) - 1))
        classes[inside[shape - 1]] = shape
    stripes = [np.sin(direction * np.pi / 2 + generator.uniform(0, 6)) for direction in (y, x, (x + y) * 0.7)]
    image = np.choose(classes, [np.zeros_like(stripes[0]), *stripes]) + generator.normal(0, NOISE, (SIZE, SIZE))
    around = sliding_window_view(np.pad(classes, 1, mode="edge"), (3, 3))
    classes[around.min(axis=(2, 3)) != around.max(axis=(2, 3))] = BORDER
    return image, classes


def scenes(number, generator):
    """Return images (N, 1, SIZE, SIZE), float32, and classes (N, SIZE, SIZE)."""
    images, classes = zip(*(draw_scene(generator) for _ in range(number)), strict=True)
    return np.array(images, np.float32)[:, None], np.array(classes)


def windows(images):
    """Return the 5 x 5 surroundings of every pixel (N, C * 25, H * W) of images (N, C, H, W), 0 beyond the edge."""
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    count, channels, height, width = images.shape
    view = sliding_window_view(padded, (5, 5), axis=(2, 3)).transpose(0, 1, 4, 5, 2, 3)
    return view.reshape(count, channels * 25, height * width)


def convolve(columns, filters):
    """Return the response (N, F, SIZE, SIZE) of filters (F, C, 5, 5) to what windows() returned."""
    return (filters.reshape(len(filters), -1) @ columns).reshape(len(columns), len(filters), SIZE, SIZE)


def forward(network, images):
    """Return the windows of the images, the hidden layer and its windows, and the logits (N, 4, SIZE, SIZE)."""
    first, first_bias, second, second_bias = network
    columns = windows(images)
    hidden = np.maximum(convolve(columns, first) + first_bias, 0)
    hidden_columns = windows(hidden)
    return columns, hidden, hidden_columns, convolve(hidden_columns, second) + second_bias


def backward(network, columns, hidden, hidden_columns, grad_logits):
    """Return the gradient of every parameter, given that of the logits."""
    second = network[2]
    # A convolution's gradient goes back through the same filters, turned round.
    turned = second[:, :, ::-1, ::-1].swapaxes(0, 1)
    grad_hidden = convolve(windows(grad_logits), turned) * (hidden > 0)
    grads = []
    for grad, inputs, filters in ((grad_hidden, columns, network[0]), (grad_logits, hidden_columns, second)):
        flat = grad.reshape(*grad.shape[:2], -1)
        grads.append((flat @ inputs.swapaxes(1, 2)).sum(axis=0).reshape(filters.shape))
        grads.append(grad.sum(axis=(0, 2, 3))[:, None, None])
    return grads


def train(steps, generator):
    """Return two layers of filters (HIDDEN, 1, 5, 5) and (4, HIDDEN, 5, 5), each with its biases (F, 1, 1).

    They learn from BATCH new images in every step.
    """
    first = generator.normal(0, math.sqrt(2 / 25), (HIDDEN, 1, 5, 5))
    second = generator.normal(0, 0.01, (len(NAMES), HIDDEN, 5, 5))
    layers = (first, np.zeros((HIDDEN, 1, 1)), second, np.zeros((len(NAMES), 1, 1)))
    network = [array.astype(np.float32) for array in layers]
    velocities = [np.zeros_like(parameter) for parameter in network]
    for _ in trange(steps, desc="learning", unit="step", leave=False):
        images, classes = scenes(BATCH, generator)
        *between, logits = forward(network, images)
        _, grad = fastce.cross_entropy_with_grad(logits, classes, axis=1, ignore_index=BORDER)
        for parameter, velocity, change in zip(network, velocities, backward(network, *between, grad), strict=True):
            velocity *= MOMENTUM
            velocity -= LEARNING_RATE * change
            parameter += velocity
    return network


def overlaps(classes, answers):
    """Return for each class the pixels where both say it over those where either does, borders left out."""
    known = classes != BORDER
    pairs = [(known & (classes == number), known & (answers == number)) for number in range(len(NAMES))]
    return np.array([np.sum(truth & found) / max(np.sum(truth | found), 1) for truth, found in pairs])


def draw(images, classes, answers, overlap, folder):
    """Save the picture of two images, what is on them, and what the network has found."""
    figure = Figure(figsize=(9.6, 7), dpi=130, layout="constrained")
    figure.suptitle(f"Shapes in noise: mean overlap with the truth {overlap:.2f}", fontsize=14, x=0.012, ha="left")
    colours = ["0.9", "tab:blue", "tab:orange", "tab:green", "black"]
    columns = {"image": images[:, 0], "truth": np.where(classes == BORDER, 4, classes), "found": answers}
    for row, panels in enumerate(figure.subplots(2, 3)):
        for panel, (name, column) in zip(panels, columns.items(), strict=True):
            look = {"cmap": "gray"} if name == "image" else {"cmap": ListedColormap(colours), "vmin": -0.5, "vmax": 4.5}
            panel.imshow(column[row], interpolation="nearest", **look)
            panel.set_axis_off()
            panel.set_title(name if row == 0 else "", loc="left", fontsize=11)
    names = [*NAMES, "border (255), ignored"]
    patches = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=5, frameon=False)
    save_picture(figure, folder, "segment_shapes.png")


def main():
    options = read_options(__doc__.partition("\n")[0], f"{QUICK_STEPS} steps, of which less is expected")
    generator = np.random.default_rng(options.seed)
    network = train(QUICK_STEPS if options.quick else STEPS, generator)
    images, classes = scenes(16, generator)
    *_, logits = forward(network, images)
    answers = logits.argmax(axis=1)
    loss, grad = fastce.cross_entropy_with_grad(logits, classes, axis=1, ignore_index=BORDER)
    border_grad = np.abs(grad.swapaxes(0, 1)[:, classes == BORDER]).max()
    overlap = overlaps(classes, answers)
    print(f"No knowledge: log {len(NAMES)} = {in_words(math.log(len(NAMES)))}.")
    print(f"New images:   {in_words(loss)}.")
    print(f"{np.mean(classes == BORDER):.0%} of the pixels are borders, the largest gradient there is {border_grad:g}.")
    for name, share in zip(NAMES, overlap, strict=True):
        print(f"  {name:<10} {share:6.1%} overlap with the truth")
    print(f"Loss and gradient of all their {classes.size:,} pixels:")
    for losses in (fastce, fastce.reference):
        timed = Timed(losses.cross_entropy_with_grad)
        for _ in range(5):
            timed(logits, classes, axis=1, ignore_index=BORDER)
        print(f"  {losses.__name__:<17} {1e3 * timed.seconds / timed.calls:6.2f} ms")
    draw(images, classes, answers, overlap.mean(), options.out)
    if border_grad != 0:
        sys.exit("A border pixel has a gradient.")
    if overlap.mean() < (wanted := QUICK_WANTED_OVERLAP if options.quick else WANTED_OVERLAP):
        sys.exit(f"The mean overlap is {overlap.mean():.2f}, below {wanted}.")


if __name__ == "__main__":
    main()
