"""Focal loss, poly loss and Kullback-Leibler divergence: their formulas, to the last digit of confident rows."""

import hard_rows
import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
from test_gradients import central_differences
from test_layouts import READABLE_LAYOUTS, WRITABLE_LAYOUTS, assert_same_bits
from test_options import EXTENDED, assert_allowed, few_rows, has_finite_range
from truth import GRADIENT_BOUND, LOSS_BOUND

import fastce
from fastce import SparseTargets

TARGET_LOSSES = [
    ("focal", {"gamma": 0.0}),
    ("focal", {"gamma": 0.5}),
    ("focal", {}),
    ("focal", {"gamma": 5}),
    ("poly", {"epsilon": 0.0}),
    ("poly", {}),
    ("poly", {"epsilon": 3.5}),
    ("poly", {"epsilon": -1.0}),
]
each_target_loss = pytest.mark.parametrize(("name", "shape"), TARGET_LOSSES, ids=str)


def loss_of(name, *arguments, **options):
    functions = {"focal": fastce.focal_loss, "poly": fastce.poly_loss, "kl": fastce.kl_divergence}
    return functions[name](*arguments, **options)


def with_grad(name, *arguments, **options):
    functions = {
        "focal": fastce.focal_loss_with_grad,
        "poly": fastce.poly_loss_with_grad,
        "kl": fastce.kl_divergence_with_grad,
    }
    return functions[name](*arguments, **options)


def softmax_parts(logits):
    """Return (p, 1 - p, -log p) of rows (N, C) in extended precision, all exact where they are tiny."""
    z = np.asarray(logits).astype(EXTENDED)
    at_top = np.arange(len(z)), z.argmax(1)
    with np.errstate(all="ignore"):
        top = z.max(1, keepdims=True)
        e = np.exp(z - top)
        e[at_top] = 0
        others = e.sum(1, keepdims=True)
        p = e / (1 + others)
        p[at_top] = (1 / (1 + others))[:, 0]
        miss = 1 - p
        miss[at_top] = (others / (1 + others))[:, 0]
        return p, miss, (top - z) + np.log1p(others)


# Focal and poly loss


def true_target_loss(name, logits, ids, gamma=2.0, epsilon=1.0):
    """Return (loss, its size, gradient, its size) of rows in extended precision."""
    p, miss, minus_log = softmax_parts(logits)
    at = np.arange(len(ids)), ids
    with np.errstate(all="ignore"):
        if name == "focal":
            damping = miss[at] ** EXTENDED(gamma)
            loss = loss_size = damping * minus_log[at]
            ratio = np.where(miss[at] > 0, p[at] * minus_log[at] / miss[at], 1)
            factor = factor_size = damping * (1 + gamma * np.where(p[at] > 0, ratio, 0))
        else:
            loss = minus_log[at] + epsilon * miss[at]
            loss_size = minus_log[at] + abs(epsilon) * miss[at]
            factor, factor_size = 1 + epsilon * p[at], 1 + abs(epsilon) * p[at]
            if epsilon == -1:
                factor = miss[at]
    gradient = p.copy()
    gradient[at] = -miss[at]
    return loss, loss_size, gradient * factor[:, None], np.abs(gradient) * factor_size[:, None]


def assert_true(name, logits, ids, what="", **shape):
    dtype = logits.dtype.name
    loss, loss_size, gradient, gradient_size = true_target_loss(name, logits, ids, **shape)
    got = with_grad(name, logits, ids, reduction="none", **shape)
    smallest = EXTENDED(np.finfo(dtype).smallest_normal)
    # A power multiplies the relative error of its base.
    times = 1 + shape.get("gamma", 2.0) if name == "focal" else 1
    with np.errstate(invalid="ignore"):
        allowed = np.maximum(loss_size * LOSS_BOUND[dtype] * times, 2 * smallest)
        assert_allowed(got[0], loss, allowed, f"{what} loss")
        allowed = np.maximum(gradient_size * GRADIENT_BOUND[dtype] * times, 6 * smallest)
        assert_allowed(got[1], gradient, allowed, f"{what} gradient")
    assert_same_bits(loss_of(name, logits, ids, reduction="none", **shape), got[0], what)


