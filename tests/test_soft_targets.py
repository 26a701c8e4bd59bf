"""Distributions and sparse targets: the same loss as class ids where they say the same, exact for any mass."""

import hard_rows
import numpy as np
import pytest
from test_layouts import READABLE_LAYOUTS, assert_same_bits
from test_options import assert_allowed, assert_true, few_rows, has_finite_range, truth_of
from truth import GRADIENT_BOUND, LOSS_BOUND, assert_accurate, assert_within

import fastce
from fastce import SparseTargets


def one_hot(ids, classes):
    return (np.asarray(ids)[..., None] == np.arange(classes)).astype(float)


def sparse(ids, values=1.0):
    """One entry a row."""
    ids = np.asarray(ids)[..., None]
    return SparseTargets(ids, np.broadcast_to(np.asarray(values, float)[..., None], ids.shape))


def rows_of(logits, targets, **options):
    return fastce.cross_entropy_with_grad(logits, targets, reduction="none", **options)


# The same as class ids


@pytest.mark.parametrize("generator", hard_rows.GENERATORS, ids=lambda generator: generator.__name__)
def test_hard_rows_by_one_hot_rows_are_as_accurate_as_by_class_ids(generator, dtype, rng):
    for number, (logits, ids) in enumerate(generator(dtype, rng)):
        logits, ids = few_rows(logits, ids, 1500)
        if logits.size > 5000 or not has_finite_range(logits):
            continue
        targets = one_hot(ids, logits.shape[1]) if number % 2 else sparse(ids)
        assert_accurate(logits, ids, *rows_of(logits, targets), what=(generator.__name__, number, logits.shape))


@pytest.mark.parametrize("depth", [16.0, 25.0, 60.5, 95.0])
def test_a_sum_of_very_many_tiny_probabilities_is_kept(depth, dtype):
    logits = np.full((2, 100_000), -depth, dtype)
    ids = np.array([0, 70_000])
    logits[[0, 1], ids] = 0
    for targets in (one_hot(ids, 100_000).astype(dtype), sparse(ids)):
        assert_accurate(logits, ids, *rows_of(logits, targets), what=depth)


def test_means_and_sums_are_those_of_class_ids(dtype, rng):
    logits, ids = rng.normal(0, 3, (20, 7)).astype(dtype), rng.integers(0, 7, 20)
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"sample_weight": rng.random(20)}):
        for reduction in ("sum", "mean"):
            expected = fastce.cross_entropy_with_grad(logits, ids, reduction=reduction, **options)
            for targets in (one_hot(ids, 7), sparse(ids)):
                got = fastce.cross_entropy_with_grad(logits, targets, reduction=reduction, **options)
                np.testing.assert_allclose(got[0], expected[0], rtol=LOSS_BOUND[dtype.name])
                np.testing.assert_allclose(got[1], expected[1], rtol=2 * GRADIENT_BOUND[dtype.name], atol=1e-12)


def test_label_smoothing_is_a_distribution(dtype, rng):
    logits, ids = rng.normal(0, 3, (20, 7)).astype(dtype), rng.integers(0, 7, 20)
    smooth = 0.7 * one_hot(ids, 7) + 0.3 / 7
    truth = truth_of(logits, smooth, reduction="none")
    for targets in (ids, one_hot(ids, 7), sparse(ids)):
        losses, gradient = rows_of(logits, targets, label_smoothing=0.3)
        assert_allowed(losses, truth.loss, truth.loss_allowed)
        assert_allowed(gradient, truth.gradient, truth.gradient_allowed)


# Any mass


def tiny_values(dtype):
    return (1e-37, 1e-30, 1e-10) if dtype == np.float32 else (1e-305, 1e-200, 1e-30)


def test_tiny_distributions_are_accurate(dtype, rng):
    for classes in (2, 10, 97, 300, 5000):
        logits = rng.normal(0, 3, (4, classes)).astype(dtype)
        logits[2:] *= 10
        ids = rng.integers(0, classes, 4)
        ids[::2] = logits[::2].argmax(1)
        for value in tiny_values(dtype):
            assert_true(logits, one_hot(ids, classes) * value, reduction="none", what=(classes, value))
            assert_true(logits, sparse(ids, np.full(4, value)), reduction="none", what=(classes, value))
            assert_true(logits, np.full(logits.shape, value), reduction="none", what=(classes, value))


