"""float16 and bfloat16 logits are computed in float32; the gradient is rounded once, from the float32 result."""

import importlib
import itertools
import warnings

import numpy as np
import pytest
from test_layouts import READABLE_LAYOUTS, WRITABLE_LAYOUTS, assert_same_bits
from test_options import OPTION_SETS, filled

import fastce
from fastce import SparseTargets

SHAPES = [(9, 1), (40, 3), (40, 33), (20, 97), (7, 1000), (3, 5000)]


@pytest.fixture(params=["float16", "bfloat16"])
def half(request):
    if request.param == "float16":
        return np.dtype(np.float16)
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


def bits(array):
    return np.ascontiguousarray(array).view(np.uint16)


def assert_rounded(got, exact, what=""):
    """`got` is `exact`, float32 in every number, rounded once to the half type of `got`; any nan is nan."""
    with np.errstate(all="ignore"):
        expected = exact.astype(got.dtype)
    is_nan = np.isnan(exact)
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), is_nan, err_msg=str(what))
    np.testing.assert_array_equal(bits(got)[~is_nan], bits(expected)[~is_nan], err_msg=str(what))


def random_logits(shape, half, rng):
    return (rng.normal(0, 1, shape) * rng.choice([1, 5, 60], (*shape[:-1], 1))).astype(half)


@pytest.mark.parametrize("options", OPTION_SETS, ids=lambda options: "-".join(options) or "plain")
def test_every_option_equals_float32_rounded_once(options, half, rng):
    for shape, reduction in zip(SHAPES, itertools.cycle(["none", "mean", "sum"]), strict=False):
        logits = random_logits(shape, half, rng)
        ids = rng.integers(0, shape[1], shape[0])
        given = filled(options, logits, ids, rng)
        wide = logits.astype(np.float32)
        for targets in (ids, rng.random(shape), SparseTargets(ids[:, None], np.ones((shape[0], 1)))):
            alone = fastce.cross_entropy(logits, targets, reduction=reduction, **given)
            loss, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction=reduction, **given)
            expected = fastce.cross_entropy_with_grad(wide, targets, reduction=reduction, **given)
            assert_same_bits(loss, expected[0], shape)
            assert_same_bits(alone, expected[0], shape)
            assert type(loss) is type(expected[0]) and gradient.dtype == half
            assert_rounded(gradient, expected[1], shape)
            if "softcap" in given:
                continue
            results = fastce.cross_entropy_with_grad_hess(logits, targets, reduction=reduction, **given)
            expected = fastce.cross_entropy_with_grad_hess(wide, targets, reduction=reduction, **given)
            assert_same_bits(results[0], expected[0], shape)
            for got, wanted in zip(results[1:], expected[1:], strict=True):
                assert got.dtype == half
                assert_rounded(got, wanted, shape)


def test_losses_are_float32(half):
    logits = np.zeros((4, 3), half)
    losses = fastce.cross_entropy(logits, [0, 1, 2, 0], reduction="none")
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, np.log(3), rtol=1e-7)
    assert type(fastce.cross_entropy(logits, [0, 1, 2, 0])) is float


def test_the_gradient_of_a_confident_row_is_not_rounded_away(half):
    # 1 - p rounded to the half type first would be wrong by up to its own size.
    for p in (0.99, 0.999, 0.9999):
        logits = np.array([[np.log(p / (1 - p)), 0]]).astype(half)
        lead = float(logits[0, 0])
        exact = 1 / (1 + np.exp(lead))
        loss, gradient = fastce.cross_entropy_with_grad(logits, [0], reduction="none")
        np.testing.assert_allclose(loss, np.log1p(np.exp(-lead)), rtol=5e-7)
        unit = 2.0**-11 if half == np.float16 else 2.0**-8
        np.testing.assert_allclose(gradient.astype(float), [[-exact, exact]], rtol=1.01 * unit)


def test_grad_output_lifts_gradients_before_they_are_rounded(half, rng):
    # What loss scaling is for: gradients below the range of the half type survive when they are scaled first.
    logits = np.array([[30, 0, 10]]).astype(half)
    _, exact = fastce.cross_entropy_with_grad(logits.astype(np.float32), [0], grad_output=2.0**24)
    _, gradient = fastce.cross_entropy_with_grad(logits, [0], grad_output=2.0**24)
    assert_rounded(gradient, exact)
    if half == np.float16:
        assert gradient.any()
        assert not fastce.cross_entropy_with_grad(logits, [0])[1][0, 1]