@pytest.mark.parametrize("generator", hard_rows.GENERATORS, ids=lambda generator: generator.__name__)
def test_hard_rows_are_accurate(generator, dtype, rng):
    for number, (logits, ids) in enumerate(generator(dtype, rng)):
        logits, ids = few_rows(logits, ids, 1500)
        if logits.size > 5000 or not has_finite_range(logits):
            continue
        name, shape = TARGET_LOSSES[number % len(TARGET_LOSSES)]
        assert_true(name, logits, ids, (generator.__name__, number, logits.shape, name, shape), **shape)


@each_target_loss
def test_rows_of_any_length_are_accurate(name, shape, dtype, rng):
    for classes in (1, 2, 3, 17, 97, 1000, 4097):
        logits = (rng.normal(0, 1, (4, classes)) * [[0.1], [3], [30], [3]]).astype(dtype)
        ids = rng.integers(0, classes, 4)
        ids[3] = logits[3].argmax()
        assert_true(name, logits, ids, classes, **shape)


def test_confident_rows_agree_with_mpmath(dtype):
    atol = float(np.finfo(dtype).smallest_normal)
    with mpmath.workdps(60):
        for gap in (1.0, 20.0, 40.0):
            x = mpmath.exp(-gap)
            p, miss = 1 / (1 + x), x / (1 + x)
            ce = mpmath.log1p(x) if gap < 30 else -mpmath.log(p)
            logits = np.array([[gap, 0]], dtype)
            for gamma in (0.5, 2.0):
                loss, gradient = with_grad("focal", logits, [0], gamma=gamma, reduction="none")
                factor = miss**gamma * (1 + gamma * p * ce / miss)
                np.testing.assert_allclose(loss, float(miss**gamma * ce), rtol=1.5e-6, atol=atol)
                np.testing.assert_allclose(
                    gradient, [[float(-miss * factor), float(miss * factor)]], rtol=1.5e-6, atol=atol
                )
            loss, gradient = with_grad("poly", logits, [0], epsilon=2.0, reduction="none")
            np.testing.assert_allclose(loss, float(ce + 2 * miss), rtol=6e-7)
            slope = float(miss * (1 + 2 * p))
            np.testing.assert_allclose(gradient, [[-slope, slope]], rtol=6e-7)


def test_without_shape_both_are_cross_entropy(dtype, rng):
    logits, ids = rng.normal(0, 4, (30, 17)).astype(dtype), rng.integers(0, 17, 30)
    ids[::5] = -100
    weights = {"weight": rng.random(17), "sample_weight": rng.normal(0, 1, 30)}
    for options in ({}, weights, {"reduction": "sum", **weights}, {"reduction": "none"}, {"denominator": 3.0}):
        expected = fastce.cross_entropy_with_grad(logits, ids, **options)
        for name, shape in (("focal", {"gamma": 0}), ("poly", {"epsilon": 0})):
            for got, wanted in zip(with_grad(name, logits, ids, **shape, **options), expected, strict=True):
                np.testing.assert_allclose(got, wanted, rtol=4 * LOSS_BOUND[dtype.name], atol=1e-30)


@each_target_loss
@pytest.mark.parametrize("axis", [0, 1])
def test_finite_differences_give_the_gradient(name, shape, axis, rng):
    logits = rng.normal(0, 2, (5, 6))
    ids = rng.integers(0, logits.shape[axis], logits.shape[1 - axis])
    ids[0] = 255
    options = {
        "axis": axis, "ignore_index": 255, "weight": rng.random(logits.shape[axis]),
        "sample_weight": rng.random(len(ids)), **shape,
    }  # fmt: skip
    for reduction in ("sum", "mean"):
        gradient = with_grad(name, logits, ids, reduction=reduction, **options)[1]
        expected = central_differences(lambda z, r=reduction: loss_of(name, z, ids, reduction=r, **options), logits)
        np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-9)