def test_huge_distributions_are_accurate(dtype, rng):
    for classes in (2, 10, 97, 5000):
        logits = rng.normal(0, 3, (4, classes)).astype(dtype)
        for value in (1e10, 1e30):
            assert_true(logits, value * rng.random(logits.shape), reduction="none", what=(classes, value))
            assert_true(logits, sparse([0, 1, 0, 1], np.full(4, value)), reduction="none", what=(classes, value))


def test_mass_of_very_different_sizes_is_accurate(dtype, rng):
    for classes in (3, 20, 97, 1000, 5000):
        logits = (rng.normal(0, 1, (6, classes)) * rng.choice([1, 30], (6, 1))).astype(dtype)
        q = 10.0 ** rng.uniform(-30, 5, logits.shape) * (rng.random(logits.shape) < 0.6)
        assert_true(logits, q, reduction="none", what=classes)
        indices = rng.integers(0, classes, (6, 5))
        assert_true(logits, SparseTargets(indices, 10.0 ** rng.uniform(-30, 5, (6, 5))), reduction="none", what=classes)


def test_a_sum_other_than_one_scales_the_probabilities_only(rng):
    # The gradient is p * sum(q) - q; p - q would be wrong here.
    logits = rng.normal(0, 2, (5, 6))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for total in (0.0, 0.3, 1.0, 4.0):
        q = rng.dirichlet(np.ones(6), 5) * total
        losses, gradient = rows_of(logits, q)
        np.testing.assert_allclose(gradient, p * total - q, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(losses, -(q * np.log(p)).sum(1), rtol=1e-13)
        w = rng.uniform(0, 2, 6)
        _, gradient = rows_of(logits, q, weight=w)
        np.testing.assert_allclose(gradient, p * (w * q).sum(1, keepdims=True) - w * q, rtol=1e-13, atol=1e-15)


def test_no_mass_is_no_loss(dtype, rng):
    logits = rng.normal(0, 3, (4, 50)).astype(dtype)
    nothing = [
        np.zeros((4, 50)),
        SparseTargets(np.zeros((4, 0), int), np.zeros((4, 0))),
        SparseTargets(np.zeros((4, 2), int), np.zeros((4, 2))),
    ]
    for targets in nothing:
        losses, gradient = assert_true(logits, targets, reduction="none")
        assert not losses.any() and not np.signbit(losses).any() and not gradient.any()
        assert fastce.cross_entropy(logits, targets) == 0.0
        losses, gradient = assert_true(logits, targets, reduction="none", z_loss=0.1)
        assert losses.all() and gradient.all()


def test_the_softmax_of_the_logits_themselves_has_gradient_zero(dtype, rng):
    for classes in (2, 10, 97, 1000, 5000):
        logits = rng.normal(0, 3, (4, classes)).astype(dtype)
        p = fastce.softmax(logits)
        _, gradient = rows_of(logits, p)
        assert (np.abs(gradient) <= 4 * GRADIENT_BOUND[dtype.name] * p).all()


# Sparse targets


def dense(targets, classes):
    indices, values = np.asarray(targets.indices), np.asarray(targets.values)
    q = np.zeros((*indices.shape[:-1], classes))
    for at in np.ndindex(indices.shape):
        q[(*at[:-1], indices[at])] += values[at]
    return q


@pytest.mark.parametrize("entries", [1, 2, 5, 40])
def test_sparse_targets_are_the_distribution_they_stand_for(entries, dtype, rng):
    for classes in (3, 20, 97, 1000, 5000):
        logits = rng.normal(0, 4, (6, classes)).astype(dtype)
        targets = SparseTargets(rng.integers(0, classes, (6, entries)), rng.random((6, entries)))
        for options in ({}, {"label_smoothing": 0.2, "weight": rng.random(classes)}, {"z_loss": 0.01}):
            truth = truth_of(logits, dense(targets, classes), reduction="none", **options)
            losses, gradient = rows_of(logits, targets, **options)
            assert_allowed(losses, truth.loss, truth.loss_allowed, classes)
            assert_allowed(gradient, truth.gradient, truth.gradient_allowed, classes)


def test_repeated_entries_of_one_class_are_a_one_hot_row(dtype, rng):
    # Mass added up in two orders must still be all there: 0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1.
    for values in ([0.1, 0.2, 0.3], [1.0, 1e-9, 1e-9, 3.0], rng.random(17)):
        for gap in (0.0, 5.0, 30.0, 60.0):
            for classes in (2, 40, 130):
                logits = np.zeros((2, classes), dtype)
                logits[:, 1] = gap
                indices = np.stack([np.full(len(values), 1), np.full(len(values), 0)])
                targets = SparseTargets(indices, np.stack([values, values]))
                losses, gradient = rows_of(logits, targets)
                total = np.longdouble(np.asarray(values)).sum()
                truth = truth_of(logits, np.array([1, 0]), reduction="none")
                assert_within(losses, truth.loss * total, LOSS_BOUND[dtype.name], f"loss {values}")
                assert_within(gradient, truth.gradient * total, GRADIENT_BOUND[dtype.name], f"gradient {values}")


def test_mixed_samples_have_the_mixed_loss(rng):
    logits = rng.normal(0, 3, (30, 11))
    first, second, part = rng.integers(0, 11, 30), rng.integers(0, 11, 30), rng.random(30)
    mixed = SparseTargets(np.stack([first, second], -1), np.stack([part, 1 - part], -1))
    one, other = (rows_of(logits, ids) for ids in (first, second))
    losses, gradient = rows_of(logits, mixed)
    np.testing.assert_allclose(losses, part * one[0] + (1 - part) * other[0], rtol=1e-13)
    expected = part[:, None] * one[1] + (1 - part)[:, None] * other[1]
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", ">i4", "u4", "i8", "u8"])
def test_any_integers_are_indices_and_any_reals_values(kind, dtype, rng):
    logits = rng.normal(0, 3, (5, 9)).astype(dtype)
    indices, values = rng.integers(0, 9, (5, 3)), rng.integers(0, 4, (5, 3))
    expected = rows_of(logits, SparseTargets(indices, values.astype(float)))
    for number in (values, values.astype("f4"), values.astype(">f8"), values.astype(np.float16), values.tolist()):
        for got, wanted in zip(rows_of(logits, SparseTargets(indices.astype(kind), number)), expected, strict=True):
            assert_same_bits(got, wanted)


def test_sparse_targets_of_several_axes_and_any_layout(dtype, rng):
    logits = rng.normal(0, 3, (4, 9, 5)).astype(dtype)
    indices, values = rng.integers(0, 9, (4, 5, 3)), rng.random((4, 5, 3))
    flat = np.moveaxis(logits, 1, -1).reshape(20, 9)
    losses, gradient = rows_of(flat, SparseTargets(indices.reshape(20, 3), values.reshape(20, 3)))
    for layout in READABLE_LAYOUTS:
        got = rows_of(layout(logits), SparseTargets(layout(indices), layout(values)), axis=1)
        assert_same_bits(got[0], losses.reshape(4, 5))
        assert_same_bits(got[1], np.moveaxis(gradient.reshape(4, 5, 9), -1, 1))


def test_a_single_row_of_sparse_targets(dtype):
    logits = np.array([1, 2, 3], dtype)
    losses, gradient = rows_of(logits, SparseTargets([0, 2], [0.5, 0.5]))
    assert losses.shape == () and gradient.shape == (3,)
    np.testing.assert_allclose(losses, 0.40760596444438 + 1, rtol=5e-7)


def test_arguments_are_left_alone(dtype, rng):
    logits, q = rng.normal(0, 3, (5, 9)).astype(dtype), rng.random((5, 9)).astype(dtype)
    targets = SparseTargets(rng.integers(0, 9, (5, 2)), rng.random((5, 2)))
    before = [array.copy() for array in (q, targets.indices, targets.values)]
    for given in (q, targets):
        fastce.cross_entropy_with_grad(logits, given, weight=rng.random(9), label_smoothing=0.1, out=logits.copy())
    for array, copy in zip((q, targets.indices, targets.values), before, strict=True):
        assert_same_bits(array, copy)


# Distributions as they come


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f4", ">f8"])
def test_distributions_of_any_float(kind, dtype, rng):
    logits = rng.normal(0, 3, (5, 90)).astype(dtype)
    q = (rng.random((5, 90)) * (rng.random((5, 90)) < 0.3)).astype(kind)
    assert_true(logits, q, reduction="none")
    # All these numbers are float32's: the dtype they come in means nothing.
    exact = np.round(q * 64).astype(kind)
    expected = rows_of(logits, exact.astype(dtype))
    for got, wanted in zip(rows_of(logits, exact), expected, strict=True):
        assert_same_bits(got, wanted)


def test_distributions_of_bfloat16(dtype, rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    logits = rng.normal(0, 3, (5, 90)).astype(dtype)
    q = rng.random((5, 90)).astype(ml_dtypes.bfloat16)
    for got, wanted in zip(rows_of(logits, q), rows_of(logits, q.astype(dtype)), strict=True):
        assert_same_bits(got, wanted)


def test_lists_and_subclasses_are_distributions(rng):
    logits, q = rng.normal(0, 3, (5, 4)), rng.random((5, 4))
    expected = rows_of(logits, q)
    for given in (q.tolist(), np.ma.array(q), q.view(np.recarray)):
        losses, gradient = rows_of(logits, given)
        assert type(losses) is type(gradient) is np.ndarray
        assert_same_bits(losses, expected[0])
        assert_same_bits(gradient, expected[1])


def test_a_square_batch_tells_ids_from_distributions_by_kind(rng):
    logits = rng.normal(0, 3, 4)
    assert fastce.cross_entropy(logits, np.array([0, 1, 0, 0.0])) == pytest.approx(fastce.cross_entropy(logits, 1))
    with pytest.raises(ValueError, match="one-hot"):
        fastce.cross_entropy(logits, np.array([0, 1, 0, 0]))
    with pytest.raises(TypeError, match="class ids must be integers"):
        fastce.cross_entropy(logits, 1.0)


# Special values


def test_zero_mass_on_minus_infinity_counts_nothing(dtype, rng):
    for classes in (3, 20, 97, 5000):
        logits = rng.normal(0, 3, (5, classes)).astype(dtype)
        hidden = rng.random(logits.shape) < 0.4
        hidden[:, 0] = False
        logits[hidden] = -np.inf
        q = rng.random(logits.shape) * ~hidden
        losses, gradient = assert_true(logits, q, reduction="none")
        assert np.isfinite(losses).all() and np.isfinite(gradient).all() and not gradient[hidden].any()
        entries = SparseTargets(
            np.stack([np.zeros(5, int), hidden.argmax(1)], 1), np.stack([np.ones(5), np.zeros(5)], 1)
        )
        losses, gradient = assert_true(logits, entries, reduction="none")
        assert np.isfinite(losses).all() and np.isfinite(gradient).all()


def test_mass_on_minus_infinity_is_an_infinite_loss_with_a_finite_gradient(dtype, rng):
    for classes in (3, 20, 97, 5000):
        logits = rng.normal(0, 3, (3, classes)).astype(dtype)
        logits[:, 1] = -np.inf
        q = rng.random(logits.shape)
        losses, gradient = assert_true(logits, q, reduction="none")
        assert np.isposinf(losses).all() and np.isfinite(gradient).all()
        np.testing.assert_allclose(gradient[:, 1], -q[:, 1], rtol=1e-6)
        # A class weight of 0 takes the mass away.
        losses, gradient = assert_true(logits, q, weight=(np.arange(classes) != 1) * 1.0, reduction="none")
        assert np.isfinite(losses).all() and not gradient[:, 1].any()


def test_rows_of_sample_weight_zero_are_not_validated(dtype):
    logits = np.zeros((2, 3), dtype)
    for bad in (np.nan, np.inf, -1.0):
        q = np.array([[1, 0, 0], [bad, bad, bad]])
        losses, gradient = rows_of(logits, q, sample_weight=[1, 0])
        np.testing.assert_allclose(losses, [np.log(3), 0], rtol=1e-6)
        assert not gradient[1].any()


# Against other libraries


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (2, 7, 3, 4)], ids=str)
def test_torch_agrees_on_any_mass(shape, rng):
    torch = pytest.importorskip("torch", reason="torch, an optional oracle, is not installed")
    for smoothing, weighted, reduction in ((0.0, True, "mean"), (0.2, True, "sum"), (1.0, False, "none")):
        logits, q = rng.normal(0, 3, shape), rng.random(shape) * 3
        weight = rng.uniform(0, 2, 7) if weighted else None
        options = {"label_smoothing": smoothing, "reduction": reduction}
        given = torch.tensor(logits, requires_grad=True)
        theirs = torch.nn.functional.cross_entropy(
            given, torch.tensor(q), weight=None if weight is None else torch.tensor(weight), **options
        )
        theirs.sum().backward()
        loss, gradient = fastce.cross_entropy_with_grad(logits, q, axis=1, weight=weight, **options)
        np.testing.assert_allclose(loss, theirs.detach().numpy(), rtol=1e-12)
        np.testing.assert_allclose(gradient, given.grad.numpy(), rtol=1e-12, atol=1e-13)


