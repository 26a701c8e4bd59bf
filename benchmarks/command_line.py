"""How fast the command line reads: python -m benchmarks.command_line [--rounds 9] [--quick].

Whole processes take turns: `cp` of a file of logits, 100,000 x 1000 float32, to memory (/dev/shm), and
`python -m fastce report` of the same file, which lies in the page cache. The aim: at least half of the speed of cp.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPE, QUICK_SHAPE = (100_000, 1000), (1000, 100)
MEMORY = Path("/dev/shm")
AIM = 0.5


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.command_line", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="a smoke run; its numbers mean nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=MEMORY) as memory:
        logits, targets = save(Path(folder), *(QUICK_SHAPE if arguments.quick else SHAPE))
        copy, report = ["cp", logits, memory], [sys.executable, "-m", "fastce", "report", logits, targets]
        times = []
        for _ in range(arguments.rounds + 1):
            times.append((seconds_of(copy), seconds_of(report)))
            (Path(memory) / logits.name).unlink()
        del times[0]  # the first round brings the file into the page cache
    ratio = statistics.median(copied / reported for copied, reported in times)
    copied, reported = map(statistics.median, zip(*times, strict=True))
    print(f"cp {copied:.3f} s, report {reported:.3f} s: {ratio:.2f} of the speed of cp, {AIM} wanted")


def save(folder, n_rows, n_classes):
    """Save logits and targets; return the paths of their files."""
    rng = np.random.default_rng(0)
    np.save(folder / "logits.npy", 3 * rng.standard_normal((n_rows, n_classes), dtype=np.float32))
    np.save(folder / "targets.npy", rng.integers(0, n_classes, n_rows))
    return folder / "logits.npy", folder / "targets.npy"


def seconds_of(command):
    """Return how long a process takes from start to end."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