@each_target_loss
def test_torch_s_automatic_gradient_agrees(name, shape, rng):
    torch = pytest.importorskip("torch", reason="torch, an optional oracle, is not installed")
    logits, ids = rng.normal(0, 3, (20, 9)), rng.integers(0, 9, 20)
    given = torch.tensor(logits, requires_grad=True)
    log_p = torch.log_softmax(given, 1)[torch.arange(20), torch.tensor(ids)]
    if name == "focal":
        theirs = -((1 - log_p.exp()) ** shape.get("gamma", 2.0)) * log_p
    else:
        theirs = -log_p + shape.get("epsilon", 1.0) * (1 - log_p.exp())
    theirs.sum().backward()
    losses, gradient = with_grad(name, logits, ids, reduction="none", **shape)
    np.testing.assert_allclose(losses, theirs.detach().numpy(), rtol=1e-11)
    np.testing.assert_allclose(gradient, given.grad.numpy(), rtol=1e-10, atol=1e-13)


def test_optax_s_poly_loss_agrees(rng):
    jax = pytest.importorskip("jax", reason="jax, an optional oracle, is not installed")
    optax = pytest.importorskip("optax", reason="optax, an optional oracle, is not installed")
    logits, ids = rng.normal(0, 3, (20, 9)), rng.integers(0, 9, 20)
    with jax.enable_x64(True):
        for epsilon in (-1.0, 1.0, 2.0):
            losses, gradient = with_grad("poly", logits, ids, epsilon=epsilon, reduction="none")
            one_hot = np.eye(9)[ids]
            theirs = optax.losses.poly_loss_cross_entropy(logits, one_hot, epsilon=epsilon)
            np.testing.assert_allclose(losses, theirs, rtol=1e-11)
            theirs = jax.grad(
                lambda z, e=epsilon, q=one_hot: optax.losses.poly_loss_cross_entropy(z, q, epsilon=e).sum()
            )(logits)
            np.testing.assert_allclose(gradient, theirs, rtol=1e-10, atol=1e-13)


@each_target_loss
def test_weights_and_means_are_those_of_cross_entropy(name, shape, dtype, rng):
    logits, ids = rng.normal(0, 2, (12, 5)).astype(dtype), rng.integers(0, 5, 12)
    ids[[2, 7]] = -100
    w, s = rng.random(5), rng.normal(0, 1, 12)
    rows, row_gradient = with_grad(name, logits, ids, reduction="none", **shape)
    live = ids >= 0
    factors = np.where(live, w[np.maximum(ids, 0)] * s, 0)
    options = {"weight": w, "sample_weight": s, **shape}
    losses, gradient = with_grad(name, logits, ids, reduction="none", **options)
    np.testing.assert_allclose(losses, rows * factors, rtol=1e-6)
    np.testing.assert_allclose(gradient, row_gradient * factors[:, None], rtol=1e-6)
    for denominator in (None, 7.5):
        divisor = factors.sum() if denominator is None else denominator
        mean, gradient = with_grad(name, logits, ids, denominator=denominator, grad_output=-2.0, **options)
        assert type(mean) is float
        np.testing.assert_allclose(mean, (rows * factors).sum() / divisor, rtol=1e-5)
        np.testing.assert_allclose(gradient, row_gradient * (-2 * factors / divisor)[:, None], rtol=1e-5)


@each_target_loss
def test_special_rows(name, shape, dtype):
    inf, nan = np.inf, np.nan
    logits = np.array(
        [[nan, 0, 0], [0, inf, 0], [-inf] * 3, [-inf, 0, 0], [0, -inf, -inf], [nan] * 3, [nan] * 3], dtype
    )
    ids, s = [0, 0, 0, 0, 0, -100, 1], [1, 1, 1, 1, 1, 1, 0]
    losses, gradient = with_grad(name, logits, ids, sample_weight=s, reduction="none", **shape)
    np.testing.assert_array_equal(losses, [nan, nan, nan, inf, 0, 0, 0])
    np.testing.assert_array_equal(gradient[:3], nan)
    np.testing.assert_array_equal(gradient[3:], [[-1, 0.5, 0.5]] + [[0, 0, 0]] * 3)
    assert not np.signbit(losses[4:]).any()
    # A class weight of 0 makes the infinite loss 0.
    losses, gradient = with_grad(name, logits[3:4], [0], weight=[0, 1, 1], reduction="none", **shape)
    assert losses[0] == 0 and not gradient.any()
    # A mean of nothing.
    for options in ({"sample_weight": [0] * 7}, {"ignore_index": [0, 1, -100]}):
        out = np.full_like(logits, 7)
        loss, gradient = with_grad(name, logits, ids, out=out, **options, **shape)
        assert np.isnan(loss) and gradient is out and not out.any()
        assert loss_of(name, logits, ids, reduction="sum", **options, **shape) == 0
    assert np.isnan(loss_of(name, logits[:0], [], **shape))
    assert loss_of(name, logits[:0], [], reduction="none", **shape).shape == (0,)


