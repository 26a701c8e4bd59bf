"""Call everything on arrays that begin and end at protected pages: a read or a write beyond one kills the process.

Run as a program, with FASTCE_TARGET in the environment; prints each group before it is tried, and "safe" at the end.
"""

import ctypes
import mmap
import os

import numpy as np

import fastce
from fastce import SparseTargets

PAGE = mmap.PAGESIZE
PROT_NONE = 0
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LENGTHS = [*range(1, 131), 255, 257, 1000, 4095, 4096, 4097, 8191, 8193, 12_289, 16_385, 65_537, 70_000, 262_145]


def guarded(array, at_end):
    """Return a copy of `array` whose last byte (else its first) lies next to a page that must not be touched."""
    pages = max(1, -(-array.nbytes // PAGE))
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for address in (start, start + (pages + 1) * PAGE):
        if LIBC.mprotect(address, PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    offset = PAGE + (pages * PAGE - array.nbytes if at_end else 0)
    copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    return copy


def calls(classes, rows, dtype, rng):
    """Yield (name, function of a `place` for arrays) for every kernel that rows of so many classes can reach."""
    logits = rng.normal(0, 3, (rows, classes)).astype(dtype)
    ids = rng.integers(0, classes, rows)
    soft = rng.random((rows, classes)).astype(dtype)
    mask, masks = rng.random(classes) < 0.7, rng.random((rows, classes)) < 0.7
    mask[ids] = masks[np.arange(rows), ids] = True
    weight, sample_weight = rng.random(classes), rng.random(rows)
    zeros = np.zeros_like(logits)
    for name, options in {
        "plain": {},
        "weights": {"weight": weight, "sample_weight": sample_weight},
        "smoothing": {"label_smoothing": 0.1},
        "scale and z_loss": {"logit_scale": 0.3, "z_loss": 0.1},
        "mask": {"class_mask": mask},
        "masks": {"class_mask": masks, "logit_scale": 0.3},
        "general": {"softcap": 5.0, "weight": weight, "label_smoothing": 0.1, "class_mask": masks},
    }.items():

        def call(place, options=options, softcap="softcap" in options):
            given = {key: place(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
            x, t = place(logits), place(ids)
            fastce.cross_entropy(x, t, **given)
            fastce.cross_entropy_with_grad(x, t, out=place(zeros), **given)
            fastce.cross_entropy_with_grad(x, t, out=x, **given)
            if not softcap:
                fastce.cross_entropy_with_grad_hess(
                    place(logits), t, out=place(zeros), hess_out=place(zeros), reduction="none", **given
                )

        yield name, call
    # Rows that leave the window of their target: their maximum is looked for.
    apart = logits * np.array(40 if dtype == np.float32 else 400, dtype)
    yield "far apart", lambda place: fastce.cross_entropy_with_grad(place(apart), place(ids), out=place(zeros))
    yield "distribution", lambda place: fastce.cross_entropy_with_grad(place(logits), place(soft), out=place(zeros))
    for teacher in (False, True):
        yield f"divergence, from_logits={teacher}", lambda place, teacher=teacher: fastce.kl_divergence_with_grad(
            place(logits), place(soft), from_logits=teacher, out=place(zeros)
        )
    sparse = np.stack([ids, ids[::-1]], 1)
    yield "sparse", lambda place: fastce.cross_entropy_with_grad(
        place(logits), SparseTargets(place(sparse), place(np.full(sparse.shape, 0.5))), out=place(zeros)
    )
    yield "statistics", lambda place: fastce.cross_entropy_stats(place(logits), place(soft))
    for function in (fastce.softmax, fastce.log_softmax):
        yield function.__name__, lambda place, function=function: function(place(logits), out=place(zeros))
    yield "logsumexp", lambda place: fastce.logsumexp(place(logits))
    columns = np.ascontiguousarray(logits.T)
    yield "columns", lambda place: fastce.cross_entropy_with_grad(
        place(columns), place(ids), axis=0, out=place(np.zeros_like(columns))
    )
    # Seventy rows side by side are squares, and some beside them.
    many = np.ascontiguousarray(np.resize(logits, (70 if classes < 5000 else rows, classes)).T)
    for function in (fastce.softmax, fastce.log_softmax):
        yield f"{function.__name__} of columns", lambda place, function=function: function(
            place(many), 0, out=place(np.zeros_like(many))
        )
    yield "logsumexp of columns", lambda place: fastce.logsumexp(place(many), 0)
    half = logits.astype(np.float16)
    halves = np.zeros_like(half)
    yield "float16", lambda place: fastce.cross_entropy_with_grad(place(half), place(ids), out=place(halves))
    yield "sigmoid", lambda place: fastce.binary_cross_entropy_with_grad(
        place(logits), place(soft), sample_weight=place(sample_weight[:, None]), out=place(zeros)
    )


    p = soft + np.array(0.01, dtype)
    p /= p.sum(axis=1, keepdims=True, dtype=np.float64)
    weights = {"weight": weight, "sample_weight": sample_weight}
    for targets in (ids, soft):

        def from_probs(place, targets=targets):
            fastce.cross_entropy_from_probs(place(p), place(targets))
            given = {name: place(value) for name, value in weights.items()}
            fastce.cross_entropy_from_probs(place(p), place(targets), reduction="none", **given)

        yield "probabilities", from_probs
    yield "entries of probabilities", lambda place: fastce.binary_cross_entropy_from_probs(
        place(p), place(soft), sample_weight=place(soft), reduction="none"
    )


def main():
    os.environ["FASTCE_NUM_THREADS"] = "2"
    for dtype in (np.float32, np.float64):
        for classes in LENGTHS:
            rng = np.random.default_rng(classes)
            # 131 rows are more than one block of the kernels for short rows.
            for rows in (3, 131) if classes % 7 == 3 and classes <= 130 else (2,):
                for name, call in calls(classes, rows, dtype, rng):
                    print(np.dtype(dtype).name, rows, classes, name, flush=True)
                    for at_end in (True, False):
                        call(lambda array, at_end=at_end: guarded(array, at_end))
    print("safe")


if __name__ == "__main__":
    main()
