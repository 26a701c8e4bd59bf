"""From the records of a comparison to tables, a chart and the README: `python -m benchmarks.report RESULTS.json`."""

import argparse
import json
import math
import os
from pathlib import Path

from . import chart, machine
from .cases import DTYPES, MODES, OUT
from .contenders import LIMITS, OURS, RIVALS

MARKS = "<!-- table -->", "<!-- /table -->"


def on(threads):
    return f"{threads} thread{'s' * (threads > 1)}"


def save_with_table(path, facts, records, text):
    """Write measurements as JSON, what is said of them beside it, and print that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"facts": facts, "records": records}, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(f"Saved: {path}, {path.with_suffix('.md')}")


class Results:
    """The records of one comparison, found by cell: (shape, dtype, mode, threads) and contender."""

    def __init__(self, facts, records):
        self.facts, self.records = facts, records
        self._found = {(*cell_of(record), record["contender"]): record for record in records}
        self.shapes = _in_order(record["shape"] for record in records)
        self.threads = sorted({record["threads"] for record in records})
        present = {record["contender"] for record in records}
        self.rivals = [name for name in RIVALS if name in present]
        self.limits = [name for name in LIMITS if name in present]

    @classmethod
    def load(cls, path):
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(saved["facts"], saved["records"])

    def save(self, path):
        text = json.dumps({"facts": self.facts, "records": self.records}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def cells(self, *, dtype=None, mode=None, threads=None):
        """Return the cells that were measured, those of one dtype, mode or number of threads if asked."""
        wanted = (dtype, mode, threads)
        cells = _in_order(cell_of(record) for record in self.records)
        return [cell for cell in cells if all(w in (None, got) for w, got in zip(wanted, cell[1:], strict=True))]

    def record(self, cell, contender):
        return self._found.get((*cell, contender), {})

    def seconds(self, cell, contender):
        return self.record(cell, contender).get("seconds")

    def ratio(self, cell, contender):
        """Return the contender's median time over fastce's, or None."""
        ours, theirs = self.seconds(cell, OURS), self.seconds(cell, contender)
        return theirs / ours if ours and theirs else None

    def geometric_mean(self, cells, contender):
        ratios = [ratio for cell in cells if (ratio := self.ratio(cell, contender))]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None

    def not_first(self):
        """Return, for each cell where rivals' medians are below fastce's, those rivals' ratios, worst cell first."""
        found = {}
        for cell in self.cells():
            ratios = {rival: self.ratio(cell, rival) for rival in self.rivals}
            if faster := {rival: ratio for rival, ratio in ratios.items() if ratio and ratio < 1}:
                found[cell] = faster
        return dict(sorted(found.items(), key=lambda entry: min(entry[1].values())))

    def problems(self):
        """Return each rival's problems, once, with the number of cells they spoil."""
        counts = {}
        for record in self.records:
            if record["problem"]:
                key = record["contender"], record["problem"]
                counts[key] = counts.get(key, 0) + 1
        return counts

    def headline(self):
        """Return the (dtype, mode, threads) that the README shows: float32 with `out`, on the most threads."""
        cells = self.cells()
        dtype = next(d for d in DTYPES if any(cell[1] == d for cell in cells))
        mode = next(m for m in (OUT, *MODES) if any(cell[2] == m for cell in cells))
        return dtype, mode, self.threads[-1]


def cell_of(record):
    return record["shape"], record["dtype"], record["mode"], record["threads"]


def _in_order(items):
    return list(dict.fromkeys(items))


def describe_setting(dtype, mode, threads):
    what = {"loss": "loss alone", "fresh": "loss and gradient, fresh", "out": "loss and gradient with `out`"}
    what["in place"] = "loss and gradient in place"
    return f"{dtype}, {what[mode]}, {on(threads)}"


def format_time(seconds):
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{seconds / 1e-9:.0f} ns"


def format_ratio(ratio):
    if ratio is None:
        return "–"
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:#.2g}".rstrip(".") + "x"