def test_a_gradient_beyond_the_range_is_infinite_and_warns_not(half):
    logits = np.zeros((2, 2), half)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        _, gradient = fastce.cross_entropy_with_grad(logits, [0, 1], reduction="sum", grad_output=1e38)
        expected = 5e37 if half != np.float16 else np.inf
        np.testing.assert_allclose(gradient.astype(float), [[-expected, expected], [expected, -expected]], rtol=1e-2)
        fastce.cross_entropy_with_grad(logits, [0, 1], grad_output=1e-38)


def test_special_rows(half):
    inf, nan = np.inf, np.nan
    logits = np.array([[0, nan, 0], [0, inf, 0], [-inf] * 3, [-inf, 0, 0], [0, -inf, -inf], [nan] * 3], np.float32)
    losses, gradient = fastce.cross_entropy_with_grad(logits.astype(half), [0, 0, 0, 0, 0, -100], reduction="none")
    np.testing.assert_array_equal(losses, [nan, nan, nan, inf, 0, 0])
    np.testing.assert_array_equal(gradient.astype(float), [[nan] * 3] * 3 + [[-1, 0.5, 0.5]] + [[0, 0, 0]] * 2)


def test_numbers_at_the_ends_of_the_range(half, rng):
    top = 65504.0 if half == np.float16 else 3.3895314e38
    logits = np.array([[top, -top, 0], [-top, -top, -top], [top, top, -top]], np.float32).astype(half)
    for options in ({}, {"label_smoothing": 1e-3}, {"logit_scale": 0.5}):
        got = fastce.cross_entropy_with_grad(logits, [0, 1, 1], reduction="none", **options)
        expected = fastce.cross_entropy_with_grad(logits.astype(np.float32), [0, 1, 1], reduction="none", **options)
        assert_same_bits(got[0], expected[0])
        assert_rounded(got[1], expected[1])


# Every number, on its way in and out


@pytest.fixture(params=fastce.build_info()["available_targets"])
def passage(request):
    """The compiled module that a target carries blocks of rows with."""
    return importlib.import_module(f"fastce._kernels.passage_{request.param}")


def readable(array):
    """An array as compiled code reads it: bfloat16 as its bits."""
    return array if array.dtype == np.float16 or array.itemsize != 2 else array.view(np.uint16)


def all_numbers(half):
    return np.arange(1 << 16, dtype=np.uint16).view(half)


def test_every_half_number_is_read_as_it_is(passage, half):
    # 37 columns: whole vectors and a rest in each row.
    halves = np.resize(all_numbers(half), (1772, 37))
    numbers = np.full(halves.shape, 7, np.float32)
    assert passage.load(readable(halves), numbers, half != np.float16, 1)
    expected = halves.astype(np.float32)
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(numbers), is_nan)
    np.testing.assert_array_equal(numbers.view(np.uint32)[~is_nan], expected.view(np.uint32)[~is_nan])


