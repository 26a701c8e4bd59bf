"""The true loss and gradient of rows, in extended precision, and the bounds that results must keep to it.

Long double has a range that no logit difference of interest leaves, so nothing under- or overflows here, and 11 bits
more than float64. test_truth.py checks it against mpmath.
"""

import numpy as np

LOSS_BOUND = {"float32": 5e-7, "float64": 2e-15}
GRADIENT_BOUND = {"float32": 4.8e-7, "float64": 2e-15}


def true_losses_and_gradients(logits, targets):
    """Return each row's loss (N,) and gradient (N, C) in long double; every row holds a finite logit and no nan."""
    z = np.asarray(logits).astype(np.longdouble)
    rows = np.arange(len(z))
    largest = z.max(axis=1)
    z_target = z[rows, targets]
    with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
        e = np.exp(z - largest[:, None])
        e_target = e[rows, targets]
        e[rows, targets] = 0
        others = e.sum(axis=1)
        total = others + e_target
        losses = np.where(e_target >= others, np.log1p(others / e_target), np.log(total) + (largest - z_target))
        e /= total[:, None]
        e[rows, targets] = -others / total
    return losses, e


def assert_within(got, true, bound, what):
    """Relative error at most `bound`; where the truth is below the smallest normal number, absolute error that number.

    A truth too large for the dtype must have come out as infinity of its sign.
    """
    got = np.asarray(got)
    true = np.asarray(true)
    assert got.shape == true.shape, f"{what}: shape {got.shape}, not {true.shape}"
    with np.errstate(over="ignore", under="ignore"):
        rounded = true.astype(got.dtype)
    overflows = np.isinf(rounded)
    np.testing.assert_array_equal(got[overflows], rounded[overflows], err_msg=what)

    smallest = np.longdouble(np.finfo(got.dtype).smallest_normal)
    size = np.abs(np.where(overflows, 0, true))
    allowed = np.where(size >= smallest, size * np.longdouble(bound), smallest)
    error = np.abs(np.where(overflows, 0, got).astype(np.longdouble) - np.where(overflows, 0, true))
    excess = np.where(np.isnan(error), np.inf, error / allowed)
    if excess.size and excess.max() > 1:
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        at = tuple(int(index) for index in worst)
        raise AssertionError(
            f"{what}: {np.count_nonzero(excess > 1)} of {excess.size} entries are off; worst at {at}: got "
            f"{got[worst]!r}, true value {true[worst]!r}, {float(excess[worst]):.3g} times the allowed error"
        )


def assert_accurate(logits, targets, losses, gradients, what=""):
    """Every loss and every gradient entry of rows (N, C) keeps fastce's accuracy guarantee."""
    name = np.asarray(gradients).dtype.name
    true_losses, true_gradients = true_losses_and_gradients(logits, targets)
    assert_within(losses, true_losses, LOSS_BOUND[name], f"{what} loss ({name})")
    assert_within(gradients, true_gradients, GRADIENT_BOUND[name], f"{what} gradient ({name})")
