"""cross_entropy_stats: loss, log-sum-exp, prediction, probability and entropy of every row, from one pass."""

import hard_rows
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layouts import READABLE_LAYOUTS, assert_same_bits
from test_options import (
    BORDERS,
    EXTENDED,
    LONG_BORDERS,
    assert_allowed,
    computing_dtype,
    dense_targets,
    few_rows,
    filled,
    has_finite_range,
    transformed,
    truth_of,
)
from truth import GRADIENT_BOUND, LOSS_BOUND

import fastce
from fastce import CrossEntropyStats, SparseTargets

TRANSFORMS = [
    {},
    {"logit_scale": 0.3},
    {"softcap": 20.0},
    {"class_mask": "classes"},
    {"class_mask": "rows", "logit_scale": 1.7, "softcap": 50.0},
]
FIELDS = ("loss", "lse", "predicted", "correct", "probability", "entropy")


def stats_of(logits, targets, **options):
    return fastce.cross_entropy_stats(logits, targets, **options)


def assert_true(logits, targets, what="", **options):
    """Rows (N, C) with a finite logit and no nan or +inf among the classes shown; none of them is ignored."""
    name = computing_dtype(logits.dtype).name
    got = stats_of(logits, targets, **options)
    q, _, ids = dense_targets(targets, logits.shape, -1, None)
    truth = truth_of(logits, targets, reduction="none", ignore_index=None, **options)
    assert_allowed(got.loss, truth.loss, truth.loss_allowed, f"{what} loss")

    mask = np.broadcast_to(options.get("class_mask", True), logits.shape)
    scale, cap = options.get("logit_scale", 1.0), options.get("softcap")
    with np.errstate(all="ignore"):
        z, _, doubt, _ = transformed(logits, np.dtype(name), scale, cap)
    z = np.where(mask, z, -np.inf).astype(EXTENDED)
    top, predicted, rows = z.max(1), z.argmax(1), np.arange(len(z))
    smallest = EXTENDED(np.finfo(name).smallest_normal)
    doubt = np.broadcast_to(doubt, z.shape).max(1).astype(EXTENDED)
    if "softcap" in options:
        # The last place of a capped logit may be another one, and a tie with it.
        assert (z[rows, got.predicted] >= top - 2 * doubt - smallest).all(), what
        predicted = got.predicted
    np.testing.assert_array_equal(got.predicted, predicted, err_msg=str(what))
    with np.errstate(all="ignore"):
        below = top[:, None] - z
        e = np.exp(-below)
        e[rows, z.argmax(1)] = 0
        others = e.sum(1)
        entropy = np.log1p(others) + np.where(e > 0, e * below, 0).sum(1) / (1 + others)
        e[rows, z.argmax(1)] = 1
        p = e / (1 + others)[:, None]
    probability, lse = (q * p).sum(1), top + np.log1p(others)
    size = np.abs(top) + np.log1p(others)
    reach = 1 + np.where(np.isfinite(below), below, 0).max(1)
    assert_allowed(got.lse, lse, size * LOSS_BOUND[name] + 2 * doubt + smallest, f"{what} lse")
    allowed = np.maximum(probability * (GRADIENT_BOUND[name] + 4 * doubt), smallest * (1 + q.sum(1)))
    assert_allowed(got.probability, probability, allowed, f"{what} probability")
    allowed = np.maximum(entropy * LOSS_BOUND[name] + 4 * doubt * (1 + entropy) * reach, smallest * reach)
    assert_allowed(got.entropy, entropy, allowed, f"{what} entropy")
    if ids is not None:
        np.testing.assert_array_equal(got.correct, predicted == ids, err_msg=str(what))
    else:
        q = np.where(mask, q, 0)
        np.testing.assert_array_equal(got.correct, (q[rows, predicted] > 0) & (q[rows, predicted] == q.max(1)))
    return got


@pytest.mark.parametrize("generator", hard_rows.GENERATORS, ids=lambda generator: generator.__name__)
def test_hard_rows_are_accurate(generator, dtype, rng):
    for number, (logits, ids) in enumerate(generator(dtype, rng)):
        logits, ids = few_rows(logits, ids, 1000)
        if logits.size > 5000 or not has_finite_range(logits):
            continue
        options = filled(TRANSFORMS[number % len(TRANSFORMS)], logits, ids, rng)
        assert_true(logits, ids, (generator.__name__, number, logits.shape, list(options)), **options)


