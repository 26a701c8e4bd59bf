"""softmax, log_softmax, logsumexp: every entry accurate, on any axis; SciPy's values where SciPy keeps its digits."""

import warnings

import hard_rows
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_layouts import READABLE_LAYOUTS, WRITABLE_LAYOUTS, assert_same_bits
from test_options import BORDERS, EXTENDED, LONG_BORDERS, few_rows
from truth import GRADIENT_BOUND, LOSS_BOUND, assert_within

import fastce

FUNCTIONS = [fastce.softmax, fastce.log_softmax]


def named(function):
    return function.__name__


def true_activations(logits):
    """Return (softmax, log_softmax, logsumexp, |largest| + log(S/e_m)) of rows (N, C) in extended precision."""
    z = np.asarray(logits).astype(EXTENDED)
    rows = np.arange(len(z))
    with np.errstate(all="ignore"):
        top = z.max(1)
        e = np.exp(z - top[:, None])
        e[rows, z.argmax(1)] = 0
        least = np.log1p(e.sum(1))
        log_p = (z - top[:, None]) - least[:, None]
        return np.exp(log_p), log_p, top + least, np.abs(top) + least


def assert_true(logits, what=""):
    name = np.asarray(logits).dtype.name
    p, log_p, lse, reach = true_activations(logits)
    assert_within(fastce.softmax(logits), p, GRADIENT_BOUND[name], f"{what} softmax")
    finite = np.isfinite(log_p)
    got = fastce.log_softmax(logits)
    np.testing.assert_array_equal(got[~finite], -np.inf)
    assert_within(np.where(finite, got, 0), np.where(finite, log_p, 0), LOSS_BOUND[name], f"{what} log_softmax")
    got = fastce.logsumexp(logits)
    # The two terms of the log-sum-exp may cancel: the bound refers to the sum of their magnitudes.
    error = np.abs(got.astype(EXTENDED) - lse)
    assert (error <= LOSS_BOUND[name] * reach + np.finfo(name).smallest_normal).all(), f"{what} logsumexp"


@pytest.mark.parametrize("generator", hard_rows.GENERATORS, ids=named)
def test_hard_rows_are_accurate(generator, dtype, rng):
    for number, (logits, targets) in enumerate(generator(dtype, rng)):
        logits, _ = few_rows(logits, targets, 3000)
        if logits.size <= 20_000:
            assert_true(logits, (generator.__name__, number, logits.shape))


@pytest.mark.parametrize("classes", [1, 2, *BORDERS, *LONG_BORDERS])
def test_rows_of_any_length_are_accurate(classes, dtype, rng):
    logits = rng.normal(0, 4, (3, classes)).astype(dtype)
    logits[1] *= 40
    logits[2, classes // 2] = 50
    assert_true(logits, classes)


def test_values_worked_by_hand(dtype):
    close = {"rtol": 6e-7}
    p = fastce.softmax(np.array([2, 0, 0], dtype))
    np.testing.assert_allclose(p, [0.78698604, 0.10650698, 0.10650698], **close)
    np.testing.assert_allclose(fastce.log_softmax(np.array([20, 0], dtype)), [-2.0611536e-09, -20.000000002], **close)
    np.testing.assert_allclose(fastce.logsumexp(np.array([1000, 1000], dtype)), 1000.69314718, **close)
    for function, value in ((fastce.softmax, 1.0), (fastce.log_softmax, 0.0)):
        np.testing.assert_array_equal(function(np.array([[3.5], [-1e30]], dtype)), value)


def test_the_three_belong_together(dtype, rng):
    logits = rng.normal(0, 5, (20, 60)).astype(dtype)
    p, log_p, lse = fastce.softmax(logits), fastce.log_softmax(logits), fastce.logsumexp(logits)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(p.sum(1, dtype=EXTENDED).astype(float), 1, rtol=4 * eps)
    np.testing.assert_allclose(np.exp(log_p.astype(float)), p, rtol=200 * eps)
    np.testing.assert_allclose((logits - lse[:, None]), log_p, rtol=0, atol=50 * eps)
    ids = logits.argmax(1)
    losses = fastce.cross_entropy(logits, ids, reduction="none")
    np.testing.assert_allclose(-log_p[np.arange(20), ids], losses, rtol=2 * LOSS_BOUND[dtype.name])


# Against SciPy


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    hnp.array_shapes(min_dims=1, max_dims=4, max_side=6), st.data(), st.integers(0, 2**32),
    st.sampled_from([1, 30, 500]),
)  # fmt: skip
def test_scipy_agrees_on_any_axis(shape, data, seed, scale):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    logits = np.random.default_rng(seed).normal(0, scale, shape)
    close = {"rtol": 1e-12, "atol": 1e-14}
    np.testing.assert_allclose(
        fastce.softmax(logits, axis), scipy.special.softmax(logits, axis=axis), rtol=1e-12, atol=1e-307
    )
    np.testing.assert_allclose(
        fastce.log_softmax(logits, axis=axis), scipy.special.log_softmax(logits, axis=axis), **close
    )
    for keepdims in (False, True):
        ours = fastce.logsumexp(logits, axis, keepdims=keepdims)
        theirs = scipy.special.logsumexp(logits, axis=axis, keepdims=keepdims)
        assert ours.shape == np.shape(theirs)
        np.testing.assert_allclose(ours, theirs, **close)


