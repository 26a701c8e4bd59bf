"""The diagonal of the Hessian: the derivative of the gradient, in any buffer that boosting libraries hand over."""

import hard_rows
import numpy as np
import pytest
from sklearn._loss import HalfMultinomialLoss
from test_layouts import WRITABLE_LAYOUTS, assert_same_bits
from test_options import OPTION_SETS, assert_allowed, few_rows, filled, has_finite_range, truth_of
from truth import GRADIENT_BOUND

import fastce
from fastce import SparseTargets, _engine

UNCAPPED = [options for options in OPTION_SETS if "softcap" not in options]


def named(options):
    return "-".join(options) or "plain"


def row_results(logits, targets, **options):
    return fastce.cross_entropy_with_grad_hess(logits, targets, reduction="none", **options)


def differences_of_gradients(gradient_of, logits, step=1e-3):
    """The diagonal second derivatives: fourth-order central differences of each gradient entry by its own logit."""
    result = np.empty_like(logits)
    for at in np.ndindex(logits.shape):
        values = []
        for steps in (-2, -1, 1, 2):
            moved = logits.copy()
            moved[at] += steps * step
            values.append(gradient_of(moved)[at])
        result[at] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    return result


@pytest.mark.parametrize("options", UNCAPPED, ids=named)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_differences_of_gradients_give_the_hessian(options, reduction, rng):
    logits = rng.normal(0, 2, (4, 6))
    ids = rng.integers(0, 6, 4)
    options = filled(options, logits, ids, rng) | {"reduction": reduction}
    distribution = rng.random((4, 6)) * options.get("class_mask", True)
    for targets in (ids, distribution, SparseTargets(np.stack([ids, ids], 1), rng.random((4, 2)))):
        hessian = fastce.cross_entropy_with_grad_hess(logits, targets, **options)[2]
        expected = differences_of_gradients(
            lambda z, t=targets: fastce.cross_entropy_with_grad(z, t, **options)[1], logits
        )
        np.testing.assert_allclose(hessian, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("generator", hard_rows.GENERATORS, ids=lambda generator: generator.__name__)
def test_hard_rows_are_accurate(generator, dtype, rng):
    for number, (logits, ids) in enumerate(generator(dtype, rng)):
        logits, ids = few_rows(logits, ids, 1000)
        if logits.size > 5000 or not has_finite_range(logits):
            continue
        options = filled(UNCAPPED[number % len(UNCAPPED)], logits, ids, rng)
        truth = truth_of(logits, ids, reduction="none", **options)
        losses, gradient, hessian = row_results(logits, ids, **options)
        what = (generator.__name__, number, logits.shape, list(options))
        assert_allowed(losses, truth.loss, truth.loss_allowed, what)
        assert_allowed(gradient, truth.gradient, truth.gradient_allowed, what)
        assert_allowed(hessian, truth.hessian, truth.hessian_allowed, what)


def test_a_row_worked_by_hand(dtype):
    losses, gradient, hessian = row_results(np.array([0, 0, np.log(2)], dtype), 2)
    np.testing.assert_allclose(losses, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [0.25, 0.25, -0.5], rtol=1e-6)
    np.testing.assert_allclose(hessian, [3 / 16, 3 / 16, 1 / 4], rtol=1e-6)


def test_a_confident_row_keeps_its_curvature(dtype):
    # p (1 - p) of a leading class is as tiny as what the other classes leave, not 0: and there is no floor under it.
    for gap in (20.0, 60.0):
        p = np.exp(-gap) / (1 + np.exp(-gap))
        hessian = row_results(np.array([[gap, 0]], dtype), [0])[2]
        np.testing.assert_allclose(hessian, np.full((1, 2), p * (1 / (1 + np.exp(-gap)))), rtol=5e-7)


LED = [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"sample_weight": [-3.0, 0.5]}]


