"""Sigmoid cross-entropy: exact to the guaranteed error, equal to the bit in every layout, refused where it is wrong.

The truth is computed in long double, as in truth.py, and checked here against mpmath; values and gradients are compared
with torch too. As a program this file prints digests of results, to compare compiled targets.
"""

import hashlib
import os
import re
import sys
import threading
import tracemalloc
import warnings
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_build import ON_X86_64, inspect, module_path, objdump  # noqa: F401
from test_gradients import central_differences
from test_layouts import READABLE_LAYOUTS, WRITABLE_LAYOUTS, assert_same_bits
from test_properties import dtypes
from test_threads import WITH_GIL, ticks  # noqa: F401
from truth import GRADIENT_BOUND, LOSS_BOUND

import fastce
from fastce import reference
from fastce.binary import binary_cross_entropy, binary_cross_entropy_with_grad

INFO = fastce.build_info()
OTHERS = [target for target in INFO["available_targets"] if target != INFO["target"]]

# Lengths around vectors, blocks of 1024, tasks and the buffers that other layouts pass through.
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 1000, 1023, 1024, 1025, 2047, 4099, 16_384, 40_001, 131_073, 300_000]


def bfloat16():
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


def problem(shape, dtype, soft=False, scale=6.0):
    rng = np.random.default_rng(shape)
    logits = (rng.normal(0, scale, shape) * rng.choice([0.01, 1, 30], shape, p=[0.1, 0.8, 0.1])).astype(dtype)
    targets = rng.random(shape) if soft else rng.integers(0, 2, shape)
    return logits, targets.astype(dtype)


def results(logits, targets, **options):
    """Losses, gradient and mean with these options."""
    losses, gradient = binary_cross_entropy_with_grad(logits, targets, reduction="none", **options)
    options = {**options, "out": None}
    options.pop("grad_output", None)
    mean, _ = binary_cross_entropy_with_grad(np.array(logits), targets, **options)
    return losses, gradient, mean


# ---- accuracy ------------------------------------------------------------------------------------------------------


def true_entries(logits, targets, pos_weight=1.0, sample_weight=1.0, smoothing=0.0):
    """Each entry's loss, gradient and the sum of the magnitudes of the gradient's two terms, in long double."""
    x, y, c, w = (np.asarray(part).astype(np.longdouble) for part in (logits, targets, pos_weight, sample_weight))
    e = np.longdouble(smoothing)
    a, b = c * ((1 - e) * y + e / 2), (1 - e) * (1 - y) + e / 2
    with np.errstate(all="ignore"):
        tail = np.exp(-np.abs(x))
        near, far = 1 / (1 + tail), tail / (1 + tail)
        of_positive = np.where(a == 0, 0, a * (np.maximum(-x, 0) + np.log1p(tail)))
        of_negative = np.where(b == 0, 0, b * (np.maximum(x, 0) + np.log1p(tail)))
        up, down = b * np.where(x > 0, near, far), a * np.where(x > 0, far, near)
    return w * (of_positive + of_negative), w * (up - down), np.abs(w) * (up + down)


def assert_within(got, true, magnitude, bound, what="", floor=0.0):
    """|got - true| <= bound * magnitude, or the smallest normal number (or `floor`) where that is more."""
    got = np.asarray(got)
    with np.errstate(over="ignore"):
        rounded = true.astype(got.dtype)
    overflows = np.isinf(rounded)
    np.testing.assert_array_equal(got[overflows], rounded[overflows], err_msg=what)
    floor = np.maximum(floor, np.longdouble(np.finfo(got.dtype).smallest_normal))
    allowed = np.maximum(np.where(overflows, 0, magnitude) * np.longdouble(bound), floor)
    error = np.abs(np.where(overflows, 0, got.astype(np.longdouble)) - np.where(overflows, 0, true))
    excess = np.where(np.isnan(error), np.inf, error / allowed)
    assert excess.size == 0 or excess.max() <= 1, (
        f"{what}: entry {np.argmax(excess)}: got {got.flat[np.argmax(excess)]!r}, true "
        f"{true.flat[np.argmax(excess)]!r}, {excess.max():.3g} times the allowed error"
    )


def assert_accurate(logits, targets, pos_weight=None, sample_weight=None, smoothing=0.0):
    options = {"pos_weight": pos_weight, "sample_weight": sample_weight, "label_smoothing": smoothing}
    losses, gradient = binary_cross_entropy_with_grad(logits, targets, reduction="none", **options)
    alone = binary_cross_entropy(logits, targets, reduction="none", **options)
    assert_same_bits(alone, losses)
    name = gradient.dtype.name
    weights = [1.0 if weight is None else weight for weight in (pos_weight, sample_weight)]
    true_losses, true_gradient, magnitude = true_entries(logits, targets, *weights, smoothing)
    # The exponential is at its best times 2^32 and in float64: below that even a huge coefficient cannot bring it back.
    floor = np.longdouble(np.max(weights[0])) * np.longdouble(2.0) ** -1054
    assert_within(losses, true_losses, np.abs(true_losses), LOSS_BOUND[name], "loss", floor)
    assert_within(gradient, true_gradient, magnitude, GRADIENT_BOUND[name], "gradient", floor)


def hard_logits(dtype):
    """Logits of every magnitude: around 0, at the borders of the exponential's reduction, where it underflows."""
    limits = np.finfo(dtype)
    steps = np.arange(-1100, 1101) * np.log(2) / 2  # on and between the borders of the reduction
    powers = np.concatenate([2.0 ** np.arange(-1074, 1024, 3)]).astype(np.longdouble)
    named = [16.6, 17, 36.7, 37, 87.3, 87.4, 88.1, 103.9, 104.1, 708.3, 708.4, 709.8, 745.2, 1000, 1e4, 1e8, 1e30]
    with np.errstate(over="ignore"):
        positive = np.concatenate([powers, named, np.abs(steps)]).astype(dtype)
    positive = positive[np.isfinite(positive)]
    around = np.concatenate([positive, np.nextafter(positive, dtype.type(0)), [limits.max, limits.smallest_normal]])
    return np.concatenate([around, -around]).astype(dtype)


def random_logits(dtype, rng, size=60_000):
    scale = rng.choice([0.001, 0.3, 1, 5, 20, 60, 300], size)
    return (rng.normal(0, 1, size) * scale).astype(dtype)


