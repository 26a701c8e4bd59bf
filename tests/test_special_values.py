"""nan, infinity and empty batches give what the table of special values says, and touch no other row."""

import warnings

import numpy as np
import pytest

import fastce

SCALES = [1, 100, 5000]  # the ways a kernel may take: small logits, large ones, and ones beyond |x| = 1000


def with_grad(logits, targets, **options):
    return fastce.cross_entropy_with_grad(logits, targets, **{"reduction": "none", **options})


def positions(classes):
    """Every position of a short row; of a long one the ends, and those around vector and chunk borders."""
    if classes <= 130:
        return np.arange(classes)
    borders = (0, 64, 256, 1024, 2048, 4096, 8192, classes - 64, classes)
    around = np.concatenate([np.arange(border - 2, border + 3) for border in borders])
    return np.unique(around[(around >= 0) & (around < classes)])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf], ids=["nan", "negative nan", "inf"])
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 10, 16, 17, 33, 48, 49, 64, 65, 100, 129, 1000, 4099, 8205])
def test_one_bad_logit_spoils_its_row_and_no_other(bad, classes, dtype, rng):
    where = positions(classes)
    for scale in SCALES:
        clean = (rng.normal(0, 1, (2 * len(where), classes)) * scale).astype(dtype)
        targets = rng.integers(0, classes, len(clean))
        clean_losses, clean_gradient = with_grad(clean, targets)
        spoiled = clean.copy()
        spoiled[2 * np.arange(len(where)), where] = bad
        losses, gradient = with_grad(spoiled, targets)
        assert np.isnan(losses[::2]).all()
        assert np.isnan(gradient[::2]).all()
        np.testing.assert_array_equal(losses[1::2], clean_losses[1::2])
        np.testing.assert_array_equal(gradient[1::2], clean_gradient[1::2])
        np.testing.assert_array_equal(fastce.cross_entropy(spoiled, targets, reduction="none"), losses)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
def test_a_bad_logit_at_the_target_spoils_the_row(bad, dtype, rng):
    for classes in (1, 2, 10, 65, 1000, 4099):
        where = positions(classes)
        logits = rng.normal(0, 3, (len(where), classes)).astype(dtype)
        logits[np.arange(len(where)), where] = bad
        losses, gradient = with_grad(logits, where)
        assert np.isnan(losses).all() and np.isnan(gradient).all()


def test_any_payload_of_a_nan_counts(dtype):
    bits = np.array([0x7F800001, 0x7FC00000, 0xFF800001, 0xFFFFFFFF, 0x7FBFFFFF], np.uint32)
    nans = bits.view(np.float32)
    if dtype == np.float64:
        nans = (bits.astype(np.uint64) << np.uint64(32) | np.uint64(1)).view(np.float64)
        nans[:] = np.array([0x7FF0000000000001, 0x7FF8000000000000, 0xFFF0000000000001, 2**64 - 1, 0x7FF7FFFFFFFFFFFF],
                           np.uint64).view(np.float64)  # fmt: skip
    for classes in (3, 20, 100):
        logits = np.zeros((len(nans), classes), dtype)
        logits.view(nans.view(f"u{dtype.itemsize}").dtype)[:, 1] = nans.view(f"u{dtype.itemsize}")
        losses, gradient = with_grad(logits, np.zeros(len(nans), int))
        assert np.isnan(losses).all() and np.isnan(gradient).all()


@pytest.mark.parametrize("pair", [(np.inf, -np.inf), (np.inf, np.nan), (-np.inf, np.nan), (np.inf, np.inf)], ids=str)
def test_bad_logits_together_spoil_the_row(pair, dtype):
    for classes in (2, 10, 48, 100, 5000):
        for first, second in (pair, pair[::-1]):
            logits = np.zeros((3, classes), dtype)
            logits[1, 0], logits[1, -1] = first, second
            losses, gradient = with_grad(logits, [0, 0, 0])
            assert np.isnan(losses[1]) and np.isnan(gradient[1]).all()
            assert np.isfinite(losses[[0, 2]]).all() and np.isfinite(gradient[[0, 2]]).all()


@pytest.mark.parametrize("classes", [1, 2, 10, 48, 64, 65, 1000, 5000])
def test_a_row_of_nothing_but_minus_infinity_is_nan(classes, dtype):
    logits = np.zeros((3, classes), dtype)
    logits[1] = -np.inf
    losses, gradient = with_grad(logits, [0, classes - 1, 0])
    assert np.isnan(losses[1]) and np.isnan(gradient[1]).all()
    assert np.isfinite(losses[[0, 2]]).all() and np.isfinite(gradient[[0, 2]]).all()