INFINITE = [
    [0.0, 1.0, -np.inf],
    [-np.inf, -np.inf, 3.0],
    [-np.inf, -np.inf, -np.inf],
    [np.inf, 0.0, 1.0],
    [np.inf, np.inf, 0.0],
    [np.inf, -np.inf, 0.0],
    [np.nan, 0.0, 1.0],
    [np.nan, np.inf, 1.0],
    [np.nan, -np.inf, -np.inf],
    [1e300, 1e300, -1e300],
]


@pytest.mark.parametrize("row", INFINITE, ids=str)
def test_scipy_agrees_on_infinities(row):
    for classes in (3, 20, 100, 5000):
        logits = np.full(classes, -np.inf)
        logits[[0, classes // 2, classes - 1]] = row
        with np.errstate(all="ignore"):
            theirs = scipy.special.logsumexp(logits)
            np.testing.assert_allclose(fastce.logsumexp(logits), theirs, rtol=1e-14)
            np.testing.assert_allclose(fastce.softmax(logits), scipy.special.softmax(logits), rtol=1e-14)
            if not np.isposinf(row).any():
                np.testing.assert_allclose(fastce.log_softmax(logits), scipy.special.log_softmax(logits), rtol=1e-14)


# Special values


@pytest.mark.parametrize("classes", [1, 2, 3, 16, 17, 97, 128, 4096, 4099, 70_000])
def test_the_log_sum_exp_of_infinite_rows(classes, dtype):
    logits = np.zeros((6, classes), dtype)
    logits[1] = -np.inf
    logits[2, -1] = np.inf
    logits[3, 0] = np.nan
    logits[4, 0], logits[4, -1] = -np.inf, np.inf
    expected = [np.log(classes), -np.inf, np.inf, np.nan, np.inf, np.log(classes)]
    np.testing.assert_allclose(fastce.logsumexp(logits), expected, rtol=5e-7)
    if classes > 1:
        logits[2:4, [0, -1]] = [np.nan, np.inf], [np.inf, np.nan]
        assert np.isnan(fastce.logsumexp(logits[2:4])).all()


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
def test_a_bad_row_is_nan_and_touches_no_other(function, dtype, rng):
    for classes in (1, 2, 3, 16, 17, 97, 128, 4099):
        logits = rng.normal(0, 3, (7, classes)).astype(dtype)
        clean = function(logits)
        for bad in (np.nan, np.inf, -np.inf):
            spoiled = logits.copy()
            spoiled[3, ... if bad == -np.inf else classes // 2] = bad
            got = function(spoiled)
            assert np.isnan(got[3]).all()
            assert_same_bits(np.delete(got, 3, 0), np.delete(clean, 3, 0))


def test_minus_infinity_has_probability_zero(dtype, rng):
    for classes in (2, 20, 97, 5000):
        logits = rng.normal(0, 3, (4, classes)).astype(dtype)
        logits[:, ::2] = -np.inf
        p, log_p = fastce.softmax(logits), fastce.log_softmax(logits)
        assert not p[:, ::2].any() and not np.signbit(p).any() and np.isfinite(log_p[:, 1::2]).all()
        np.testing.assert_array_equal(log_p[:, ::2], -np.inf)


def test_nothing_warns_and_no_floating_point_error_is_raised(dtype):
    top = np.finfo(dtype).max
    logits = np.array([[np.nan, 0], [np.inf, 0], [-np.inf, -np.inf], [top, -top], [1e-40, 0], [90, 0]]).astype(dtype)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        for function in (*FUNCTIONS, fastce.logsumexp):
            function(logits)
            function(logits[:0])
            function(np.asfortranarray(logits))


def test_no_rows(dtype):
    logits = np.zeros((3, 0, 5), dtype)
    for function in FUNCTIONS:
        assert function(logits).shape == (3, 0, 5)
    assert fastce.logsumexp(logits).shape == (3, 0)
    assert fastce.logsumexp(logits, keepdims=True).shape == (3, 0, 1)


# What is returned, and the same bits however


def test_results_have_the_documented_types(dtype, rng):
    logits = rng.normal(0, 3, (2, 5, 3)).astype(dtype)
    for axis in range(-3, 3):
        for function in FUNCTIONS:
            got = function(logits, axis)
            assert type(got) is np.ndarray and got.shape == logits.shape and got.dtype == dtype
        got = fastce.logsumexp(logits, axis)
        assert type(got) is np.ndarray and got.shape == tuple(np.delete(logits.shape, axis)) and got.dtype == dtype
    single = fastce.logsumexp(logits[0, 0])
    assert type(single) is np.ndarray and single.shape == ()
    for rows in ([[0.5, 1.0]], np.array([[0.5, 1.0]]).view(np.recarray)):
        assert type(fastce.softmax(rows)) is np.ndarray and fastce.softmax(rows).dtype == np.float64


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
def test_out_is_returned_and_may_be_the_logits(function, dtype, rng):
    for shape in ((7, 3), (4, 3, 20), (5, 300), (3, 5000), (2, 70_000)):
        logits = (rng.normal(0, 1, shape) * rng.choice([1, 60], (*shape[:-1], 1))).astype(dtype)
        expected = function(logits)
        for layout in WRITABLE_LAYOUTS if logits.size < 5000 else (np.copy, np.asfortranarray):
            for out in (layout(np.full_like(logits, 7)), layout(logits)):
                source = out if np.array_equal(out, logits) else logits
                assert function(source, out=out) is out
                assert_same_bits(np.array(out), expected, layout)


def test_layouts_and_axes_change_no_bit(dtype, rng):
    for shape in ((7, 3), (5, 40), (3, 200), (2, 5000)):
        logits = rng.normal(0, 9, shape).astype(dtype)
        expected = [function(logits) for function in (*FUNCTIONS, fastce.logsumexp)]
        for layout in READABLE_LAYOUTS:
            got = [function(layout(logits)) for function in (*FUNCTIONS, fastce.logsumexp)]
            for one, other in zip(got, expected, strict=True):
                assert_same_bits(one, other, layout)
        assert_same_bits(fastce.softmax(np.ascontiguousarray(logits.T), 0).T, expected[0])
        assert_same_bits(fastce.log_softmax(np.ascontiguousarray(logits.T), 0).T, expected[1])
        assert_same_bits(fastce.logsumexp(np.ascontiguousarray(logits.T), 0), expected[2])


# Lengths at the borders of the kernels for classes that lie a stride apart: columns up to 96, squares of 4, tiles of at
# least 16 rows up to 32768 classes, buffers beyond.
STRIDED_CLASSES = [1, 2, 3, 4, 5, 8, 9, 21, 95, 96, 97, 99, 128, 1000, 1024, 4097, 32_768, 32_769]
NEIGHBOURS = [2, 3, 4, 5, 16, 67, 128, 130]


def strange_rows(shape, dtype, rng):
    """Rows (..., C) of which some leave the common window, hold infinities or nan, or are large and near each other."""
    logits = rng.normal(0, 3, shape) + rng.choice([0, 1, 60, -700, 3000, 1e30], (*shape[:-1], 1), p=[0.7, *[0.06] * 5])
    flat = logits.reshape(-1, shape[-1])
    for value in (np.nan, np.inf, -np.inf):
        for _ in range(1 + len(flat) // 40):
            flat[rng.integers(len(flat)), rng.integers(shape[-1])] = value
    flat[rng.integers(len(flat))] = -np.inf
    flat[rng.integers(len(flat))] = rng.normal(0, 1e-40, shape[-1])
    return logits.astype(dtype)


@pytest.mark.parametrize("classes", STRIDED_CLASSES)
def test_a_strided_class_axis_changes_no_bit(classes, dtype, rng):
    for n in NEIGHBOURS if classes < 1000 else (3, 67) if classes < 5000 else (17,):
        for groups in (1, 3) if classes < 1000 else (1,):
            rows = strange_rows((groups, n, classes), dtype, rng)
            columns = np.ascontiguousarray(rows.swapaxes(1, 2))
            padded = np.full((groups, classes, n + 3), 7, dtype)[..., 1:-2]
            for function in FUNCTIONS:
                expected = function(rows)
                for num_threads in (1, 3):
                    got = function(columns, 1, num_threads=num_threads)
                    assert_same_bits(got.swapaxes(1, 2), expected, (n, groups, num_threads))
                padded[...] = columns
                for out in (columns.copy(), padded):
                    # An axis that is no int keeps the call from the short way.
                    for axis in (1, -2, np.int64(1)):
                        out[...] = columns
                        assert function(out, axis, out=out) is out
                        assert_same_bits(out.swapaxes(1, 2), expected, (n, groups, axis))
                assert (padded.base[..., [0, -2, -1]] == 7).all()
            expected = fastce.logsumexp(rows)
            padded[...] = columns
            for logits in (columns, padded):
                for axis in (1, -2, np.int64(1)):
                    assert_same_bits(fastce.logsumexp(logits, axis), expected, (n, groups))
                    kept = fastce.logsumexp(logits, axis, keepdims=True, num_threads=2)
                    assert_same_bits(kept, expected[:, None], (n, groups))


def test_the_class_axis_may_be_any_of_many(dtype, rng):
    for shape in ((3, 5, 4, 6), (1, 5, 1, 6), (2, 1, 3, 1), (7, 2, 1, 1), (100, 3, 3, 1), (5,)):
        logits = rng.normal(0, 3, shape).astype(dtype)
        for axis in range(-len(shape), len(shape)):
            rows = np.ascontiguousarray(np.moveaxis(logits, axis, -1))
            for function in FUNCTIONS:
                expected = function(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
                assert_same_bits(np.moveaxis(function(logits, axis), axis, -1), expected, (shape, axis))
            expected = fastce.logsumexp(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape[:-1])
            for keepdims in (False, True):
                got = fastce.logsumexp(logits, axis, keepdims=keepdims)
                assert type(got) is np.ndarray
                assert_same_bits(got, np.expand_dims(expected, axis) if keepdims else expected, (shape, axis))


@pytest.mark.parametrize(("classes", "n"), [(21, 110_007), (150, 20_011)])
def test_columns_too_large_for_the_caches_have_the_same_bits(classes, n, dtype, rng):
    columns = np.tile(rng.normal(0, 3, (2, classes, 7)).astype(dtype), n // 7 + 1)[..., :n].copy()
    columns[0, 0, 5], columns[1, :, n - 1] = np.nan, -np.inf
    for function in FUNCTIONS:
        expected = function(np.ascontiguousarray(columns.swapaxes(1, 2)))
        buffer = np.full(columns.size + 3, 7, dtype)
        out = buffer[1:-2].reshape(columns.shape)
        function(columns, 1, out=out)
        assert_same_bits(out.swapaxes(1, 2), expected)
        assert (buffer[[0, -2, -1]] == 7).all()
        out[...] = columns
        function(out, 1, out=out)
        assert_same_bits(out.swapaxes(1, 2), expected)
    assert_same_bits(fastce.logsumexp(columns, 1), fastce.logsumexp(np.ascontiguousarray(columns.swapaxes(1, 2))))


@pytest.mark.thread_unsafe(reason="replaces sizes that fastce works with")
def test_no_size_of_slabs_or_blocks_changes_a_bit(dtype, rng, monkeypatch):
    rows = [strange_rows(shape, dtype, rng) for shape in ((1, 1200, 5), (3, 400, 5), (400, 3, 5), (2, 60, 130))]
    expected = [function(logits) for logits in rows for function in (*FUNCTIONS, fastce.logsumexp)]
    monkeypatch.setattr(fastce._engine, "slab_rows", lambda n_classes, num_threads, elements=0: 7)
    monkeypatch.setattr(fastce._engine, "BUFFER_ELEMENTS", 512)
    got = []
    for logits in rows:
        columns = np.ascontiguousarray(logits.swapaxes(1, 2))
        got += [function(columns, np.int64(1)).swapaxes(1, 2) for function in FUNCTIONS]
        got += [fastce.logsumexp(columns, np.int64(1))]
        for function, wanted in zip((*FUNCTIONS, fastce.logsumexp), expected[len(got) - 3 :], strict=False):
            assert_same_bits(function(logits, np.int64(2)), wanted)
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("shape", [(3000, 5), (300, 97), (40, 1000), (9, 5000), (3, 70_000)], ids=str)
def test_threads_and_the_place_in_the_batch_change_no_bit(shape, dtype, rng):
    logits = (rng.normal(0, 1, shape) * rng.choice([1, 60, 3000], (shape[0], 1))).astype(dtype)
    logits[0, 1], logits[1, :-1] = np.nan, -np.inf
    for function in (*FUNCTIONS, fastce.logsumexp):
        expected = function(logits, num_threads=1)
        for num_threads in (2, 3, 8, None):
            assert_same_bits(function(logits, num_threads=num_threads), expected, num_threads)
        for part in (slice(1, 2), slice(2, None), slice(None, None, -1)):
            assert_same_bits(function(logits[part]), expected[part], part)
        assert_same_bits(function(logits[-1]), expected[-1])


# Errors


@pytest.mark.parametrize("function", [*FUNCTIONS, fastce.logsumexp], ids=named)
def test_logits_that_cannot_be_right(function):
    for logits in (np.zeros((2, 3), int), [[1, 2]], np.zeros((2, 3), complex), "logits", None, np.zeros(3, EXTENDED)):
        with pytest.raises(TypeError, match="logits"):
            function(logits)
    for logits in (np.float32(1), np.zeros((2, 0)), np.zeros(0)):
        with pytest.raises(ValueError, match="logits"):
            function(logits)
    masked = np.ma.masked_less(np.array([[1.0, -1.0]]), 0)
    with pytest.raises(TypeError, match="logits"):
        function(masked)
    outside = [(axis, ValueError) for axis in (2, -3, 1 << 70)]
    for axis, error in (*outside, (1.0, TypeError), (None, TypeError), (True, TypeError)):
        with pytest.raises(error, match="axis"):
            function(np.zeros((2, 3)), axis)
    for num_threads, error in ((0, ValueError), (True, TypeError), (2.0, TypeError)):
        with pytest.raises(error, match="num_threads"):
            function(np.zeros((2, 3)), num_threads=num_threads)


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
def test_an_out_that_does_not_fit_is_refused_and_left_alone(function):
    logits = np.linspace(-1, 1, 12).astype(np.float32).reshape(4, 3)
    before = logits.copy()
    read_only = np.zeros((4, 3), np.float32)
    read_only.flags.writeable = False
    cases = [
        (np.full((3, 4), 7, np.float32), ValueError), (np.full((4, 3), 7.0), TypeError),
        (np.full((4, 3), 7, ">f4"), TypeError), (read_only, ValueError), ([[0.0] * 3] * 4, TypeError),
        (logits[::-1], ValueError), (np.broadcast_to(np.float32(7), (4, 3)), ValueError),
    ]  # fmt: skip
    for out, error in cases:
        with pytest.raises(error, match="out"):
            function(logits, out=out)
        assert_same_bits(logits, before)
        assert (np.asarray(out) == 7).all() or out is read_only or error is TypeError or out.base is not None


def test_keepdims_is_a_bool():
    for value in (1, "yes", None, np.ones(2, bool)):
        with pytest.raises(TypeError, match="keepdims"):
            fastce.logsumexp(np.zeros((2, 3)), keepdims=value)
    assert fastce.logsumexp(np.zeros((2, 3)), keepdims=np.True_).shape == (2, 1)


def test_the_softmax_of_one_class_is_exactly_one(dtype, rng):
    np.testing.assert_array_equal(fastce.softmax(rng.normal(0, 30, (1000, 1)).astype(dtype)), 1)
