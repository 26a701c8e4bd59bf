"""What the examples have in common: their options, the time spent in a loss, a loss in words, a picture of curves."""

import argparse
import math
from pathlib import Path
from time import perf_counter

from matplotlib.figure import Figure


def read_options(description, quick):
    """Return the options quick, seed and out of the command line; `quick` says what a quick run does."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of the picture")
    options = parser.parse_args()
    if options.seed < 0:
        parser.error("--seed must be at least 0")
    return options


class Timed:
    """A function that counts its calls and adds up the seconds spent in them."""

    def __init__(self, function):
        self.function = function
        self.calls = 0
        self.seconds = 0.0

    def __call__(self, *args, **options):
        start = perf_counter()
        result = self.function(*args, **options)
        self.seconds += perf_counter() - start
        self.calls += 1
        return result


def in_words(loss):
    """Return a loss in nats with its perplexity exp(loss), the number of equally likely classes of the same loss."""
    return f"{loss:.4f} nats, as unsure as a fair choice among {math.exp(loss):,.4g} classes"


def time_in_words(name, loss_seconds, calls, all_seconds):
    """Return one line on how long a loss took, per call and as a share of the training around it."""
    return (
        f"  {name:<17} {loss_seconds / calls * 1e6:9,.1f} microseconds per call,"
        f" {loss_seconds:7.3f} s in the loss of {all_seconds:7.3f} s of training"
        f" ({100 * loss_seconds / all_seconds:.0f} %)"
    )


def new_picture(title, widths):
    """Return a figure and its panels, side by side and as wide as `widths` (inches)."""
    figure = Figure(figsize=(sum(widths), 4.6), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    figure.suptitle(title, fontsize=14, x=0.012, ha="left")
    panels = figure.subplots(1, len(widths), width_ratios=widths)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
    return figure, panels


def draw_curve(panel, values, name, colour):
    """Draw one value per epoch, from the untrained network at epoch 0 on; `name` goes to the legend."""
    panel.plot(values, color=colour, linewidth=2, marker="o", markersize=3.5, label=name)
    panel.legend(loc="best", frameon=False, labelcolor="linecolor")
    panel.set_xlabel("epoch")
    panel.xaxis.get_major_locator().set_params(integer=True)


def draw_level(panel, level, text, above=True):
    """Draw a dashed line at a value that needs no network, with its meaning written above or below it."""
    panel.axhline(level, color="0.4", linewidth=1.2, linestyle="--")
    panel.annotate(
        text,
        xy=(1, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4 if above else -4),
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        color="0.3",
    )


def draw_times(panel, milliseconds, title):
    """Draw a bar for the time of each loss, fastce's first, with the number beside it."""
    bars = panel.barh(range(len(milliseconds)), milliseconds.values(), color=["tab:blue", "0.65"], height=0.35)
    panel.bar_label(bars, labels=[f"{value:.3g} ms" for value in milliseconds.values()], padding=4)
    for position, name in enumerate(milliseconds):
        panel.annotate(name, xy=(0, position - 0.24), xytext=(2, 0), textcoords="offset points")
    panel.set_xlim(0, 1.35 * max(milliseconds.values()))
    panel.set_ylim(len(milliseconds) - 0.5, -0.6)
    panel.set_axis_off()
    panel.set_title(title, loc="left", fontsize=11)


def save_picture(figure, folder, name):
    """Write the figure to folder/name (made if missing) and print where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / name).resolve()
    figure.savefig(path)
    print(f"\nPicture: {path}")