@pytest.mark.parametrize("scale", SCALES)
def test_minus_infinity_elsewhere_has_gradient_zero_and_leaves_the_rest(scale, dtype, rng):
    for classes in (2, 3, 10, 33, 48, 65, 129, 1000, 4099):
        where = positions(classes)
        logits = (rng.normal(0, 1, (len(where), classes)) * scale).astype(dtype)
        targets = (where + 1) % classes
        logits[np.arange(len(where)), where] = -np.inf
        losses, gradient = with_grad(logits, targets)
        assert np.isfinite(losses).all() and np.isfinite(gradient).all()
        assert not gradient[np.arange(len(where)), where].any()


def test_minus_infinity_at_the_target_is_an_infinite_loss_with_a_finite_gradient(dtype, rng):
    for classes in (2, 10, 48, 65, 1000, 4099):
        for scale in SCALES:
            logits = (rng.normal(0, 1, (6, classes)) * scale).astype(dtype)
            targets = rng.integers(0, classes, 6)
            rows = np.arange(6)
            logits[rows, targets] = -np.inf
            losses, gradient = with_grad(logits, targets)
            assert np.isposinf(losses).all()
            np.testing.assert_array_equal(gradient[rows, targets], -1)
            # The others are the softmax of the others.
            gradient[rows, targets] = 0
            np.testing.assert_allclose(gradient.sum(axis=1, dtype=float), 1, rtol=5e-7)
            assert (gradient >= 0).all()


def test_a_lone_finite_logit_is_certain(dtype):
    for classes in (1, 2, 10, 65, 5000):
        logits = np.full((2, classes), -np.inf, dtype)
        logits[0, -1] = 3
        logits[1, 0] = -70
        losses, gradient = with_grad(logits, [classes - 1, 0])
        np.testing.assert_array_equal(losses, 0)
        assert not np.signbit(losses).any()
        assert not gradient.any()


def test_a_lead_beyond_exp_gives_zero_and_a_loss_beyond_the_range_infinity(dtype):
    top = np.finfo(dtype).max
    logits = np.array([[top, -top], [top, -top], [1e4, -1e4]], dtype)
    losses, gradient = with_grad(logits, [0, 1, 0])
    np.testing.assert_array_equal(losses, [0, np.inf, 0])
    np.testing.assert_array_equal(gradient, [[0, 0], [1, -1], [0, 0]])


def test_losses_are_never_negative_and_never_minus_zero(dtype, rng):
    for classes in (1, 2, 3, 10, 48, 65, 1000, 4099):
        for lead in (0, 1, 15, 16, 17, 20, 60, 87, 88, 103, 104, 110, 700, 745, 800, 5000, 1e8, 1e30):
            logits = rng.normal(0, 1, (8, classes)).astype(dtype)
            targets = rng.integers(0, classes, 8)
            logits[np.arange(8), targets] += dtype.type(lead)
            for given in (logits, -logits):
                losses = fastce.cross_entropy(given, targets, reduction="none")
                assert (losses >= 0).all() and not np.signbit(losses).any()
                for reduction in ("sum", "mean"):
                    assert not np.signbit(fastce.cross_entropy(given, targets, reduction=reduction))


def test_weights_of_minus_zero_make_no_minus_zero(dtype):
    for classes in (2, 10, 97, 5000):
        logits = np.zeros((3, classes), dtype)
        logits[:, 0] = 5000     # a loss of 0 for class 0, whatever its weight
        for targets in ([0, 1, 0], [0, 0, 0]):
            for options in ({"weight": np.full(classes, -0.0)}, {"sample_weight": np.full(3, -0.0)}):
                losses = fastce.cross_entropy(logits, targets, reduction="none", **options)
                assert (losses == 0).all() and not np.signbit(losses).any()
                assert not np.signbit(fastce.cross_entropy(logits, targets, reduction="sum", **options))


def test_zeros_of_both_signs_are_equal(dtype, rng):
    for classes in (2, 10, 65, 1000):
        zeros = np.zeros((4, classes), dtype)
        mixed = np.where(rng.random(zeros.shape) < 0.5, zeros, -zeros)
        targets = rng.integers(0, classes, 4)
        for one, other in zip(with_grad(zeros, targets), with_grad(mixed, targets), strict=True):
            np.testing.assert_array_equal(one, other)