def table(results, dtype, mode, threads, *, spread=False):
    """Return the Markdown table of one setting: fastce's time, then everybody's time over it."""
    cells = results.cells(dtype=dtype, mode=mode, threads=threads)
    others = results.rivals + results.limits
    fallback = {name for name in others if any(results.record(cell, name).get("ran_as") != mode for cell in cells)}
    heads = [name + ("¹" if name in fallback and name in results.rivals else "") for name in others]
    heads = ["shape", OURS, *heads]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for cell in cells:
        record = results.record(cell, OURS)
        time = format_time(record["seconds"])
        if spread:
            low, high = record["quartiles"]
            time += f" ({format_time(low)}–{format_time(high)})"
        ratios = [format_ratio(results.ratio(cell, name)) for name in others]
        lines.append("| " + " | ".join([cell[0], time, *ratios]) + " |")
    means = [format_ratio(results.geometric_mean(cells, name)) for name in others]
    lines.append("| " + " | ".join(["**geometric mean**", "", *means]) + " |")
    if any("¹" in head for head in heads):
        lines += ["", f"¹ has no such mode ({mode}); its time is that of its fresh gradient."]
    return "\n".join(lines)


def means_table(results):
    """Return the Markdown table of geometric means over the shapes, one row a setting."""
    heads = ["geometric mean over the shapes", *results.rivals]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for setting in _in_order(cell[1:] for cell in results.cells()):
        cells = results.cells(**dict(zip(("dtype", "mode", "threads"), setting, strict=True)))
        means = [format_ratio(results.geometric_mean(cells, rival)) for rival in results.rivals]
        lines.append("| " + " | ".join([describe_setting(*setting), *means]) + " |")
    return "\n".join(lines)


def not_first_text(results):
    """Return one paragraph or list that names every cell where a rival is faster."""
    lost, measured = results.not_first(), len(results.cells())
    if not lost:
        return f"fastce is first in all {measured} cells that were measured."
    lines = [f"fastce is not first in {len(lost)} of {measured} cells (time over fastce's):", ""]
    for (shape, *setting), faster in lost.items():
        rivals = ", ".join(f"{rival} {ratio:.2f}x" for rival, ratio in faster.items())
        lines.append(f"- {shape}, {describe_setting(*setting)}: {rivals}")
    return "\n".join(lines)


def problems_text(results):
    return "\n".join(
        f"- {contender} is missing from {count} cell{'s' * (count > 1)}: {problem}"
        for (contender, problem), count in results.problems().items()
    )


def summary(results, picture):
    """Return what the README shows: the headline table, the chart, the geometric means, the shapes that are lost."""
    setting = results.headline()
    parts = [
        f"Time of {describe_setting(*setting)}; for the others, their time over fastce's (medians, taken in turns).",
        table(results, *setting),
        f"![Ratios by shape]({picture})",
        not_first_text(results),
        problems_text(results),
        f"Measured on: {machine.describe(results.facts)}.",
    ]
    return "\n\n".join(part for part in parts if part)


def full_report(results, picture):
    """Return every table of the comparison."""
    parts = ["# The comparison in full", summary(results, picture), "## All settings", means_table(results)]
    for setting in _in_order(cell[1:] for cell in results.cells()):
        parts += [f"## {describe_setting(*setting).capitalize()}", table(results, *setting, spread=True)]
    return "\n\n".join(parts) + "\n"


def draw(results, path):
    dtype, mode, threads = results.headline()
    cells = results.cells(dtype=dtype, mode=mode, threads=threads)
    by_contender = {
        name: {cell[0]: results.ratio(cell, name) for cell in cells} for name in results.rivals + results.limits
    }
    title = describe_setting(dtype, mode, threads).replace("`", "")
    chart.ratios(path, title, [cell[0] for cell in cells], by_contender, faint=results.limits)


def write(results, json_path):
    """Save the picture and the full report beside the JSON file; return their paths."""
    picture, report = Path(json_path).with_suffix(".svg"), Path(json_path).with_suffix(".md")
    draw(results, picture)
    report.write_text(full_report(results, picture.name), encoding="utf-8")
    return picture, report


def update_readme(path, results, picture):
    """Replace what stands between the marks in the file at `path`."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if text.count(MARKS[0]) != 1 or text.count(MARKS[1]) != 1:
        raise SystemExit(f"{path} must hold the lines {MARKS[0]} and {MARKS[1]} once each, around the table")
    before, _, rest = text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    block = summary(results, Path(os.path.relpath(picture, path.parent)).as_posix())
    path.write_text(f"{before}{MARKS[0]}\n{block}\n{MARKS[1]}{after}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", help="the JSON file of a comparison")
    parser.add_argument("--readme", help="also replace the table between the marks in this file")
    arguments = parser.parse_args()
    results = Results.load(arguments.results)
    picture, report = write(results, arguments.results)
    if arguments.readme:
        update_readme(arguments.readme, results, picture)
    print(f"wrote {picture} and {report}")


if __name__ == "__main__":
    main()
