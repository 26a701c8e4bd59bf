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


if __name__ == "__main__":
    print("target", fastce.build_info()["target"])
    for name, logits, targets, options in cases():
        loss, gradient = fastce.cross_entropy_with_grad(logits, targets, **options)
        options.pop("grad_output", None)
        alone = fastce.cross_entropy(logits, targets, **options)
        print(name.replace(" ", ""), digest_of(loss, gradient, alone))
