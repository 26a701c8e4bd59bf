"""The pictures of a loss report, drawn with matplotlib: calibration, confidence, losses of the rows and the classes."""

import io
import math
from pathlib import Path
from typing import Any

from fastce.loss_report import LOSS_EDGES, percent

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import NullFormatter
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install 'fastce[plot]'") from error

__all__ = ["COLOURS", "PANELS", "figure_of", "picture", "svg_of"]

# A page puts its own colours, light or dark, in the place of these numbers.
COLOURS = {"ink": "#24292f", "faint": "#d0d7de", "main": "#3573b1", "contrast": "#bc4c00"}
INK, FAINT, MAIN, CONTRAST = COLOURS.values()
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # the name of a class may hold a $
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",  # letters stay letters: they can be searched, and take the font of the page
    "svg.hashsalt": "fastce",  # the same report gives the same bytes
}
CONFIDENCE = "confidence (probability of the prediction)"
MOST_CLASSES = 20
LONGEST_NAME = 18


def figure_of(report):
    """Return a matplotlib Figure with the four pictures of a report."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 8), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
        for panel, draw in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            draw(panel, report)
    return figure


def picture(report, path):
    """Return the four pictures as the bytes of a file of the kind that the end of its path says."""
    return saved(figure_of(report), Path(path).suffix[1:].lower(), dpi=150)


def svg_of(draw, report):
    """Return one of the PANELS as the text of an svg element."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.9), layout="constrained")
        draw(figure.subplots(), report)
    text = saved(figure, "svg", transparent=True).decode()
    return text[text.index("<svg") :]


def saved(figure, kind, **options):
    """Return a figure as the bytes of a file, without date and origin: equal figures are equal files."""
    stream = io.BytesIO()
    unsaid = {"svg": ("Creator", "Date", "Format", "Type"), "pdf": ("Creator", "Producer", "CreationDate")}
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format=kind, metadata=dict.fromkeys(unsaid.get(kind, ())), **options)
    return stream.getvalue()


def draw_calibration(panel, report):
    """Draw how often predictions of each confidence are right: on the dotted line as often as the model says."""
    bins = [part for part in report.calibration_bins if part.n_rows]
    wide = [part for part in bins if part.low < part.high]
    panel.bar(
        [part.low for part in wide], [part.accuracy for part in wide], [part.high - part.low for part in wide],
        align="edge", color=MAIN, alpha=0.25, edgecolor=MAIN, linewidth=0.8,
    )  # fmt: skip
    most = max((part.n_rows for part in bins), default=1)
    panel.scatter(
        [part.confidence for part in bins], [part.accuracy for part in bins],
        [12 + 120 * part.n_rows / most for part in bins], color=MAIN, zorder=3, clip_on=False,
        label="mean of a bin (larger: more rows)",
    )  # fmt: skip
    panel.plot([0, 1], [0, 1], color=INK, linewidth=1.2, linestyle=":", label="ideal")
    panel.set(
        title=f"Calibration: error {percent(report.calibration_error)}", xlabel=CONFIDENCE, ylabel="accuracy",
        xlim=(0, 1), ylim=(0, 1),
    )  # fmt: skip
    add_legend(panel)


def draw_confidence(panel, report):
    """Draw how many rows have which confidence, with the mean and the accuracy, which should be the same."""
    *bins, ones = report.calibration_bins
    counts = [part.n_rows for part in bins]
    counts[-1] += ones.n_rows
    draw_histogram(panel, [*(part.low for part in bins), 1.0], counts)
    draw_level(panel, report.mean_confidence, f"mean {percent(report.mean_confidence)}", CONTRAST)
    draw_level(panel, report.accuracy, f"accuracy {percent(report.accuracy)}", INK)
    panel.set(title="Confidence of the predictions", xlabel=CONFIDENCE, xlim=(0, 1))
    add_legend(panel)


def draw_losses(panel, report):
    """Draw how many rows have which loss, on a logarithmic axis."""
    occupied = [index for index, count in enumerate(report.loss_histogram) if count] or [0]
    # A decade at least, whose ends have numbers.
    first, stop = occupied[0] // 5 * 5, (occupied[-1] // 5 + 1) * 5
    panel.set_xscale("log")
    draw_histogram(panel, LOSS_EDGES[first : stop + 1], report.loss_histogram[first:stop])
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    draw_level(panel, report.loss, f"mean {report.loss:.3g}", CONTRAST)
    draw_level(panel, report.uniform_loss, f"equal chances {report.uniform_loss:.3g}", INK)
    lowest = f"; {LOSS_EDGES[0]:g} and less at the left" if first == 0 else ""
    panel.set(title="Losses of the rows", xlabel=f"loss of a row (nats{lowest})")
    add_legend(panel)


def draw_classes(panel, report):
    """Draw the loss of the classes, the largest first, and what share of their rows is found."""
    seen = [part for part in report.per_class if part.support and math.isfinite(part.loss)]
    shown = sorted(seen, key=lambda part: -part.loss)[:MOST_CLASSES]
    bars = panel.barh(range(len(shown)), [part.loss for part in shown], color=MAIN, height=0.75)
    size = 10 if len(shown) <= 12 else 8
    panel.bar_label(bars, [f"{100 * part.recall:.0f} %" for part in shown], padding=3, fontsize=size)
    panel.set_yticks(range(len(shown)), [shortened(part.name) for part in shown], fontsize=size)
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    panel.margins(x=0.12)
    panel.set_xlim(left=0, right=None if any(part.loss for part in shown) else 1)
    which = "" if len(shown) == len(seen) else f", the {len(shown)} largest of {len(seen):,}"
    panel.set(title=f"Loss of the classes{which}", xlabel="mean loss (nats); beside it: share of the rows found")


PANELS = (draw_calibration, draw_confidence, draw_losses, draw_classes)


def draw_histogram(panel, edges, counts):
    """Draw counts as shares of their sum."""
    total = sum(counts) or 1
    panel.margins(x=0)
    panel.stairs([100 * count / total for count in counts], edges, fill=True, color=MAIN)
    panel.set_ylabel("% of rows")
    panel.set_ylim(bottom=0, top=None if any(counts) else 1)


def draw_level(panel, value, meaning, colour):
    """Draw a vertical line at a value, if it has a place on the axis."""
    if math.isfinite(value) and (value > 0 or panel.get_xscale() == "linear"):
        panel.axvline(value, color=colour, linewidth=1.6, linestyle="--", label=meaning)


def add_legend(panel):
    """Put the legend between title and picture, where it hides nothing."""
    panel.set_title(panel.get_title("left"), pad=30)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, frameon=False, handlelength=1.6)


def shortened(name):
    """Return a name that leaves room for the picture, on one line."""
    name = " ".join(name.split())
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