@pytest.mark.parametrize("options", LED, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 16, 40, 97, 1000, 5000, 70_000, 300_000])
def test_a_class_that_leads_without_being_the_target_keeps_its_curvature(classes, options, dtype):
    # Where 1 - p is what the other classes have together.
    logits = np.zeros((2, classes), dtype)
    logits[:, classes // 2] = 35
    ids = [classes // 2 - 1, 0]
    hessian = row_results(logits, ids, **options)[2][:, classes // 2]
    rest = (classes - 1) * np.exp(-35.0)
    p = 1 / (1 + rest)
    lse = 35 + np.log1p(rest)
    z_loss = options.get("z_loss", 0)
    expected = p * ((1 + 2 * z_loss * lse) * rest * p + 2 * z_loss * p) * np.array(options.get("sample_weight", 1))
    # Smoothing hides the smaller probabilities from the gradient, which tells the rest: to an ulp of a class's share.
    share = options.get("label_smoothing", 0) * np.finfo(dtype).eps
    bound = GRADIENT_BOUND[dtype.name]
    np.testing.assert_allclose(hessian, np.broadcast_to(expected, 2), rtol=2 * bound, atol=share)


@pytest.mark.parametrize("classes", [2, 3, 10, 50, 96, 97])
def test_a_class_that_leads_by_anything_keeps_its_curvature(classes, dtype):
    # From leads that cancel nothing of 1 - p to such that leave no bit of it in the dtype.
    leads = np.arange(0.5, 40, 0.5)
    logits = np.zeros((len(leads), classes), dtype)
    logits[:, 1] = leads
    hessian = row_results(logits, np.zeros(len(leads), int))[2][:, 1]
    rest = (classes - 1) * np.exp(-leads)
    np.testing.assert_allclose(hessian, rest / (1 + rest) ** 2, rtol=2 * GRADIENT_BOUND[dtype.name])


@pytest.mark.parametrize("classes", [3, 10, 50, 96, 97, 1000])
def test_a_row_with_a_factor_beyond_the_dtype_changes_no_other_row(classes, dtype, rng):
    logits, ids = rng.normal(0, 3, (40, classes)).astype(dtype), rng.integers(0, classes, 40)
    factors = np.ones(40)
    factors[20] = 1e-44 if dtype == np.float32 else 1e-310
    plain = row_results(logits, ids, grad_output=np.ones(40))
    others = np.arange(40) != 20
    for options in ({"grad_output": factors}, {"sample_weight": factors}):
        for got, expected in zip(row_results(logits, ids, **options), plain, strict=True):
            assert_same_bits(got[others], expected[others])


def test_a_leading_class_that_its_gradients_hide_is_within_the_bound(dtype):
    # Smoothing beside a gradient factor 1 + 2 z_loss lse that nearly vanishes; a gradient that overflows.
    row = np.array([-8.0, 0, -8])
    row = (row - np.log(np.exp(row).sum()) - 1 + 1e-3)[None].astype(dtype)
    options = {"z_loss": 0.5, "label_smoothing": 0.5}
    expected = fastce.reference.cross_entropy_with_grad_hess(row, [0], **options)[2]
    np.testing.assert_allclose(row_results(row, [0], **options)[2], expected, rtol=0, atol=GRADIENT_BOUND[dtype.name])
    logits = np.zeros((1, 4), np.float32)
    logits[0, 1] = 6000
    factors = {"logit_scale": 1e-3, "grad_output": np.array([1e42])}
    expected = fastce.reference.cross_entropy_with_grad_hess(logits, [0], reduction="none", **factors)[2]
    np.testing.assert_allclose(row_results(logits, [0], **factors)[2], expected, rtol=1e-5)


def test_the_loss_has_the_bits_of_the_loss_alone(dtype, rng):
    for classes in (2, 3, 10, 33, 97, 1000, 5000):
        logits = rng.normal(0, 3, (30, classes)).astype(dtype)
        ids = rng.integers(0, classes, 30)
        for options in UNCAPPED:
            given = filled(options, logits, ids, rng)
            for reduction in ("none", "sum", "mean"):
                alone = fastce.cross_entropy(logits, ids, reduction=reduction, **given)
                loss = fastce.cross_entropy_with_grad_hess(logits, ids, reduction=reduction, **given)[0]
                assert type(loss) is type(alone)
                assert_same_bits(loss, alone, (classes, named(options), reduction))


def test_the_gradient_has_the_bits_of_the_gradient_without_a_hessian(dtype, rng):
    for classes in (2, 3, 10, 33, 97, 1000, 5000):
        logits = rng.normal(0, 3, (30, classes)).astype(dtype)
        ids = rng.integers(0, classes, 30)
        for options in UNCAPPED:
            given = filled(options, logits, ids, rng)
            gradient = fastce.cross_entropy_with_grad(logits, ids, **given)[1]
            got = fastce.cross_entropy_with_grad_hess(logits, ids, **given)[1]
            assert_same_bits(got, gradient, (classes, named(options)))


def test_curvature_is_never_negative(dtype, rng):
    for classes in (2, 10, 97, 5000):
        logits = (rng.normal(0, 1, (20, classes)) * rng.choice([1, 20, 400], (20, 1))).astype(dtype)
        ids = rng.integers(0, classes, 20)
        for targets in (ids, rng.random((20, classes))):
            hessian = row_results(logits, targets, label_smoothing=0.1)[2]
            assert (hessian >= 0).all() and not np.signbit(hessian).any()


# Scaled like the gradient


def test_reductions_and_factors_scale_gradient_and_hessian_alike(dtype, rng):
    logits, ids = rng.normal(0, 2, (8, 5)).astype(dtype), rng.integers(0, 5, 8)
    _, gradient, hessian = row_results(logits, ids)
    for options, factor in (
        ({"reduction": "sum"}, 1),
        ({"reduction": "mean"}, 1 / 8),
        ({"reduction": "mean", "denominator": 2.0}, 1 / 2),
        ({"reduction": "sum", "grad_output": -4.0}, -4),
        ({"reduction": "mean", "grad_output": 2.0}, 1 / 4),
        ({"reduction": "sum", "sample_weight": np.full(8, -0.5)}, -1 / 2),
        ({"reduction": "none", "grad_output": np.full(8, 16.0)}, 16),
    ):
        got = fastce.cross_entropy_with_grad_hess(logits, ids, **options)
        np.testing.assert_allclose(got[1], gradient * factor, rtol=3e-7)
        np.testing.assert_allclose(got[2], hessian * factor, rtol=3e-7)


def test_the_logit_scale_counts_twice(dtype, rng):
    logits, ids = rng.normal(0, 2, (8, 5)).astype(dtype), rng.integers(0, 5, 8)
    _, gradient, hessian = row_results(logits * dtype.type(4), ids)
    _, scaled_gradient, scaled_hessian = row_results(logits, ids, logit_scale=4.0)
    np.testing.assert_allclose(scaled_gradient, 4 * gradient, rtol=1e-6)
    # The bound refers to p, not to p (1 - p): two ways to the same number differ by that much where p is nearly 1.
    allowed = 2 * GRADIENT_BOUND[dtype.name] * fastce.softmax(4 * logits)
    assert (np.abs(scaled_hessian / 16 - hessian) <= allowed).all()


def test_there_is_no_factor_of_two_and_no_floor(rng):
    # Some boosting libraries double the Hessian and keep it above 1e-16; this is the plain derivative.
    logits, ids, s = rng.normal(0, 2, (6, 4)), rng.integers(0, 4, 6), rng.random(6)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    _, gradient, hessian = row_results(logits, ids, sample_weight=s)
    np.testing.assert_allclose(gradient, s[:, None] * (p - np.eye(4)[ids]), rtol=1e-12)
    np.testing.assert_allclose(hessian, s[:, None] * p * (1 - p), rtol=1e-12)
    assert row_results(np.array([[300.0, 0.0]]), [0])[2].max() < 1e-100


def test_scikit_learn_agrees(rng):
    logits, ids, s = rng.normal(0, 3, (50, 12)), rng.integers(0, 12, 50), rng.random(50)
    _, gradient, hessian = row_results(logits, ids, sample_weight=s)
    theirs = HalfMultinomialLoss(n_classes=12).gradient_hessian(ids.astype(float), logits, s)
    np.testing.assert_allclose(gradient, theirs[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(hessian, theirs[1], rtol=1e-12, atol=1e-14)


# Special values


def test_special_rows(dtype):
    inf, nan = np.inf, np.nan
    logits = np.array(
        [[0, nan, 0], [0, inf, 0], [-inf] * 3, [-inf, 0, 0], [0, -inf, -inf], [nan] * 3, [nan] * 3], dtype
    )
    ids = [0, 0, 0, 0, 0, -100, 1]
    losses, gradient, hessian = row_results(logits, ids, sample_weight=[1, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(losses, [nan, nan, nan, inf, 0, 0, 0])
    np.testing.assert_array_equal(gradient, [[nan] * 3] * 3 + [[-1, 0.5, 0.5]] + [[0, 0, 0]] * 3)
    np.testing.assert_array_equal(hessian, [[nan] * 3] * 3 + [[0, 0.25, 0.25]] + [[0, 0, 0]] * 3)


def test_masked_classes_have_none_whatever_the_factors(dtype):
    for factors in ({"logit_scale": 1e10, "grad_output": 1e290}, {"z_loss": 1e300, "grad_output": 1e10}):
        logits = np.full((1, 4), -np.log(3), dtype)
        mask = [True, True, False, True]
        hessian = fastce.cross_entropy_with_grad_hess(logits, [0], class_mask=mask, reduction="sum", **factors)[2]
        assert hessian[0, 2] == 0


def test_masked_classes_have_none_even_in_nan_rows(dtype):
    logits = np.array([[np.nan, 0, 0], [0, np.nan, 0]], dtype)
    mask = [False, True, True]
    losses, gradient, hessian = row_results(logits, [1, 2], class_mask=mask)
    np.testing.assert_allclose(losses, [np.log(2), np.nan], rtol=1e-6)
    np.testing.assert_array_equal(gradient, [[0, -0.5, 0.5], [0, np.nan, np.nan]])
    np.testing.assert_array_equal(hessian, [[0, 0.25, 0.25], [0, np.nan, np.nan]])


# Buffers


def float_dtypes():
    kinds = [np.dtype(kind) for kind in ("f2", "f4", "f8")]
    try:
        import ml_dtypes
    except ImportError:
        return kinds
    return [*kinds, np.dtype(ml_dtypes.bfloat16)]


@pytest.mark.parametrize("kind", float_dtypes(), ids=str)
@pytest.mark.parametrize("shape", [(7, 3), (40, 33), (5, 300), (2, 5000)], ids=str)
def test_buffers_of_any_float_hold_the_numbers_rounded_once_more(kind, shape, dtype, rng):
    logits, ids = rng.normal(0, 3, shape).astype(dtype), rng.integers(0, shape[1], shape[0])
    losses, gradient, hessian = row_results(logits, ids)
    with np.errstate(all="ignore"):
        rounded = gradient.astype(kind), hessian.astype(kind)
    for order in "CF":
        out, hess_out = (np.full(shape, 7, kind, order=order) for _ in range(2))
        got = row_results(logits, ids, out=out, hess_out=hess_out)
        assert got[1] is out and got[2] is hess_out
        assert_same_bits(got[0], losses)
        for one, other in zip(got[1:], rounded, strict=True):
            assert_same_bits(np.asarray(one, np.float64), np.asarray(other, np.float64), (kind, order))


def test_fortran_ordered_float32_from_float64_scores(rng):
    scores, ids = rng.normal(0, 3, (1000, 7)), rng.integers(0, 7, 1000)
    _, gradient, hessian = fastce.cross_entropy_with_grad_hess(scores, ids, reduction="sum")
    out, hess_out = (np.full((1000, 7), np.nan, np.float32, order="F") for _ in range(2))
    fastce.cross_entropy_with_grad_hess(np.asfortranarray(scores), ids, reduction="sum", out=out, hess_out=hess_out)
    assert_same_bits(out, gradient.astype(np.float32))
    assert_same_bits(hess_out, hessian.astype(np.float32))
    assert out.flags.f_contiguous and hess_out.flags.f_contiguous


@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_layout_of_the_buffers(layout, dtype, rng):
    for shape in ((7, 3), (4, 3, 20), (5, 300)):
        logits, ids = rng.normal(0, 3, shape).astype(dtype), rng.integers(0, shape[-1], shape[:-1])
        expected = row_results(logits, ids, label_smoothing=0.1)
        out, hess_out = layout(np.full_like(logits, 7)), layout(np.full_like(logits, 7))
        got = row_results(logits, ids, label_smoothing=0.1, out=out, hess_out=hess_out)
        for one, other in zip(got, expected, strict=True):
            assert_same_bits(np.array(one), other, layout)
        # One buffer alone, and the other way round; and the gradient, or the Hessian's neighbour, over the logits.
        assert_same_bits(row_results(logits, ids, label_smoothing=0.1, hess_out=hess_out)[1], expected[1])
        given = layout(logits)
        got = row_results(given, ids, label_smoothing=0.1, out=given)
        for one, other in zip(got, expected, strict=True):
            assert_same_bits(np.array(one), other, layout)


def test_the_hessian_may_be_written_over_the_logits(dtype, rng):
    for shape in ((7, 3), (40, 33), (5, 300), (3, 5000), (2, 70_000)):
        logits, ids = rng.normal(0, 3, shape).astype(dtype), rng.integers(0, shape[-1], shape[0])
        for options in ({}, {"label_smoothing": 0.1}):
            expected = row_results(logits, ids, **options)
            given = logits.copy()
            got = row_results(given, ids, hess_out=given, **options)
            assert got[2] is given
            for one, other in zip(got, expected, strict=True):
                assert_same_bits(one, other, shape)


def test_any_axis(dtype, rng):
    logits, ids = rng.normal(0, 3, (3, 9, 4)).astype(dtype), rng.integers(0, 9, (3, 4))
    losses, gradient, hessian = row_results(np.moveaxis(logits, 1, -1), ids)
    got = row_results(logits, ids, axis=1)
    assert_same_bits(got[0], losses)
    assert_same_bits(np.moveaxis(got[1], 1, -1), gradient)
    assert_same_bits(np.moveaxis(got[2], 1, -1), hessian)


def test_results_have_the_documented_types(dtype):
    logits = np.zeros((2, 3), dtype)
    for reduction in ("mean", "sum"):
        loss, gradient, hessian = fastce.cross_entropy_with_grad_hess(logits, [0, 1], reduction=reduction)
        assert type(loss) is float
        for array in (gradient, hessian):
            assert type(array) is np.ndarray and array.shape == (2, 3) and array.dtype == dtype
    losses, _, _ = row_results(logits, [0, 1])
    assert losses.shape == (2,) and losses.dtype == dtype


@pytest.mark.parametrize("softcap", [5.0, 1e9, np.inf, "5"])
def test_a_cap_has_no_hessian(softcap):
    out, hess_out = np.full((2, 3), 7.0), np.full((2, 3), 7.0)
    with pytest.raises((ValueError, TypeError), match="softcap"):
        fastce.cross_entropy_with_grad_hess(np.zeros((2, 3)), [0, 1], softcap=softcap, out=out, hess_out=hess_out)
    assert (out == 7).all() and (hess_out == 7).all()
    fastce.cross_entropy_with_grad_hess(np.zeros((2, 3)), [0, 1], softcap=None)


@pytest.mark.parametrize("n", [1, 7, 33, 1000, 65537])
@pytest.mark.parametrize("weighted", [False, True])
def test_newton_terms_are_what_the_slopes_say(n, weighted, dtype, rng):
    slopes = np.asfortranarray(rng.uniform(-1, 1, (n, 3)), dtype)
    slopes[0] = [0, 1, -1]
    weights = rng.uniform(-2, 2, n) if weighted else None
    grad, hess = _engine.newton_terms(slopes, 1.25, weights, 1)
    exact, factors = slopes.astype(np.float64), 1.0 if weights is None else weights[:, None]
    np.testing.assert_array_equal(grad, (exact * factors).astype(np.float32))
    np.testing.assert_array_equal(hess, (1.25 * np.abs(exact) * (1 - np.abs(exact)) * factors).astype(np.float32))
    assert grad.flags.f_contiguous and hess.flags.f_contiguous
    for again, first in zip(_engine.newton_terms(slopes, 1.25, weights, 2), (grad, hess), strict=True):
        np.testing.assert_array_equal(again, first)


def test_newton_terms_of_no_rows_are_empty(dtype):
    grad, hess = _engine.newton_terms(np.empty((0, 3), dtype, order="F"), 2.0, None, None)
    assert grad.shape == hess.shape == (0, 3)
