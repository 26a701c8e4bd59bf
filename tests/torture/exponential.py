"""Measure the kernels' exponential on every float32 number it may meet, and on 10^7 float64 numbers, on every target.

Every float32 x with |x| <= 1000 once, in a window that brings e^x near 1, and every 16th block of them in windows where
it is at both ends of the range; how often consecutive results fall back. float64 is sampled at random, around borders
of the reduction, and around the worst numbers found so far.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import elementary

import fastce


def every_float(module, step):
    """Return (numbers tried, largest error, where, falls, the deepest in places) of float32 in windows near 1."""
    tried, worst, where, falls, deepest = 0, 0.0, 0.0, 0, 0
    for x in elementary.chunks(step):
        shift = elementary.shift_around(x[x.size // 2])
        error = elementary.errors(module, x, shift)
        tried += x.size
        if not error.max() <= worst:
            worst, where = float(error.max()), float(x[error.argmax()])
        terms = elementary.exponentials(module, x, shift)
        rises = np.diff(terms.view(np.int32)) * (1 if x[-1] > 0 else -1)
        falls += np.count_nonzero(rises < 0)
        deepest = max(deepest, -int(rises.min(initial=0)))
    return tried, worst, where, falls, deepest


def other_windows(module, step):
    """Return the largest error of float32 in windows where e^x is about 2^-120, 2^-64, 2^64 and 2^120."""
    worst = 0.0
    for x in elementary.chunks(step):
        around = elementary.shift_around(x[x.size // 2])
        for exponent in (-120, -64, 64, 120):
            worst = max(worst, float(elementary.errors(module, x, around - exponent).max()))
    return worst


def doubles(module, count, rng):
    """Return (largest error, where) of float64: random numbers, those around borders, and a climb from the worst."""
    worst, where = 0.0, 0.0
    borders = np.repeat(np.arange(-1020, 1021) / 2 * np.log(2), 64)
    while count > 0:
        size = min(count, 1 << 20)
        pools = [
            rng.uniform(-350, 350, size // 2),
            rng.normal(0, 1, size // 4) * 2.0 ** rng.integers(-60, 8, size // 4),
            rng.choice(borders, size // 8) * (1 + rng.normal(0, 1e-12, size // 8)),
            where + rng.normal(0, 1, size // 8) * 2.0 ** rng.integers(-50, -8, size // 8),
        ]
        x = np.concatenate(pools)
        x = x[np.abs(x) <= 350]
        error = elementary.errors_of_doubles(module, x, 0.0)
        if not error.max() <= worst:
            worst, where = float(error.max()), float(x[error.argmax()])
        count -= size
    return worst, where


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every 256th block of float32 and fewer float64")
    step, count = (256, 1 << 20) if parser.parse_args().quick else (1, 10_000_000)
    start, rng = time.monotonic(), np.random.default_rng(0)
    figures, bad = [], False
    with tempfile.TemporaryDirectory() as folder:
        modules = elementary.build(fastce.build_info()["available_targets"], folder)
        for target, module in modules.items():
            tried, worst, where, falls, deepest = every_float(module, step)
            windows = other_windows(module, 16 * step)
            of_double, at = doubles(module, count, rng)
            logarithm = elementary.errors_of_logarithms(module, rng.uniform(0.5**0.5, 2**0.5, count)).max()
            print(
                f"{target}: float32 {worst:.4f} ulp at {where!r}, {windows:.4f} in other windows, {falls} falls "
                f"by at most {deepest} in the last place; "
                f"float64 {of_double:.4f} ulp at {at!r}; log {logarithm:.4f} ulp",
                flush=True,
            )
            bad |= not max(worst, windows, of_double, logarithm) <= 1 or deepest > 1
            figures.append(f"{target} {worst:.3f} ulp float32, {of_double:.3f} float64")
    print(
        f"result: {tried:,} float32 and {count:,} float64 numbers a target; largest error {'; '.join(figures)}; "
        f"{time.monotonic() - start:.0f} s"
    )
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
