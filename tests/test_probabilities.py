"""Losses of probabilities are those of the formula, in any layout, and rows that are no probabilities are refused."""

import math
import re
import tracemalloc
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import log_loss
from test_build import ON_X86_64, inspect, module_path, objdump  # noqa: F401
from test_threads import WITH_GIL, ticks  # noqa: F401

import fastce
from fastce import _checks, _engine
from fastce.probabilities import binary_cross_entropy_from_probs, cross_entropy_from_probs

# What other layouts pass through the kernels in.
BLOCK_ELEMENTS = _engine.BUFFER_ELEMENTS
INF = math.inf
NAN = math.nan
# What the docstrings promise of float64; a narrower dtype adds half a unit in the last place for the one rounding.
BOUND = 2e-15
HALF_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 0.0}


def random_probs(rng, shape, dtype=np.float64, axis=-1, spread=3.0):
    """Rows of probabilities along `axis`, some of them tiny, rounded to `dtype`."""
    z = rng.normal(0, spread, shape)
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return (e / e.sum(axis=axis, keepdims=True)).astype(dtype)


def bfloat16():
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


@pytest.fixture(params=["float16", "bfloat16", "float32", "float64"])
def any_dtype(request):
    return bfloat16() if request.param == "bfloat16" else np.dtype(request.param)


def assert_accurate(losses, true, dtype_name):
    """Each of `losses` is within the promised relative error of the numbers `true` of mpmath."""
    allowed = BOUND + HALF_UNIT[dtype_name]
    for got, expected in zip(np.ravel(losses), true, strict=True):
        if mpmath.isinf(expected):
            assert float(got) == float(expected)
        else:
            smallest = float(np.finfo(losses.dtype).smallest_normal)
            assert abs(mpmath.mpf(float(got)) - expected) <= max(allowed * abs(expected), smallest), (got, expected)


DIGITS = 350  # enough for 1 - p of the smallest p tested


def exact(number):
    """A number of any dtype as it is."""
    return number if isinstance(number, mpmath.mpf) else mpmath.mpf(float(number))


def exact_log(p):
    """The logarithm of the number `p`, to many digits."""
    with mpmath.workdps(DIGITS):
        return mpmath.log(exact(p)) if p else mpmath.mpf("-inf")


def exact_cross_entropy(mass, row):
    """-sum of mass * log p to many digits, 0 log 0 = 0."""
    with mpmath.workdps(DIGITS):
        return mpmath.fsum(-exact(m) * exact_log(p) for m, p in zip(mass, row, strict=True) if m)


# The textbook


@pytest.mark.parametrize("row", [[0.1, 0.9, 0, 0], [0.1, 0.3, 0.3, 0.3], [0.1, 0.9]])
def test_only_the_probability_of_the_true_class_counts(row):
    row = np.array(row, float)
    assert cross_entropy_from_probs(row, 0) == pytest.approx(math.log(10), rel=BOUND)
    one_hot = np.eye(len(row))[0]
    assert cross_entropy_from_probs(row, one_hot) == pytest.approx(math.log(10), rel=BOUND)


@pytest.mark.parametrize("y", [0, 1, 0.25])
@pytest.mark.parametrize("h", [0.1, 0.5, 0.9])
def test_the_textbook_cost_of_a_hypothesis(h, y):
    cost = -y * math.log(h) - (1 - y) * math.log(1 - h)
    assert binary_cross_entropy_from_probs(h, y) == pytest.approx(cost, rel=1e-15)


def test_two_classes_are_the_binary_loss(rng):
    p = np.round(rng.random(50), 12)
    y = rng.integers(0, 2, 50)
    both = np.stack([1 - p, p], axis=1)
    assert cross_entropy_from_probs(both, y) == pytest.approx(binary_cross_entropy_from_probs(p, y), rel=1e-14)


def test_probabilities_of_logits_have_the_loss_of_the_logits(rng):
    logits = rng.normal(0, 3, (200, 11))
    targets = rng.integers(0, 11, 200)
    e = np.exp(logits)
    loss = cross_entropy_from_probs(e / e.sum(axis=1, keepdims=True), targets)
    assert loss == pytest.approx(fastce.cross_entropy(logits, targets), rel=1e-13)


# Accuracy, against mpmath


def test_every_loss_of_class_ids_is_exact_to_the_dtype(rng, any_dtype):
    probs = random_probs(rng, (300, 6), any_dtype, spread=4)
    targets = rng.integers(0, 6, 300)
    losses = cross_entropy_from_probs(probs, targets, reduction="none")
    assert_accurate(losses, [-exact_log(p) for p in probs[np.arange(300), targets]], losses.dtype.name)


@pytest.mark.parametrize("p", [1 - 2**-53, 1 - 2**-30, 0.999, 0.5 + 1e-9, 0.1, 1e-10, 1e-300, 5e-324, 1.0])
def test_probabilities_from_end_to_end_of_the_range(p):
    probs = np.array([[p, 1 - p]])
    losses = cross_entropy_from_probs(probs, [0], reduction="none")
    assert_accurate(losses, [-exact_log(p)], "float64")
    losses = cross_entropy_from_probs(probs, probs[:, :] * 0 + [2.5, 0], reduction="none")
    assert_accurate(losses, [-exact_log(p) * 2.5], "float64")


def test_every_loss_of_distributions_is_exact_to_the_dtype(rng, any_dtype):
    probs = random_probs(rng, (120, 9), any_dtype, spread=3)
    q = rng.random((120, 9)) * (rng.random((120, 9)) < 0.7)
    weight = rng.random(9) * 3
    weight[4] = 0
    losses = cross_entropy_from_probs(probs, q, weight=weight, reduction="none")
    with mpmath.workdps(DIGITS):
        masses = [[exact(a) * exact(w) for a, w in zip(row, weight, strict=True)] for row in q]
    true = [exact_cross_entropy(mass, row) for mass, row in zip(masses, probs, strict=True)]
    assert_accurate(losses, true, losses.dtype.name)


def test_a_long_row_is_accurate(rng):
    probs = random_probs(rng, (2, 3 * BLOCK_ELEMENTS + 17))
    q = rng.random(probs.shape)
    true = [
        math.fsum(-a * math.log(b) for a, b in zip(q_row, p_row, strict=True))
        for q_row, p_row in zip(q, probs, strict=True)
    ]
    np.testing.assert_allclose(cross_entropy_from_probs(probs, q, reduction="none"), true, rtol=BOUND)


def test_every_binary_loss_is_exact_to_the_dtype(rng, any_dtype):
    ends = [0, 1, 2**-24, 2**-60, 1 - 2**-7, 1 - 2**-24, 1 - 2**-53, 1e-300, 0.5]
    probs = np.concatenate([ends, ends, ends, rng.random(200)]).astype(any_dtype)
    y = np.concatenate([np.zeros(9), np.ones(9), np.full(9, 1e-9), rng.random(200)])
    losses = binary_cross_entropy_from_probs(probs, y, reduction="none")
    true = []
    for p, t in zip(probs, y, strict=True):
        with mpmath.workdps(DIGITS):
            true.append(exact_cross_entropy([exact(t), 1 - exact(t)], [exact(p), 1 - exact(p)]))
    assert_accurate(losses, true, losses.dtype.name)


# Other libraries


def test_scikit_learn_agrees(rng):
    probs = random_probs(rng, (500, 7))
    targets = np.concatenate([np.arange(7), rng.integers(0, 7, 493)])
    sample_weight = rng.random(500)
    assert cross_entropy_from_probs(probs, targets) == pytest.approx(log_loss(targets, probs), rel=1e-13)
    weighted = cross_entropy_from_probs(probs, targets, sample_weight=sample_weight)
    assert weighted == pytest.approx(log_loss(targets, probs, sample_weight=sample_weight), rel=1e-13)
    total = cross_entropy_from_probs(probs, targets, sample_weight=sample_weight, reduction="sum")
    expected = log_loss(targets, probs, sample_weight=sample_weight, normalize=False)
    assert total == pytest.approx(expected, rel=1e-13)