# Ignored rows and empty batches


def test_ignored_rows_are_zero_whatever_they_hold(dtype, rng):
    for classes in (1, 2, 10, 48, 65, 1000, 4099):
        logits = rng.normal(0, 3, (8, classes)).astype(dtype)
        targets = rng.integers(0, classes, 8)
        without = with_grad(logits, targets)
        for bad in (np.nan, np.inf, -np.inf):
            logits[[1, 4, 7]] = bad
            targets[[1, 4, 7]] = -100
            out = np.full_like(logits, 7)
            losses, gradient = with_grad(logits, targets, out=out)
            for got, expected in ((losses, without[0]), (gradient, without[1])):
                np.testing.assert_array_equal(got[[0, 2, 3, 5, 6]], expected[[0, 2, 3, 5, 6]])
                assert not got[[1, 4, 7]].any() and not np.signbit(got[[1, 4, 7]]).any()
            assert np.isfinite(fastce.cross_entropy(logits, targets))


def test_ignored_rows_are_exactly_zero_for_any_grad_output(dtype):
    logits = np.full((3, 4), np.nan, dtype)
    for reduction in ("none", "sum", "mean"):
        for factor in (np.nan, np.inf, -1.0):
            out = np.full_like(logits, 7)
            fastce.cross_entropy_with_grad(
                logits, [-100] * 3, reduction=reduction, grad_output=factor, out=out
            )
            assert not out.any()


def test_all_rows_ignored(dtype):
    logits = np.full((3, 4), np.nan, dtype)
    targets = [-100, -100, -100]
    loss, gradient = fastce.cross_entropy_with_grad(logits, targets)
    assert np.isnan(loss) and not gradient.any()
    loss, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="sum")
    assert loss == 0.0 and not np.signbit(loss) and not gradient.any()
    losses, gradient = with_grad(logits, targets)
    assert not losses.any() and not gradient.any()
    # A denominator that is given is not 0, so the mean is the sum over it.
    assert fastce.cross_entropy(logits, targets, denominator=3) == 0.0


@pytest.mark.parametrize("targets", [[], (), np.zeros(0, int), np.zeros(0, np.uint8)], ids=repr)
def test_no_rows(targets, dtype):
    logits = np.zeros((0, 5), dtype)
    loss, gradient = fastce.cross_entropy_with_grad(logits, targets)
    assert np.isnan(loss) and gradient.shape == (0, 5) and gradient.dtype == dtype
    assert fastce.cross_entropy(logits, targets, reduction="sum") == 0.0
    losses = fastce.cross_entropy(logits, targets, reduction="none")
    assert losses.shape == (0,) and losses.dtype == dtype
    assert fastce.cross_entropy(logits, targets, denominator=2) == 0.0


def test_no_rows_of_several_axes(dtype):
    logits = np.zeros((3, 5, 0, 2), dtype)
    losses, gradient = with_grad(logits, np.zeros((3, 0, 2), int), axis=1)
    assert losses.shape == (3, 0, 2) and gradient.shape == logits.shape


def test_nan_rows_make_the_mean_nan(dtype):
    logits = np.zeros((3, 4), dtype)
    logits[1, 2] = np.nan
    assert np.isnan(fastce.cross_entropy(logits, [0, 1, 2]))
    loss, gradient = fastce.cross_entropy_with_grad(logits, [0, 1, 2], reduction="sum")
    assert np.isnan(loss)
    assert np.isnan(gradient[1]).all() and np.isfinite(gradient[[0, 2]]).all()


def test_special_values_raise_no_warning_and_no_floating_point_error(dtype):
    inf = np.inf
    rows = np.array(
        [[np.nan, 0, 0], [inf, 0, 0], [-inf, 0, 0], [3e38, -3e38, 0], [1e-40, 0, -1e-40], [-inf] * 3, [90, 0, 0]]
    )
    logits = np.concatenate([rows, rows, rows]).astype(dtype)
    targets = np.repeat([0, 2, -100], len(rows))
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        for reduction in ("none", "sum", "mean"):
            fastce.cross_entropy(logits, targets, reduction=reduction)
            fastce.cross_entropy_with_grad(logits, targets, reduction=reduction)
        fastce.cross_entropy_with_grad(logits, targets, reduction="none", grad_output=1e300)
        fastce.cross_entropy(logits[:0], targets[:0])
        fastce.cross_entropy(logits, np.full(len(logits), -100))
