"""Every loss and every gradient entry is within the guaranteed relative error of the true value.

float32: losses 5e-7, gradients 4.8e-7; float64: 2e-15; below the smallest normal number, that number.
"""

import hard_rows
import mpmath
import numpy as np
import pytest
from truth import GRADIENT_BOUND, LOSS_BOUND, assert_accurate, assert_within, true_losses_and_gradients

import fastce


def row_losses_and_gradients(logits, targets):
    return fastce.cross_entropy_with_grad(logits, targets, reduction="none")


@pytest.mark.parametrize("generator", hard_rows.GENERATORS, ids=lambda generator: generator.__name__)
def test_hard_rows_are_accurate(generator, dtype, rng):
    for logits, targets in generator(dtype, rng):
        losses, gradients = row_losses_and_gradients(logits, targets)
        assert_accurate(logits, targets, losses, gradients, f"{generator.__name__} {logits.shape}")


def test_random_short_rows_agree_with_mpmath(dtype, rng):
    for classes in (2, 3, 10, 40):
        logits = (rng.normal(0, 1, (12, classes)) * rng.choice([0.1, 3, 40], (12, 1))).astype(dtype)
        targets = rng.integers(0, classes, 12)
        losses, gradients = row_losses_and_gradients(logits, targets)
        with mpmath.workdps(50):
            for row, t, loss, gradient in zip(logits, targets, losses, gradients, strict=True):
                z = [mpmath.mpf(float(value)) for value in row]
                true_loss = mpmath.log1p(mpmath.fsum(mpmath.exp(z[j] - z[t]) for j in range(classes) if j != t))
                total = mpmath.fsum(mpmath.exp(value) for value in z)
                true_gradient = [mpmath.exp(value) / total for value in z]
                true_gradient[t] = -mpmath.fsum(true_gradient[j] for j in range(classes) if j != t)
                smallest = float(np.finfo(dtype).smallest_normal)
                assert abs(float(loss) - true_loss) <= max(LOSS_BOUND[dtype.name] * true_loss, smallest)
                for got, true in zip(gradient, true_gradient, strict=True):
                    assert abs(float(got) - true) <= max(GRADIENT_BOUND[dtype.name] * abs(true), smallest)


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 33, 47, 48, 49, 100, 129, 1000, 1025, 4097, 40_000, 128_256])
def test_constant_rows_of_awkward_mantissas(classes, dtype, rng):
    # Equal terms round alike: a sum with a bias shows here and nowhere else. The truth is 1/C and log C.
    rows = 64 if classes <= 5000 else 8
    constants = np.concatenate([rng.uniform(-1, 1, rows // 2), rng.uniform(-1000, 1000, rows // 2)]).astype(dtype)
    logits = np.repeat(constants[:, None], classes, axis=1)
    targets = rng.integers(0, classes, rows)
    losses, gradients = row_losses_and_gradients(logits, targets)

    one = np.longdouble(1)
    true_gradients = np.full(logits.shape, one / classes)
    true_gradients[np.arange(rows), targets] = (one - classes) / classes
    true_losses = np.full(rows, np.log(np.longdouble(classes)))
    assert_within(losses, true_losses, LOSS_BOUND[dtype.name], "loss")
    assert_within(gradients, true_gradients, GRADIENT_BOUND[dtype.name], "gradient")


def test_a_million_classes(dtype, rng):
    logits = rng.normal(0, 2, (1, 1_000_000)).astype(dtype)
    targets = np.array([123_456])
    assert_accurate(logits, targets, *row_losses_and_gradients(logits, targets))


def test_tiny_loss_of_very_many_classes():
    logits = np.full((1, 100_000), -95, np.float32)
    logits[0, 99] = 0
    loss, gradient = row_losses_and_gradients(logits, [99])
    true = float(99_999 * mpmath.exp(-95))
    assert true == pytest.approx(5.5e-37, rel=0.01)
    assert loss[0] == pytest.approx(true, rel=5e-7, abs=0)
    assert gradient[0, 99] == pytest.approx(-true, rel=4.8e-7, abs=0)


def test_an_offset_of_1e8_changes_nothing(dtype, rng):
    # Multiples of 8 near 1e8 are float32 numbers, so the offset itself rounds nothing.
    small = 8.0 * rng.integers(-3, 4, (50, 30))
    targets = rng.integers(0, 30, 50)
    plain = small.astype(dtype)
    for offset in (1e8, -1e8):
        shifted = (small + offset).astype(dtype)
        np.testing.assert_array_equal(shifted.astype(float) - offset, small)
        assert_accurate(plain, targets, *row_losses_and_gradients(shifted, targets))


def test_mean_and_sum_are_those_of_the_exact_losses(dtype, rng):
    # Tiny and large losses together: the batch is summed in float64 whatever the logits are.
    logits = rng.normal(0, 8, (20_000, 4)).astype(dtype)
    targets = rng.integers(0, 4, len(logits))
    true = true_losses_and_gradients(logits, targets)[0].sum()
    bound = LOSS_BOUND[dtype.name]
    assert fastce.cross_entropy(logits, targets, reduction="sum") == pytest.approx(float(true), rel=bound)
    assert fastce.cross_entropy(logits, targets) == pytest.approx(float(true / len(logits)), rel=bound)


def test_scaled_gradients_are_as_accurate(dtype, rng):
    logits = rng.normal(0, 5, (37, 100)).astype(dtype)
    targets = rng.integers(0, 100, 37)
    true = true_losses_and_gradients(logits, targets)[1]
    factors = rng.normal(0, 3, 37).astype(dtype)
    bound = GRADIENT_BOUND[dtype.name]
    mean = fastce.cross_entropy_with_grad(logits, targets)[1]
    assert_within(mean, true / 37, bound, "gradient of the mean")
    divided = fastce.cross_entropy_with_grad(logits, targets, denominator=1e-3, grad_output=0.7)[1]
    assert_within(divided, true * (np.longdouble(0.7) / np.longdouble(1e-3)), bound, "gradient over a denominator")
    each = fastce.cross_entropy_with_grad(logits, targets, reduction="none", grad_output=factors)[1]
    assert_within(each, true * factors.astype(np.longdouble)[:, None], bound, "gradient times grad_output")


def test_an_extreme_scale_loses_nothing(dtype, rng):
    # The factor alone would overflow or underflow; its product with the gradient does not.
    classes, lead = 10, 60.0
    logits = np.zeros((4, classes), dtype)
    targets = np.array([0, 3, 5, 9])
    logits[np.arange(4), targets] = lead
    true = true_losses_and_gradients(logits, targets)[1]
    for factor in (1e30, 1e-8):
        got = fastce.cross_entropy_with_grad(logits, targets, reduction="sum", grad_output=factor)[1]
        assert_within(got, true * np.longdouble(factor), GRADIENT_BOUND[dtype.name], f"grad_output {factor}")