def test_scikit_learn_agrees_on_binary_losses(rng):
    probs, sample_weight = rng.random(300), rng.random(300)
    y = rng.integers(0, 2, 300)
    loss = binary_cross_entropy_from_probs(probs, y, sample_weight=sample_weight)
    assert loss == pytest.approx(log_loss(y, probs, sample_weight=sample_weight), rel=1e-13)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 2, 255])
def test_torch_agrees_on_class_ids(rng, reduction, weighted, ignore_index):
    torch = pytest.importorskip("torch")
    probs = random_probs(rng, (4, 5, 6, 3), axis=1)
    targets = rng.integers(0, 5, (4, 6, 3))
    targets[rng.random(targets.shape) < 0.3] = ignore_index
    weight = rng.random(5) if weighted else None
    loss = cross_entropy_from_probs(
        probs, targets, axis=1, weight=weight, ignore_index=ignore_index, reduction=reduction
    )
    expected = torch.nn.functional.nll_loss(
        torch.log(torch.tensor(probs)),
        torch.tensor(targets),
        weight=None if weight is None else torch.tensor(weight),
        ignore_index=ignore_index,
        reduction=reduction,
    )
    np.testing.assert_allclose(loss, expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_torch_agrees_on_distributions(rng, reduction, weighted):
    torch = pytest.importorskip("torch")
    probs, q = random_probs(rng, (20, 5)), rng.random((20, 5))
    weight = rng.random(5) if weighted else None
    loss = cross_entropy_from_probs(probs, q, weight=weight, reduction=reduction)
    expected = torch.nn.functional.cross_entropy(
        torch.log(torch.tensor(probs)),
        torch.tensor(q),
        weight=None if weight is None else torch.tensor(weight),
        reduction=reduction,
    )
    if reduction == "mean":  # torch divides by the number of rows too
        assert loss == pytest.approx(cross_entropy_from_probs(probs, q, weight=weight, reduction="sum") / 20, rel=1e-14)
    np.testing.assert_allclose(loss, expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_torch_agrees_on_binary_losses(rng, reduction):
    torch = pytest.importorskip("torch")
    probs, y = rng.random((20, 5)), rng.random((20, 5))
    loss = binary_cross_entropy_from_probs(probs, y, reduction=reduction)
    expected = torch.nn.functional.binary_cross_entropy(torch.tensor(probs), torch.tensor(y), reduction=reduction)
    np.testing.assert_allclose(loss, expected.numpy(), rtol=1e-12)


# Any call, against the formula written out in plain Python


def plain_row_loss(row, target, weight, sample_weight):
    """The loss of a row and its weight in the mean, as api.md has them; an int is a class id, a row a distribution."""
    if np.ndim(target) == 0:
        mass = [float(c == target) for c in range(len(row))]
        importance = sample_weight * weight[target]
    else:
        mass, importance = [float(q) for q in target], sample_weight
    terms = [-w * m * (math.log(p) if p else -INF) for w, m, p in zip(weight, mass, row, strict=True) if w * m]
    return (sample_weight * sum(terms) if sample_weight and terms else 0.0), importance


def plain_cross_entropy(probs, targets, axis, weight, sample_weight, ignored, reduction, denominator):
    rows = np.moveaxis(np.asarray(probs, float), axis, -1)
    distributions = targets.dtype.kind == "f"
    if distributions:
        targets = np.moveaxis(targets, axis, -1)
    losses, importances = np.zeros(rows.shape[:-1]), []
    for index in np.ndindex(losses.shape):
        target = targets[index]
        if not distributions and target in ignored:
            continue
        weight_of_row = 1.0 if sample_weight is None else float(sample_weight[index])
        weights = [1.0] * rows.shape[-1] if weight is None else weight
        losses[index], importance = plain_row_loss(rows[index], target, weights, weight_of_row)
        importances.append(importance)
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    divisor = denominator or math.fsum(importances)
    return total / divisor if divisor else NAN


@st.composite
def calls(draw):
    """Probabilities of any shape, axis and dtype, with targets of both kinds and any options."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=6))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    classes, row_shape = shape[axis], tuple(np.delete(shape, axis))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    probs = random_probs(rng, shape, dtype, axis, draw(st.sampled_from([0.1, 2.0, 30.0])))
    options = {"axis": axis, "reduction": draw(st.sampled_from(["none", "sum", "mean"]))}
    if draw(st.booleans()):
        targets = rng.random(shape) * (rng.random(shape) < 0.6)
        options["ignore_index"] = draw(st.sampled_from([None, -100]))
    else:
        targets = rng.integers(0, classes, row_shape).astype(draw(st.sampled_from(["i1", "i4", "i8", "u1", "u8"])))
        ignored = st.one_of(st.none(), st.integers(-3, 8), st.lists(st.integers(-3, 8), max_size=3), st.just(-100))
        options["ignore_index"] = draw(ignored)
    if draw(st.booleans()):
        options["weight"] = np.round(rng.random(classes) * 3)
    if draw(st.booleans()):
        options["sample_weight"] = np.round(rng.random(row_shape) * 3, 1) * (rng.random(row_shape) < 0.7)
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["denominator"] = draw(st.floats(0.01, 1e4))
    return probs, targets, options


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(calls())
def test_any_call_agrees_with_the_formula(call):
    probs, targets, options = call
    loss = cross_entropy_from_probs(probs, targets, **options)
    expected = plain_cross_entropy(
        probs,
        np.asarray(targets),
        options["axis"],
        options.get("weight"),
        options.get("sample_weight"),
        np.atleast_1d([] if options["ignore_index"] is None else options["ignore_index"]),
        options["reduction"],
        options.get("denominator"),
    )
    if options["reduction"] == "none":
        assert loss.dtype == (np.float32 if probs.dtype == np.float16 else probs.dtype)
        np.testing.assert_allclose(loss, expected, rtol=1e-7 if loss.dtype == np.float32 else 1e-13, atol=1e-44)
        assert not np.signbit(loss).any()
    else:
        assert type(loss) is float
        np.testing.assert_allclose(loss, expected, rtol=1e-13)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_binary_call_agrees_with_the_formula(data):
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    probs = np.clip(np.round(rng.random(shape) * 1.2 - 0.1, 3), 0, 1)
    target_shape = tuple(length if data.draw(st.booleans()) else 1 for length in shape)
    kind = data.draw(st.sampled_from(["?", "i1", "u8", "f4", "f8"]))
    targets = rng.random(target_shape)
    targets = (targets if kind[0] == "f" else targets > 0.5).astype(kind)
    options = {"reduction": data.draw(st.sampled_from(["none", "sum", "mean"]))}
    if data.draw(st.booleans()):
        options["sample_weight"] = np.round(rng.random(shape[1:]) * 2)
    loss = binary_cross_entropy_from_probs(probs, targets, **options)
    weights = np.broadcast_to(options.get("sample_weight", 1.0), shape)
    expected = np.zeros(shape)
    for index in np.ndindex(shape):
        y = float(np.broadcast_to(targets, shape)[index])
        expected[index] = plain_row_loss([probs[index], 1 - probs[index]], [y, 1 - y], [1, 1], float(weights[index]))[0]
    if options["reduction"] == "sum":
        expected = expected.sum()
    elif options["reduction"] == "mean":
        expected = expected.sum() / weights.sum() if weights.sum() else NAN
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert np.shape(loss) == np.shape(expected)


# Blocks


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((3 * BLOCK_ELEMENTS + 5, 2), -1),
        ((BLOCK_ELEMENTS // 3 * 4 + 1, 3), 0),
        ((5, BLOCK_ELEMENTS), -1),
        ((5, BLOCK_ELEMENTS - 1), -1),
        ((5, BLOCK_ELEMENTS + 1), -1),
        ((3, 3 * BLOCK_ELEMENTS + 100), 1),
        ((3, 4, 70, 70), 1),
        ((2, 300, 200, 3), -1),
        ((4 * BLOCK_ELEMENTS + 9,), 0),
    ],
)
def test_more_than_a_block(rng, shape, axis):
    probs = random_probs(rng, shape, np.float32, axis)
    rows = np.moveaxis(probs, axis, -1).astype(np.float64)
    classes = rows.shape[-1]
    targets = rng.integers(-1, classes, rows.shape[:-1])
    sample_weight = np.round(rng.normal(0, 1, rows.shape[:-1]))
    weight = rng.random(classes)
    options = {"axis": axis, "weight": weight, "sample_weight": sample_weight}

    p_target = np.take_along_axis(rows, np.maximum(targets, 0)[..., None], -1)[..., 0]
    factors = np.where(targets >= 0, sample_weight * weight[targets], 0)
    expected = -factors * np.log(p_target)
    losses = cross_entropy_from_probs(probs, targets, ignore_index=-1, reduction="none", **options)
    np.testing.assert_allclose(losses, expected, rtol=1e-7)
    total = cross_entropy_from_probs(probs, targets, ignore_index=-1, reduction="sum", **options)
    assert total == pytest.approx(expected.sum(), rel=1e-10, abs=1e-10)
    if np.any(factors):
        mean = cross_entropy_from_probs(probs, targets, ignore_index=-1, **options)
        assert mean == pytest.approx(expected.sum() / factors.sum(), rel=1e-8)

    q = rng.random(shape)
    expected = -sample_weight * (np.moveaxis(q, axis, -1) * weight * np.log(rows)).sum(axis=-1)
    losses = cross_entropy_from_probs(probs, q, reduction="none", **options)
    np.testing.assert_allclose(losses, expected, rtol=1e-7)


def test_a_row_has_the_same_bits_anywhere_in_a_batch(rng):
    probs = random_probs(rng, (BLOCK_ELEMENTS // 7 + 50, 7))
    targets, q = rng.integers(0, 7, len(probs)), rng.random(probs.shape)
    of_ids = cross_entropy_from_probs(probs, targets, reduction="none")
    of_distributions = cross_entropy_from_probs(probs, q, reduction="none")
    for i in [0, 1, 1000, len(probs) - 51, len(probs) - 1]:
        assert cross_entropy_from_probs(probs[i], targets[i]) == of_ids[i]
        assert cross_entropy_from_probs(probs[i], q[i]) == of_distributions[i]


def test_a_bad_value_is_found_in_any_block(rng):
    probs = random_probs(rng, (3, 40, 30, 5), axis=-1)
    targets = rng.integers(0, 5, (3, 40, 30))
    probs[2, 39, 28, 3] = NAN
    with pytest.raises(ValueError, match=r"probs.*nan.*\[2, 39, 28\]"):
        cross_entropy_from_probs(probs, targets)
    probs = random_probs(rng, (2, 3 * BLOCK_ELEMENTS))
    probs[1, -1] = 2
    with pytest.raises(ValueError, match=r"probs.*got 2 in row \[1\]"):
        cross_entropy_from_probs(probs, [0, 0])
    probs[1] = 1 / BLOCK_ELEMENTS
    with pytest.raises(ValueError, match=r"probs.*sum.*got 3 in row \[1\]"):
        cross_entropy_from_probs(probs, [0, 0])


@pytest.mark.thread_unsafe(reason="tracemalloc counts the memory of all threads")
@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_does_not_grow_with_the_batch_times_the_classes(order):
    # The array has 40 MB; a call may take a block's temporaries, and the ids and weights of the rows as copies.
    rows, classes = 10_000, 1000
    probs = np.full((rows, classes), 1 / classes, np.float32, order=order)
    targets, sample_weight = np.zeros(rows, np.int64), np.ones(rows)
    calls = [
        (24 * rows, lambda: cross_entropy_from_probs(probs, targets, sample_weight=sample_weight, reduction="none")),
        (24 * rows, lambda: cross_entropy_from_probs(probs, probs, sample_weight=sample_weight)),
        (0, lambda: binary_cross_entropy_from_probs(probs, probs, sample_weight=probs)),
        (0, lambda: binary_cross_entropy_from_probs(probs, targets[:, None], sample_weight=sample_weight[:, None])),
    ]
    for of_rows, call in calls:
        call()
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.15e6 + of_rows


# Kernels

# Around quarters and whole vectors, the rows that are added in a block, the pieces of long ones.
LENGTHS = [*range(1, 36), 63, 64, 65, 127, 128, 129, 130, 255, 256, 257, 2047, 2048, 2049, 2177, 4095, 4096, 4097]


def swapped(array):
    """The same numbers in the other byte order: those pass through the general way and its buffers."""
    return array.astype(array.dtype.newbyteorder())


@pytest.mark.parametrize("classes", LENGTHS)
def test_rows_of_any_length_have_the_losses_of_the_formula(rng, dtype, classes):
    probs, targets = random_probs(rng, (67, classes), dtype), rng.integers(-1, classes, 67)
    q = (rng.random(probs.shape) * (rng.random(probs.shape) < 0.8)).astype(dtype)
    weight, sample_weight = rng.random(classes) * (rng.random(classes) < 0.8), np.round(rng.normal(0, 2, 67))
    logs = np.log(probs.astype(np.float64))
    allowed = BOUND + HALF_UNIT[np.dtype(dtype).name]
    for w, s in ((None, None), (weight, sample_weight)):
        options = {"weight": w, "sample_weight": s, "ignore_index": -1, "reduction": "none"}
        of_class, of_row = (np.ones(classes), np.ones(67)) if w is None else (w, s)
        expected = np.where(targets < 0, 0, -of_row * of_class[targets] * logs[np.arange(67), targets])
        losses = cross_entropy_from_probs(probs, targets, **options)
        np.testing.assert_allclose(losses, expected, rtol=allowed)
        np.testing.assert_array_equal(cross_entropy_from_probs(swapped(probs), targets, **options), losses, strict=True)
        options["ignore_index"] = None
        products = -of_row[:, None] * of_class * q * logs
        expected = [math.fsum(row) for row in products]
        losses = cross_entropy_from_probs(probs, q, **options)
        np.testing.assert_allclose(losses, expected, rtol=allowed + 1e-15)  # the products are rounded here too
        np.testing.assert_array_equal(cross_entropy_from_probs(swapped(probs), q, **options), losses, strict=True)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weights", [np.float32, np.float64, None])
def test_the_short_way_has_the_bits_of_the_general_one(rng, dtype, reduction, weights):
    for rows, classes in ((8, 10), (700, 3), (300, 40), (40, 1000), (3, 5000)):
        probs, targets = random_probs(rng, (rows, classes), dtype), rng.integers(0, classes, rows)
        options = {"reduction": reduction}
        if weights is not None:
            options["weight"] = rng.random(classes).astype(weights)
            options["sample_weight"] = np.round(rng.normal(0, 2, rows)).astype(weights)
        others = {name: swapped(value) if name.endswith("weight") else value for name, value in options.items()}
        for t in (targets, targets.astype(np.int32), random_probs(rng, (rows, classes), dtype)):
            short, general = (
                cross_entropy_from_probs(probs, t, **options),
                cross_entropy_from_probs(swapped(probs), swapped(t), **others),
            )
            np.testing.assert_array_equal(short, general, strict=True)
        options.pop("weight", None)
        if weights is not None:
            options["sample_weight"] = rng.normal(0, 2, probs.shape).astype(weights)
        others = options | {"sample_weight": swapped(options["sample_weight"])} if weights is not None else options
        for y in (rng.random(probs.shape) < 0.5, rng.integers(0, 2, probs.shape), rng.random(probs.shape)):
            short, general = (
                binary_cross_entropy_from_probs(probs, y, **options),
                binary_cross_entropy_from_probs(swapped(probs), swapped(y), **others),
            )
            np.testing.assert_array_equal(short, general, strict=True)


@pytest.mark.parametrize("bad", [-1e-9, 1.0000001, NAN, INF, -INF])
def test_a_bad_number_is_found_wherever_it_lies_in_a_row(dtype, bad):
    for classes in (1, 2, 3, 4, 5, 7, 10, 15, 16, 17, 23, 33, 40):
        for place in range(classes):
            probs = np.full((5, classes), 1 / classes, dtype)
            q = probs.copy()
            probs[3, place] = bad
            with pytest.raises(ValueError, match=r"probs must be finite and within \[0, 1\], got .* in row \[3\]"):
                cross_entropy_from_probs(probs, np.zeros(5, int))
            if bad == 1.0000001:
                continue
            probs, q = q, probs
            with pytest.raises(ValueError, match=r"targets: distributions must be finite .* in row \[3\]"):
                cross_entropy_from_probs(probs, q)


def test_minus_0_is_a_probability_wherever_it_lies(dtype):
    for classes in (2, 3, 5, 10, 16, 17, 40):
        for place in range(1, classes):
            probs, q = np.zeros((1, classes), dtype), np.ones((1, classes), dtype)
            probs[0, 0] = 1
            probs[0, place] = q[0, place] = -0.0
            assert cross_entropy_from_probs(probs, [0]) == 0
            assert cross_entropy_from_probs(probs, [place]) == INF
            q[probs == 0] *= 0
            loss = cross_entropy_from_probs(probs, q, reduction="none")
            assert loss[0] == 0 and not np.signbit(loss[0])


def test_denormal_probabilities_keep_their_digits(dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    p = np.array([tiny, 3 * tiny, 5 * tiny, np.finfo(dtype).smallest_normal / 2, np.finfo(dtype).smallest_normal])
    probs = np.stack([p.astype(dtype), np.ones(5, dtype)], axis=1)
    true = [-exact_log(number) for number in probs[:, 0]]
    assert_accurate(cross_entropy_from_probs(probs, np.zeros(5, int), reduction="none"), true, probs.dtype.name)
    one_hot = np.repeat([[1, 0]], 5, axis=0).astype(dtype)
    assert_accurate(cross_entropy_from_probs(probs, one_hot, reduction="none"), true, probs.dtype.name)
    assert_accurate(binary_cross_entropy_from_probs(probs[:, 0], np.ones(5), reduction="none"), true, probs.dtype.name)
    losses = binary_cross_entropy_from_probs(probs[:, 0], np.zeros(5), reduction="none")
    assert_accurate(losses, [exact(number) for number in probs[:, 0]], probs.dtype.name)


def test_logarithms_are_accurate_where_their_algorithm_changes(rng):
    # At sqrt(1/2), where the exponent is counted from, and for 1 - p at 1 - sqrt(1/2) and 1/2; and where they are 0.
    seams = [math.sqrt(0.5), 1 - math.sqrt(0.5), 0.5, 0.25, 1 - 2**-10, 2**-10]
    p = np.concatenate([seam * (1 + np.arange(-30, 31) * 2.0**-52) for seam in seams] + [rng.random(300)])
    p = p[p <= 1]
    for y in (0, 1, 0.3):
        losses = binary_cross_entropy_from_probs(p, np.full(len(p), y), reduction="none")
        with mpmath.workdps(40):
            true = [-(exact(y) * exact_log(x) + (1 - exact(y)) * exact_log(1 - exact(x))) for x in p]
        assert_accurate(losses, true, "float64")


@pytest.mark.parametrize("shape", [(30_000, 3), (5000, 70), (600, 1000), (3, 300_000)], ids=str)
def test_no_number_of_threads_changes_a_bit_of_a_large_batch(rng, dtype, shape):
    probs, targets = random_probs(rng, shape, dtype), rng.integers(0, shape[1], shape[0])
    q, y = random_probs(rng, shape, dtype), rng.random(shape).astype(dtype)
    others = np.asfortranarray(probs)
    for reduction in ("none", "mean"):
        for t in (targets, q):
            alone = cross_entropy_from_probs(probs, t, reduction=reduction, num_threads=1)
            for array, threads in ((probs, 2), (probs, 3), (others, 2), (probs, None)):
                several = cross_entropy_from_probs(array, t, reduction=reduction, num_threads=threads)
                np.testing.assert_array_equal(several, alone, strict=True)
        alone = binary_cross_entropy_from_probs(probs, y, reduction=reduction, num_threads=1)
        for array, threads in ((probs, 2), (probs, 3), (others, 2), (probs, None)):
            several = binary_cross_entropy_from_probs(array, y, reduction=reduction, num_threads=threads)
            np.testing.assert_array_equal(several, alone, strict=True)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_first_of_several_bad_rows_is_named_by_any_number_of_threads(num_threads):
    probs = np.full((20_000, 10), 0.1)
    for rows in ([19_999, 500, 12_000], [7000, 6999], [3, 19_000]):
        bad = probs.copy()
        bad[rows] *= 2
        y = bad * 8
        for array in (bad, swapped(bad)):
            with pytest.raises(ValueError, match=rf"sum to 1 .* got 2 in row \[{min(rows)}\]"):
                cross_entropy_from_probs(array, np.zeros(20_000, int), num_threads=num_threads)
            with pytest.raises(ValueError, match=rf"sum to 1 .* in row \[{min(rows)}\]"):
                cross_entropy_from_probs(array, probs, num_threads=num_threads)
            with pytest.raises(ValueError, match=rf"targets .* in entry \[{min(rows)}, 0\]"):
                binary_cross_entropy_from_probs(probs, y, num_threads=num_threads)


def test_numbers_that_another_thread_puts_right_are_refused_nevertheless(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(_engine, "probability_rows", lambda *arguments: 2)  # as if row 2 had been bad when it was read
        for targets in (IDS, PROBS):
            with pytest.raises(ValueError, match=r"changed while they were read, in row \[2\]"):
                cross_entropy_from_probs(swapped(PROBS), targets)
        patch.setattr(_engine, "binary_probabilities", lambda *arguments: (0.0, 0.0, False))
        with pytest.raises(ValueError, match="changed while they were read, in some entry"):
            binary_cross_entropy_from_probs(swapped(PROBS), PROBS, sample_weight=PROBS)
        patch.setattr(_engine, "first_outside", lambda *arguments: 4)
        with pytest.raises(ValueError, match=r"changed while they were read, in entry \[1, 1\]"):
            binary_cross_entropy_from_probs(swapped(PROBS), PROBS, sample_weight=PROBS)


@WITH_GIL
@pytest.mark.parametrize("binary", [False, True])
def test_python_runs_on_while_probabilities_are_computed(binary, ticks):  # noqa: F811
    probs = np.full((1, 2_000_000), 2.0**-21, np.float32)
    probs[0, 0] = 1 - probs[0, 1:].sum(dtype=np.float64)
    grown = 0
    for _ in range(300):
        before = ticks[0]
        if binary:
            binary_cross_entropy_from_probs(probs, probs, num_threads=1)
        else:
            cross_entropy_from_probs(probs, probs, num_threads=1)
        grown += ticks[0] > before
        if grown >= 3:
            break
    assert grown >= 3


@ON_X86_64
@pytest.mark.parametrize(("target", "register"), [("v3", "ymm"), ("v4", "zmm")])
def test_loops_of_probabilities_hold_packed_instructions(target, register, objdump):  # noqa: F811
    path = Path(str(module_path(target)).replace("rows_", "probabilities_"))
    code = inspect(path, "-d", "--no-show-raw-insn")
    assert len(re.findall(rf"vfn?m(?:add|sub)\d+pd\s.*%{register}\d", code)) >= 15
    assert re.search(rf"vdivpd\s.*%{register}\d", code)


# Layouts


def layouts(array, tmp_path):
    """The same values at other places: order, strides, alignment, byte order, flags, classes of array."""
    flat = np.zeros(array.nbytes + 1, np.uint8)
    unaligned = flat[1:].view(array.dtype).reshape(array.shape)
    unaligned[...] = array
    padded = np.zeros((*array.shape[:-1], array.shape[-1] + 3), array.dtype)
    padded[..., 1:-2] = array
    spaced = np.zeros([2 * length for length in array.shape], array.dtype)
    spaced[tuple(slice(None, None, 2) for _ in array.shape)] = array
    read_only = array.copy()
    read_only.flags.writeable = False
    mapped = np.memmap(tmp_path / str(id(array)), array.dtype, "w+", shape=array.shape)
    mapped[...] = array
    yield "fortran", np.asfortranarray(array)
    yield "reversed", array[..., ::-1].copy()[..., ::-1]
    yield "unaligned", unaligned
    yield "padded", padded[..., 1:-2]
    yield "spaced", spaced[tuple(slice(None, None, 2) for _ in array.shape)]
    yield "read-only", read_only
    yield "swapped", array.astype(array.dtype.newbyteorder())
    yield "mapped", mapped
    yield "masked", np.ma.array(array)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_layout_changes_a_bit(rng, dtype, reduction, tmp_path):
    probs = random_probs(rng, (40, 60, 9), dtype)
    targets, q = rng.integers(0, 9, (40, 60)), rng.random((40, 60, 9))
    sample_weight = np.round(rng.random((40, 60)) * 2)
    of_ids, of_distributions, binary = (
        cross_entropy_from_probs(probs, targets, sample_weight=sample_weight, reduction=reduction),
        cross_entropy_from_probs(probs, q, sample_weight=sample_weight, reduction=reduction),
        binary_cross_entropy_from_probs(probs, q, sample_weight=sample_weight[..., None], reduction=reduction),
    )
    others = zip(
        layouts(probs, tmp_path),
        layouts(targets, tmp_path),
        layouts(q, tmp_path),
        layouts(sample_weight, tmp_path),
        strict=True,
    )
    for (name, other), (_, other_targets), (_, other_q), (_, other_weight) in others:
        options = {"sample_weight": other_weight, "reduction": reduction}
        result = cross_entropy_from_probs(other, other_targets, **options)
        np.testing.assert_array_equal(result, of_ids, strict=True, err_msg=name)
        assert type(result) is type(of_ids)
        result = cross_entropy_from_probs(other, other_q, **options)
        np.testing.assert_array_equal(result, of_distributions, strict=True, err_msg=name)
        options["sample_weight"] = np.asarray(other_weight)[..., None]
        result = binary_cross_entropy_from_probs(other, other_q, **options)
        np.testing.assert_array_equal(result, binary, strict=True, err_msg=name)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
def test_any_axis_has_the_bits_of_the_last(rng, axis):
    probs = random_probs(rng, (3, 4, 5, 6), axis=axis)
    q = rng.random(probs.shape)
    last, q_last = (np.ascontiguousarray(np.moveaxis(array, axis, -1)) for array in (probs, q))
    targets = rng.integers(0, last.shape[-1], last.shape[:-1])
    weight = rng.random(last.shape[-1])
    np.testing.assert_array_equal(
        cross_entropy_from_probs(probs, targets, axis=axis, weight=weight, reduction="none"),
        cross_entropy_from_probs(last, targets, weight=weight, reduction="none"),
    )
    np.testing.assert_array_equal(
        cross_entropy_from_probs(probs, q, axis=axis, weight=weight, reduction="none"),
        cross_entropy_from_probs(last, q_last, weight=weight, reduction="none"),
    )


@pytest.mark.parametrize("num_threads", [1, 2, 7, 10**6])
def test_no_number_of_threads_changes_a_bit(rng, num_threads):
    probs, targets = random_probs(rng, (500, 9)), rng.integers(0, 9, 500)
    loss = cross_entropy_from_probs(probs, targets, num_threads=num_threads)
    assert loss == cross_entropy_from_probs(probs, targets)
    loss = binary_cross_entropy_from_probs(probs, probs, num_threads=num_threads)
    assert loss == binary_cross_entropy_from_probs(probs, probs)


def test_lists_are_taken_as_numpy_takes_them():
    assert cross_entropy_from_probs([[0.25, 0.75], [0.5, 0.5]], [0, 1], reduction="none").dtype == np.float64
    assert cross_entropy_from_probs([[0.5, 0.5]], [[1.0, 1.0]]) == pytest.approx(2 * math.log(2), rel=BOUND)
    assert binary_cross_entropy_from_probs([0.5, 0.5], [True, 0.0]) == pytest.approx(math.log(2), rel=BOUND)


def test_any_integer_dtype_makes_class_ids(rng):
    probs, targets = random_probs(rng, (30, 5)), rng.integers(0, 5, 30)
    loss = cross_entropy_from_probs(probs, targets)
    for dtype in ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">u8"]:
        assert cross_entropy_from_probs(probs, targets.astype(dtype)) == loss


def test_distributions_of_any_floating_dtype(rng, any_dtype):
    probs = random_probs(rng, (30, 5))
    q = random_probs(rng, (30, 5), any_dtype)
    loss = cross_entropy_from_probs(probs, q)
    assert loss == cross_entropy_from_probs(probs, q.astype(np.float64))
    assert binary_cross_entropy_from_probs(probs, q) == binary_cross_entropy_from_probs(probs, q.astype(np.float64))


# What is returned


def test_sum_and_mean_are_python_floats_and_rows_have_the_dtype(any_dtype):
    probs = np.full((2, 3, 4), 0.25, any_dtype)
    rows_dtype = np.dtype(np.float32) if any_dtype.itemsize == 2 else any_dtype
    for reduction in ("sum", "mean"):
        assert type(cross_entropy_from_probs(probs, np.zeros((2, 3), int), reduction=reduction)) is float
        assert type(cross_entropy_from_probs(probs, probs, reduction=reduction)) is float
        assert type(binary_cross_entropy_from_probs(probs, 1, reduction=reduction)) is float
    for losses, shape in (
        (cross_entropy_from_probs(probs, np.zeros((2, 3), int), reduction="none"), (2, 3)),
        (cross_entropy_from_probs(probs, probs, reduction="none"), (2, 3)),
        (cross_entropy_from_probs(probs[0, 0], 3, reduction="none"), ()),
        (binary_cross_entropy_from_probs(probs, 1, reduction="none"), (2, 3, 4)),
        (binary_cross_entropy_from_probs(probs[0, 0, 0], 1, reduction="none"), ()),
    ):
        assert type(losses) is np.ndarray and losses.shape == shape and losses.dtype == rows_dtype


def test_means_divide_by_the_weights_of_the_rows_that_count():
    probs = np.array([[0.5, 0.5], [0.25, 0.75], [0.125, 0.875], [0.5, 0.5]])
    targets, ln2 = [0, 0, 0, -100], math.log(2)
    sample_weight = np.array([1.0, 0.5, 0, 7])
    weight = [3, 5]
    q = np.array([[1.0, 0]] * 4)

    def mean(targets, **options):
        return pytest.approx(cross_entropy_from_probs(probs, targets, **options), rel=1e-14)

    assert mean(targets) == ln2 * (1 + 2 + 3) / 3
    assert mean(targets, weight=weight) == ln2 * (1 + 2 + 3) / 3
    assert mean([0, 1, 0, -100], weight=weight) == (3 * ln2 - 5 * math.log(0.75) + 9 * ln2) / 11
    assert mean(targets, sample_weight=sample_weight) == ln2 * (1 + 1) / 1.5
    assert mean(targets, sample_weight=sample_weight, weight=weight) == ln2 * 6 / 4.5
    assert mean(targets, denominator=10) == ln2 * 6 / 10
    assert mean(q) == ln2 * (1 + 2 + 3 + 1) / 4
    assert mean(q, weight=weight) == 3 * ln2 * (1 + 2 + 3 + 1) / 4
    assert mean(q, sample_weight=sample_weight) == ln2 * (1 + 1 + 7) / 8.5
    assert mean(targets, sample_weight=[-1, 0.5, 0, 7]) == 0
    assert mean(targets, sample_weight=[-2, 0.5, 0, 7]) == ln2 * (-2 + 1) / -1.5


def test_binary_means_divide_by_the_broadcast_weights():
    probs = np.full((3, 4), 0.5)
    ln2 = math.log(2)
    assert binary_cross_entropy_from_probs(probs, 1, sample_weight=[1, 2, 0, 0]) == pytest.approx(ln2, rel=1e-15)
    assert binary_cross_entropy_from_probs(probs, 1, sample_weight=5, reduction="sum") == pytest.approx(60 * ln2)
    assert binary_cross_entropy_from_probs(probs, 1, denominator=3) == pytest.approx(4 * ln2, rel=1e-15)


@pytest.mark.parametrize("of_nothing", ["ignored", "no rows", "zero weights", "weights that cancel", "class weights"])
def test_a_mean_over_nothing_is_nan(of_nothing):
    probs, targets, options = np.array([[0.5, 0.5], [0.5, 0.5]]), [0, 0], {}
    if of_nothing == "ignored":
        targets = [-100, -100]
    elif of_nothing == "no rows":
        probs, targets = probs[:0], []
    elif of_nothing == "zero weights":
        options = {"sample_weight": [0, 0]}
    elif of_nothing == "weights that cancel":
        options = {"sample_weight": [1, -1]}
    else:
        options = {"weight": [0, 1]}
    assert math.isnan(cross_entropy_from_probs(probs, targets, **options))
    total = cross_entropy_from_probs(probs, targets, reduction="sum", **options)
    assert total == 0 and not math.copysign(1, total) < 0
    assert cross_entropy_from_probs(probs, targets, denominator=3.0, **options) == 0
    assert cross_entropy_from_probs(probs, targets, reduction="none", **options).shape == (len(probs),)


def test_binary_means_over_nothing_are_nan():
    assert math.isnan(binary_cross_entropy_from_probs(np.zeros((0, 3)), 1))
    assert math.isnan(binary_cross_entropy_from_probs([0.5], [1], sample_weight=[0]))
    assert binary_cross_entropy_from_probs(np.zeros((0, 3)), 1, reduction="sum") == 0
    assert binary_cross_entropy_from_probs(np.zeros((0, 3)), 1, reduction="none").shape == (0, 3)


# Special values


def test_a_target_of_probability_0_has_an_infinite_loss():
    probs = np.array([[0, 1], [0.5, 0.5]])
    np.testing.assert_array_equal(
        cross_entropy_from_probs(probs, [0, 1], reduction="none"), [INF, -np.log(0.5)], strict=True
    )
    assert cross_entropy_from_probs(probs, [0, 1]) == INF
    assert cross_entropy_from_probs(-0.0 * probs + [[-0.0, 1]], [0, 0]) == INF
    assert cross_entropy_from_probs(probs, [0, 1], sample_weight=[-1, 1], reduction="sum") == -INF
    assert cross_entropy_from_probs(probs, [[1e-300, 1], [0, 0]], reduction="sum") == INF


def test_an_infinite_loss_times_0_is_0():
    probs = np.array([[0.0, 1.0]])
    for options in ({"weight": [0, 1]}, {"sample_weight": [0]}):
        assert cross_entropy_from_probs(probs, [0], reduction="sum", **options) == 0
        assert cross_entropy_from_probs(probs, [[2.0, 0]], reduction="sum", **options) == 0
    assert cross_entropy_from_probs(probs, [[0.0, 5]], reduction="sum") == 0


@pytest.mark.parametrize(
    ("p", "y", "loss"),
    [(0, 0, 0), (1, 1, 0), (0, 1, INF), (1, 0, INF), (0, 0.5, INF), (1, 0.5, INF), (-0.0, 0, 0), (-0.0, 1, INF)],
)
def test_binary_ends_of_the_range(p, y, loss, dtype):
    got = binary_cross_entropy_from_probs(np.array([p], dtype), [y], reduction="none")
    assert got[0] == loss and not np.signbit(got[0])
    assert binary_cross_entropy_from_probs(np.array([p], dtype), [y], sample_weight=[-2]) == loss


def test_no_loss_is_minus_0(any_dtype):
    probs = np.array([[1, 0], [0.5, 0.5], [1, 0]], any_dtype)
    for options in ({}, {"weight": [0, 0]}, {"sample_weight": [1, 0, 2]}):
        for targets in ([0, 1, 0], [-100, 0, 0], np.array([[1.0, 0], [0, 0], [0, 0]])):
            losses = cross_entropy_from_probs(probs, targets, reduction="none", **options)
            assert not np.signbit(losses).any()
            total = cross_entropy_from_probs(probs, targets, reduction="sum", **options)
            assert math.copysign(1, total) == 1
    losses = binary_cross_entropy_from_probs(probs, probs, reduction="none", sample_weight=[[1], [0], [2]])
    assert not np.signbit(losses).any()


def test_rows_that_do_not_count_are_not_read():
    probs = np.array([[0.5, 0.5], [NAN, NAN], [-5, 9], [INF, 0], [0.2, 0.2]])
    live = math.log(2)
    assert cross_entropy_from_probs(probs, [0, -1, -1, 7, -1], ignore_index=[-1, 7]) == pytest.approx(live)
    sample_weight = [1, 0, 0, -0.0, 0]
    assert cross_entropy_from_probs(probs, [0, 1, 0, 1, 0], sample_weight=sample_weight) == pytest.approx(live)
    q = np.where(np.arange(5)[:, None] == 0, [1.0, 0], [[NAN, -3]])
    assert cross_entropy_from_probs(probs, q, sample_weight=sample_weight) == pytest.approx(live)
    losses = cross_entropy_from_probs(probs, q, sample_weight=sample_weight, reduction="none")
    np.testing.assert_array_equal(losses[1:], 0)
    y = [[1, 0], [NAN, 3], [NAN, 3], [-1, 7], [0, 9]]
    weights = np.array(sample_weight)[:, None]
    assert binary_cross_entropy_from_probs(probs, y, sample_weight=weights) == pytest.approx(live)


def test_rows_of_class_weight_0_are_read():
    with pytest.raises(ValueError, match="probs"):
        cross_entropy_from_probs([[0.5, NAN]], [0], weight=[0, 1])


def test_ids_of_weightless_rows_are_range_checked():
    with pytest.raises(IndexError, match=r"targets\[1\] = 9"):
        cross_entropy_from_probs([[0.5, 0.5], [0.5, 0.5]], [0, 9], sample_weight=[1, 0])


def test_numpys_error_state_is_respected_and_kept():
    with np.errstate(all="raise"):
        before = np.geterr()
        tiny = np.array([[0, 1]], np.float32)
        assert cross_entropy_from_probs(tiny, [0]) == INF
        assert cross_entropy_from_probs(tiny, [[1e-300, 1e-300]]) == INF
        assert cross_entropy_from_probs(np.array([[1e-300, 1]]), [1], reduction="none")[0] == 0
        assert cross_entropy_from_probs(tiny, [1], sample_weight=[1e-300], reduction="none")[0] == 0
        assert cross_entropy_from_probs(np.float32([[0.5, 0.5]]), [1], sample_weight=[1e300], reduction="none") == INF
        assert binary_cross_entropy_from_probs(tiny, 1 - tiny) == INF
        with pytest.raises(ValueError, match="probs"):
            cross_entropy_from_probs([[NAN, 1]], [0])
        assert np.geterr() == before


# Tolerance


def test_sums_may_be_off_by_the_root_of_epsilon(any_dtype):
    epsilon = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}[any_dtype.name]
    # 0.5 plus a multiple of epsilon / 2 is a number of the dtype; so is the sum in float64.
    steps = math.floor(math.sqrt(epsilon) / (epsilon / 2))
    for sign in (1, -1):
        inside = np.array([0.5, 0.5 + sign * steps * epsilon / 2], any_dtype)
        outside = np.array([0.5, 0.5 + sign * (steps + 2) * epsilon / 2], any_dtype)
        assert cross_entropy_from_probs(inside, 0) == pytest.approx(math.log(2), rel=BOUND)
        with pytest.raises(ValueError, match=r"probs must sum to 1 within .* divide by the sum"):
            cross_entropy_from_probs(outside, 0)


def test_nothing_is_clipped_or_renormalised():
    p = np.array([0.1, 0.9 + 1e-9])
    assert cross_entropy_from_probs(p, 1) == pytest.approx(-math.log(0.9 + 1e-9), rel=1e-15)
    assert cross_entropy_from_probs([1e-300, 1.0], 0) == pytest.approx(300 * math.log(10), rel=1e-15)
    with pytest.raises(ValueError, match="within"):
        cross_entropy_from_probs([0.0, 1 + 2**-52], 1)


# Refusals

PROBS = np.array([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [1, 0, 0]])
IDS = np.array([0, 2, 1, 0])


def changed(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


def refuse(function, exception, patterns, probs, targets, **options):
    """The call raises exactly this kind of error, its message has all the patterns, and no array has changed."""
    given = [array for array in (probs, targets, *options.values()) if isinstance(array, np.ndarray)]
    before = [array.tobytes() for array in given]
    with pytest.raises(exception) as caught:
        function(probs, targets, **options)
    assert type(caught.value) is exception
    message = str(caught.value)
    for pattern in patterns:
        assert re.search(pattern, message), f"no {pattern!r} in: {message}"
    if function is cross_entropy_from_probs:
        assert "logits" not in message.replace("for logits call cross_entropy", "")
    assert [array.tobytes() for array in given] == before


def test_the_call_itself_is_valid():
    assert math.isfinite(cross_entropy_from_probs(PROBS, IDS))
    assert math.isfinite(cross_entropy_from_probs(PROBS, PROBS))
    assert math.isfinite(binary_cross_entropy_from_probs(PROBS, PROBS))


@pytest.mark.parametrize(
    ("probs", "exception", "patterns"),
    [
        (np.ones((4, 3), int), TypeError, ["float32", "int64"]),
        ([[1, 0, 0]] * 4, TypeError, ["float32", "int64"]),
        (np.ones((4, 3), bool), TypeError, ["float32", "bool"]),
        (PROBS.astype(complex), TypeError, ["float32", "complex128"]),
        (PROBS.astype(np.longdouble), TypeError, ["float32", np.dtype(np.longdouble).name]),
        (PROBS.astype(object), TypeError, ["float32", "object"]),
        (np.full((4, 3), "0.5"), TypeError, ["float32", "U3"]),
        (None, TypeError, ["float32", "object"]),
        (np.ma.array(PROBS, mask=PROBS == 0), TypeError, ["mask", "sample_weight"]),
        ([[0.5], [0.5, 0.5]], ValueError, ["inhomogeneous|ragged|array"]),
        (changed(PROBS, (2, 1), NAN), ValueError, ["nan", r"row \[2\]", "finite"]),
        (changed(PROBS, (2, 1), INF), ValueError, ["inf", r"row \[2\]", "finite"]),
    ],
)
def test_probabilities_of_a_kind_that_cannot_be_right(probs, exception, patterns):
    refuse(cross_entropy_from_probs, exception, ["probs", *patterns], probs, IDS)
    patterns = [pattern.replace(r"row \[2\]", r"entry \[2, 1\]") for pattern in patterns]
    refuse(binary_cross_entropy_from_probs, exception, ["probs", *patterns], probs, 1)


@pytest.mark.parametrize(
    ("probs", "patterns"),
    [
        (changed(PROBS, (2, 1), -0.125), [r"\[0, 1\]", "-0.125", r"row \[2\]", "logits call cross_entropy"]),
        (changed(PROBS, (3, 0), 1.5), [r"\[0, 1\]", "1.5", r"row \[3\]", "logits call cross_entropy"]),
        (changed(PROBS, (1, 0), 0.25), ["sum to 1", "0.75", r"row \[1\]", "cross_entropy"]),
        (np.full((4, 3), 0.5), ["sum to 1", "1.5", r"row \[0\]"]),
        (np.zeros((4, 3)), ["sum to 1", "got 0 ", r"row \[0\]"]),
        (np.array([[3.0, -1.0, 20.0]] * 4), ["3", r"row \[0\]", "logits call cross_entropy"]),
    ],
)
def test_rows_that_are_no_probabilities(probs, patterns):
    refuse(cross_entropy_from_probs, ValueError, ["probs", *patterns], probs, IDS)
    refuse(cross_entropy_from_probs, ValueError, ["probs", *patterns], probs, PROBS)
    refuse(cross_entropy_from_probs, ValueError, ["probs", *patterns], probs.astype(np.float32), IDS)


def test_a_single_bad_row_is_named():
    refuse(cross_entropy_from_probs, ValueError, ["probs", "the only row"], np.array([0.5, 0.25]), 0)
    refuse(binary_cross_entropy_from_probs, ValueError, ["probs", "the only entry", "binary_cross"], np.float64(7), 0)


def test_shapes_of_probabilities():
    refuse(cross_entropy_from_probs, ValueError, ["probs", "0-d", "class axis"], np.float64(0.5), 0)
    refuse(cross_entropy_from_probs, ValueError, ["probs", "at least one class"], np.zeros((4, 0)), IDS)
    for axis in (2, -3, 2**70):
        refuse(cross_entropy_from_probs, ValueError, ["axis", "probs", str(axis)], PROBS, IDS, axis=axis)
    for axis in (1.0, None, "1", True, (0,)):
        refuse(cross_entropy_from_probs, TypeError, ["axis", "integer"], PROBS, IDS, axis=axis)


@pytest.mark.parametrize(
    ("targets", "exception", "patterns"),
    [
        (IDS.astype(float), TypeError, ["class ids must be integers", "float64"]),
        (IDS.astype(np.float16), TypeError, ["class ids must be integers", "float16"]),
        (IDS.astype(bool), TypeError, ["class ids must be integers", "bool"]),
        (IDS.astype(complex), TypeError, ["class ids must be integers", "complex"]),
        (IDS.astype(object), TypeError, ["class ids must be integers", "object"]),
        (None, TypeError, ["class ids must be integers", "object"]),
        ("abc", TypeError, ["class ids must be integers", "U3"]),
        (np.ma.array(IDS, mask=IDS == 0), TypeError, ["mask"]),
        (np.ma.array(PROBS, mask=PROBS == 0), TypeError, ["mask"]),
        (PROBS.astype(np.longdouble), TypeError, ["distributions", np.dtype(np.longdouble).name]),
        (np.eye(3, dtype=int)[IDS], ValueError, [r"\(4,\)", r"\(4, 3\)", "one-hot", "argmax"]),
        (IDS[:, None], ValueError, [r"\(4,\)", r"\(4, 1\)", r"\[\.\.\., 0\]"]),
        (IDS[:3], ValueError, [r"\(4,\)", r"\(3,\)", "transposed", "axis=0"]),
        (PROBS.T, ValueError, [r"\(4, 3\)", r"\(3, 4\)", "distributions"]),
        (PROBS[:, :2], ValueError, [r"\(4, 3\)", r"\(4, 2\)", "distributions"]),
        (PROBS[0], ValueError, [r"\(4,\)", r"\(4, 3\)", r"\(3,\)"]),
        ([], ValueError, [r"\(4,\)", r"\(0,\)"]),
        (changed(PROBS, (2, 1), NAN), ValueError, ["distributions", "finite", "nan", r"row \[2\]"]),
        (changed(PROBS, (2, 1), INF), ValueError, ["distributions", "finite", "inf", r"row \[2\]"]),
        (changed(PROBS, (2, 1), -1e-9), ValueError, ["distributions", ">= 0", "-1e-09", r"row \[2\]"]),
    ],
)
def test_targets_that_do_not_fit(targets, exception, patterns):
    refuse(cross_entropy_from_probs, exception, ["targets", *patterns], PROBS, targets)


@pytest.mark.parametrize(
    ("targets", "patterns"),
    [
        ([0, 1, 3, 7], [r"targets\[2\] = 3", r"0\.\.2", "2 rows"]),
        ([0, 1, -1, 0], [r"targets\[2\] = -1", "ignore_index=-1"]),
        ([0, 255, 1, 0], [r"targets\[1\] = 255", "ignore_index=255"]),
        ([1, 2, 3, 3], [r"targets\[2\] = 3", "start at 1"]),
        (np.array([0, 1, 2**63, 0], np.uint64), [r"targets\[2\] = 9223372036854775808"]),
    ],
)
def test_class_ids_out_of_range(targets, patterns):
    refuse(cross_entropy_from_probs, IndexError, patterns, PROBS, targets)


@pytest.mark.parametrize(
    ("options", "exception", "patterns"),
    [
        ({"weight": np.ones(4)}, ValueError, ["weight", r"\(3,\)", r"\(4,\)"]),
        ({"weight": 2.0}, ValueError, ["weight", r"\(3,\)", r"\(\)"]),
        ({"weight": [1, -1, 1]}, ValueError, ["weight", ">= 0", "-1"]),
        ({"weight": [1, NAN, 1]}, ValueError, ["weight", "finite", "nan"]),
        ({"weight": [1, 1, INF]}, ValueError, ["weight", "finite", "inf"]),
        ({"weight": ["a", "b", "c"]}, TypeError, ["weight"]),
        ({"weight": np.ones(3, complex)}, TypeError, ["weight", "complex"]),
        ({"weight": np.ma.array([1.0, 2, 3], mask=[0, 1, 0])}, TypeError, ["weight", "mask"]),
        ({"sample_weight": np.ones(3)}, ValueError, ["sample_weight", r"\(4,\)", r"\(3,\)"]),
        ({"sample_weight": 2.0}, ValueError, ["sample_weight", r"\(4,\)", r"\(\)"]),
        ({"sample_weight": [1, 1, NAN, 1]}, ValueError, ["sample_weight", "finite"]),
        ({"sample_weight": [1, 1, 1, -INF]}, ValueError, ["sample_weight", "finite"]),
        ({"sample_weight": ["a"] * 4}, TypeError, ["sample_weight"]),
        ({"sample_weight": np.ma.array(np.ones(4), mask=IDS == 0)}, TypeError, ["sample_weight", "mask"]),
        ({"ignore_index": 1.5}, TypeError, ["ignore_index", "1.5"]),
        ({"ignore_index": "1"}, TypeError, ["ignore_index"]),
        ({"ignore_index": 2**63}, ValueError, ["ignore_index", "int64"]),
        ({"reduction": "average"}, ValueError, ["reduction", "average", "mean"]),
        ({"reduction": None}, TypeError, ["reduction", "None"]),
        ({"denominator": 0}, ValueError, ["denominator", "> 0"]),
        ({"denominator": -1.0}, ValueError, ["denominator", "> 0"]),
        ({"denominator": NAN}, ValueError, ["denominator", "finite"]),
        ({"denominator": "3"}, TypeError, ["denominator"]),
        ({"denominator": 2, "reduction": "sum"}, ValueError, ["denominator", "mean", "sum"]),
        ({"denominator": 2, "reduction": "none"}, ValueError, ["denominator", "mean", "none"]),
        ({"num_threads": 0}, ValueError, ["num_threads", "0"]),
        ({"num_threads": True}, TypeError, ["num_threads", "True"]),
        ({"num_threads": 1.0}, TypeError, ["num_threads", "1.0"]),
    ],
)
def test_options_that_cannot_be_right(options, exception, patterns):
    for targets in (IDS, PROBS):
        refuse(cross_entropy_from_probs, exception, patterns, PROBS, targets, **options)


@pytest.mark.parametrize("ignore_index", [0, 255, [-100, 1], np.array([3])])
def test_ignore_index_does_not_go_with_distributions(ignore_index):
    patterns = ["ignore_index", "distributions", "sample_weight 0"]
    refuse(cross_entropy_from_probs, ValueError, patterns, PROBS, PROBS, ignore_index=ignore_index)


@pytest.mark.parametrize("ignore_index", [None, -100, [], [-100]])
def test_ignoring_nothing_goes_with_distributions(ignore_index):
    loss = cross_entropy_from_probs(PROBS, PROBS, ignore_index=ignore_index)
    assert loss == cross_entropy_from_probs(PROBS, PROBS)


@pytest.mark.parametrize(
    ("options", "exception", "patterns"),
    [
        ({"probs": changed(PROBS, (2, 1), -0.5)}, ValueError, ["probs", r"\[0, 1\]", "-0.5", r"entry \[2, 1\]"]),
        ({"probs": PROBS * 3}, ValueError, ["probs", "1.5", r"entry \[0, 2\]", "logits call binary_cross_entropy"]),
        ({"targets": PROBS * 3}, ValueError, ["targets", r"\[0, 1\]", "1.5", r"entry \[0, 2\]"]),
        ({"targets": np.full((4, 3), -100)}, ValueError, ["targets", "-100", r"entry \[0, 0\]", "sample_weight 0"]),
        ({"targets": np.full((4, 3), 2)}, ValueError, ["targets", "got 2 in"]),
        ({"targets": np.full(3, NAN)}, ValueError, ["targets", "nan"]),
        ({"targets": np.ones(4)}, ValueError, ["targets", "broadcast", r"\(4, 3\)", r"\(4,\)"]),
        ({"targets": np.ones((2, 4, 3))}, ValueError, ["targets", "broadcast", r"\(4, 3\)", r"\(2, 4, 3\)"]),
        ({"targets": np.ones(3, complex)}, TypeError, ["targets", "complex"]),
        ({"targets": np.ones(3, np.longdouble)}, TypeError, ["targets", np.dtype(np.longdouble).name]),
        ({"targets": "yes"}, TypeError, ["targets"]),
        ({"targets": None}, TypeError, ["targets"]),
        ({"targets": np.ma.array(PROBS, mask=PROBS == 0)}, TypeError, ["targets", "mask"]),
        ({"sample_weight": np.ones(4)}, ValueError, ["sample_weight", "broadcast", r"\(4, 3\)", r"\(4,\)"]),
        ({"sample_weight": [1, NAN, 1]}, ValueError, ["sample_weight", "finite", "nan", r"entry \[0, 1\]"]),
        ({"sample_weight": -INF}, ValueError, ["sample_weight", "finite", "inf"]),
        ({"sample_weight": "1"}, TypeError, ["sample_weight"]),
        ({"reduction": "average"}, ValueError, ["reduction", "average"]),
        ({"denominator": 0}, ValueError, ["denominator", "> 0"]),
        ({"denominator": 2, "reduction": "sum"}, ValueError, ["denominator", "mean"]),
        ({"num_threads": 0}, ValueError, ["num_threads"]),
        ({"num_threads": False}, TypeError, ["num_threads"]),
    ],
)
def test_binary_calls_that_cannot_be_right(options, exception, patterns):
    call = {"probs": PROBS, "targets": PROBS > 0.3, **options}
    refuse(binary_cross_entropy_from_probs, exception, patterns, **call)


class RepairedMemory(np.ndarray):
    """Numbers that another thread puts right as soon as somebody has looked at them once."""

    def __array_ufunc__(self, ufunc, method, *arguments, **options):
        plain = [value.view(np.ndarray) if isinstance(value, np.ndarray) else value for value in arguments]
        result = getattr(ufunc, method)(*plain, **options)
        self.view(np.ndarray)[...] = 0.5
        return result


@pytest.mark.parametrize("bad", [-1.0, NAN])
def test_numbers_that_change_while_they_are_checked_are_refused_as_they_were(bad):
    for check, remedy in ((_checks.check_unit_interval, ["be careful"]), (_checks.check_distributions, [])):
        numbers = np.full((2, 3), 0.25)
        numbers[1, 2] = bad
        name = ["probs"] if remedy else []
        with pytest.raises(ValueError, match=r"must be finite.* in row 1"):
            check(*name, numbers.view(RepairedMemory), "row {}".format, *remedy)