def test_the_truth_agrees_with_mpmath(dtype, rng):
    mpmath.mp.prec = 200
    logits = np.concatenate([hard_logits(dtype)[::19], random_logits(dtype, rng, 200)])
    logits = logits[np.abs(logits) < 11_000]  # e^-11355 is below what long double holds
    soft = np.where(rng.random(len(logits)) < 0.5, rng.random(len(logits)), logits > 0).astype(dtype)
    losses, gradient, magnitude = true_entries(logits, soft, 3.0, -0.7, 0.1)
    for i in range(len(logits)):
        x, y, e = mpmath.mpf(float(logits[i])), mpmath.mpf(float(soft[i])), mpmath.mpf(0.1)
        y = (1 - e) * y + e / 2
        up, down = (1 - y) / (1 + mpmath.exp(-x)), 3 * y / (1 + mpmath.exp(x))
        loss = 3 * y * mpmath.log1p(mpmath.exp(-x)) + (1 - y) * mpmath.log1p(mpmath.exp(x))
        for got, true, size in (
            (losses[i], -mpmath.mpf(0.7) * loss, abs(loss)),
            (gradient[i], -mpmath.mpf(0.7) * (up - down), up + down),
            (magnitude[i], mpmath.mpf(0.7) * (up + down), up + down),
        ):
            assert abs(as_mpf(got) - true) <= mpmath.mpf(2) ** -60 * size


def as_mpf(value):
    high = float(value)
    return mpmath.mpf(high) + mpmath.mpf(float(value - np.longdouble(high)))


@pytest.mark.parametrize("target", [0, 1])
def test_hard_targets_are_accurate(target, dtype, rng):
    for logits in (hard_logits(dtype), random_logits(dtype, rng)):
        assert_accurate(logits, np.full(len(logits), target))


def test_tiny_losses_keep_their_digits(dtype):
    gaps = np.arange(10, 87 if dtype == np.float32 else 708, dtype=dtype)
    losses, gradient = binary_cross_entropy_with_grad(gaps, np.ones_like(gaps), reduction="none")
    assert (losses > 0).all() and (gradient < 0).all()
    np.testing.assert_allclose(losses, np.exp(-gaps.astype(np.longdouble)).astype(dtype), rtol=5e-5)
    np.testing.assert_allclose(-gradient, losses, rtol=5e-5)


def test_soft_targets_are_accurate(dtype, rng):
    for logits in (hard_logits(dtype), random_logits(dtype, rng)):
        spread = [0, 1e-30, 1e-7, 0.1, 0.5, 0.9, 1 - 2.0**-24, 1]
        soft = np.where(rng.random(len(logits)) < 0.5, rng.random(len(logits)), rng.choice(spread, len(logits)))
        for kind in (np.float32, np.float64):
            assert_accurate(logits, soft.astype(kind))


@pytest.mark.parametrize("smoothing", [1e-12, 0.1, 0.5, 1 - 1e-9, 1])
def test_smoothed_targets_are_accurate(smoothing, dtype, rng):
    for logits in (hard_logits(dtype), random_logits(dtype, rng)):
        assert_accurate(logits, rng.integers(0, 2, len(logits)), smoothing=smoothing)
        assert_accurate(logits, rng.random(len(logits)).astype(dtype), smoothing=smoothing)


@pytest.mark.parametrize("pos_weight", [0, 1e-30, 0.3, 7, 1e10, 1e30, 1e300])
def test_a_pos_weight_of_any_size_is_accurate(pos_weight, dtype, rng):
    for logits in (hard_logits(dtype), random_logits(dtype, rng)):
        assert_accurate(logits, rng.integers(0, 2, len(logits)), pos_weight=pos_weight)
        assert_accurate(logits, rng.random(len(logits)), pos_weight=pos_weight, smoothing=0.2)
        each = pos_weight * rng.random(len(logits))
        assert_accurate(logits, rng.integers(0, 2, len(logits)), pos_weight=each)


def test_sample_weights_are_accurate(dtype, rng):
    logits = random_logits(dtype, rng)
    logits = logits[np.abs(logits) < (80 if dtype == np.float32 else 700)]
    for weight in (rng.normal(0, 1, len(logits)), rng.normal(0, 1, len(logits)).astype(np.float32), 1e10, -3):
        assert_accurate(logits, rng.integers(0, 2, len(logits)), sample_weight=weight)
        assert_accurate(logits, rng.random(len(logits)), 2.5, weight, 0.1)


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 65_536.0, 1e25, 1e38])
def test_the_scale_of_the_gradient_leaves_it_accurate(factor, dtype, rng):
    logits = random_logits(dtype, rng)
    logits = logits[np.abs(logits) < (80 if dtype == np.float32 else 700)]
    targets = rng.integers(0, 2, len(logits))
    _, true, magnitude = true_entries(logits, targets)
    factor = np.longdouble(factor)
    for options in ({"reduction": "sum"}, {"reduction": "none"}, {"reduction": "mean", "denominator": 1.0}):
        gradient = binary_cross_entropy_with_grad(logits, targets, grad_output=float(factor), **options)[1]
        assert_within(gradient, true * factor, magnitude * factor, GRADIENT_BOUND[dtype.name])
    each = np.full(len(logits), float(factor))
    gradient = binary_cross_entropy_with_grad(logits, targets, reduction="none", grad_output=each)[1]
    assert_within(gradient, true * factor, magnitude * factor, GRADIENT_BOUND[dtype.name])


@pytest.mark.parametrize("size", LENGTHS)
def test_sums_and_means_are_accurate(size, dtype):
    logits, targets = problem((size,), dtype)
    weight = np.random.default_rng(size).normal(1, 1, size)
    for options, weights in (({}, 1.0), ({"sample_weight": weight}, weight)):
        losses = true_entries(logits, targets, 1.0, weights)[0]
        total, magnitude = losses.sum(), np.abs(losses).sum()
        divisor = np.broadcast_to(np.asarray(weights, np.longdouble), size).sum()
        bound = LOSS_BOUND[dtype.name]
        got = binary_cross_entropy(logits, targets, reduction="sum", **options)
        assert type(got) is float and abs(got - total) <= bound * magnitude
        mean = binary_cross_entropy(logits, targets, **options)
        assert type(mean) is float
        # The weights' own sum is rounded too.
        allowed = 2 * bound * magnitude + 1e-15 * abs(total / divisor) * np.abs(weights).sum()
        assert abs(mean - total / divisor) * abs(divisor) <= allowed
        halved = binary_cross_entropy(logits, targets, denominator=2 * size, **options)
        assert abs(halved - total / (2 * size)) <= bound * magnitude / size


# ---- values --------------------------------------------------------------------------------------------------------


def test_values_by_hand():
    losses, gradient = binary_cross_entropy_with_grad([0.0, np.log(3), -np.log(3)], [1, 1, 1], reduction="none")
    np.testing.assert_allclose(losses, np.log([2, 4 / 3, 4]), rtol=1e-15)
    np.testing.assert_allclose(gradient, [-0.5, -0.25, -0.75], rtol=1e-15)
    losses, gradient = binary_cross_entropy_with_grad(
        [0.0, np.log(3)], [1, 0], pos_weight=2, sample_weight=[3, -1], label_smoothing=0.2, reduction="none"
    )
    np.testing.assert_allclose(losses[0], 3 * (2 * 0.9 + 0.1) * np.log(2), rtol=1e-15)
    np.testing.assert_allclose(losses[1], -(2 * 0.1 * np.log(4 / 3) + 0.9 * np.log(4)), rtol=1e-15)
    np.testing.assert_allclose(gradient[0], 3 * (0.1 * 0.5 - 2 * 0.9 * 0.5), rtol=1e-15)
    np.testing.assert_allclose(gradient[1], -(0.9 * 0.75 - 2 * 0.1 * 0.25), rtol=1e-14)