# Kullback-Leibler divergence


def true_divergence(logits, q, log_q=None):
    """Return (loss, allowed error, gradient, its size) of rows in extended precision."""
    name = np.asarray(logits).dtype.name
    p, _, minus_log = softmax_parts(logits)
    q = np.asarray(q).astype(EXTENDED)
    with np.errstate(all="ignore"):
        log_q = np.log(q) if log_q is None else log_q
        terms = np.where(q > 0, q * (log_q + minus_log), 0)
        reach = np.where((q > 0) & np.isfinite(minus_log), np.abs(np.where(q > 0, log_q, 0)) + minus_log, 0)
        slope = np.where(q > 0, np.abs(q - p), 0)
    loss = terms.sum(1)
    # The terms are functions of float64 logarithms: q - p is their derivative. What q lacks of 1 is a sum of its own.
    rounding = 2.0**-50 * ((slope * reach).sum(1) + q.sum(1) + 1)
    finite = np.where(np.isfinite(loss), np.abs(loss), 0)
    bound = GRADIENT_BOUND[name]
    size = p * q.sum(1, keepdims=True) + q
    return loss, finite * LOSS_BOUND[name] + rounding, p * q.sum(1, keepdims=True) - q, size * bound


def assert_true_divergence(logits, targets, what="", from_logits=False):
    dtype = logits.dtype.name
    if from_logits:
        q, _, minus_log = softmax_parts(targets)
        loss, allowed, gradient, gradient_allowed = true_divergence(logits, q, -minus_log)
    else:
        loss, allowed, gradient, gradient_allowed = true_divergence(logits, targets)
    got = with_grad("kl", logits, targets, from_logits=from_logits, reduction="none")
    smallest = EXTENDED(np.finfo(dtype).smallest_normal)
    assert_allowed(got[0], loss, allowed + smallest, f"{what} loss")
    assert_allowed(got[1], gradient, np.maximum(gradient_allowed, 4 * smallest), f"{what} gradient")
    assert_same_bits(loss_of("kl", logits, targets, from_logits=from_logits, reduction="none"), got[0], what)
    return got


@pytest.mark.parametrize("classes", [1, 2, 3, 16, 17, 97, 128, 1000, 4097, 70_000])
def test_divergences_are_accurate(classes, dtype, rng):
    for scale in (0.1, 3, 40) if classes < 10_000 else (3,):
        logits = rng.normal(0, scale, (3, classes)).astype(dtype)
        q = rng.dirichlet(np.ones(classes), 3) * (rng.random((3, classes)) < 0.7)
        assert_true_divergence(logits, q.astype(dtype), classes)
        assert_true_divergence(logits, q * 2.5, classes)
        assert_true_divergence(logits, rng.normal(0, scale, (3, classes)).astype(dtype), classes, from_logits=True)


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-6])
def test_a_small_divergence_keeps_its_digits(distance, rng):
    # The sum of q log(q/p) itself would cancel: its terms are as large as the distance, it is as small as its square.
    teacher = rng.normal(0, 2, (4, 12))
    student = teacher + distance * rng.normal(0, 1, teacher.shape)
    with mpmath.workdps(60):
        for from_logits in (True, False):
            q = scipy.special.softmax(teacher, axis=1)
            got = loss_of("kl", student, teacher if from_logits else q, from_logits=from_logits, reduction="none")
            for row in range(4):
                e, f = ([mpmath.exp(mpmath.mpf(float(v))) for v in x[row]] for x in (student, teacher))
                p = [v / mpmath.fsum(e) for v in e]
                t = [v / mpmath.fsum(f) for v in f] if from_logits else [mpmath.mpf(float(v)) for v in q[row]]
                exact = mpmath.fsum(a * mpmath.log(a / b) for a, b in zip(t, p, strict=True))
                assert abs(float(exact) - got[row]) <= 4e-15 * distance + (0 if from_logits else 4e-16)
                assert not from_logits or got[row] >= 0


