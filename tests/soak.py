"""Calls, failing calls and short-lived threads by the thousand, and what is left of them: memory, threads, files."""

import gc
import os
import sys
import threading
import tracemalloc
from dataclasses import dataclass
from functools import partial

import numpy as np

import fastce
from fastce import SparseTargets

MEMORY_LIMIT = 1 << 20  # bytes that the process may grow by: the allocator's own affairs
OBJECTS_LIMIT = 4096  # bytes that Python's objects may grow by in 1,000 calls


@dataclass
class Use:
    """What a process holds."""

    resident: int
    threads: int
    files: int

    @classmethod
    def now(cls):
        gc.collect()
        with open("/proc/self/statm") as numbers:
            resident = int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(resident, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")))


def good_calls():
    """Return functions without arguments: calls of all functions, short and general ways, with and without buffers."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 3, (16, 10)), rng.integers(0, 10, 16)
    soft, out, hess_out = rng.random((16, 10)), np.empty((16, 10)), np.empty((16, 10))
    probs, labels = rng.dirichlet(np.ones(10), 16), rng.integers(0, 2, (16, 10))
    sparse = SparseTargets(targets[:, None], np.ones((16, 1)))
    halves, across = logits.astype(np.float16), np.asfortranarray(logits)
    general = {"label_smoothing": 0.7, "softcap": 9.0, "weight": rng.random(10), "sample_weight": rng.random(16)}
    return [
        lambda: fastce.cross_entropy(logits, targets),
        lambda: fastce.cross_entropy_with_grad(logits, targets),
        lambda: fastce.cross_entropy_with_grad(logits, targets, out=out, reduction="none"),
        lambda: fastce.cross_entropy_with_grad_hess(logits, targets, out=out, hess_out=hess_out),
        lambda: fastce.cross_entropy_with_grad(logits, targets, **general),
        lambda: fastce.cross_entropy_with_grad(logits, soft, class_mask=soft > 0.1),
        lambda: fastce.cross_entropy_with_grad(logits, sparse),
        lambda: fastce.cross_entropy_with_grad(halves, targets, num_threads=2),
        lambda: fastce.cross_entropy_with_grad(across, targets),
        lambda: fastce.cross_entropy_stats(logits, soft),
        lambda: fastce.softmax(logits, out=out),
        lambda: fastce.log_softmax(logits),
        lambda: fastce.logsumexp(logits),
        lambda: fastce.focal_loss_with_grad(logits, targets),
        lambda: fastce.poly_loss(logits, targets),
        lambda: fastce.kl_divergence_with_grad(logits, soft),
        lambda: fastce.kl_divergence_with_grad(logits, soft, from_logits=True),
        lambda: fastce.binary_cross_entropy(logits, labels),
        lambda: fastce.binary_cross_entropy_with_grad(logits, labels, pos_weight=soft, out=out),
        lambda: fastce.cross_entropy_from_probs(probs, targets),
        lambda: fastce.binary_cross_entropy_from_probs(soft, labels),
    ]


def bad_calls():
    """Return (exception, function without arguments) for each kind of error, on the short and on the general way."""
    logits, targets = np.zeros((16, 10)), np.zeros(16, int)
    bad_ids, soft, out = np.full(16, 10), np.full((16, 10), -1.0), np.empty((16, 10))
    frozen = np.empty((16, 10))
    frozen.flags.writeable = False
    huge = np.broadcast_to(np.float32(1), (1, 2**50))
    call = fastce.cross_entropy_with_grad
    return [
        (IndexError, lambda: call(logits, bad_ids, out=out)),
        (IndexError, lambda: call(logits, bad_ids, label_smoothing=0.7)),
        (IndexError, lambda: fastce.focal_loss(logits, bad_ids)),
        (IndexError, lambda: call(logits, SparseTargets(bad_ids[:, None], np.ones((16, 1))))),
        (TypeError, lambda: call(logits, targets * 1.5)),
        (TypeError, lambda: call(targets, targets)),
        (TypeError, lambda: call(logits, targets, num_threads=True)),
        (TypeError, lambda: call(logits, targets, out=[])),
        (ValueError, lambda: call(logits, targets[1:])),
        (ValueError, lambda: call(logits, soft)),
        (ValueError, lambda: call(logits, targets, out=frozen)),
        (ValueError, lambda: call(logits, targets, z_loss=-1.0)),
        (ValueError, lambda: call(logits, targets, class_mask=np.zeros(10, bool))),
        (ValueError, lambda: fastce.binary_cross_entropy_with_grad(logits, soft, out=out)),
        (ValueError, lambda: fastce.cross_entropy_from_probs(logits, targets)),
        (MemoryError, lambda: call(huge, [0])),
    ]


def fail(expected, call):
    try:
        call()
    except expected:
        return
    raise AssertionError(f"no {expected.__name__}")


def arguments_of(calls):
    """Return all objects that the calls refer to."""
    return [cell.cell_contents for call in calls for cell in call.__closure__ or ()]


def repeat(calls, count):
    for _ in range(-(-count // len(calls))):
        for call in calls:
            call()


def soak_calls(calls, count, *, memory=True, objects=None):
    """Make `count` calls; raise AssertionError if anything is left of them. Returns the bytes the process has grown.

    `objects` must not be referred to by more than before; by default what the calls, which are closures, refer to.
    """
    objects = arguments_of(calls) if objects is None else objects
    assert objects
    repeat(calls, max(1000, count // 10))
    references = [sys.getrefcount(item) for item in objects]
    before = Use.now()
    repeat(calls, count)
    after = Use.now()
    assert [sys.getrefcount(item) for item in objects] == references, "arguments are still referred to"
    check_left(before, after, memory)
    if not memory:
        return 0
    grown = python_growth(calls, min(count, 1000))
    assert grown < OBJECTS_LIMIT, f"Python holds {grown} bytes more"
    return after.resident - before.resident


def soak_failures(count, **options):
    """Do what soak_calls does with every bad call, each of which has to fail."""
    pairs = bad_calls()
    objects = arguments_of([call for _, call in pairs])
    return soak_calls([partial(fail, *pair) for pair in pairs], count, objects=objects, **options)


def python_growth(calls, count):
    """Return the bytes that objects grow by with each of three rounds of calls: what fills but once does not count."""
    tracemalloc.start()
    try:
        repeat(calls, 2 * len(calls))
        growths = []
        for _ in range(3):
            held = traced_memory()
            repeat(calls, count)
            growths.append(traced_memory() - held)
        return min(growths)
    finally:
        tracemalloc.stop()


# CPython remembers look-ups of attributes by the address of the name, and keeps up to 4,096 names for it. An allocator
# that gives no address a second time soon, a sanitizer's, thus has each of NumPy's look-ups keep another one.
forget_names = getattr(sys, "_clear_internal_caches", None) or sys._clear_type_cache


def traced_memory():
    """Return the bytes that tracemalloc knows of, without garbage and remembered names."""
    gc.collect()
    forget_names()
    return tracemalloc.get_traced_memory()[0]


def check_left(before, after, memory):
    assert after.threads == before.threads, f"{after.threads - before.threads} threads are left"
    assert after.files == before.files, f"{after.files - before.files} files are left open"
    grown = after.resident - before.resident
    assert not memory or grown < MEMORY_LIMIT, f"the process has grown by {grown} bytes"


def soak_threads(count, *, memory=True, at_once=4):
    """Start `count` short-lived threads, each with two of the kernels' own; check as in :func:`soak_calls`."""
    logits, targets = np.zeros((100, 1000), np.float32), np.zeros(100, int)
    expected = fastce.cross_entropy(logits, targets)
    wrong = []

    def work():
        if fastce.cross_entropy_with_grad(logits, targets, num_threads=2)[0] != expected:
            wrong.append(1)

    def start(number):
        for _ in range(number // at_once):
            threads = [threading.Thread(target=work) for _ in range(at_once)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive(), "a thread hangs"

    start(max(40, count // 10))
    before = settled_use()
    start(count)
    after = settled_use(before.threads)
    assert not wrong, "a thread got another result"
    check_left(before, after, memory)
    return after.resident - before.resident


def settled_use(threads=None):
    """Return what is in use once the kernels' threads of ended Python threads are gone, for which they have 5 s."""
    use = Use.now()
    for _ in range(500):
        if threads is None or use.threads <= threads:
            break
        threading.Event().wait(0.01)
        use = Use.now()
    return use