def test_integers_and_bools_are_zeros_and_ones(dtype, rng):
    logits = rng.normal(0, 5, 3000).astype(dtype)
    bits = rng.integers(0, 2, 3000)
    expected = results(logits, bits.astype(dtype))
    integers = [np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)]
    for kind in (bool, *integers, np.float16, np.float32, np.float64):
        for got, wanted in zip(results(logits, bits.astype(kind)), expected, strict=True):
            assert_same_bits(got, wanted, kind)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_the_reference_agrees(soft, reduction, dtype, rng):
    logits, targets = problem((40, 7), dtype, soft)
    weights = {"pos_weight": rng.random(7) * 3, "sample_weight": rng.normal(1, 1, (40, 1))}
    for pos_weight in (None, 2.0, weights["pos_weight"]):
        for sample_weight in (None, 0.5, weights["sample_weight"]):
            for smoothing in (0.0, 0.1, 1.0):
                options = {"pos_weight": pos_weight, "sample_weight": sample_weight, "label_smoothing": smoothing}
                options |= {"reduction": reduction, "grad_output": -1.5}
                loss, gradient = binary_cross_entropy_with_grad(logits, targets, **options)
                expected = reference.binary_cross_entropy_with_grad(logits, targets, **options)
                tolerance = 2e-6 if dtype == np.float32 else 1e-13
                np.testing.assert_allclose(loss, expected[0], rtol=tolerance)
                largest = np.abs(gradient).max()
                np.testing.assert_allclose(gradient, expected[1], rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"pos_weight": 3.0}, {"pos_weight": "classes"}, {"sample_weight": "entries"}, {"sample_weight": "rows"},
     {"pos_weight": "classes", "sample_weight": "entries"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("soft", [False, True])
def test_torch_agrees(options, reduction, soft, dtype, rng):
    torch = pytest.importorskip("torch")
    logits, targets = problem((40, 7), dtype, soft)
    shapes = {"classes": 7, "entries": (40, 7), "rows": (40, 1)}
    arrays = {
        name: rng.random(shapes[value]).astype(dtype) if isinstance(value, str) else value
        for name, value in options.items()
    }
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in arrays.items()}
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        z,
        torch.tensor(targets, dtype=torch.float64),
        pos_weight=tensors.get("pos_weight"),
        weight=tensors.get("sample_weight"),
        reduction=reduction,
    )
    expected.sum().backward()
    if reduction == "mean":
        arrays["denominator"] = 280.0  # torch divides by the number of entries
    loss, gradient = binary_cross_entropy_with_grad(logits, targets, reduction=reduction, **arrays)
    tolerance = 2e-6 if dtype == np.float32 else 1e-12
    # torch itself loses tiny losses: its absolute error is that of 1 + e^-|x|.
    np.testing.assert_allclose(loss, expected.detach().numpy(), rtol=tolerance, atol=1e-14)
    np.testing.assert_allclose(gradient, z.grad.numpy(), rtol=tolerance, atol=tolerance * np.abs(gradient).max() / 10)


def test_the_mean_divides_by_the_weights_of_all_entries(rng):
    logits, targets = problem((30, 4), np.float64)
    for weight in (2.0, rng.random((30, 1)), rng.random(4), rng.random((1, 4)), rng.random((30, 4))):
        losses = binary_cross_entropy(logits, targets, reduction="none", sample_weight=weight)
        divisor = np.broadcast_to(weight, (30, 4)).sum()
        mean, gradient = binary_cross_entropy_with_grad(logits, targets, sample_weight=weight)
        np.testing.assert_allclose(mean, losses.sum() / divisor, rtol=1e-14)
        of_sum = binary_cross_entropy_with_grad(logits, targets, sample_weight=weight, reduction="sum")[1]
        np.testing.assert_allclose(gradient, of_sum / divisor, rtol=1e-14)


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"denominator": 3.7}, {"pos_weight": [0.5, 2, 0, 3, 1.5]}, {"label_smoothing": 0.3},
     {"sample_weight": [[1.0], [-2.0], [0.0], [0.5]]}],
    ids=str,
)  # fmt: skip
def test_finite_differences_give_the_gradient(options, rng):
    logits, soft = rng.normal(0, 2, (4, 5)), rng.random((4, 5))
    soft[0], soft[1] = 0, 1
    gradient = binary_cross_entropy_with_grad(logits, soft, **options)[1]
    expected = central_differences(lambda z: binary_cross_entropy(z, soft, **options), logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-10)


def test_the_chain_rule_through_an_array_of_factors(rng):
    logits, soft, factors = rng.normal(0, 2, (4, 5)), rng.random((4, 5)), rng.normal(0, 2, (4, 5))
    options = {"reduction": "none", "pos_weight": 2.0, "sample_weight": rng.random((4, 1))}
    gradient = binary_cross_entropy_with_grad(logits, soft, grad_output=factors, **options)[1]
    expected = central_differences(lambda z: float((factors * binary_cross_entropy(z, soft, **options)).sum()), logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-10)


def test_what_the_gradient_belongs_to(dtype):
    logits, targets = problem((300,), dtype)
    each = binary_cross_entropy_with_grad(logits, targets, reduction="none")[1]
    assert_same_bits(binary_cross_entropy_with_grad(logits, targets, reduction="sum")[1], each)
    mean = binary_cross_entropy_with_grad(logits, targets)[1]
    np.testing.assert_allclose(mean, each / 300, rtol=4 * np.finfo(dtype).eps)
    scaled = binary_cross_entropy_with_grad(logits, targets, grad_output=-2.0)[1]
    np.testing.assert_allclose(scaled, each / -150, rtol=4 * np.finfo(dtype).eps)


# ---- special values ------------------------------------------------------------------------------------------------


def test_infinite_logits(dtype):
    for options in ({}, {"pos_weight": 2.0}, {"sample_weight": np.ones(4)}, {"reduction": "none"}):
        losses, gradient = binary_cross_entropy_with_grad(
            np.array([np.inf, -np.inf, np.inf, -np.inf], dtype),
            [1, 0, 0, 1],
            **{"reduction": "none", **options},
        )
        weight = options.get("pos_weight", 1.0)
        assert losses.tolist() == [0, 0, np.inf, np.inf] and not np.signbit(losses).any()
        assert gradient.tolist() == [0, 0, 1, -weight]
    assert binary_cross_entropy(np.array([np.inf, 0.0], dtype), [0, 1]) == np.inf
    assert binary_cross_entropy(np.array([np.inf, -np.inf], dtype), [1, 0]) == 0