def test_a_softmax_does_not_diverge_from_itself(dtype, rng):
    for classes in (1, 2, 10, 97, 5000):
        logits = (rng.normal(0, 1, (4, classes)) * [[0.1], [3], [40], [1000]]).astype(dtype)
        losses, gradient = with_grad("kl", logits, logits.copy(), from_logits=True, reduction="none")
        np.testing.assert_array_equal(losses, 0)
        p = scipy.special.softmax(logits.astype(float), axis=1)
        assert (np.abs(gradient) <= 4 * GRADIENT_BOUND[dtype.name] * p + 1e-37).all()
        moved = with_grad("kl", logits, logits + dtype.type(2), from_logits=True, reduction="none")[0]
        assert (np.abs(moved) <= 1e-4).all() and (moved >= 0).all()


@pytest.mark.parametrize("distance", [1e-2, 1e-6, 1e-9, 1e-12])
def test_a_divergence_between_softmaxes_is_never_negative(distance, dtype, rng):
    for classes in (2, 3, 10, 97):
        teacher = rng.normal(0, 2, (2000, classes))
        student = teacher + distance * rng.normal(0, 1, teacher.shape)
        losses = loss_of("kl", student.astype(dtype), teacher.astype(dtype), from_logits=True, reduction="none")
        assert (losses >= 0).all() and not np.signbit(losses).any()


def test_divergence_is_cross_entropy_less_entropy(dtype, rng):
    logits, q = rng.normal(0, 3, (20, 9)).astype(dtype), rng.dirichlet(np.ones(9), 20)
    losses, gradient = with_grad("kl", logits, q, reduction="none")
    expected = fastce.cross_entropy_with_grad(logits, q, reduction="none")
    np.testing.assert_allclose(losses, expected[0] - scipy.stats.entropy(q, axis=1), rtol=1e-5, atol=1e-6)
    assert_same_bits(gradient, expected[1])


def test_finite_differences_give_the_gradient_of_the_divergence(rng):
    logits, teacher, s = rng.normal(0, 2, (5, 6)), rng.normal(0, 2, (5, 6)), rng.normal(0, 1, 6)
    for from_logits, targets in ((True, teacher), (False, np.abs(teacher))):
        for reduction in ("sum", "mean"):
            options = {"axis": 0, "from_logits": from_logits, "sample_weight": s, "reduction": reduction}
            gradient = with_grad("kl", logits, targets, **options)[1]
            expected = central_differences(lambda z, t=targets, o=options: loss_of("kl", z, t, **o), logits)
            np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-9)


def test_scipy_s_relative_entropy_agrees(rng):
    logits, q = rng.normal(0, 3, (20, 9)), rng.dirichlet(np.ones(9), 20)
    q[:, 3] = 0
    p = scipy.special.softmax(logits, axis=1)
    np.testing.assert_allclose(
        loss_of("kl", logits, q, reduction="none"), scipy.special.rel_entr(q, p).sum(1), rtol=1e-12, atol=1e-14
    )


def test_torch_s_divergence_agrees(rng):
    torch = pytest.importorskip("torch", reason="torch, an optional oracle, is not installed")
    logits, teacher, q = rng.normal(0, 3, (20, 9)), rng.normal(0, 3, (20, 9)), rng.dirichlet(np.ones(9), 20)
    for from_logits, targets in ((False, torch.tensor(q)), (True, torch.log_softmax(torch.tensor(teacher), 1))):
        given = torch.tensor(logits, requires_grad=True)
        theirs = torch.nn.functional.kl_div(
            torch.log_softmax(given, 1), targets, reduction="batchmean", log_target=from_logits
        )
        theirs.backward()
        loss, gradient = with_grad("kl", logits, teacher if from_logits else q, from_logits=from_logits)
        np.testing.assert_allclose(loss, theirs.item(), rtol=1e-12)
        np.testing.assert_allclose(gradient, given.grad.numpy(), rtol=1e-11, atol=1e-14)