@pytest.mark.parametrize("classes", [1, 2, 3, *BORDERS, *LONG_BORDERS])
def test_rows_of_any_length_are_accurate(classes, dtype, rng):
    logits = (rng.normal(0, 1, (3, classes)) * [[0.1], [4], [40]]).astype(dtype)
    ids = rng.integers(0, classes, 3)
    ids[1] = logits[1].argmax()
    soft = rng.random(logits.shape), SparseTargets(rng.integers(0, classes, (3, 2)), rng.random((3, 2)))
    for targets in (ids, *soft) if classes < 5000 else (ids, soft[dtype == np.float64]):
        assert_true(logits, targets, classes)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 9), st.integers(1, 120), st.sampled_from(["float32", "float64"]), st.sampled_from(TRANSFORMS),
    st.sampled_from(["ids", "distribution", "sparse"]), st.sampled_from([0.1, 3, 60, 1000]), st.integers(0, 2**32),
)  # fmt: skip
def test_any_rows_are_accurate(rows, classes, name, options, kind, scale, seed):
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(0, scale, (rows, classes)), rng.integers(0, 6)).astype(name)
    ids = rng.integers(0, classes, rows)
    options = filled(options, logits, ids, rng)
    targets = {
        "ids": ids,
        "distribution": np.round(rng.random((rows, classes)), 1),
        "sparse": SparseTargets(np.stack([ids, ids[::-1], ids], 1), np.round(rng.random((rows, 3)), 1)),
    }[kind]
    assert_true(logits, targets, **options)


def test_scipy_agrees(rng):
    logits, ids = rng.normal(0, 2, (20, 9)), rng.integers(0, 9, 20)
    got = stats_of(logits, ids)
    p = scipy.special.softmax(logits, axis=1)
    np.testing.assert_allclose(got.lse, scipy.special.logsumexp(logits, axis=1), rtol=1e-13)
    np.testing.assert_allclose(got.entropy, scipy.stats.entropy(p, axis=1), rtol=1e-12)
    np.testing.assert_allclose(got.probability, p[np.arange(20), ids], rtol=1e-13)
    np.testing.assert_allclose(got.loss, -np.log(p[np.arange(20), ids]), rtol=1e-12)
    np.testing.assert_array_equal(got.predicted, logits.argmax(1))
    np.testing.assert_array_equal(got.correct, logits.argmax(1) == ids)


def test_the_entropy_of_known_rows(dtype):
    for classes in (1, 2, 10, 97, 5000):
        got = stats_of(np.full((2, classes), -3.5, dtype), [0, classes - 1])
        np.testing.assert_allclose(got.entropy, np.log(classes), rtol=5e-7)
    # A certain prediction keeps the digits of its tiny entropy: e^-d (1 + d) for one other class d below.
    got = stats_of(np.array([[60, 0]], dtype), [0])
    np.testing.assert_allclose(got.entropy, 61 * np.exp(-60.0), rtol=5e-7)
    np.testing.assert_array_equal(stats_of(np.array([[0, -np.inf]], dtype), [0]).entropy, 0)


def test_numbers_belong_together(dtype, rng):
    logits, ids = rng.normal(0, 4, (40, 60)).astype(dtype), rng.integers(0, 60, 40)
    got = stats_of(logits, ids)
    np.testing.assert_allclose(got.lse - logits[np.arange(40), ids], got.loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.exp(-got.loss.astype(float)), got.probability, rtol=1e-5)
    assert (got.entropy >= 0).all() and (got.entropy <= np.log(60) * (1 + 1e-6)).all()
    alone = fastce.cross_entropy(logits, ids, reduction="none")
    np.testing.assert_allclose(got.loss, alone, rtol=2 * LOSS_BOUND[dtype.name])


# Predictions