def test_infinite_logits_of_soft_targets(dtype):
    logits = np.array([np.inf, -np.inf], dtype)
    losses, gradient = binary_cross_entropy_with_grad(logits, np.array([0.25, 0.25], dtype), reduction="none")
    assert losses.tolist() == [np.inf, np.inf] and gradient.tolist() == [0.75, -0.25]
    losses, gradient = binary_cross_entropy_with_grad(logits, [1, 0], label_smoothing=0.5, reduction="none")
    assert losses.tolist() == [np.inf, np.inf] and gradient.tolist() == [0.25, -0.25]


def test_infinite_logits_on_a_side_without_weight(dtype):
    logits = np.array([np.inf, -np.inf], dtype)
    losses, gradient = binary_cross_entropy_with_grad(logits, [1, 1], pos_weight=0, reduction="none")
    assert losses.tolist() == [0, 0] and gradient.tolist() == [0, 0]


@pytest.mark.parametrize("size", [1, 5, 16, 33, 1024, 1030, 40_000])
def test_nan_stays_nan_and_alone(size, dtype):
    clean, targets = problem((size,), dtype)
    losses, gradient, _ = results(clean, targets)
    for at in {0, size // 2, size - 1}:
        spoiled = clean.copy()
        spoiled[at] = np.nan
        for options in ({}, {"pos_weight": 0.0}, {"label_smoothing": 0.1}, {"sample_weight": np.ones(size)}):
            got, slope, mean = results(spoiled, targets, **options)
            assert np.isnan(got[at]) and np.isnan(slope[at]) and np.isnan(mean)
            assert np.isnan(got).sum() == np.isnan(slope).sum() == 1
        got, slope, _ = results(spoiled, targets)
        others = np.arange(size) != at
        assert_same_bits(got[others], losses[others])
        assert_same_bits(slope[others], gradient[others])


def test_entries_of_weight_zero_are_not_read(dtype):
    logits, targets = problem((2000,), dtype, soft=True)
    weight = np.random.default_rng(1).random(2000)
    weight[::3] = 0
    weight[3] = -0.0
    expected = results(logits, targets, sample_weight=weight)
    poison = np.resize([np.nan, np.inf, -np.inf], 2000)
    logits[::3], targets[::3] = poison[::3], poison[::3]
    for got, wanted in zip(results(logits, targets, sample_weight=weight), expected, strict=True):
        assert_same_bits(got, wanted)
    losses, gradient = binary_cross_entropy_with_grad(
        logits, targets, sample_weight=weight, reduction="none", grad_output=np.where(weight == 0, np.nan, 1)
    )
    assert (losses[::3] == 0).all() and (gradient[::3] == 0).all() and not np.signbit(losses[::3]).any()
    whole = np.where(weight == 0, -1, 1)
    assert np.isfinite(binary_cross_entropy(logits, whole, sample_weight=weight))
    assert binary_cross_entropy(logits, targets, sample_weight=0, reduction="sum") == 0


def test_no_loss_is_below_zero(dtype, rng):
    logits = np.concatenate([hard_logits(dtype), np.array([0.0, -0.0, np.inf, -np.inf], dtype)])
    for targets in (np.zeros(len(logits)), np.ones(len(logits)), rng.random(len(logits)).astype(dtype)):
        for options in ({}, {"pos_weight": 0.0}, {"sample_weight": rng.random(len(logits))}, {"label_smoothing": 1.0}):
            losses = binary_cross_entropy(logits, targets, reduction="none", **options)
            assert (losses >= 0).all() and not np.signbit(losses).any()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 5)])
def test_no_entries(shape, dtype):
    logits = np.empty(shape, dtype)
    for targets in (logits, np.empty(shape, int), 1):
        loss, gradient = binary_cross_entropy_with_grad(logits, targets)
        assert np.isnan(loss) and gradient.shape == shape and gradient.dtype == dtype
        assert binary_cross_entropy(logits, targets, reduction="sum") == 0
        assert binary_cross_entropy(logits, targets, reduction="none").shape == shape
        assert binary_cross_entropy(logits, targets, denominator=3) == 0
    assert np.isnan(binary_cross_entropy([], []))


def test_weights_that_add_up_to_zero(dtype):
    logits = np.array([1.0, np.nan, 3.0, 4.0], dtype)
    for weight in (0, [0, 0, 0, 0], [1, 2, -1, -2]):
        loss, gradient = binary_cross_entropy_with_grad(logits, [0, 1, 0, 1], sample_weight=weight)
        assert np.isnan(loss) and gradient.tolist() == [0, 0, 0, 0]
    loss, gradient = binary_cross_entropy_with_grad(logits[2:], [0, 1], sample_weight=[1, -1], denominator=2.0)
    assert np.isfinite(loss) and (gradient != 0).all()


def test_logits_without_an_axis(dtype):
    for logit in (dtype.type(2), np.array(2, dtype), np.array(2, dtype.newbyteorder())):
        loss, gradient = binary_cross_entropy_with_grad(logit, 1)
        assert type(loss) is float and abs(loss - 0.12692801104297263) < 1e-7
        assert gradient.shape == () and type(gradient) is np.ndarray and gradient.dtype == dtype
        losses = binary_cross_entropy(logit, 1.0, reduction="none")
        assert losses.shape == () and losses.dtype == dtype
    out = np.zeros((), dtype)
    assert binary_cross_entropy_with_grad(np.array(2, dtype), True, out=out)[1] is out and out < 0
    assert binary_cross_entropy(2.0, 1) == binary_cross_entropy(np.float64(2), 1)


def test_no_warning_is_issued(dtype):
    logits = hard_logits(dtype)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        for options in ({}, {"pos_weight": 1e300}, {"sample_weight": np.full(len(logits), 1e300)}):
            binary_cross_entropy_with_grad(logits, np.ones(len(logits)), reduction="none", **options)
        half = np.float16([1e4, -1e4])
        binary_cross_entropy_with_grad(half, [0, 1], grad_output=1e30)


# ---- half types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_types_are_computed_in_float32_and_rounded_once(name):
    half = bfloat16() if name == "bfloat16" else np.dtype(np.float16)
    logits, targets = problem((70, 9), np.float32, soft=True)
    logits, targets = logits.astype(half), targets.astype(half)
    single = logits.astype(np.float32), targets.astype(np.float32)
    for options in ({}, {"pos_weight": np.arange(9)}, {"label_smoothing": 0.1, "sample_weight": np.ones((70, 1))}):
        losses, gradient, mean = results(logits, targets, **options)
        expected = results(*single, **options)
        assert losses.dtype == np.float32 and gradient.dtype == half
        assert_same_bits(losses, expected[0])
        assert mean == expected[2]
        assert_same_bits(gradient.astype(np.float32), expected[1].astype(half).astype(np.float32))
        given = logits.copy()
        assert binary_cross_entropy_with_grad(given, targets, reduction="none", out=given, **options)[1] is given
        assert_same_bits(given.astype(np.float32), gradient.astype(np.float32))
        out = np.zeros((9, 70), half).T
        assert binary_cross_entropy_with_grad(logits, targets, reduction="none", out=out, **options)[1] is out
        assert_same_bits(out.astype(np.float32), gradient.astype(np.float32))


