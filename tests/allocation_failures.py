"""Have every allocation of every kind of call fail in turn: the call raises MemoryError and has changed nothing.

Run as a program with failing_malloc.c, compiled, in LD_PRELOAD and named in FAILING_MALLOC. Under PYTHONMALLOC=malloc
the allocations of Python's own small objects fail too; of those, unlike of arrays, some come after the first write, so
there alone the caller's buffers may hold a part of the result. Prints the number of failures, and "safe" at the end.
"""

import ctypes
import os
import resource
import sys

import numpy as np
from fuzz import PARAMETERS, results_of
from test_layouts import assert_same_bits, byte_swapped, every_third_class

import fastce
from fastce import SparseTargets

SMALL_OBJECTS = os.environ.get("PYTHONMALLOC") == "malloc"
MOST_FAILURES = 100_000
# NumPy's own: the shape of a view, wherever one is made; an iterator, whose want of memory it reports as a SystemError.
SHAPE_BYTES, ITERATOR_BYTES = 64, 4096


def load_shim():
    shim = ctypes.CDLL(os.environ["FAILING_MALLOC"])
    shim.failing_malloc_arm.argtypes = [ctypes.c_long, ctypes.c_size_t]
    shim.failing_malloc_disarm.restype = ctypes.c_long
    shim.failing_malloc_size.restype = ctypes.c_size_t
    return shim.failing_malloc_arm, shim.failing_malloc_disarm, shim.failing_malloc_size


ARM, DISARM, FAILED_SIZE = load_shim()


def cases(quick):
    """Yield (name, function's name, arguments) of a call for each way through the package; `quick`: of smaller ones."""
    rng = np.random.default_rng(5)
    for name, function, arguments in short_cases(rng, quick):
        yield name, function, arguments
        # A number that only equals an int: these arguments are checked one by one.
        yield f"checked {name}", function, arguments | {"num_threads": np.int64(1)}
    yield from cases_of_several_blocks(rng, [] if quick and SMALL_OBJECTS else LAYOUTS)


def short_cases(rng, quick):
    """Yield calls as `cases` does, of plain arrays, most of which take a short way."""

    def batch(rows, classes, dtype=np.float32):
        return {
            "logits": rng.normal(0, 3, (rows, classes)).astype(dtype),
            "targets": rng.integers(0, classes, rows),
        }

    def both(name, function, arguments):
        for suffix in ("", "_with_grad"):
            yield name, function + suffix, arguments

    for shape in ((3, 5), (4, 96), (3, 130), (5, 200), (4, 1000), (2, 5000), *([] if quick else [(3, 70_000)])):
        yield from both(f"plain {shape}", "cross_entropy", batch(*shape))
        yield f"plain {shape}", "cross_entropy_with_grad_hess", batch(*shape)
        yield f"{shape}", "cross_entropy_stats", batch(*shape)
        for function in ("softmax", "log_softmax", "logsumexp"):
            yield f"{shape}", function, {"logits": batch(*shape)["logits"]}
        general = {"label_smoothing": 0.7, "z_loss": 0.1, "softcap": 9.0, "weight": rng.random(shape[1])}
        yield from both(f"general {shape}", "cross_entropy", batch(*shape) | general)
        soft = rng.random(shape).astype(np.float32)
        yield from both(f"distribution {shape}", "cross_entropy", batch(*shape) | {"targets": soft})
        yield f"distribution {shape}", "cross_entropy_with_grad_hess", batch(*shape) | {"targets": soft}
        yield from both(f"divergence {shape}", "kl_divergence", batch(*shape) | {"targets": soft})
        yield from both(f"teacher {shape}", "kl_divergence", batch(*shape) | {"targets": soft, "from_logits": True})
        weighted = batch(*shape) | {"targets": soft, "sample_weight": rng.random(shape[0])}
        yield from both(f"weighted divergence {shape}", "kl_divergence", weighted)
        yield from both(f"weighted teacher {shape}", "kl_divergence", weighted | {"from_logits": True})
    weights = {"weight": rng.random(200).astype(np.float32), "sample_weight": rng.random(5), "reduction": "none"}
    yield from both("weights", "cross_entropy", batch(5, 200) | weights)
    yield from both("weights", "focal_loss", batch(5, 200) | weights)
    yield from both("weights", "poly_loss", batch(5, 200) | weights)
    mask = rng.random((5, 200)) < 0.7
    mask[:, 0] = True
    yield from both("masks", "cross_entropy", batch(5, 200) | {"class_mask": mask, "label_smoothing": 0.1})
    yield from both("a mask", "cross_entropy", batch(5, 200) | {"class_mask": mask[0]})
    sparse = SparseTargets(rng.integers(0, 200, (5, 2)), rng.random((5, 2)))
    yield from both("sparse", "cross_entropy", batch(5, 200) | {"targets": sparse, "reduction": "sum"})
    factors = {"grad_output": rng.random(5), "reduction": "none"}
    yield "factors", "cross_entropy_with_grad", batch(5, 200) | factors

    if not SMALL_OBJECTS:  # NumPy's as_strided, by which these are viewed, does not survive that
        columns = batch(100, 10)
        columns["logits"] = np.ascontiguousarray(columns["logits"].T)
        yield from both("columns", "cross_entropy", columns | {"axis": 0})

    entries = {"logits": rng.normal(0, 3, 2000), "targets": rng.integers(0, 2, 2000)}
    yield from both("plain", "binary_cross_entropy", entries)
    probs = rng.dirichlet(np.ones(300), 100)
    yield "", "cross_entropy_from_probs", {"probs": probs, "targets": rng.integers(0, 300, 100)}
    yield "soft", "cross_entropy_from_probs", {"probs": probs, "targets": probs[::-1].copy()}
    yield "", "binary_cross_entropy_from_probs", {"probs": rng.random(900), "targets": rng.random(900)}


