"""pytest-benchmark cases: fastce and fastce.reference side by side, for every shape, dtype and mode.

Each test first checks that its results agree with the reference. FASTCE_BENCH_QUICK=1: tiny shapes, seconds.
"""

import os
from functools import lru_cache

import numpy as np
import pytest

from .agreement import compare
from .cases import DTYPES, IN_PLACE, MODES, QUICK_CASES, find, make_logits, make_targets
from .contenders import Job, fastce, numpy_reference

SHAPES = ("32x10", "1024x10", "65536x10", "1024x1000", "256x32000", "2048x32000", "512x128256")
QUICK = os.environ.get("FASTCE_BENCH_QUICK", "0") not in ("", "0")
CASES = QUICK_CASES if QUICK else [find(shape) for shape in SHAPES]
CONTENDERS = {"fastce": fastce, "reference": numpy_reference}
# So many logits are worth one round, in all; the reference needs some 50 ns for each.
LOGITS_A_TEST = {"fastce": 2e8, "reference": 2e7}


@lru_cache(maxsize=1)  # the largest batch and its gradient fill a gigabyte
def batch(case, dtype):
    """Return logits, targets, a gradient buffer, and the loss and gradient by the reference."""
    from fastce import reference

    logits, targets = make_logits(case, dtype), make_targets(case)
    return logits, targets, np.zeros_like(logits), reference.cross_entropy_with_grad(logits, targets)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_speed(benchmark, case, dtype, mode, contender):
    logits, targets, out, expected = batch(case, dtype)
    call = CONTENDERS[contender](Job(logits, targets, out, mode)).call
    own_logits = logits.copy()

    def restore():
        np.copyto(own_logits, logits)
        return (own_logits,), {}

    differences, problem = compare(call(own_logits), expected, dtype)
    assert problem is None

    benchmark.group = f"{case.name} {dtype}, {mode}"
    benchmark.extra_info |= {"shape": case.name, "dtype": dtype, "mode": mode, "contender": contender} | differences
    # Short calls are timed several at once, except in place, where each one needs its logits restored before it.
    calls = int(np.clip(LOGITS_A_TEST[contender] / logits.size / 20, 1, 100))
    rounds = int(np.clip(LOGITS_A_TEST[contender] / logits.size, 3, 20))
    if QUICK:
        calls, rounds = 1, 3
    if mode == IN_PLACE:
        benchmark.pedantic(call, setup=restore, rounds=rounds, warmup_rounds=1)
    else:
        benchmark.pedantic(call, args=(logits,), rounds=rounds, iterations=calls, warmup_rounds=1)