def test_bfloat16_is_known_without_importing_ml_dtypes(run_python):
    run_python("-c", "import sys, fastce.binary; assert 'ml_dtypes' not in sys.modules")


# ---- layouts -------------------------------------------------------------------------------------------------------

OPTIONS = [{}, {"pos_weight": 2.0, "label_smoothing": 0.1}, {"sample_weight": 0.5}]
CASES = [(shape, options) for shape in [(1,), (7, 3), (1030,), (40, 65), (3, 4, 5, 6)] for options in OPTIONS]
CASES += [((2, 70_000), {}), ((70_000, 2), {}), ((150, 1000), {"sample_weight": 2.0})]  # larger than the buffers


@pytest.mark.parametrize("layout", READABLE_LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_layout_of_logits_and_targets(layout, dtype):
    for shape, options in CASES:
        logits, targets = problem(shape, dtype, soft=True)
        expected = results(logits, targets, **options)
        for pair in ((layout(logits), targets), (logits, layout(targets)), (layout(logits), layout(targets))):
            before = pair[0].tobytes()
            got = results(*pair, **options)
            for one, wanted in zip(got, expected, strict=True):
                assert_same_bits(one, wanted, shape)
            assert type(got[0]) is type(got[1]) is np.ndarray and got[1].dtype.isnative
            assert pair[0].tobytes() == before
            assert binary_cross_entropy(*pair, **options) == expected[2]


@pytest.mark.parametrize("layout", READABLE_LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_layout_of_weights_and_factors(layout, dtype, rng):
    for shape in ((7, 3), (300, 1000)):
        logits, targets = problem(shape, dtype)
        options = {
            "pos_weight": rng.random(shape),
            "sample_weight": rng.normal(size=shape),
            "grad_output": rng.normal(size=shape),
        }
        expected = results(logits, targets, **options)
        for name, value in options.items():
            got = results(logits, targets, **{**options, name: layout(value)})
            for one, wanted in zip(got, expected, strict=True):
                assert_same_bits(one, wanted, name)


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_layout_of_out_and_in_place(layout, dtype):
    for shape, options in CASES:
        logits, targets = problem(shape, dtype, soft=True)
        expected = results(logits, targets, **options)
        out = layout(np.full_like(logits, np.nan))
        assert binary_cross_entropy_with_grad(logits, targets, reduction="none", out=out, **options)[1] is out
        assert_same_bits(np.array(out), expected[1], shape)
        place = layout(logits.copy())
        losses, gradient = binary_cross_entropy_with_grad(place, targets, reduction="none", out=place, **options)
        assert gradient is place
        assert_same_bits(losses, expected[0], shape)
        assert_same_bits(np.array(place), expected[1], shape)
        place = layout(logits.copy())
        of_mean = binary_cross_entropy_with_grad(logits, targets, **options)
        assert binary_cross_entropy_with_grad(place, targets, out=place, **options)[0] == expected[2] == of_mean[0]
        assert_same_bits(np.array(place), of_mean[1], shape)


@pytest.mark.parametrize("size", LENGTHS)
def test_every_length_and_address_gives_the_same_bits(size, dtype):
    logits, targets = problem((size + 40,), dtype)
    losses, gradient, _ = results(logits, targets)
    for start in (0, 1, 3, 16, 31, 40):
        part = slice(start, start + size)
        out = np.full(size + 80, 8.5, dtype)
        given = [array[part] for array in (logits, targets)]
        got, _ = binary_cross_entropy_with_grad(*given, reduction="none", out=out[start : start + size])
        assert_same_bits(got, losses[part])
        assert_same_bits(out[part], gradient[part])
        assert (out[:start] == 8.5).all() and (out[start + size :] == 8.5).all()
        mean = binary_cross_entropy(*given)
        assert mean == binary_cross_entropy(*(array.copy() for array in given))


def test_arguments_are_broadcast_to_the_logits(dtype, rng):
    shape = (20, 300, 30)
    logits = rng.normal(0, 4, shape).astype(dtype)
    for part in ((30,), (300, 30), (300, 1), (20, 1, 1), (20, 1, 30), (1,), ()):
        for name in ("targets", "pos_weight", "sample_weight"):
            arguments = {"targets": rng.integers(0, 2, shape), name: rng.integers(0, 2, part) * 1.0}
            full = {key: np.broadcast_to(value, shape).copy() for key, value in arguments.items()}
            if name != "targets":
                arguments[name] += 0.5
                full[name] += 0.5
            got = binary_cross_entropy_with_grad(logits, **arguments, reduction="none")
            wanted = binary_cross_entropy_with_grad(logits, **full, reduction="none")
            assert_same_bits(got[0], wanted[0], (name, part))
            assert_same_bits(got[1], wanted[1], (name, part))
            mean = binary_cross_entropy(logits, **full)
            np.testing.assert_allclose(binary_cross_entropy(logits, **arguments), mean, rtol=1e-13)


def test_strides_of_zero(dtype, rng):
    column = rng.normal(0, 3, (300, 1)).astype(dtype)
    logits, weight = np.broadcast_to(column, (300, 500)), np.broadcast_to(np.abs(column), (300, 500))
    targets = np.broadcast_to(np.uint8(1), (300, 500))
    expected = results(logits.copy(), targets.copy(), sample_weight=weight.copy())
    for got, wanted in zip(results(logits, targets, sample_weight=weight), expected, strict=True):
        assert_same_bits(got, wanted)


def test_lists_are_float64():
    logits, targets = problem((5, 3), np.float64)
    for got, wanted in zip(results(logits.tolist(), targets.tolist()), results(logits, targets), strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.thread_unsafe(reason="tracemalloc counts the memory of all threads")
def test_memory_of_a_fixed_size(dtype):
    # Whatever passes through buffers does so in parts: beside the gradient nothing grows with the batch.
    size = 3_000_000
    logits = np.zeros((2, size), dtype).T[:, :1]
    targets = np.zeros((2, size), np.int16).T[:, :1]
    weight = np.broadcast_to(np.float16(1), (size, 1))
    out = np.empty((2, size), dtype).T[:, :1]
    tracemalloc.start()
    try:
        binary_cross_entropy_with_grad(logits, targets, sample_weight=weight, pos_weight=weight, out=out)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
        tracemalloc.reset_peak()
        binary_cross_entropy_with_grad(logits.copy(order="F")[:, 0], targets[:, 0].astype(dtype))
        # Two copies made here, the gradient, and no more.
        assert tracemalloc.get_traced_memory()[1] < 3 * size * dtype.itemsize + 1_000_000
    finally:
        tracemalloc.stop()


# ---- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", LENGTHS)
def test_any_number_of_threads_gives_the_same_bits(size, dtype):
    logits, targets = problem((size,), dtype, soft=True)
    for options in ({}, {"pos_weight": 2.0}, {"sample_weight": np.full(size, 0.3)}):
        one = results(logits, targets, num_threads=1, **options)
        for num_threads in (2, 3, 7, 10**9, 2**100, None):
            for got, wanted in zip(results(logits, targets, num_threads=num_threads, **options), one, strict=True):
                assert_same_bits(got, wanted)
            strided = np.repeat(logits, 2)[::2]
            for got, wanted in zip(results(strided, targets, num_threads=num_threads, **options), one, strict=True):
                assert_same_bits(got, wanted)
    assert binary_cross_entropy(logits, targets) == binary_cross_entropy(logits, targets, num_threads=1)


def test_concurrent_callers_get_the_same_bits(dtype):
    problems = [problem((size,), dtype) for size in (50, 5000, 200_000)]
    expected = [binary_cross_entropy_with_grad(*each) for each in problems]
    failures = []

    def work(k):
        try:
            for repeat in range(5):
                for each, (loss, gradient) in zip(problems, expected, strict=True):
                    got = binary_cross_entropy_with_grad(*each, num_threads=1 + (k + repeat) % 3)
                    assert got[0] == loss
                    np.testing.assert_array_equal(got[1], gradient)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)


@WITH_GIL
@pytest.mark.parametrize("options", [{}, {"out": True}, {"reduction": "sum"}], ids=str)
def test_python_runs_on_while_a_kernel_runs(options, ticks):  # noqa: F811
    logits, targets = np.zeros(2_000_000, np.float32), np.zeros(2_000_000, np.float32)
    options = options | ({"out": np.empty_like(logits)} if "out" in options else {})
    grown = 0
    for _ in range(300):
        before = ticks[0]
        binary_cross_entropy_with_grad(logits, targets, **options)
        grown += ticks[0] > before
        if grown >= 3:
            break
    assert grown >= 3


FORKED = """
import os, signal, warnings
import numpy as np
from fastce.binary import binary_cross_entropy_with_grad as loss_and_grad
warnings.simplefilter("ignore", DeprecationWarning)
logits = np.random.default_rng(0).normal(size=500_000)
targets = (logits > 0.3).astype(float)
expected = loss_and_grad(logits, targets, num_threads=2)
pid = os.fork()
if pid == 0:
    signal.alarm(30)  # a child that hangs is killed
    for num_threads in (2, None, 1):
        loss, gradient = loss_and_grad(logits, targets, num_threads=num_threads)
        if loss != expected[0] or (gradient != expected[1]).any():
            os._exit(1)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_children_of_a_fork_work(run_python):
    run_python("-c", FORKED, timeout=60)


# ---- properties ----------------------------------------------------------------------------------------------------


@given(hnp.arrays(np.uint32, st.integers(1, 90)), st.integers(0, 2**32))
def test_any_bits_at_all_as_float32_logits(bits, seed):
    logits = bits.view(np.float32)
    rng = np.random.default_rng(seed)
    targets = np.where(rng.random(len(logits)) < 0.5, rng.integers(0, 2, len(logits)), rng.random(len(logits)))
    targets = targets.astype(np.float32)
    losses, gradient = binary_cross_entropy_with_grad(logits, targets, reduction="none")
    bad = np.isnan(logits)
    assert np.isnan(losses[bad]).all() and np.isnan(gradient[bad]).all()
    assert (losses[~bad] >= 0).all() and np.isfinite(gradient[~bad]).all()
    finite = np.isfinite(logits)
    assert_accurate(logits[finite], targets[finite])


@st.composite
def batches(draw):
    """Logits (N, C), targets and options."""
    dtype = draw(dtypes)
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = (rng.normal(0, 1, shape) * draw(st.sampled_from([0.01, 1, 10, 60]))).astype(dtype)
    targets = rng.integers(0, 2, shape) if draw(st.booleans()) else rng.random(shape).astype(dtype)
    options = {}
    broadcast = st.sampled_from([shape, shape[1:], (shape[0], 1), ()])
    if draw(st.booleans()):
        options["pos_weight"] = rng.random(draw(broadcast)) * 3
    if draw(st.booleans()):
        options["sample_weight"] = rng.normal(0, 1, draw(broadcast))
    if draw(st.booleans()):
        options["label_smoothing"] = draw(st.floats(0, 1))
    return logits, targets, options


@given(batches())
def test_generated_batches_are_accurate(batch):
    logits, targets, options = batch
    options = dict(options)
    assert_accurate(
        logits, targets, options.get("pos_weight"), options.get("sample_weight"), options.get("label_smoothing", 0.0)
    )


@given(batches(), st.integers(0, 2**32))
def test_entries_do_not_know_their_places(batch, seed):
    logits, targets, options = batch
    order = np.random.default_rng(seed).permutation(logits.size)
    flat = {
        name: np.broadcast_to(value, logits.shape).reshape(-1) if name.endswith("weight") else value
        for name, value in options.items()
    }
    moved = {name: value[order] if name.endswith("weight") else value for name, value in flat.items()}
    losses, gradient, _ = results(logits, targets, **options)
    got, slope, _ = results(logits.reshape(-1)[order], targets.reshape(-1)[order], **moved)
    assert_same_bits(got, losses.reshape(-1)[order])
    assert_same_bits(slope, gradient.reshape(-1)[order])


@given(batches())
def test_yes_and_no_are_mirror_images(batch):
    logits, targets, options = batch
    if targets.dtype.kind == "f":
        targets = np.round(targets * 1024) / 1024  # so that 1 - y is exact
    options = {name: value for name, value in options.items() if name != "pos_weight"}
    losses, gradient, _ = results(logits, targets, **options)
    mirrored, slope, _ = results(-logits, 1 - targets, **options)
    tolerance = 4e-7 if logits.dtype == np.float32 else 2e-15
    np.testing.assert_allclose(mirrored, losses, rtol=tolerance)
    np.testing.assert_allclose(slope, -gradient, rtol=tolerance, atol=tolerance * np.abs(gradient).max())


@given(batches(), st.data())
def test_a_bad_target_anywhere_is_found(batch, data):
    logits, targets, options = batch
    options.pop("sample_weight", None)
    at = data.draw(st.integers(0, logits.size - 1))
    bad = data.draw(st.sampled_from([-1, 2, 255, -(2**31)]))
    if targets.dtype.kind == "f":
        bad = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 1.0000002, -1e-30, 2.0, -1.0]))
    targets.flat[at] = bad
    out = np.full_like(logits, 3.25)
    position = ", ".join(str(int(i)) for i in np.unravel_index(at, logits.shape))
    for call in (
        lambda: binary_cross_entropy_with_grad(logits, targets, out=out, **options),
        lambda: binary_cross_entropy_with_grad(logits, targets, **options),
        lambda: binary_cross_entropy(np.asfortranarray(logits), targets, **options),
    ):
        with pytest.raises(ValueError, match=re.escape(f"targets[{position}] = ")):
            call()
    assert (out == 3.25).all()


# ---- errors --------------------------------------------------------------------------------------------------------


class Call:
    """A valid call, to be spoiled in one argument."""

    def __init__(self):
        rng = np.random.default_rng(5)
        self.logits = rng.normal(0, 3, (6, 5)).astype(np.float32)
        self.targets = rng.integers(0, 2, (6, 5))
        self.options = {"out": np.full((6, 5), 12345.678, np.float32)}

    def arrays(self):
        return [
            array for array in (self.logits, self.targets, *self.options.values())
            if isinstance(array, np.ndarray) and array.dtype != object
        ]  # fmt: skip


def refuse(call, exception, *patterns, loss_too=True):
    """Both functions raise exactly this kind of error, its message has all the patterns, and no array has changed."""
    before = [array.tobytes() for array in call.arrays()]
    alone = {name: value for name, value in call.options.items() if name not in ("out", "grad_output")}
    calls = [(binary_cross_entropy_with_grad, call.options)] + [(binary_cross_entropy, alone)] * loss_too
    for function, options in calls:
        with pytest.raises((TypeError, ValueError)) as caught:
            function(call.logits, call.targets, **options)
        assert type(caught.value) is exception
        for pattern in patterns:
            assert re.search(pattern, str(caught.value)), f"no {pattern!r} in: {caught.value}"
    assert [array.tobytes() for array in call.arrays()] == before


@pytest.mark.parametrize(
    ("logits", "got"),
    [
        (np.zeros((6, 5), int), "int64"),
        (np.zeros((6, 5), bool), "bool"),
        (np.zeros((6, 5), complex), "complex128"),
        (np.zeros((6, 5), np.longdouble), np.dtype(np.longdouble).name),
        (np.zeros((6, 5), object), "object"),
        (np.full((6, 5), "1.5"), "<U3"),
        ([[0] * 5] * 6, "int64"),
        (None, "object"),
        (1, "int64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_logits_of_a_kind_that_cannot_be_right(logits, got):
    call = Call()
    call.logits = logits
    refuse(call, TypeError, "logits", "float32", "float64", got)


def test_masked_arrays_are_refused_unless_nothing_is_masked():
    call = Call()
    masked = np.ma.array(call.logits, mask=np.eye(6, 5))
    for name in ("logits", "targets"):
        call = Call()
        setattr(call, name, masked)
        refuse(call, TypeError, name, "mask")
    for name in ("pos_weight", "sample_weight", "grad_output"):
        call = Call()
        call.options[name] = masked
        refuse(call, TypeError, name, "mask", loss_too=name != "grad_output")


@pytest.mark.parametrize(
    "targets",
    [np.zeros((6, 5), complex), np.zeros((6, 5), object), np.full((6, 5), "1"), np.zeros((6, 5), "m8[s]"), None,
     np.zeros((6, 5), np.longdouble)],
    ids=lambda value: str(getattr(value, "dtype", value)),
)  # fmt: skip
def test_targets_of_a_kind_that_cannot_be_right(targets):
    call = Call()
    call.targets = targets
    refuse(call, TypeError, "targets", re.escape(str(np.asarray(targets).dtype)))


@pytest.mark.parametrize(
    ("shape", "hint"),
    [((6,), ""), ((6, 5, 1), r"targets\[\.\.\., 0\]"), ((5, 6), "transposed"), ((2, 6, 5), "broadcast"), ((4, 5), ""),
     ((0,), "")],
    ids=str,
)  # fmt: skip
def test_arguments_that_do_not_broadcast(shape, hint):
    call = Call()
    call.targets = np.zeros(shape, int)
    refuse(call, ValueError, "targets", re.escape("(6, 5)"), re.escape(str(shape)), hint)
    for name in ("pos_weight", "sample_weight"):
        call = Call()
        call.options[name] = np.ones(shape)
        refuse(call, ValueError, name, re.escape("(6, 5)"), re.escape(str(shape)), hint.replace("targets", name))


def test_a_column_of_logits_against_a_row_of_targets():
    call = Call()
    call.logits, call.targets, call.options["out"] = np.zeros((30, 1)), np.zeros(30), np.zeros((30, 1))
    refuse(call, ValueError, r"targets", r"\(30, 1\)", r"\(30,\)", r"np\.newaxis")


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
def test_integers_other_than_0_and_1(kind):
    for value in {np.iinfo(kind).min, np.iinfo(kind).max, 2} - {0, 1}:
        call = Call()
        call.targets = call.targets.astype(kind)
        call.targets[4, 2] = call.targets[5, 1] = value
        refuse(call, ValueError, "targets must be 0 or 1", re.escape(f"targets[4, 2] = {value}"), "cross_entropy")


def test_labels_of_minus_one_get_a_hint():
    call = Call()
    call.targets = 2 * call.targets - 1
    refuse(call, ValueError, "-1", r"\(targets \+ 1\) / 2", "sample_weight")


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [-0.25, 1.5, np.nan, np.inf, -np.inf])
def test_floats_outside_0_and_1(kind, value):
    for at in ((0, 0), (3, 4), (5, 4)):
        call = Call()
        call.targets = call.targets.astype(kind)
        call.targets[at] = value
        got = re.escape(str(kind(value)))
        refuse(call, ValueError, r"targets must be in \[0, 1\]", re.escape(f"targets[{at[0]}, {at[1]}] = ") + got)
        call.options["sample_weight"] = np.ones(5)
        refuse(call, ValueError, re.escape(f"targets[{at[0]}, {at[1]}] = ") + got)
    call = Call()
    call.targets = np.array([0, 1, value, 0, 1], kind)
    refuse(call, ValueError, re.escape("targets[2] = "))
    call.options["sample_weight"] = np.ones((6, 1))
    refuse(call, ValueError, re.escape("targets[2] = "))
    call.targets = kind(value)
    refuse(call, ValueError, "targets = ")


def test_targets_at_the_borders_are_allowed(dtype):
    borders = np.array([0.0, -0.0, 1.0, np.finfo(dtype).smallest_subnormal, 1 - np.finfo(dtype).epsneg], dtype)
    assert np.isfinite(binary_cross_entropy(np.ones(5, dtype), borders))


@pytest.mark.parametrize("name", ["pos_weight", "sample_weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(name, value):
    call = Call()
    call.options[name] = value
    refuse(call, ValueError, name, "finite", str(value))
    for kind in (np.float16, np.float32, np.float64):
        call.options[name] = np.array([1, 1, value, 1, 1], kind)
        refuse(call, ValueError, "finite", re.escape(f"{name}[2] = {value}"))


def test_a_negative_pos_weight():
    call = Call()
    call.options["pos_weight"] = -1e-9
    refuse(call, ValueError, "pos_weight", ">= 0")
    call.options["pos_weight"] = np.array([1, 1, 1, -1, 1])
    refuse(call, ValueError, ">= 0", re.escape("pos_weight[3] = -1"))


@pytest.mark.parametrize("name", ["pos_weight", "sample_weight", "grad_output"])
@pytest.mark.parametrize("value", ["2", 2j, True, [None] * 5, np.ones(5, np.longdouble)], ids=str)
def test_weights_and_factors_of_a_kind_that_cannot_be_right(name, value):
    call = Call()
    call.options[name] = value
    refuse(call, TypeError, name, loss_too=name != "grad_output")


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan, np.inf])
def test_label_smoothing_out_of_range(value):
    call = Call()
    call.options["label_smoothing"] = value
    refuse(call, ValueError, "label_smoothing", r"\[0, 1\]", str(value))


@pytest.mark.parametrize("value", ["0.1", None, 1j, [0.1]])
def test_label_smoothing_of_another_kind(value):
    call = Call()
    call.options["label_smoothing"] = value
    refuse(call, TypeError, "label_smoothing")


def test_reduction_and_denominator():
    for value, exception in (("average", ValueError), (None, TypeError), (1, TypeError)):
        call = Call()
        call.options["reduction"] = value
        refuse(call, exception, "reduction", "mean", "sum", "none")
    for value in (0, -1.0, np.nan, np.inf):
        call = Call()
        call.options["denominator"] = value
        refuse(call, ValueError, "denominator", "finite")
    for reduction in ("sum", "none"):
        call = Call()
        call.options |= {"reduction": reduction, "denominator": 2.0}
        refuse(call, ValueError, "denominator", "mean", reduction)
    call = Call()
    call.options["denominator"] = "2"
    refuse(call, TypeError, "denominator")


@pytest.mark.parametrize(
    ("value", "exception"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_num_threads(value, exception):
    call = Call()
    call.options["num_threads"] = value
    refuse(call, exception, "num_threads")


def test_grad_output_of_the_wrong_shape():
    call = Call()
    call.options["grad_output"] = np.ones((6, 5))
    refuse(call, ValueError, "grad_output", "none", loss_too=False)
    call.options["reduction"] = "none"
    call.options["grad_output"] = np.ones(5)
    refuse(call, ValueError, "grad_output", re.escape("(6, 5)"), re.escape("(5,)"), loss_too=False)


@pytest.mark.parametrize(
    ("out", "exception", "pattern"),
    [
        ([[0.0] * 5] * 6, TypeError, "list"),
        (np.zeros((6, 5)), TypeError, "float32.*float64"),
        (np.zeros((6, 5), ">f4"), TypeError, "byte order"),
        (np.zeros((5, 6), np.float32), ValueError, r"\(6, 5\)"),
        (np.zeros(30, np.float32), ValueError, r"\(6, 5\)"),
        (np.broadcast_to(np.float32(0), (6, 5)), ValueError, "read-only"),
        (np.lib.stride_tricks.as_strided(np.zeros(40, np.float32), (6, 5), (8, 4)), ValueError, "itself"),
    ],
    ids=str,
)
def test_out_that_cannot_take_the_gradient(out, exception, pattern):
    call = Call()
    call.options["out"] = out
    refuse(call, exception, "out", pattern, loss_too=False)


def test_out_that_overlaps_an_argument():
    memory = np.zeros(100, np.float32)
    call = Call()
    call.logits, call.options["out"] = memory[:30].reshape(6, 5), memory[1:31].reshape(6, 5)
    refuse(call, ValueError, "out overlaps logits", "in place", loss_too=False)
    call = Call()
    call.targets, call.options["out"] = memory[:30].reshape(6, 5), memory[:30].reshape(6, 5)
    refuse(call, ValueError, "out overlaps targets", loss_too=False)
    for name in ("pos_weight", "sample_weight", "grad_output"):
        call = Call()
        call.options |= {"out": memory[:30].reshape(6, 5), name: memory[25:55].reshape(6, 5), "reduction": "none"}
        refuse(call, ValueError, f"out overlaps {name}", loss_too=False)
    call = Call()
    call.logits = call.targets = call.options["out"] = np.zeros((6, 5), np.float32)
    refuse(call, ValueError, "out overlaps targets", loss_too=False)


# ---- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", OTHERS)
def test_the_compiled_code_keeps_its_promises_on(target, run_python):
    chosen = (
        "accurate or reference or infinite or nan_stays or weight_zero or below_zero or half_types or bools "
        "or every_length or arguments_are_broadcast or number_of_threads"
    )
    options = ["-p", "no:cacheprovider", __file__, "-k", chosen]
    done = run_python("-m", "pytest", *options, FASTCE_TARGET=target, timeout=280)
    assert f"fastce: target {target}," in done.stdout
    assert " passed" in done.stdout and " failed" not in done.stdout


def digests():
    """Name and digest of the results of every case."""
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        rng = np.random.default_rng(3)
        batch = [hard_logits(dtype), random_logits(dtype, rng), np.array([np.nan, np.inf, -np.inf], dtype)]
        logits = np.concatenate(batch)
        for number, targets in enumerate((logits > 1, rng.random(len(logits)).astype(dtype), rng.random(len(logits)))):
            for options in (
                {},
                {"pos_weight": 3.3},
                {"label_smoothing": 0.1},
                {"sample_weight": rng.normal(size=len(logits))},
            ):
                for size in (5, 100, 1025, len(logits)):
                    part = {name: value[-size:] if np.ndim(value) else value for name, value in options.items()}
                    got = results(logits[-size:], targets[-size:], **part)
                    sha = hashlib.sha256()
                    for result in got:
                        result = np.array(result)
                        result[np.isnan(result)] = np.nan
                        sha.update(result.tobytes())
                    yield f"{dtype}-{number}-{'-'.join(options)}-{size}", sha.hexdigest()[:16]


@pytest.mark.skipif(not {"v3", "v4"} <= set(INFO["available_targets"]), reason="this processor has no AVX-512")
def test_the_same_bits_on_v3_and_v4(run_python):
    v3, v4 = (run_python(__file__, FASTCE_TARGET=target).stdout.splitlines() for target in ("v3", "v4"))
    assert v3[0] == "target v3" and v4[0] == "target v4" and len(v3) == len(v4) > 90
    assert [pair for pair in zip(v3[1:], v4[1:], strict=True) if pair[0] != pair[1]] == []


def binary_module(target):
    return Path(str(module_path(target)).replace("rows_", "binary_"))


@ON_X86_64
@pytest.mark.parametrize(("target", "register"), [("v3", "ymm"), ("v4", "zmm")])
def test_loops_hold_packed_instructions(target, register, objdump):  # noqa: F811
    code = inspect(binary_module(target), "-d", "--no-show-raw-insn")
    for kind in ("ps", "pd"):
        assert len(re.findall(rf"vfn?m(?:add|sub)\d+{kind}\s.*%{register}\d", code)) >= 15
        assert re.search(rf"vdiv{kind}\s.*%{register}\d", code)


@ON_X86_64
@pytest.mark.parametrize("target", INFO["built_targets"])
def test_arithmetic_is_inlined(target, objdump):  # noqa: F811
    symbols = inspect(binary_module(target), "-t")
    assert "take_batch" in symbols, "stripped: nothing can be seen"
    for name in ("exp_shifted", "log1p_of", "multiply_add", "slope_of", "loss_of"):
        assert name not in symbols


if __name__ == "__main__":
    print("target", fastce.build_info()["target"])
    for name, digest in digests():
        print(name, digest)
    sys.exit()