def test_the_lowest_of_equal_classes_is_predicted(dtype):
    for classes in (2, 16, 17, 97, 129, 4097, 70_000):
        logits = np.zeros((4, classes), dtype)
        logits[1, classes // 2 :] = 3
        logits[2, -1] = 5
        logits[3] = np.where(np.arange(classes) % 2, 0.0, -0.0)
        got = stats_of(logits, [0, classes // 2, 0, 0])
        np.testing.assert_array_equal(got.predicted, [0, classes // 2, classes - 1, 0])
        np.testing.assert_array_equal(got.correct, [True, True, False, True])


def test_soft_targets_count_their_largest_class(dtype):
    logits = np.array([[0, 3, 1]] * 5, dtype)
    q = np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4], [0.4, 0.4, 0.2], [0, 0, 0], [0.3, 0.1, 0.1]])
    expected = [True, False, True, False, False]
    p = np.exp([0, 3, 1]) / np.exp([0, 3, 1]).sum()
    for targets in (q, SparseTargets(np.array([[0, 1, 2]] * 5), q)):
        got = stats_of(logits, targets)
        np.testing.assert_array_equal(got.predicted, 1)
        np.testing.assert_array_equal(got.correct, expected)
        np.testing.assert_allclose(got.probability, q @ p, rtol=1e-6)
    # Entries of one class add up before they are compared.
    split = SparseTargets([[1, 0, 1]], [[0.3, 0.4, 0.3]])
    assert stats_of(logits[:1], split).correct.all()
    split = SparseTargets([[0, 1, 0]], [[0.3, 0.4, 0.3]])
    assert not stats_of(logits[:1], split).correct.any()


def test_masked_classes_are_not_predicted(dtype):
    logits = np.array([[9, 1, 2], [np.nan, 1, 2], [np.inf, 1, 2]], dtype)
    got = stats_of(logits, [2, 1, 0], class_mask=[False, True, True])
    np.testing.assert_array_equal(got.predicted, 2)
    np.testing.assert_array_equal(got.correct, [True, False, False])
    np.testing.assert_allclose(got.lse, np.log(np.exp(1) + np.exp(2)), rtol=1e-6)
    # The target of the last row is masked.
    assert np.isposinf(got.loss[2]) and got.probability[2] == 0 and np.isfinite(got.entropy).all()


# Rows without an answer


def test_ignored_rows_have_no_statistics(dtype, rng):
    logits = rng.normal(0, 3, (5, 30)).astype(dtype)
    ids = np.array([3, -100, 4, -100, 29])
    clean = stats_of(logits, np.maximum(ids, 0))
    for bad in (np.nan, np.inf, 0.0):
        logits[[1, 3]] = bad
        got = stats_of(logits, ids)
        np.testing.assert_array_equal(got.loss[[1, 3]], 0)
        np.testing.assert_array_equal(got.predicted[[1, 3]], -1)
        assert not got.correct[[1, 3]].any()
        for name in ("lse", "probability", "entropy"):
            assert np.isnan(getattr(got, name)[[1, 3]]).all()
        for name in FIELDS:
            assert_same_bits(getattr(got, name)[[0, 2, 4]], getattr(clean, name)[[0, 2, 4]], name)
    got = stats_of(logits, np.array([3, 255, 4, 7, 29]), ignore_index=[255, 7])
    np.testing.assert_array_equal(got.predicted == -1, [False, True, False, True, False])


def test_bad_rows_have_no_statistics(dtype, rng):
    for classes in (1, 3, 20, 97, 5000):
        logits = rng.normal(0, 3, (5, classes)).astype(dtype)
        clean = stats_of(logits, np.zeros(5, int))
        logits[1, -1], logits[2, 0], logits[3] = np.nan, np.inf, -np.inf
        for targets in (np.zeros(5, int), np.ones((5, classes)), SparseTargets(np.zeros((5, 1), int), np.ones((5, 1)))):
            got = stats_of(logits, targets)
            for name in ("loss", "lse", "probability", "entropy"):
                np.testing.assert_array_equal(np.isnan(getattr(got, name)), [False, True, True, True, False], name)
            np.testing.assert_array_equal(got.predicted[1:4], -1)
            assert not got.correct[1:4].any()
        got = stats_of(logits, np.zeros(5, int))
        for name in FIELDS:
            assert_same_bits(getattr(got, name)[[0, 4]], getattr(clean, name)[[0, 4]], name)


def test_a_target_of_minus_infinity(dtype):
    got = stats_of(np.array([[-np.inf, 0, 0]], dtype), [0])
    assert np.isposinf(got.loss[0]) and got.probability[0] == 0 and got.predicted[0] == 1 and not got.correct[0]
    np.testing.assert_allclose([got.lse[0], got.entropy[0]], np.log(2), rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_no_rows(shape, dtype):
    got = stats_of(np.zeros(shape, dtype), np.zeros(shape[:-1], int))
    for name in FIELDS:
        assert getattr(got, name).shape == shape[:-1]


# What is returned


def test_a_named_tuple_of_the_documented_types(dtype, rng):
    logits, ids = rng.normal(0, 3, (4, 7, 5)).astype(dtype), rng.integers(0, 7, (4, 5))
    got = stats_of(logits, ids, axis=1)
    assert isinstance(got, CrossEntropyStats) and isinstance(got, tuple) and got._fields == FIELDS
    kinds = {"predicted": np.int64, "correct": np.bool_}
    for name, array in got._asdict().items():
        assert type(array) is np.ndarray and array.shape == (4, 5) and array.dtype == kinds.get(name, dtype), name
    for array in stats_of(logits[0, :, 0], 3):
        assert type(array) is np.ndarray and array.shape == ()


def test_half_types_give_float32(rng):
    logits, ids = rng.normal(0, 3, (4, 7)).astype(np.float16), rng.integers(0, 7, 4)
    got, expected = stats_of(logits, ids), stats_of(logits.astype(np.float32), ids)
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("shape", [(300, 3), (200, 33), (60, 97), (20, 1000), (9, 5000), (3, 70_000)], ids=str)
@pytest.mark.parametrize("options", TRANSFORMS, ids=lambda options: "-".join(options) or "plain")
def test_threads_layouts_and_the_place_in_the_batch_change_no_bit(options, shape, dtype, rng):
    logits = (rng.normal(0, 1, shape) * rng.choice([1, 60, 3000], (shape[0], 1))).astype(dtype)
    ids = rng.integers(0, shape[1], shape[0])
    logits[1, 1] = np.nan
    options = filled(options, logits, ids, rng)
    targets = [ids, SparseTargets(np.stack([ids, ids[::-1]], 1), rng.random((shape[0], 2)))]
    for kind in targets:
        expected = stats_of(logits, kind, num_threads=1, **options)

        def check(got, part=slice(None), expected=expected):
            for one, other in zip(got, expected, strict=True):
                assert_same_bits(one, other[part])

        for num_threads in (2, 3, 8, None):
            check(stats_of(logits, kind, num_threads=num_threads, **options))
        if kind is ids:
            rows = {**options}
            if np.ndim(options.get("class_mask")) == 2:
                rows["class_mask"] = options["class_mask"][1:]
            check(stats_of(logits[1:], ids[1:], **rows), slice(1, None))
            for layout in READABLE_LAYOUTS if logits.size < 5000 else READABLE_LAYOUTS[1:3]:
                check(stats_of(layout(logits), ids, **options))
            across = np.ascontiguousarray(logits.T)
            if np.ndim(options.get("class_mask")) == 2:
                options = {**options, "class_mask": options["class_mask"].T}
            elif "class_mask" in options:
                options = {**options, "class_mask": options["class_mask"][:, None]}
            check(stats_of(across, ids, axis=0, **options))
            if "class_mask" in options:
                break


# Errors


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("logits", [[1, 2]], TypeError),
        ("logits", 1.0, ValueError),
        ("targets", [0.0, 1.0], TypeError),
        ("targets", [0, 1, 2], ValueError),
        ("targets", [0, 9], IndexError),
        ("targets", -np.ones((2, 3)), ValueError),
        ("targets", SparseTargets([[9], [0]], [[1.0], [1.0]]), IndexError),
        ("axis", 5, ValueError),
        ("ignore_index", 1.5, TypeError),
        ("logit_scale", 0, ValueError),
        ("logit_scale", np.nan, ValueError),
        ("softcap", -1.0, ValueError),
        ("class_mask", np.ones(3), TypeError),
        ("class_mask", np.ones(4, bool), ValueError),
        ("class_mask", np.zeros(3, bool), ValueError),
        ("num_threads", 0, ValueError),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_right(name, value, error):
    arguments = {"logits": np.zeros((2, 3)), "targets": [0, 1], name: value}
    with pytest.raises(error, match=name):
        fastce.cross_entropy_stats(**arguments)


def test_weights_and_reductions_are_no_options():
    for name in ("weight", "sample_weight", "reduction", "label_smoothing", "z_loss", "out"):
        with pytest.raises(TypeError, match=name):
            fastce.cross_entropy_stats(np.zeros((2, 3)), [0, 1], **{name: None})


@pytest.mark.parametrize("classes", [129, 133, 257, 1000, 4100])
def test_the_probability_of_soft_targets_counts_every_class_once(classes, dtype):
    # The largest logit where the last vector of a row overlaps the one before.
    uniform = np.full((16, classes), 1 / classes, dtype)
    logits = np.zeros((16, classes), dtype)
    last = classes // 128 * 128
    logits[np.arange(16), last - 16 + np.arange(16)] = 8
    np.testing.assert_allclose(fastce.cross_entropy_stats(logits, uniform).probability, 1 / classes, rtol=2e-6)


@pytest.mark.parametrize("classes", [5, 96, 97, 4097])
def test_the_probability_of_large_masses_is_finite(classes, rng):
    # e_c q_c, of which the probability is the sum, is beyond float32 here.
    logits = rng.normal(0, 3, (3, classes)).astype(np.float32)
    masses = (rng.random((3, classes)) * 1e25).astype(np.float32)
    expected = (scipy.special.softmax(logits.astype(float), axis=1) * masses).sum(axis=1)
    np.testing.assert_allclose(fastce.cross_entropy_stats(logits, masses).probability, expected, rtol=5e-7)
