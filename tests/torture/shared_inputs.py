"""Eight threads call every public function on the same inputs, also while another thread changes those inputs.

    python tests/torture/shared_inputs.py [--quick] [--seconds S] [--only PART]

Parts, in this order: `first calls` (a fresh process whose threads import fastce all at once), `steady` (the inputs stay
as they are: every result has the bits of a single thread's), `ids` (class ids change: each row's loss is that of an id
that was there, or the call is refused) and `all` (every array changes: any result or documented error, but no crash and
no hang). `--only race` instead has two threads write one array, which a race detector must report.
"""

import argparse
import contextlib
import faulthandler
import inspect
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np

import fastce
from fastce import SparseTargets

THREADS = 8
ROWS = 240
INPUTS = [(classes, dtype) for classes in (5, 70, 1000, 20_000) for dtype in (np.float32, np.float64)]
FIRST_CALLS = """
import threading
barrier, losses = threading.Barrier(8), []

def work():
    barrier.wait()
    import fastce
    losses.append(fastce.cross_entropy([[20.0, 0.0]] * 40_000, [0] * 40_000))

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(losses) == 8 and len(set(losses)) == 1, losses
"""


class Inputs:
    """Arrays for rows of so many classes; ids lie in a bytearray, which Python's own code (not NumPy's) writes."""

    def __init__(self, classes, dtype):
        rng = np.random.default_rng(classes)
        rows = max(2, min(ROWS, 400_000 // classes))
        self.classes = classes
        self.logits = rng.normal(0, 3, (rows, classes)).astype(dtype)
        self.ids = np.frombuffer(bytearray(8 * rows), np.int64)
        self.ids[:] = rng.integers(0, classes, rows)
        self.distribution = rng.random((rows, classes)).astype(dtype)
        self.distribution /= self.distribution.sum(1, keepdims=True)
        self.weight, self.sample_weight = rng.random(classes), rng.random(rows)
        self.mask = rng.random((rows, classes)) < 0.7
        self.mask[:, [0, -1]] = True
        self.indices = np.stack([self.ids, self.ids[::-1]], 1)
        self.values = rng.random((rows, 2))
        self.probs = rng.random((rows, classes))
        self.probs /= self.probs.sum(1, keepdims=True)
        self.labels = (rng.random((rows, classes)) < 0.5).astype(dtype)

    def arrays(self):
        return [value for value in vars(self).values() if isinstance(value, np.ndarray)]


def calls(given):
    """Yield (public name, call without arguments) so that every public function and every way through it is there."""
    x, ids, soft = given.logits, given.ids, given.distribution
    sparse = SparseTargets(given.indices, given.values)
    smoothed, weighted = {"label_smoothing": 0.1}, {"weight": given.weight, "sample_weight": given.sample_weight}
    everything = {**smoothed, **weighted, "class_mask": given.mask, "softcap": 9.0, "z_loss": 0.1, "logit_scale": 0.5}
    for options in ({}, smoothed, weighted, {"class_mask": given.mask}, everything):
        for threads in (1, 2):
            options = {**options, "num_threads": threads}
            for targets in (ids, soft, sparse):
                yield "cross_entropy", partial(fastce.cross_entropy, x, targets, **options)
                yield "cross_entropy_with_grad", partial(fastce.cross_entropy_with_grad, x, targets, **options)
            if "softcap" not in options:
                yield "cross_entropy_with_grad_hess", partial(fastce.cross_entropy_with_grad_hess, x, ids, **options)
    for view in (x[:, ::2], x[::-1], x.astype(np.float16)):
        targets = ids % view.shape[1]
        yield "cross_entropy_with_grad", partial(fastce.cross_entropy_with_grad, view, targets)
    yield "cross_entropy_with_grad", partial(fastce.cross_entropy_with_grad, np.ascontiguousarray(x.T), ids, axis=0)
    for name in ("kl_divergence", "kl_divergence_with_grad"):
        yield name, partial(getattr(fastce, name), x, soft)
        yield name, partial(getattr(fastce, name), x, x, from_logits=True)
    for name in ("focal_loss", "focal_loss_with_grad", "poly_loss", "poly_loss_with_grad"):
        yield name, partial(getattr(fastce, name), x, ids, **weighted)
    for name in ("binary_cross_entropy", "binary_cross_entropy_with_grad"):
        yield name, partial(getattr(fastce, name), x, given.labels)
        yield name, partial(getattr(fastce, name), x, given.labels, sample_weight=given.sample_weight[:, None])
    yield "cross_entropy_from_probs", partial(fastce.cross_entropy_from_probs, given.probs, ids)
    yield "cross_entropy_from_probs", partial(fastce.cross_entropy_from_probs, given.probs, soft)
    yield "binary_cross_entropy_from_probs", partial(fastce.binary_cross_entropy_from_probs, given.probs, given.labels)
    yield "cross_entropy_stats", partial(fastce.cross_entropy_stats, x, ids)
    yield "cross_entropy_stats", partial(fastce.cross_entropy_stats, x, soft, class_mask=given.mask)
    for name in ("softmax", "log_softmax", "logsumexp"):
        yield name, partial(getattr(fastce, name), x)
    yield "init_bias", partial(fastce.init_bias, ids, given.classes, sample_weight=given.sample_weight)
    yield "report", lambda: str(fastce.report(x, ids, sample_weight=given.sample_weight))
    yield "build_info", fastce.build_info


def check_that_nothing_is_left_out():
    called = {name for name, _ in calls(Inputs(5, np.float32))}
    public = {name for name in fastce.__all__ if inspect.isfunction(getattr(fastce, name))}
    assert called == public, called ^ public


def same(one, other):
    """Whether results, arrays and numbers in tuples or not, are equal to the bit; nan equals nan."""
    if isinstance(one, tuple):
        return all(map(same, one, other))
    return one == other if isinstance(one, (dict, str)) else np.array_equal(one, other, equal_nan=True)


def steady(given):
    """Return (calls in a round, round of thread k, no writer): every result has the bits of a single thread's."""
    cases = list(calls(given))
    expected = [call() for _, call in cases]

    def work(k):
        for i in order(len(cases), k):
            assert same(cases[i][1](), expected[i]), cases[i]

    return len(cases), work, None


def changing_ids(given):
    """As `steady`, while a writer changes the ids: each row has the loss of an id that was there, or an error comes."""
    x, ids, numbers = given.logits, given.ids, memoryview(given.ids)
    values = (0, given.classes - 1, 10**9, -(2**60))
    options = ({}, {"num_threads": 2}, {"weight": np.ones(given.classes)}, {"softcap": 1e9})
    functions = [partial(fastce.cross_entropy, x, ids, reduction="none", **some) for some in options]
    functions.append(lambda: fastce.cross_entropy_with_grad(x, ids, reduction="none")[0])
    functions.append(lambda: fastce.cross_entropy_stats(x, ids).loss)
    allowed = []
    for value in values[:2]:
        ids[:] = value
        allowed.append([function() for function in functions])

    def work(k):
        for i in order(len(functions), k):
            with contextlib.suppress(IndexError):
                losses = functions[i]()
                assert ((losses == allowed[0][i]) | (losses == allowed[1][i])).all()

    def write():
        for value in values:
            for i in range(0, len(numbers), 7):
                numbers[i] = value

    return len(functions), work, write


def changing_all(given):
    """As `steady`, while a writer changes every array: any result or documented error, but no crash and no hang."""
    cases = list(calls(given))
    arrays = [(array.dtype == np.bool_, array.reshape(-1).view(np.uint8)) for array in given.arrays()]
    before, rng = [numbers.copy() for _, numbers in arrays], np.random.default_rng(3)

    def work(k):
        with np.errstate(all="ignore"):
            for i in order(len(cases), k):
                with contextlib.suppress(TypeError, ValueError, IndexError):
                    cases[i][1]()

    def write():
        for (is_bool, numbers), old in zip(arrays, before, strict=True):
            start = int(rng.integers(0, len(numbers)))
            part = numbers[start : start + 64]
            part[:] = part ^ 1 if is_bool else rng.integers(0, 256, len(part))
            numbers[:] = old

    return len(cases), work, write


def order(count, k):
    """Yield the numbers below `count`; threads begin elsewhere, so that different functions meet."""
    for i in range(count):
        yield (i + k * count // THREADS) % count


def in_threads(work, writer=None):
    """Call work(k) in threads that start together, `writer` over and over meanwhile; raise what one of them raises."""
    barrier, problems, done = threading.Barrier(THREADS), [], threading.Event()

    def run(k):
        try:
            barrier.wait()
            work(k)
        except BaseException as problem:
            problems.append(problem)

    def write():
        while not done.is_set():
            writer()

    threads = [threading.Thread(target=run, args=(k,)) for k in range(THREADS)]
    disturbers = [threading.Thread(target=write)] if writer else []
    for thread in [*disturbers, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    for thread in disturbers:
        thread.join()
    if problems:
        raise problems[0]


def repeat(seconds, work):
    """Return how often work() was called within a time, at least once."""
    end, count = time.monotonic() + seconds, 0
    while count == 0 or time.monotonic() < end:
        work()
        count += 1
    return count


def run_on_all_inputs(part, seconds):
    """Return the number of calls of a part that were made."""
    count = 0
    for classes, dtype in INPUTS:
        n_calls, work, writer = part(Inputs(classes, dtype))
        count += THREADS * n_calls * repeat(seconds / len(INPUTS), partial(in_threads, work, writer))
    return count


def first_calls(seconds):
    return THREADS * repeat(seconds, lambda: subprocess.run([sys.executable, "-c", FIRST_CALLS], check=True))


def race(seconds):
    x, ids, out = np.ones((100, 100)), np.zeros(100, np.int64), np.empty((100, 100))
    return THREADS * repeat(seconds, lambda: in_threads(lambda k: fastce.cross_entropy_with_grad(x, ids, out=out)))


PARTS = {
    "first calls": first_calls,
    "steady": partial(run_on_all_inputs, steady),
    "ids": partial(run_on_all_inputs, changing_ids),
    "all": partial(run_on_all_inputs, changing_all),
    "race": race,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each part once, a few seconds in all")
    parser.add_argument("--seconds", type=float, default=60, help="time for each part")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part (may be repeated)")
    arguments = parser.parse_args()
    seconds = 0 if arguments.quick else arguments.seconds
    check_that_nothing_is_left_out()
    start, total = time.monotonic(), 0
    for part in arguments.only or [name for name in PARTS if name != "race"]:
        faulthandler.dump_traceback_later(300 + 10 * seconds, exit=True)  # a hang ends with a traceback and status 1
        count = PARTS[part](seconds)
        faulthandler.cancel_dump_traceback_later()
        print(f"{part}: {count} calls", flush=True)
        total += count
    lock = "on" if getattr(sys, "_is_gil_enabled", lambda: True)() else "off"
    seconds = time.monotonic() - start
    print(f"result: {total} calls in {THREADS} threads, interpreter lock {lock}, {seconds:.0f} seconds")


if __name__ == "__main__":
    main()