def test_optax_s_divergences_agree(rng):
    jax = pytest.importorskip("jax", reason="jax, an optional oracle, is not installed")
    optax = pytest.importorskip("optax", reason="optax, an optional oracle, is not installed")
    logits, teacher, q = rng.normal(0, 3, (20, 9)), rng.normal(0, 3, (20, 9)), rng.dirichlet(np.ones(9), 20)
    with jax.enable_x64(True):
        log_p = jax.nn.log_softmax(logits, axis=1)
        theirs = optax.losses.kl_divergence(log_p, q)
        np.testing.assert_allclose(loss_of("kl", logits, q, reduction="none"), theirs, rtol=1e-11, atol=1e-14)
        theirs = optax.losses.kl_divergence_with_log_targets(log_p, jax.nn.log_softmax(teacher, axis=1))
        ours = loss_of("kl", logits, teacher, from_logits=True, reduction="none")
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-14)


def test_special_rows_of_the_divergence(dtype):
    inf, nan = np.inf, np.nan
    logits = np.array([[nan, 0, 0], [0, inf, 0], [-inf] * 3, [-inf, 0, 0], [-inf, 0, 0], [nan] * 3], dtype)
    q = np.array([[0.5, 0.5, 0]] * 3 + [[0.5, 0.5, 0], [0, 0.5, 0.5], [nan, 1, 0]])
    s = [1, 1, 1, 1, 1, 0]
    losses, gradient = with_grad("kl", logits, q, sample_weight=s, reduction="none")
    np.testing.assert_array_equal(losses[:4], [nan, nan, nan, inf])
    np.testing.assert_allclose(losses[4:], 0, atol=1e-12)
    np.testing.assert_array_equal(gradient[:3], nan)
    np.testing.assert_allclose(gradient[3:], [[-0.5, 0, 0.5], [0, 0, 0], [0, 0, 0]], atol=1e-7)
    losses = loss_of("kl", logits, q, sample_weight=[-1, 1, 1, -1, 1, 0], reduction="none")
    assert losses[3] == -inf
    # Teachers by logits.
    with np.errstate(divide="ignore"):
        teacher = np.array([[0, 0, -inf], [nan, 0, 0], [inf, 0, 0], [-inf] * 3, [-inf, 0, 0]], dtype)
    student = np.array([[0, 0, -inf], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, -inf, 0]], dtype)
    losses, gradient = with_grad("kl", student, teacher, from_logits=True, reduction="none")
    np.testing.assert_array_equal(losses, [0, nan, nan, nan, inf])
    np.testing.assert_array_equal(np.isnan(gradient).all(1), [False, True, True, True, False])
    assert np.isfinite(gradient[[0, 4]]).all()
    # A mean of nothing.
    out = np.full_like(logits, 7)
    loss, gradient = with_grad("kl", logits, q, sample_weight=np.zeros(6), out=out)
    assert np.isnan(loss) and gradient is out and not out.any()
    assert np.isnan(loss_of("kl", logits[:0], q[:0])) and loss_of("kl", logits[:0], q[:0], reduction="sum") == 0


# What all of them share


KINDS = [("focal", {"gamma": 1.5}), ("poly", {"epsilon": 2.0}), ("kl", {}), ("kl", {"from_logits": True})]
each_kind = pytest.mark.parametrize(("name", "shape"), KINDS, ids=str)


def targets_of(name, shape, rows, classes, rng):
    if name != "kl":
        return rng.integers(0, classes, rows)
    targets = rng.normal(0, 3, (*rows, classes) if isinstance(rows, tuple) else (rows, classes))
    return targets if shape else np.abs(targets)


