"""The gradient is the derivative of the loss that was returned."""

from itertools import pairwise

import numpy as np
import pytest

import fastce


def central_differences(loss_of, logits, step=1e-3):
    """Fourth-order central differences of a scalar function, entry by entry."""
    gradient = np.empty_like(logits)
    for at in np.ndindex(logits.shape):
        values = []
        for steps in (-2, -1, 1, 2):
            moved = logits.copy()
            moved[at] += steps * step
            values.append(loss_of(moved))
        gradient[at] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    return gradient


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "mean"},
        {"reduction": "mean", "denominator": 3.7},
        {"reduction": "mean", "ignore_index": [2, 5]},
        {"reduction": "mean", "ignore_index": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_finite_differences_give_the_gradient(options, axis, rng):
    logits = rng.normal(0, 2, (4, 6, 5))
    targets = rng.integers(0, logits.shape[axis], np.delete(logits.shape, axis))
    gradient = fastce.cross_entropy_with_grad(logits, targets, axis=axis, **options)[1]
    expected = central_differences(lambda z: fastce.cross_entropy(z, targets, axis=axis, **options), logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-10)


def test_the_chain_rule_through_an_array_of_row_weights(rng):
    logits = rng.normal(0, 2, (4, 6))
    targets = np.array([0, 5, -100, 3])
    weights = rng.normal(0, 2, 4)
    gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none", grad_output=weights)[1]
    expected = central_differences(
        lambda z: float(weights @ fastce.cross_entropy(z, targets, reduction="none")), logits
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-10)


def test_each_row_of_no_reduction_has_its_own_gradient(dtype, rng):
    logits = rng.normal(0, 2, (30, 17)).astype(dtype)
    targets = rng.integers(0, 17, 30)
    of_rows = fastce.cross_entropy_with_grad(logits, targets, reduction="none")[1]
    of_sum = fastce.cross_entropy_with_grad(logits, targets, reduction="sum")[1]
    np.testing.assert_array_equal(of_rows, of_sum)


def test_rows_sum_to_zero(dtype, rng):
    eps = np.finfo(dtype).eps
    for classes in (1, 2, 10, 48, 1000, 5000, 50_000):
        logits = rng.normal(0, 5, (4, classes)).astype(dtype)
        gradient = fastce.cross_entropy_with_grad(logits, rng.integers(0, classes, 4), reduction="none")[1]
        assert np.abs(gradient.sum(axis=1, dtype=np.longdouble)).max() <= 8 * eps


def test_only_the_target_is_negative(dtype, rng):
    for classes in (2, 10, 48, 1000):
        logits = (rng.normal(0, 1, (40, classes)) * rng.choice([1, 20, 400], (40, 1))).astype(dtype)
        targets = rng.integers(0, classes, 40)
        gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none")[1]
        assert (gradient[np.arange(40), targets] <= 0).all()
        gradient[np.arange(40), targets] = 0
        assert (gradient >= 0).all()


def test_the_mean_divides_by_the_live_rows(dtype, rng):
    logits = rng.normal(0, 2, (8, 5)).astype(dtype)
    targets = rng.integers(0, 5, 8)
    targets[[1, 4, 5, 7]] = -100
    of_sum = fastce.cross_entropy_with_grad(logits, targets, reduction="sum")
    of_mean = fastce.cross_entropy_with_grad(logits, targets)
    # Four live rows: division by a power of two is exact.
    assert of_mean[0] == of_sum[0] / 4
    np.testing.assert_array_equal(of_mean[1], of_sum[1] / 4)


def test_a_denominator_takes_the_place_of_the_row_count(dtype, rng):
    logits = rng.normal(0, 2, (8, 5)).astype(dtype)
    targets = rng.integers(0, 5, 8)
    of_sum = fastce.cross_entropy_with_grad(logits, targets, reduction="sum")
    for denominator in (0.25, 2, 1024):
        loss, gradient = fastce.cross_entropy_with_grad(logits, targets, denominator=denominator)
        assert loss == of_sum[0] / denominator
        np.testing.assert_array_equal(gradient, of_sum[1] / dtype.type(denominator))


def test_micro_batches_with_one_denominator_add_up_to_the_whole(dtype, rng):
    logits = rng.normal(0, 2, (64, 33)).astype(dtype)
    targets = rng.integers(0, 33, 64)
    whole, gradient = fastce.cross_entropy_with_grad(logits, targets, denominator=64)
    parts = [
        fastce.cross_entropy_with_grad(logits[k : k + 16], targets[k : k + 16], denominator=64)
        for k in range(0, 64, 16)
    ]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole, rel=1e-12)
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), gradient)


def test_grad_output_multiplies_the_gradient_and_not_the_loss(dtype, rng):
    logits = rng.normal(0, 2, (16, 12)).astype(dtype)
    targets = rng.integers(0, 12, 16)
    loss, gradient = fastce.cross_entropy_with_grad(logits, targets)
    for factor in (4, -0.5, 0):
        scaled_loss, scaled = fastce.cross_entropy_with_grad(logits, targets, grad_output=factor)
        assert scaled_loss == loss
        np.testing.assert_array_equal(scaled, gradient * dtype.type(factor))


def test_an_array_grad_output_of_equal_entries_is_the_scalar(dtype, rng):
    logits = rng.normal(0, 2, (3, 4, 12)).astype(dtype)
    targets = rng.integers(0, 12, (3, 4))
    scalar = fastce.cross_entropy_with_grad(logits, targets, reduction="none", grad_output=0.3)
    array = fastce.cross_entropy_with_grad(logits, targets, reduction="none", grad_output=np.full((3, 4), 0.3))
    for one, other in zip(scalar, array, strict=True):
        np.testing.assert_array_equal(one, other)


def test_grad_output_is_data_and_may_be_anything(dtype):
    logits = np.zeros((4, 2), dtype)
    factors = [np.nan, np.inf, -np.inf, 0]
    losses, gradient = fastce.cross_entropy_with_grad(logits, [0, 0, 1, 1], reduction="none", grad_output=factors)
    np.testing.assert_allclose(losses, np.log(2), rtol=1e-7)
    np.testing.assert_array_equal(
        gradient, [[np.nan, np.nan], [-np.inf, np.inf], [-np.inf, np.inf], [0, 0]]
    )


def test_a_step_down_the_gradient_lowers_the_loss(dtype, rng):
    logits = rng.normal(0, 2, (16, 12)).astype(dtype)
    targets = rng.integers(0, 12, 16)
    losses = []
    for _ in range(50):
        loss, gradient = fastce.cross_entropy_with_grad(logits, targets)
        losses.append(loss)
        logits -= 5 * gradient
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] < losses[0] / 5


@pytest.mark.parametrize("grad_output", [np.nan, np.inf, -1.0, -np.inf])
@pytest.mark.parametrize("classes", [2, 10, 96, 97, 1000, 5000])
def test_ignored_rows_are_positive_zeros_whatever_the_factor(classes, grad_output, dtype):
    targets = np.zeros(64, int)
    targets[[0, 5, 40, 63]] = -100
    logits = np.zeros((64, classes), dtype)
    _, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="sum", grad_output=grad_output)
    ignored = gradient[targets == -100]
    assert (ignored == 0).all() and not np.signbit(ignored).any()


def test_a_huge_factor_reaches_tiny_probabilities():
    logits = np.array([[0, -70, -np.inf]], np.float32)
    _, gradient = fastce.cross_entropy_with_grad(logits, [0], grad_output=1e60)
    expected = 1e60 * np.exp(-70.0)
    np.testing.assert_allclose(gradient, [[-expected, expected, 0]], rtol=1e-6)