@pytest.fixture
def optax():
    """Optax and JAX, computing in float64."""
    jax = pytest.importorskip("jax", reason="jax, an optional oracle, is not installed")
    module = pytest.importorskip("optax", reason="optax, an optional oracle, is not installed")
    with jax.enable_x64(True):
        yield module


def test_optax_s_safe_cross_entropy_agrees(optax, rng):
    import jax

    logits = rng.normal(0, 3, (6, 9))
    hidden = rng.random(logits.shape) < 0.3
    hidden[:, 0] = False
    logits[hidden] = -np.inf
    q = rng.dirichlet(np.ones(9), 6) * ~hidden
    losses, gradient = rows_of(logits, q)
    np.testing.assert_allclose(losses, optax.safe_softmax_cross_entropy(logits, q), rtol=1e-12)
    theirs = jax.grad(lambda z: optax.safe_softmax_cross_entropy(z, q).sum())(logits)
    np.testing.assert_allclose(gradient, theirs, rtol=1e-11, atol=1e-14)


def test_optax_agrees_where_classes_are_masked(optax, rng):
    import jax

    logits = rng.normal(0, 3, (6, 9))
    mask = rng.random(logits.shape) < 0.6
    mask[:, 0] = True
    q = rng.dirichlet(np.ones(9), 6) * mask
    losses, gradient = rows_of(logits, q, class_mask=mask)
    np.testing.assert_allclose(losses, optax.softmax_cross_entropy(logits, q, where=mask), rtol=1e-12)
    theirs = jax.grad(lambda z: optax.softmax_cross_entropy(z, q, where=mask).sum())(logits)
    np.testing.assert_allclose(gradient, theirs, rtol=1e-11, atol=1e-14)
    ids = np.zeros(6, int)
    losses, gradient = rows_of(logits, ids, class_mask=mask)
    theirs = optax.softmax_cross_entropy_with_integer_labels(logits, ids, where=mask)
    np.testing.assert_allclose(losses, theirs, rtol=1e-12)


