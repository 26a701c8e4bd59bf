"""The pictures: ratios of many shapes on one scale, and lines of growth; plain SVG that can be read and compared."""

import matplotlib

matplotlib.use("Agg")
# Text stays text and ids stay the same, so that a new picture differs from the old one only where its numbers do.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastce", "font.size": 9})

from matplotlib import pyplot  # noqa: E402

MARKERS = "osD^vP*X<>"
FAINT_MARKERS = "|x+"
PAGE = 4096  # bytes; less memory than this cannot be seen, and is drawn as this


def ratios(path, title, shapes, by_contender, faint=()):
    """Chart time over fastce's time: a row a shape, a marker a contender; those in `faint` are no rivals."""
    figure, axes = pyplot.subplots(figsize=(8, 1.6 + 0.32 * len(shapes)), layout="constrained")
    for index, (name, values) in enumerate(by_contender.items()):
        rows = [row for row, shape in enumerate(shapes) if values.get(shape)]
        style = {"marker": MARKERS[index % len(MARKERS)], "markersize": 6}
        if name in faint:
            style = {"marker": FAINT_MARKERS[faint.index(name) % len(FAINT_MARKERS)], "markersize": 8, "color": "0.45"}
        axes.plot([values[shapes[row]] for row in rows], rows, linestyle="none", label=name, **style)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}x")
    if max(axes.get_xlim()) < 20 * min(axes.get_xlim()):  # too few powers of ten in sight to be read by them alone
        axes.xaxis.set_minor_formatter(lambda ratio, _: f"{ratio:g}x" if f"{ratio:e}"[0] in "25" else "")
    else:
        axes.xaxis.set_minor_formatter("")
    axes.set_yticks(range(len(shapes)), shapes)
    axes.set_ylim(len(shapes) - 0.5, -0.5)
    axes.grid(axis="x", which="both", alpha=0.2)
    axes.set_xlabel("time / fastce's time (right of 1: fastce is faster)")
    axes.set_title(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    _save(figure, path)


def growth(path, title, lines, limit):
    """Chart two panels over the number of logits: ns per logit, and memory beyond inputs and output.

    `lines` maps a label to its points (logits, ns per logit, extra bytes or None); `limit` is a line of memory
    (label, bytes per logit) to compare with.
    """
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for marker, (label, points) in zip(MARKERS, lines.items(), strict=False):
        sizes, nanoseconds, extra = zip(*points, strict=True)
        speed.plot(sizes, nanoseconds, marker=marker, label=label)
        measured = [(size, max(more, PAGE)) for size, more in zip(sizes, extra, strict=True) if more is not None]
        if measured:
            memory.plot(*zip(*measured, strict=True), marker=marker, label=label)
    ends = [min(points[0][0] for points in lines.values()), max(points[-1][0] for points in lines.values())]
    memory.plot(ends, [limit[1] * end for end in ends], color="0.6", linestyle="--", label=limit[0])
    for axes in (speed, memory):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("logits in the batch")
        axes.grid(which="both", alpha=0.2)
        axes.legend(frameon=False)
    speed.set_title("ns per logit, loss and gradient")
    memory.set_title("peak memory beyond inputs and output, bytes")
    figure.suptitle(title)
    _save(figure, path)


def _save(figure, path):
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