def test_whatever_lies_between_is_rounded_to_nearest_ties_to_even(passage, half, rng):
    exact = np.sort(all_numbers(half).astype(np.float32))
    exact = exact[np.isfinite(exact)]
    middles = ((exact[:-1].astype(float) + exact[1:]) / 2).astype(np.float32)
    up, down = np.float32(np.inf), np.float32(-np.inf)
    numbers = [np.nextafter(group, way) for group in (exact, middles) for way in (up, down)]
    any_bits = rng.integers(0, 1 << 32, 500_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 65519.996, 65520, 3.3961775e38, 1e-45, -1e-45], np.float32)
    numbers = np.concatenate([exact, middles, *numbers, any_bits, special])
    numbers = numbers[: numbers.size // 37 * 37].reshape(-1, 37)
    halves = np.empty(numbers.shape, half)
    assert passage.store(numbers, readable(halves), half != np.float16, 1)
    assert_rounded(halves, numbers)


LAYOUT_SHAPES = [(21, 1024), (5,), (3, 7), (70, 20), (4, 5, 6), (2, 3, 70, 18), (3, 130, 5, 9), (1, 6, 1, 4)]


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64", "uint8"])
def test_blocks_of_any_layout_are_carried_both_ways(passage, kind, rng):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if kind == "bfloat16" else kind)
    wide, is_bfloat = np.dtype(np.float32) if dtype.itemsize == 2 else dtype, kind == "bfloat16"
    for shape in LAYOUT_SHAPES:
        for order in itertools.islice(itertools.permutations(range(len(shape))), 0, None, len(shape) - 1 or 1):
            for step in (1, -1, 2):
                whole = np.zeros([length * abs(step) for length in shape], dtype).transpose(order)
                array = whole[(slice(None, None, step),) * len(shape)]
                numbers = rng.integers(0, 200, array.shape)
                array[...] = numbers
                buffer = np.zeros((array.size // array.shape[-1], array.shape[-1]), wide)
                num_threads = 2 if step == 2 else 1
                assert passage.load(readable(array), buffer, is_bfloat, num_threads)
                assert (buffer.reshape(array.shape) == numbers).all()
                whole[...] = 7
                assert passage.store(buffer, readable(array), is_bfloat, num_threads)
                assert (array.astype(int) == numbers).all()
                array[...] = 7
                assert (whole.astype(int) == 7).all()   # beside the array nothing was written


def test_what_is_left_to_numpy_is_not_touched(passage):
    buffer = np.full((4, 3), 7, np.float32)
    swapped, unaligned = np.zeros((4, 3), ">f2"), np.zeros(25, np.uint8)[1:].view(np.float16).reshape(4, 3)
    for array in (swapped, unaligned, np.zeros((4, 3)), np.zeros((4, 3), np.uint16), np.zeros((4, 3), int)):
        assert not passage.load(array, buffer, False, 1)
        assert not passage.store(buffer, array, False, 1)
        assert (buffer == 7).all() and not array.any()
    assert not passage.load(np.zeros((4, 3), np.float16), np.zeros((4, 3)), False, 1)


# Layouts and buffers


def test_any_layout_axis_and_buffer(half, rng):
    for options in ({}, {"label_smoothing": 0.1}):
        logits, ids = random_logits((3, 7, 9), half, rng), rng.integers(0, 7, (3, 9))
        last = np.ascontiguousarray(np.moveaxis(logits, 1, -1)).astype(np.float32)
        losses, exact = fastce.cross_entropy_with_grad(last, ids, reduction="none", **options)
        layouts = [layout for layout in READABLE_LAYOUTS if half == np.float16 or "swapped" not in layout.__name__]
        for layout in layouts:
            got = fastce.cross_entropy_with_grad(layout(logits), ids, axis=1, reduction="none", **options)
            assert_same_bits(got[0], losses, layout)
            assert_rounded(np.moveaxis(got[1], 1, -1), exact, layout)
        for layout in WRITABLE_LAYOUTS:
            for out in (layout(np.zeros_like(logits)), layout(logits)):
                source = out if np.array_equal(bits(np.array(out)), bits(logits)) else logits
                got = fastce.cross_entropy_with_grad(source, ids, axis=1, reduction="none", out=out, **options)
                assert got[1] is out
                assert_rounded(np.moveaxis(np.array(out), 1, -1), exact, layout)


def test_batches_of_many_blocks_and_threads(half, rng):
    for shape in ((50_000, 5), (3000, 97), (500, 1000), (6, 40_000)):
        logits, ids = random_logits(shape, half, rng), rng.integers(0, shape[1], shape[0])
        loss, exact = fastce.cross_entropy_with_grad(logits.astype(np.float32), ids)
        for num_threads in (1, 3):
            got = fastce.cross_entropy_with_grad(logits, ids, num_threads=num_threads)
            assert got[0] == loss
            assert_rounded(got[1], exact, shape)


def test_out_has_the_type_of_the_logits(half):
    logits = np.zeros((2, 3), half)
    for kind in (np.float32, np.float64, np.uint16):
        out = np.full((2, 3), 7, kind)
        with pytest.raises(TypeError, match="out"):
            fastce.cross_entropy_with_grad(logits, [0, 1], out=out)
        assert (out == 7).all()
    out, hess_out = np.zeros((2, 3), np.float32), np.zeros((2, 3))
    fastce.cross_entropy_with_grad_hess(logits, [0, 1], reduction="sum", out=out, hess_out=hess_out)
    np.testing.assert_allclose(out, np.full((2, 3), 1 / 3) - np.eye(2, 3), rtol=1e-6)
    np.testing.assert_allclose(hess_out, 2 / 9, rtol=1e-6)


def test_half_weights_and_targets(half, rng):
    logits, ids = rng.normal(0, 3, (20, 9)).astype(np.float32), rng.integers(0, 9, 20)
    w, s = rng.random(9).astype(half), rng.random(20).astype(half)
    got = fastce.cross_entropy_with_grad(logits, ids, weight=w, sample_weight=s)
    expected = fastce.cross_entropy_with_grad(logits, ids, weight=w.astype(float), sample_weight=s.astype(float))
    assert got[0] == expected[0]
    assert_same_bits(got[1], expected[1])
    q = rng.random((20, 9)).astype(half)
    got = fastce.cross_entropy_with_grad(logits.astype(half), q)
    expected = fastce.cross_entropy_with_grad(logits.astype(half).astype(np.float32), q.astype(np.float32))
    assert got[0] == expected[0]
    assert_rounded(got[1], expected[1])


# Everything else that takes logits


def test_activations_are_rounded_once(half, rng):
    for shape in SHAPES:
        logits = random_logits(shape, half, rng)
        wide = logits.astype(np.float32)
        for function in (fastce.softmax, fastce.log_softmax):
            got = function(logits)
            assert got.dtype == half
            assert_rounded(got, function(wide))
            out = logits.copy()
            assert function(out, out=out) is out
            assert_rounded(out, function(wide))
        got = fastce.logsumexp(logits)
        assert got.dtype == np.float32
        assert_same_bits(got, fastce.logsumexp(wide))


def test_statistics_are_float32(half, rng):
    logits, ids = random_logits((20, 33), half, rng), rng.integers(0, 33, 20)
    expected = fastce.cross_entropy_stats(logits.astype(np.float32), ids)
    for got, wanted in zip(fastce.cross_entropy_stats(logits, ids), expected, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_torch_s_losses_agree(half, reduction, rng):
    torch = pytest.importorskip("torch", reason="torch, an optional oracle, is not installed")
    logits, ids = rng.normal(0, 3, (30, 17)).astype(half), rng.integers(0, 17, 30)
    given = torch.tensor(logits.astype(np.float32), requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(given, torch.tensor(ids), reduction=reduction, label_smoothing=0.1)
    theirs.sum().backward()
    loss, gradient = fastce.cross_entropy_with_grad(logits, ids, reduction=reduction, label_smoothing=0.1)
    np.testing.assert_allclose(loss, theirs.detach().numpy(), rtol=1e-5)
    unit = 2.0**-11 if half == np.float16 else 2.0**-8
    np.testing.assert_allclose(gradient.astype(float), given.grad.numpy(), rtol=1.1 * unit, atol=1e-7)


def test_foreign_byte_order_changes_nothing(half, rng):
    logits, ids = rng.normal(0, 3, (20, 33)).astype(half), rng.integers(0, 33, 20)
    masses = rng.random((20, 33)).astype(half)
    # Not by .byteswap(), which ml_dtypes' bfloat16 does not know.
    swapped, swapped_masses = (array.astype(half.newbyteorder(">")) for array in (logits, masses))
    assert_same_bits(fastce.softmax(swapped), fastce.softmax(logits))
    assert_same_bits(fastce.logsumexp(swapped.T, axis=0), fastce.logsumexp(logits))
    for targets, foreign in ((ids, ids), (masses, swapped_masses)):
        loss, grad = fastce.cross_entropy_with_grad(swapped, foreign)
        expected = fastce.cross_entropy_with_grad(logits, targets)
        assert loss == expected[0]
        assert_same_bits(grad, expected[1])
    assert fastce.kl_divergence(swapped, swapped_masses) == fastce.kl_divergence(logits, masses)


def test_float8_is_no_dtype_of_logits():
    dtypes = pytest.importorskip("ml_dtypes")
    for dtype in (dtypes.float8_e5m2, dtypes.float8_e4m3fn):
        with pytest.raises(TypeError, match="float16, bfloat16, float32 or float64"):
            fastce.softmax(np.zeros((2, 3), dtype))
