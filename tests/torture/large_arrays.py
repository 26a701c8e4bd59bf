"""More than 2^31 elements, really read and written: broadcast, pages of zeros, and in memory if there is enough.

Run from the project's root; `--quick` takes small arrays through the same checks.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np

import fastce

ROW = 65_600  # classes of the broadcast rows


def close(got, expected, bound=5e-7):
    assert abs(got - expected) <= bound * abs(expected), (got, expected)


def equal(got, expected):
    assert np.array_equal(got, expected), (got, expected)


def rows_of_one_array(size):
    """Every row the same, stride 0: losses of single rows, however many there are."""
    row = np.random.default_rng(0).normal(0, 3, ROW).astype(np.float32)
    logits = np.broadcast_to(row, (size // ROW + 3, ROW))
    targets = np.arange(len(logits)) % ROW
    targets[-1] = ROW - 1
    for options in ({}, {"label_smoothing": 0.5}, {"class_mask": row < 5}, {"softcap": 20.0}):
        losses = fastce.cross_entropy(logits, targets, reduction="none", **options)
        for at in (0, 1, len(logits) // 2, len(logits) - 2, len(logits) - 1):
            equal(losses[at], fastce.cross_entropy(row, targets[at], reduction="none", **options))
        yield f"cross_entropy {' '.join(options)}", logits.size
    lse = fastce.logsumexp(logits)
    equal(lse, np.full(len(logits), fastce.logsumexp(row)))
    yield "logsumexp", logits.size
    stats = fastce.cross_entropy_stats(logits, targets)
    assert (stats.predicted == row.argmax()).all() and len(np.unique(stats.entropy)) == 1
    yield "cross_entropy_stats", logits.size


def one_row_of_zeros(size):
    """A single row: class numbers beyond 32 bits. Pages that are only read need no memory."""
    n_classes = size + 16
    logits = np.zeros((1, n_classes), np.float32)
    for target in (0, n_classes // 2, n_classes - 1):
        close(fastce.cross_entropy(logits, [target]), math.log(n_classes))
        yield f"class {target} of {n_classes}", n_classes
    for num_threads in (1, 2):
        close(float(fastce.logsumexp(logits, num_threads=num_threads)[0]), math.log(n_classes))
        yield f"logsumexp, {num_threads} threads", n_classes
    try:
        fastce.cross_entropy(logits, [n_classes])
    except IndexError as error:
        assert f"targets[0] = {n_classes}" in str(error), error
    else:
        raise AssertionError("a class beyond the last one was accepted")
    sparse = fastce.SparseTargets([[0, n_classes - 1]], [[0.5, 0.5]])
    close(fastce.cross_entropy(logits, sparse), math.log(n_classes))
    yield "sparse targets", n_classes


def entries_of_one_number(size):
    """The sigmoid family and reductions over more numbers than 32 bits count."""
    count = size + 5
    logits = np.broadcast_to(np.float32(1.25), (count,))
    loss = fastce.binary_cross_entropy(logits, np.broadcast_to(np.float32(0.25), (count,)))
    close(loss, fastce.binary_cross_entropy(1.25, 0.25))
    yield "binary_cross_entropy", count
    probs = np.broadcast_to(np.float32(0.5), (count,))
    close(fastce.binary_cross_entropy_from_probs(probs, True), math.log(2))
    yield "binary_cross_entropy_from_probs", count


def columns_of_one_array(size):
    """The class axis first: what lies beside one another belongs to different rows."""
    classes, rows = 3000, size // 3000 + 7
    column = np.linspace(-2, 2, classes, dtype=np.float32)
    logits = np.broadcast_to(column[:, None], (classes, rows))
    losses = fastce.cross_entropy(logits, np.full(rows, classes - 1), axis=0, reduction="none")
    equal(losses, np.full(rows, fastce.cross_entropy(column, classes - 1, reduction="none")))
    yield "cross_entropy along axis 0", logits.size


def in_place(size):
    """Gradients of more elements than 32 bits count, written over the logits; half types and float32."""
    for dtype in (np.float16, np.float32):
        rows = size // 4096 + 3
        needed = rows * 4096 * np.dtype(dtype).itemsize
        if available_bytes() < needed + 2 * 2**30:
            print(f"left out: {np.dtype(dtype).name} in place, {needed / 1e9:.1f} GB of memory", flush=True)
            continue
        logits = np.empty((rows, 4096), dtype)
        row = np.random.default_rng(1).normal(0, 3, 4096).astype(dtype)
        logits[...] = row
        targets = np.full(rows, 4095)
        loss, gradient = fastce.cross_entropy_with_grad(row, 4095, reduction="none")
        losses, _ = fastce.cross_entropy_with_grad(logits, targets, reduction="none", out=logits)
        equal(losses, np.full(rows, loss))
        for start in range(0, rows, 8192):
            assert (logits[start : start + 8192] == gradient).all()
        yield f"cross_entropy_with_grad in place, {np.dtype(dtype).name}", logits.size
        logits[...] = row
        expected = fastce.softmax(row)
        fastce.softmax(logits, out=logits)
        for start in range(0, rows, 8192):
            assert (logits[start : start + 8192] == expected).all()
        yield f"softmax in place, {np.dtype(dtype).name}", logits.size
        del logits


def available_bytes():
    """Return how much memory can be had, as Linux reckons; elsewhere nothing is risked."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2^22 elements in place of 2^31")
    size = 2**22 if parser.parse_args().quick else 2**31
    begin, n_checks, most = time.perf_counter(), 0, 0
    for checks in (rows_of_one_array, one_row_of_zeros, entries_of_one_number, columns_of_one_array, in_place):
        start = time.perf_counter()
        for name, n_elements in checks(size):
            print(f"{name}: {n_elements} elements, {time.perf_counter() - start:.1f} s", flush=True)
            n_checks, most, start = n_checks + 1, max(most, n_elements), time.perf_counter()
    seconds = time.perf_counter() - begin
    print(f"result: {n_checks} checks of up to {most} elements, all right, {seconds:.0f} s")


if __name__ == "__main__":
    main()
