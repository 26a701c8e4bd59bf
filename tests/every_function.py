"""Call every public function on rows of every kind of kernel, and give it what it must refuse.

Run as a program: prints a digest of each result and the words of each error, so that two processes can be compared.
"""

import numpy as np
from digests import digest_of

import fastce
from fastce import SparseTargets

# Tiles and short rows, medium rows, long rows; more than one thread's work of short ones; columns shared among threads.
SHAPES = [(40, 3), (6000, 10), (30, 97), (20, 1000), (3, 5003), (2, 40_000)]


def calls(dtype=np.float32, shapes=SHAPES, num_threads=2):
    """Yield (name, function without arguments) for every public function."""
    threads = {"num_threads": num_threads}
    for rows, classes in shapes:
        rng = np.random.default_rng(classes)
        logits = rng.normal(0, 5, (rows, classes)).astype(dtype)
        logits[:: max(2, rows // 3), classes // 2] += 60
        ids = rng.integers(0, classes, rows)
        ids[1::5] = -100
        live = np.where(ids < 0, 0, ids)
        soft = rng.random((rows, classes)).astype(dtype)
        soft /= soft.sum(axis=1, keepdims=True, dtype=np.float64)
        sparse = SparseTargets(np.stack([live, live[::-1]], 1), np.full((rows, 2), 0.5))
        mask = rng.random((rows, classes)) < 0.8
        mask[:, 0] = True
        some = {"weight": rng.random(classes), "sample_weight": rng.random(rows), "label_smoothing": 0.1, **threads}
        every = some | {"logit_scale": 0.5, "softcap": 30.0, "z_loss": 0.01, "class_mask": mask}
        for name, given in {
            "cross_entropy": [(logits, ids, threads), (logits, sparse, threads), (logits, soft, every)],
            "cross_entropy_with_grad": [
                (logits, ids, threads),
                (logits, ids, some),
                (logits, live, every),
                (logits, soft, threads),
                (logits, sparse, some),
                (np.asfortranarray(logits), ids, threads),
                (logits.astype(np.float16), ids, threads),
            ],
            "cross_entropy_with_grad_hess": [(logits, ids, threads), (logits, soft, some)],
            "cross_entropy_stats": [(logits, ids, threads), (logits, soft, threads)],
            "kl_divergence": [(logits, soft, threads)],
            "kl_divergence_with_grad": [(logits, soft, threads)],
            "focal_loss": [(logits, ids, threads)],
            "focal_loss_with_grad": [(logits, ids, threads)],
            "poly_loss": [(logits, ids, threads)],
            "poly_loss_with_grad": [(logits, ids, threads)],
            "binary_cross_entropy": [(logits, soft, threads)],
            "binary_cross_entropy_with_grad": [(logits, soft, threads), (logits, soft, threads | {"pos_weight": 2.0})],
            "cross_entropy_from_probs": [(soft, ids, threads)],
            "binary_cross_entropy_from_probs": [(soft, mask, threads)],
            "softmax": [(logits, threads)],
            "log_softmax": [(logits, threads)],
            "logsumexp": [(logits, threads)],
        }.items():
            for number, (*arrays, options) in enumerate(given):
                if "loss" in name or "entropy" in name or "divergence" in name:
                    options = options if "stats" in name else options | {"reduction": "none"}
                yield (
                    f"{name}-{number}-{rows}x{classes}",
                    lambda name=name, arrays=arrays, options=options: getattr(fastce, name)(*arrays, **options),
                )
    # What is made of these with NumPy is not promised to have the same bits in any environment; counts are.
    rng = np.random.default_rng(5)
    logits, ids = rng.normal(0, 5, (300, 9)).astype(dtype), rng.integers(0, 9, 300)
    yield "report", lambda: np.array([number.predicted for number in fastce.report(logits, ids).per_class])
    yield "init_bias", lambda: fastce.init_bias(ids, 9).round(6)
    yield "build_info", lambda: fastce.build_info()["target"]


def refused():
    """Yield (name, function that must raise)."""
    logits = np.zeros((3, 4), np.float32)
    for name, arguments, options in [
        ("cross_entropy", (logits, [0, 1, 4]), {}),
        ("cross_entropy", (logits, [0, -1, 0]), {}),
        ("cross_entropy", (logits, [0.0, 1.0, 2.0]), {}),
        ("cross_entropy", (np.zeros((3, 4), int), [0, 1, 2]), {}),
        ("cross_entropy", (logits, [0, 1]), {}),
        ("cross_entropy", (logits, [0, 1, 2]), {"label_smoothing": 2.0}),
        ("cross_entropy", (logits, [0, 1, 2]), {"weight": [1, 1, 1, np.nan]}),
        ("cross_entropy", (logits, [0, 1, 2]), {"num_threads": 0}),
        ("cross_entropy_with_grad", (logits, [0, 1, 2]), {"out": np.zeros((3, 5), np.float32)}),
        ("cross_entropy_with_grad", (logits, [0, 1, 2]), {"out": logits[::-1]}),
        ("cross_entropy_from_probs", (logits, [0, 1, 2]), {}),
        ("binary_cross_entropy", (logits, logits - 1), {}),
        ("softmax", (logits,), {"axis": 3}),
    ]:
        yield name, lambda name=name, arguments=arguments, options=options: getattr(fastce, name)(*arguments, **options)


def arrays_of(result):
    """Return a result as a sequence of arrays or numbers."""
    return result if isinstance(result, tuple) else (result,)


def main():
    for dtype in (np.float32, np.float64):
        for name, call in calls(dtype):
            print(name, np.dtype(dtype), digest_of(*arrays_of(call())))
    for name, call in refused():
        try:
            call()
            print(name, "refuses nothing")
        except (TypeError, ValueError, IndexError) as error:
            print(name, type(error).__name__, error)


if __name__ == "__main__":
    main()
