"""Print one digest per case of losses and gradients, so that compiled targets can be compared to the bit.

Run as a program, with FASTCE_TARGET in the environment: ``FASTCE_TARGET=v3 python tests/digests.py``.
"""

import hashlib

import hard_rows
import numpy as np

import fastce


def digest_of(*results):
    """A digest of the bits of arrays; every nan counts as the same."""
    sha = hashlib.sha256()
    for result in results:
        result = np.array(result)
        if result.dtype.kind == "f":
            result[np.isnan(result)] = np.nan
        sha.update(str(result.dtype).encode() + str(result.shape).encode() + result.tobytes())
    return sha.hexdigest()[:16]


def cases():
    """Name, logits, targets and options of every case."""
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        rng = np.random.default_rng(11)
        for generator in hard_rows.GENERATORS:
            for number, (logits, targets) in enumerate(generator(dtype, rng)):
                yield f"{generator.__name__}-{number}-{logits.shape}-{dtype}", logits, targets, {"reduction": "none"}
        for rows, classes in ((1, 10), (33, 10), (5000, 10), (1000, 48), (333, 1000), (7, 40_000)):
            logits = rng.normal(0, 6, (rows, classes)).astype(dtype)
            logits[:: max(2, rows // 3), classes // 2] = -np.inf
            logits[1 :: max(2, rows // 3), classes // 3] = np.nan
            targets = rng.integers(0, classes, rows)
            targets[2::7] = -100
            yield f"mean-{rows}x{classes}-{dtype}", logits, targets, {"grad_output": 0.3}
            yield f"axis-{rows}x{classes}-{dtype}", np.asfortranarray(logits), targets, {"reduction": "sum"}


def general_cases():
    """Name and results of every case of the general rows: options, soft targets, Hessians, statistics, activations."""
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        rng = np.random.default_rng(12)
        for rows, classes in ((200, 3), (150, 10), (40, 96), (9, 97), (20, 1000), (3, 5003), (2, 70_001)):
            logits = (rng.normal(0, 4, (rows, classes)) * rng.choice([1, 1, 20, 500], (rows, 1))).astype(dtype)
            logits[:: max(2, rows // 3), classes // 2] = -np.inf
            logits[1 :: max(2, rows // 3), classes // 3] = np.nan
            ids, q = rng.integers(0, classes, rows), rng.random((rows, classes)).astype(dtype)
            sparse = fastce.SparseTargets(rng.integers(0, classes, (rows, 3)), rng.random((rows, 3)))
            weight, shown = rng.random(classes), rng.random((rows, classes)) < 0.8
            shown[:, 0] = True
            every = {"sample_weight": rng.normal(size=rows), "weight": weight, "label_smoothing": 0.1, "z_loss": 0.01}
            every |= {"logit_scale": 0.7, "class_mask": shown, "softcap": 20.0}
            options = [{}] + [{name: value} for name, value in every.items()] + [every]
            options += [{"weight": weight, "label_smoothing": 0.2}, {"class_mask": shown[0], "label_smoothing": 0.2}]
            for number, chosen in enumerate(options):
                for kind, targets in (("ids", ids), ("dense", q), ("sparse", sparse)):
                    results = fastce.cross_entropy_with_grad(logits, targets, reduction="none", **chosen)
                    yield f"{kind}-{number}-{rows}x{classes}-{dtype}", results
                    if "softcap" not in chosen:
                        results = fastce.cross_entropy_with_grad_hess(logits, targets, reduction="none", **chosen)
                        yield f"hessian-{kind}-{number}-{rows}x{classes}-{dtype}", results
            for targets in (ids, q, sparse):
                yield f"statistics-{rows}x{classes}-{dtype}", fastce.cross_entropy_stats(logits, targets)
            for function in (fastce.softmax, fastce.log_softmax, fastce.logsumexp):
                yield f"{function.__name__}-{rows}x{classes}-{dtype}", (function(logits),)


if __name__ == "__main__":
    print("target", fastce.build_info()["target"])
    for name, logits, targets, options in cases():
        loss, gradient = fastce.cross_entropy_with_grad(logits, targets, **options)
        options.pop("grad_output", None)
        alone = fastce.cross_entropy(logits, targets, **options)
        print(name.replace(" ", ""), digest_of(loss, gradient, alone))
    for name, results in general_cases():
        print(name, digest_of(*results))
