"""What `fastce.report` costs over `cross_entropy_stats`: python -m benchmarks.loss_report [--threads 2] [--quick].

The aim at 100,000 x 1000 float32 logits: at most twice the time of cross_entropy_stats, and 50 ms. Targets:
random ones, of which nearly all are predicted wrong, and some of which 70 % are predicted right.
"""

import argparse
import os

import numpy as np

from . import machine
from .contenders import Step
from .timing import QUICK, Effort, Turns, take_turns

SHAPE, QUICK_SHAPE = (100_000, 1000), (1000, 100)
FACTOR, SECONDS = 2.0, 0.05


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_report", description=__doc__)
    parser.add_argument("--threads", type=int, default=len(machine.cpus()))
    parser.add_argument("--quick", action="store_true", help="a smoke run; its numbers mean nothing")
    arguments = parser.parse_args()
    os.environ["FASTCE_NUM_THREADS"] = str(arguments.threads)
    print("| targets | cross_entropy_stats | report | allowed | holds |\n|---|--:|--:|--:|---|")
    for name, logits, targets in cases(*(QUICK_SHAPE if arguments.quick else SHAPE)):
        stats, report = measure(logits, targets, arguments)
        allowed = FACTOR * stats + SECONDS
        times = " | ".join(f"{1e3 * seconds:.0f} ms" for seconds in (stats, report, allowed))
        print(f"| {name} | {times} | {'yes' if report <= allowed else 'no'} |")


def cases(n_rows, n_classes):
    """Yield (name, logits, targets)."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (n_rows, n_classes)).astype(np.float32)
    targets = rng.integers(0, n_classes, n_rows)
    yield "random", logits, targets
    yield "70 % right", logits, np.where(rng.random(n_rows) < 0.7, logits.argmax(axis=1), targets)


def measure(logits, targets, arguments):
    """Return the median seconds of the statistics and of the report, taken in turns, once they agree."""
    import fastce

    losses = fastce.cross_entropy_stats(logits, targets).loss
    assert np.isclose(fastce.report(logits, targets).loss, losses.mean(dtype=np.float64), rtol=1e-6)
    effort = QUICK if arguments.quick else Effort(rounds=31, seconds=10.0, fewest=11)
    calls = [lambda logits: fastce.cross_entropy_stats(logits, targets), lambda logits: fastce.report(logits, targets)]
    turns = [Turns(Step(call), logits, consumes=False, effort=effort) for call in calls]
    take_turns(turns, arguments.threads)
    return [turn.summary()["seconds"] for turn in turns]


if __name__ == "__main__":
    main()
