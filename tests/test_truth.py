"""The extended-precision truth agrees with mpmath, so that accuracy tests may use it on rows too long for mpmath."""

import hard_rows
import mpmath
import numpy as np
import pytest
from truth import true_losses_and_gradients


def mpmath_loss_and_gradient(row, target):
    with mpmath.workdps(60):
        # An entry 40,000 below the largest is 0 to any number of digits that matter; mpmath would take it seriously.
        z = [mpmath.mpf(float(value)) for value in row]
        largest = max(z)
        e = [mpmath.exp(value - largest) if value - largest > -40_000 else mpmath.mpf(0) for value in z]
        others = mpmath.fsum(value for j, value in enumerate(e) if j != target)
        total = others + e[target]
        loss = mpmath.log1p(others / e[target]) if e[target] else mpmath.log(total) + largest - z[target]
        gradient = [value / total for value in e]
        gradient[target] = -others / total
        return loss, gradient


def as_mpmath(value):
    """A long double without loss: the head that fits float64, and the rest."""
    head = float(value)
    return mpmath.mpf(head) + mpmath.mpf(float(value - np.longdouble(head)))


def assert_agrees(got, true):
    with mpmath.workdps(60):
        got = as_mpmath(got)
        assert mpmath.isfinite(got)
        assert abs(got - true) <= max(abs(true) * mpmath.mpf(1e-16), mpmath.mpf(2) ** -1070)


# far_below has long rows alone; they have a test of their own.
@pytest.mark.parametrize(
    "generator",
    [generator for generator in hard_rows.GENERATORS if generator is not hard_rows.far_below],
    ids=lambda generator: generator.__name__,
)
def test_truth_agrees_with_mpmath_on_short_rows(generator, dtype, rng):
    checked = 0
    for logits, targets in generator(dtype, rng):
        if logits.shape[1] > 50:
            continue
        for row in rng.choice(len(logits), min(2, len(logits)), replace=False):
            losses, gradients = true_losses_and_gradients(logits[row : row + 1], targets[row : row + 1])
            loss, gradient = mpmath_loss_and_gradient(logits[row], targets[row])
            if abs(loss) < 1e307:
                assert_agrees(losses[0], loss)
            for got, true in zip(gradients[0], gradient, strict=True):
                assert_agrees(got, true)
            checked += 1
    assert checked


@pytest.mark.parametrize("classes", [1000, 20_000])
def test_truth_agrees_with_mpmath_on_long_rows(classes, rng):
    logits = rng.normal(0, 5, (1, classes))
    targets = np.array([classes // 2])
    losses, gradients = true_losses_and_gradients(logits, targets)
    loss, gradient = mpmath_loss_and_gradient(logits[0], targets[0])
    assert_agrees(losses[0], loss)
    for got, true in zip(gradients[0], gradient, strict=True):
        assert_agrees(got, true)


def test_truth_of_very_many_tiny_classes():
    logits = np.full((1, 100_000), -95, np.float32)
    logits[0, 7] = 0
    losses, gradients = true_losses_and_gradients(logits, np.array([7]))
    with mpmath.workdps(60):
        others = 99_999 * mpmath.exp(-95)
        assert_agrees(losses[0], mpmath.log1p(others))
        assert_agrees(gradients[0, 7], -others / (1 + others))
        assert_agrees(gradients[0, 0], mpmath.exp(-95) / (1 + others))