LAYOUTS = [
    ("float16", np.float16, np.asarray),
    ("byte-swapped", np.float32, byte_swapped),
    ("strided", np.float64, every_third_class),
]


def cases_of_several_blocks(rng, layouts):
    """Yield calls as `cases` does, of arrays that pass through buffers in more than one block."""
    shape = 1320, 100
    for name, dtype, layout in layouts:
        logits = layout(rng.normal(0, 3, shape).astype(dtype))
        given = {"logits": logits, "targets": rng.integers(0, 100, shape[0])}
        soft = {"logits": logits, "targets": rng.random(shape)}
        for suffix in ("_with_grad", ""):
            yield name, f"cross_entropy{suffix}", given
            yield f"general {name}", f"cross_entropy{suffix}", given | {"label_smoothing": 0.7}
            yield name, f"focal_loss{suffix}", given | {"weight": rng.random(100)}
            yield name, f"binary_cross_entropy{suffix}", soft | {"reduction": "none"}
            yield f"weighted {name}", f"binary_cross_entropy{suffix}", soft | {"pos_weight": rng.random(100)}
            yield name, f"kl_divergence{suffix}", soft
            yield f"teacher {name}", f"kl_divergence{suffix}", soft | {"from_logits": True}
        yield name, "cross_entropy_with_grad_hess", given
        for function in ("softmax", "log_softmax"):
            yield name, function, {"logits": logits}


def with_buffers(function, arguments):
    """Yield (name, arguments) with the buffers that the function takes: none, others, one that is the logits."""
    yield "fresh", arguments
    known = PARAMETERS[function]
    logits = arguments.get("logits")
    if "out" not in known:
        return
    buffers = {name: np.full(logits.shape, 7, logits.dtype.newbyteorder("=")) for name in known if name.endswith("out")}
    yield "out", arguments | buffers
    if logits.dtype.isnative:
        yield "in place", arguments | buffers | {"out": logits}


def contents(arguments):
    """Return (array, copy) of all arrays among the arguments."""
    targets = arguments.get("targets")
    sparse = [targets.indices, targets.values] if isinstance(targets, SparseTargets) else []
    return [(array, array.copy()) for array in [*arguments.values(), *sparse] if isinstance(array, np.ndarray)]


def fail_all(function, arguments):
    """Fail the n-th allocation, n = 0, 1, ... until the call no longer gets so far; return how many have failed."""
    call = getattr(fastce, function)
    before = contents(arguments)
    buffers = [arguments.get("out"), arguments.get("hess_out")]

    def is_buffer(array):
        return any(array is buffer for buffer in buffers)

    def restore():
        for array, content in before:
            if is_buffer(array):
                array[...] = content

    expected = tuple(np.copy(result) for result in results_of(call(**arguments)))
    restore()
    for n in range(MOST_FAILURES):
        result, error = None, None
        try:
            ARM(n, 0)
            result = call(**arguments)
        except (MemoryError, SystemError) as raised:
            error = type(raised)
        finally:
            seen = DISARM()
        size = FAILED_SIZE()
        if result is None:
            assert issubclass(error, MemoryError) or size <= ITERATOR_BYTES, f"allocation {n} of {size} bytes: {error}"
            half_written = SMALL_OBJECTS or size <= SHAPE_BYTES
            for array, content in before:
                if not (half_written and is_buffer(array)):
                    assert array.tobytes() == content.tobytes(), f"allocation {n} of {size} bytes: an array has changed"
        else:
            check_results(results_of(result), expected)
        restore()
        if n % 8 == 0:
            check_results(results_of(call(**arguments)), expected)
            restore()
        if seen <= n:
            return n
    raise AssertionError("the allocations of a call do not end")


def check_results(results, expected):
    for result, true in zip(results, expected, strict=True):
        assert_same_bits(result, true)


def check_leaks():
    """1,000 failures of each allocation of a call with a large scratch leave no memory behind."""
    logits, targets = np.zeros((2, 70_000), np.float32), np.zeros(2, int)
    options = {"label_smoothing": 0.7, "num_threads": 2}

    def fail(n):
        ARM(n, 4096)
        try:
            fastce.cross_entropy_with_grad(logits, targets, **options)
        except MemoryError:
            return True
        finally:
            DISARM()
        return False

    for n in range(10):
        if not fail(n):
            break
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for repeat in range(1000):
        fail(repeat % n)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest
    assert n >= 2 and grown < 1024, f"{grown} KiB more after 1,000 failures of {n} allocations"


def main():
    # Teams of threads are had once: libgomp itself ends the process when it cannot have one.
    os.environ["FASTCE_NUM_THREADS"] = "2"
    unraised = []
    sys.unraisablehook = unraised.append
    failures = 0
    quick = "--quick" in sys.argv
    for number, (name, function, arguments) in enumerate(cases(quick)):
        ways = list(with_buffers(function, arguments))
        for buffers, given in ways if not quick else [ways[-1 - number // 2 % 2]] if len(ways) > 1 else ways:
            print(function, name, buffers, end=" ", flush=True)
            failed = fail_all(function, given)
            print(failed, flush=True)
            failures += failed
    if not SMALL_OBJECTS:
        check_leaks()
    # Python itself wants memory to close a generator.
    assert all(SMALL_OBJECTS and hook.exc_type is MemoryError for hook in unraised), unraised
    print(f"{failures} failures")
    print("safe")


if __name__ == "__main__":
    main()
