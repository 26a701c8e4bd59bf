"""The ratios in a pytest-benchmark JSON file, as a table and a picture: `python -m benchmarks.table RESULTS.json`.

The file is what `python -m pytest benchmarks --benchmark-json=RESULTS.json` has written.
"""

import argparse
import json
from pathlib import Path

from . import chart
from .cases import DTYPES, MODES
from .report import format_ratio, format_time

DEFAULT = Path("benchmarks/results/reference.json")


def read(path):
    """Return the median seconds by (shape, dtype, mode) and contender."""
    seconds = {}
    for benchmark in json.loads(Path(path).read_text(encoding="utf-8"))["benchmarks"]:
        info = benchmark["extra_info"]
        cell = info["shape"], info["dtype"], info["mode"]
        seconds.setdefault(cell, {})[info["contender"]] = benchmark["stats"]["median"]
    return {cell: both for cell, both in seconds.items() if {"fastce", "reference"} <= both.keys()}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=DEFAULT, help=f"by default {DEFAULT}")
    path = parser.parse_args().results
    seconds = read(path)
    if not seconds:
        raise SystemExit(f"{path} holds no pair of fastce and reference to compare")
    shapes = list(dict.fromkeys(cell[0] for cell in seconds))
    ratios = {cell: both["reference"] / both["fastce"] for cell, both in seconds.items()}

    print("Median time of fastce, and how many times longer the NumPy reference takes:\n")
    print(f"{'shape':>12}  dtype  " + "".join(f"{mode:>20}" for mode in MODES))
    for shape in shapes:
        for dtype in DTYPES:
            cells = [(shape, dtype, mode) for mode in MODES]
            texts = [f"{format_time(seconds[c]['fastce'])} {format_ratio(ratios[c]):>7}" for c in cells if c in seconds]
            print(f"{shape:>12}  {dtype}" + "".join(f"{text:>20}" for text in texts))

    settings = {f"{dtype}, {mode}": (dtype, mode) for dtype in DTYPES for mode in MODES}
    by_setting = {
        label: {shape: ratios.get((shape, *setting)) for shape in shapes} for label, setting in settings.items()
    }
    picture = path.with_suffix(".svg")
    chart.ratios(picture, "NumPy reference over fastce", shapes, by_setting)
    print(f"\nSaved a picture: {picture}")


if __name__ == "__main__":
    main()