def test_optax_s_smoothing_over_unmasked_classes_agrees(optax, rng):
    logits = rng.normal(0, 3, (6, 9))
    mask = rng.random(logits.shape) < 0.6
    mask[:, 0] = True
    shown = mask.sum(1, keepdims=True)
    smooth = (0.8 * one_hot(np.zeros(6, int), 9) + 0.2 / shown) * mask
    theirs = optax.softmax_cross_entropy(logits, smooth, where=mask)
    for targets in (np.zeros(6, int), one_hot(np.zeros(6, int), 9), sparse(np.zeros(6, int))):
        losses, _ = rows_of(logits, targets, class_mask=mask, label_smoothing=0.2)
        np.testing.assert_allclose(losses, theirs, rtol=1e-12)


def test_sums_of_masses_may_exceed_float32():
    for classes in (90, 200, 5000):
        logits, masses = np.zeros((1, classes), np.float32), np.full((1, classes), 1e38, np.float32)
        total = masses.sum(dtype=float)
        assert fastce.cross_entropy(logits, masses) == pytest.approx(total * np.log(classes))
        logits[0, 1:] = -3e38
        expected = 2.0 * (classes - 1) * float(np.float32(3e38))
        assert fastce.cross_entropy(logits, np.full_like(masses, 2)) == pytest.approx(expected)


@pytest.mark.parametrize("classes", [10, 97, 300, 5000])
def test_rows_that_are_left_out_change_no_bit_of_the_others(classes, dtype, rng):
    # Long rows are taken two and three at a time: whether those between them count must not mix them up.
    logits = rng.normal(0, 4, (9, classes)).astype(dtype)
    targets = rng.random((9, classes)).astype(dtype)
    options = {"softcap": 3.0, "label_smoothing": 0.1, "weight": rng.random(classes), "reduction": "none"}
    losses, gradients = fastce.cross_entropy_with_grad(logits, targets, **options)
    for _ in range(20):
        counts = rng.random(9) < 0.5
        got = fastce.cross_entropy_with_grad(logits, targets, sample_weight=counts.astype(float), **options)
        np.testing.assert_array_equal(got[0], np.where(counts, losses, 0))
        np.testing.assert_array_equal(got[1], np.where(counts[:, None], gradients, 0))
