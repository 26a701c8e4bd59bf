"""Measure how long Ctrl-C takes during long calls of every function: at most 0.3 s from the signal to the exception.

    python tests/torture/interrupts.py [--quick] [--only WORD]

Each call is left alone once and then interrupted at several moments, by a process of its own that sends SIGINT. What
counts is the processor time of this process from the signal to KeyboardInterrupt, on one thread: what it takes on a
machine that has nothing else to do. The time on the clock is printed beside it.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from calls import calls

import fastce

LIMIT = 0.3  # seconds
# Rows and classes by the kind of kernel, up to 2^26 elements: what is not divided shows as a wait of its own length.
SHAPES = {
    "two classes": (1 << 24, 2),
    "short rows": (1 << 21, 16),
    "rows": (1 << 16, 1000),
    "long rows": (1 << 9, 1 << 17),
    "few rows": (4, 1 << 21),
}
# The clock of the parent's processor time, as Linux numbers it.
SENDER = """
import os, signal, sys, time
parent = os.getppid()
for line in sys.stdin:
    time.sleep(float(line))
    sent = time.monotonic(), time.clock_gettime(~parent << 3 | 2)
    os.kill(parent, signal.SIGINT)
    print(*sent, flush=True)
"""


class Sender:
    """A process that sends SIGINT to this one when it is told to."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def interrupt(self, call, delay):
        """Return (processor time, time) from the signal, `delay` seconds after the call began, to KeyboardInterrupt."""
        try:
            self.process.stdin.write(f"{delay}\n")
            self.process.stdin.flush()
            call()
            time.sleep(60)
        except KeyboardInterrupt:
            caught, caught_processor = time.monotonic(), time.process_time()
        sent, sent_processor = map(float, self.process.stdout.readline().split())
        return caught_processor - sent_processor, caught - sent

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def repeated(value, n_rows, row_shape):
    """Return arrays of one row as `n_rows` of them, with stride 0: they take no memory.

    A mask is given its own, since one that is the same for all rows is only a vector to the kernels.
    """
    if not isinstance(value, np.ndarray) or value.shape[:1] != (1,):
        return value
    rows = np.broadcast_to(value, (n_rows, *value.shape[1:]))
    return np.ascontiguousarray(rows) if value.dtype == bool and value.shape == row_shape else rows


def long_calls(dtype, n_rows, n_classes):
    """Yield (name, call) of every public function for rows of this shape."""
    row_shape = 1, n_classes
    for name, call in calls(dtype, row_shape).items():
        given = {key: repeated(value, n_rows, row_shape) for key, value in call.arguments.items()}
        yield name, partial(call.function, **given)


def plain_calls(dtype, n_rows, n_classes):
    """Yield (name, call) of arrays in memory: of rows, which take the short way, and of columns, classes first."""
    rows, ids = np.zeros((n_rows, n_classes), dtype), np.zeros(n_rows, np.int64)
    for function in (
        fastce.cross_entropy, fastce.cross_entropy_with_grad, fastce.cross_entropy_with_grad_hess,
        fastce.binary_cross_entropy_with_grad,
    ):  # fmt: skip
        yield f"plain {function.__name__}", partial(function, rows, rows if "binary" in function.__name__ else ids)
    if n_classes <= 16:
        columns = rows.reshape(n_classes, n_rows)
        yield "columns", partial(fastce.cross_entropy_with_grad, columns, ids, axis=0)


def all_calls(quick):
    """Yield (case, call) one after the other."""
    for kind, (n_rows, n_classes) in SHAPES.items():
        n_rows = max(1, n_rows // 16) if quick else n_rows
        for dtype in (np.float32, np.float64):
            for make in (plain_calls, long_calls):
                for name, call in make(dtype, n_rows, n_classes):
                    yield f"{name}, {kind}, {np.dtype(dtype)}", call


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and moments")
    parser.add_argument("--only", default="", help="cases whose name holds this word")
    arguments = parser.parse_args()
    moments = (0.5,) if arguments.quick else (0.02, 0.5, 0.95)
    os.environ["FASTCE_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begun, sender, waits = time.monotonic(), Sender(), {}
    for case, call in all_calls(arguments.quick):
        if arguments.only not in case:
            continue
        start = time.monotonic()
        call()
        whole = time.monotonic() - start
        measured = [sender.interrupt(call, moment * whole) for moment in moments]
        waits[case], on_the_clock = map(max, zip(*measured, strict=True))
        print(f"{waits[case]:.3f} s ({on_the_clock:.3f} on the clock) of {whole:.2f}: {case}", flush=True)
    sender.end()
    worst = max(waits, key=waits.get)
    late = [case for case, wait in waits.items() if wait > LIMIT]
    for case in late:
        print(f"later than {LIMIT} s: {waits[case]:.3f} s, {case}")
    print(
        f"result: {len(waits)} kinds of calls, target {fastce.build_info()['target']}: KeyboardInterrupt after at most "
        f"{waits[worst]:.3f} s of computing ({worst}), {len(late)} later than {LIMIT} s; "
        f"{time.monotonic() - begun:.0f} s"
    )
    sys.exit(1 if late else 0)


if __name__ == "__main__":
    main()