@each_kind
@pytest.mark.parametrize("dimensions", [(300, 5), (200, 97), (20, 1000), (5, 5000), (3, 70_000), (4, 40_000)], ids=str)
def test_threads_buffers_and_the_place_in_the_batch_change_no_bit(name, shape, dimensions, dtype, rng):
    rows, classes = dimensions
    logits = (rng.normal(0, 1, dimensions) * rng.choice([1, 30], (rows, 1))).astype(dtype)
    logits[1, 1] = np.nan
    targets = targets_of(name, shape, rows, classes, rng)
    s, factors = rng.normal(0, 1, rows), rng.normal(0, 1, rows)
    options = {"reduction": "none", **shape}
    per_row = {"sample_weight": s, "grad_output": factors}
    expected = with_grad(name, logits, targets, num_threads=1, **per_row, **options)
    assert_same_bits(loss_of(name, logits, targets, sample_weight=s, **options), expected[0])
    for num_threads in (2, 3, 8):
        for got, wanted in zip(with_grad(name, logits, targets, num_threads=num_threads, **per_row, **options),
                               expected, strict=True):  # fmt: skip
            assert_same_bits(got, wanted)
    part = slice(1, None, 2)
    got = with_grad(name, logits[part], targets[part], **{k: v[part] for k, v in per_row.items()}, **options)
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other[part])
    given = logits.copy()
    for source, out in ((logits, np.full_like(logits, 7)), (given, given)):
        losses, gradient = with_grad(name, source, targets, out=out, **per_row, **options)
        assert gradient is out
        assert_same_bits(losses, expected[0])
        assert_same_bits(gradient, expected[1])


@each_kind
def test_layouts_and_axes_change_no_bit(name, shape, dtype, rng):
    logits = rng.normal(0, 3, (3, 7, 4)).astype(dtype)
    last = np.ascontiguousarray(np.moveaxis(logits, 1, -1))
    targets = targets_of(name, shape, (3, 4), 7, rng)
    options = {"sample_weight": rng.random((3, 4)), "reduction": "none", **shape}
    losses, gradient = with_grad(name, last, targets, **options)
    laid = np.ascontiguousarray(np.moveaxis(targets, -1, 1)) if name == "kl" else targets
    for layout in READABLE_LAYOUTS:
        got = with_grad(name, layout(logits), layout(laid), axis=1, **options)
        assert_same_bits(got[0], losses, layout)
        assert_same_bits(np.moveaxis(got[1], 1, -1), gradient, layout)
    for layout in WRITABLE_LAYOUTS:
        for out in (layout(np.full_like(logits, 7)), layout(logits)):
            source = out if np.array_equal(out, logits) else logits
            with_grad(name, source, laid, axis=1, out=out, **options)
            assert_same_bits(np.moveaxis(np.array(out), 1, -1), gradient, layout)


@each_kind
def test_half_types_are_computed_in_float32(name, shape, rng):
    kinds = [np.float16]
    try:
        import ml_dtypes

        kinds.append(ml_dtypes.bfloat16)
    except ImportError:
        pass
    for kind in kinds:
        logits = rng.normal(0, 3, (6, 9)).astype(kind)
        targets = targets_of(name, shape, 6, 9, rng)
        losses, gradient = with_grad(name, logits, targets, reduction="none", **shape)
        expected = with_grad(name, logits.astype(np.float32), targets, reduction="none", **shape)
        assert losses.dtype == np.float32 and gradient.dtype == kind
        assert_same_bits(losses, expected[0])
        assert_same_bits(gradient.astype(np.float32), expected[1].astype(kind).astype(np.float32))


@each_kind
def test_results_have_the_documented_types(name, shape, dtype, rng):
    logits, targets = np.zeros((2, 3), dtype), targets_of(name, shape, 2, 3, rng)
    for reduction in ("mean", "sum"):
        assert type(loss_of(name, logits, targets, reduction=reduction, **shape)) is float
    losses, gradient = with_grad(name, logits, targets, reduction="none", **shape)
    assert type(losses) is np.ndarray and losses.shape == (2,) and losses.dtype == dtype
    assert type(gradient) is np.ndarray and gradient.shape == (2, 3) and gradient.dtype == dtype
    losses, gradient = with_grad(name, logits[0], targets[0], reduction="none", **shape)
    assert losses.shape == () and gradient.shape == (3,)


# Errors


BAD = {
    "logits": [(np.zeros((4, 3), int), TypeError), (np.zeros((4, 0)), ValueError)],
    "axis": [(2, ValueError), (0.5, TypeError)],
    "sample_weight": [([1.0] * 3, ValueError), ([np.nan] * 4, ValueError), (["a"] * 4, TypeError)],
    "reduction": [("avg", ValueError), (None, TypeError)],
    "denominator": [(0.0, ValueError), ("3", TypeError)],
    "num_threads": [(0, ValueError), (True, TypeError)],
    "grad_output": [([1.0] * 4, ValueError), ("1", TypeError)],
    "out": [(np.full((4, 4), 7.0), ValueError), (np.full((4, 3), 7, np.float32), TypeError), ([[7.0]], TypeError)],
}
OWN = {
    "focal": {
        "gamma": [(-0.1, ValueError), (np.nan, ValueError), (np.inf, ValueError), ("2", TypeError), ([2.0], TypeError)],
        "targets": [([0, 1, 2, 3], IndexError), ([0.0] * 4, TypeError), (np.ones((4, 3)), TypeError),
                    (SparseTargets([[0]] * 4, [[1.0]] * 4), TypeError), ([0, 1], ValueError)],
        "weight": [([1.0] * 4, ValueError), ([1, -1, 1], ValueError)],
        "ignore_index": [(1.5, TypeError), (2**64, ValueError)],
    },
    "kl": {
        "targets": [([0, 1, 2, 0], TypeError), (-np.ones((4, 3)), ValueError), (np.ones((4, 2)), ValueError),
                    (np.full((4, 3), np.nan), ValueError), (np.ones((4, 3), int), (TypeError, ValueError))],
        "from_logits": [(1, TypeError), ("yes", TypeError), (None, TypeError)],
    },
}  # fmt: skip
EPSILONS = [(-1.1, ValueError), (np.nan, ValueError), (np.inf, ValueError), ("1", TypeError)]
OWN["poly"] = {**{name: cases for name, cases in OWN["focal"].items() if name != "gamma"}, "epsilon": EPSILONS}
CASES = [(n, option, *case) for n, own in OWN.items() for option, cases in {**BAD, **own}.items() for case in cases]


@pytest.mark.parametrize(("name", "option", "value", "error"), CASES, ids=str)
def test_arguments_that_cannot_be_right(name, option, value, error, rng):
    arguments = {"logits": rng.normal(0, 1, (4, 3)), "out": np.full((4, 3), 7.0)}
    arguments["targets"] = np.full((4, 3), 1 / 3) if name == "kl" else np.array([0, 1, 2, 0])
    if option == "logits":
        arguments["out"] = np.full(value.shape, 7.0)
    before = arguments["logits"].copy()
    given = {**arguments, option: value}
    logits, targets = given.pop("logits"), given.pop("targets")
    with pytest.raises(error, match=option):
        with_grad(name, logits, targets, **given)
    assert_same_bits(arguments["logits"], before)
    assert (arguments["out"] == 7).all()
    if option not in ("out", "grad_output"):
        del given["out"]
        with pytest.raises(error, match=option):
            loss_of(name, logits, targets, **given)


def test_teachers_that_cannot_be_right():
    logits = np.zeros((4, 3))
    bad = [(np.zeros((4, 3), int), TypeError), (np.zeros((4, 2)), ValueError), ([0, 1, 2, 0], TypeError)]
    for targets, error in bad:
        with pytest.raises(error, match="targets"):
            fastce.kl_divergence(logits, targets, from_logits=True)


def test_the_gradient_may_not_overwrite_the_targets():
    logits, targets = np.zeros((4, 3)), np.full((4, 3), 0.25)
    for from_logits in (False, True):
        with pytest.raises(ValueError, match="out overlaps targets"):
            fastce.kl_divergence_with_grad(logits, targets, from_logits=from_logits, out=targets)
    assert (targets == 0.25).all()


@pytest.mark.parametrize("name", ["weight", "ignore_index", "label_smoothing"])
def test_a_divergence_has_no_classes_to_weigh(name):
    with pytest.raises(TypeError, match=name):
        fastce.kl_divergence(np.zeros((2, 3)), np.ones((2, 3)), **{name: None})
