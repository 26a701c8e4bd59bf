"""fastce.reference is the definition: it agrees with mpmath, with other libraries, and with its own differences."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import hard_rows
import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
from sklearn._loss import HalfBinomialLoss, HalfMultinomialLoss
from sklearn.metrics import log_loss
from truth import assert_accurate

from fastce import reference

EPS = np.finfo(float).eps
INF = np.inf
NAN = np.nan


def assert_close(got, expected, rtol=1e-12, atol=1e-14):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def assert_same(got, expected):
    """Equal numbers, nan where nan; an array is as good as a float."""
    np.testing.assert_array_equal(np.asarray(got, float), np.asarray(expected, float))


def sparse(indices, values):
    return SimpleNamespace(indices=np.asarray(indices), values=np.asarray(values))


def scattered(targets, classes):
    """The distributions that sparse targets mean."""
    dense = np.zeros((*targets.indices.shape[:-1], classes))
    for at in np.ndindex(targets.indices.shape):
        dense[(*at[:-1], targets.indices[at])] += targets.values[at]
    return dense


def central_differences(function, logits, step=1e-3):
    """Fourth-order differences of a function of rows (N, C) whose value at a row, or an entry, depends on that row
    alone, or on that entry: all rows move at once, one class after the other."""
    columns = []
    for column in range(logits.shape[1]):
        values = []
        for steps in (-2, -1, 1, 2):
            moved = logits.copy()
            moved[:, column] += steps * step
            value = function(moved)
            values.append(value if value.ndim == 1 else value[:, column])
        columns.append((values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step))
    return np.stack(columns, axis=1)


# Against the formulas in 60 digits, on rows where careless code loses its digits

ROWS = {
    "ordinary": [0.3, -1.2, 2.5, 0.0],
    "confident": [40.0, 0.0, -3.0, 1.0],
    "very confident": [690.0, 0.0, 1.0, -2.0],
    "wrong": [0.0, 700.0, 30.0, -300.0],
    "tied": [5.0, 5.0, 5.0, 5.0],
    "almost tied": [5.0, 5.0 + 1e-15, 5.0 - 1e-15, -30.0],
    "offset": [1e8, 1e8 + 2, 1e8 - 0.5, 1e8 - 30],
    "negative offset": [-1e12, -1e12 + 1, -1e12 - 1, -1e12],
    "hidden by -inf": [-INF, 1.0, 0.5, -INF],
    "lse is almost 0": [-1.3862943611198906] * 4,
    "tiny": [1e-300, -1e-300, 1e-17, 0.0],
}


def exact_softmax(z):
    """p, 1 - p and -log p of a row in mpmath, from exact logits; no entry is computed as a difference."""
    z = [mpmath.mpf(value) for value in z]
    top = max(z)
    e = [mpmath.exp(value - top) if value > -mpmath.inf else mpmath.mpf(0) for value in z]
    total = mpmath.fsum(e)
    rest = [mpmath.fsum(e[:c] + e[c + 1 :]) / total for c in range(len(e))]
    minus_log_p = [mpmath.log1p(rest[c] * total / e[c]) if e[c] else mpmath.inf for c in range(len(e))]
    return [value / total for value in e], rest, minus_log_p, top + mpmath.log(total)


def assert_exact(got, true, size, factor=8):
    """Every entry of `got` within factor * 2^-52 of the truth, relative to `size`, the magnitudes that make it up."""
    for value, true_value, magnitude in zip(np.ravel(got), true, size, strict=True):
        if mpmath.isinf(true_value):
            assert value == float(true_value)
        else:
            error = abs(mpmath.mpf(float(value)) - true_value)
            assert error <= max(factor * EPS * abs(magnitude), mpmath.mpf(2) ** -1022), (float(value), true_value)


@pytest.mark.parametrize("z_loss", [0.0, 0.25])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_cross_entropy_is_exact_for_any_target(row, smoothing, z_loss):
    weight = [0.5, 2.0, 1.0, 0.25]
    options = {"weight": weight, "label_smoothing": smoothing, "z_loss": z_loss, "reduction": "sum"}
    unit = np.eye(4)
    for targets, q in [*((c, unit[c]) for c in range(4)), ([0.1, 0.2, 0.7, 0.0],) * 2, ([0.0, 3.0, 0.0, 1e-9],) * 2]:
        given = targets if np.ndim(targets) == 0 else np.array(targets)
        loss, grad, hess = reference.cross_entropy_with_grad_hess(np.array(row), given, **options)
        with mpmath.workdps(60):
            p, rest, minus_log_p, lse = exact_softmax(row)
            e = mpmath.mpf(smoothing)
            a = [mpmath.mpf(w) * ((1 - e) * mpmath.mpf(float(v)) + e / 4) for w, v in zip(weight, q, strict=True)]
            mass = mpmath.fsum(a)
            terms = [a[c] * minus_log_p[c] if a[c] else mpmath.mpf(0) for c in range(4)]
            # lse is a difference where it is close to 0; the size of what makes it up is that of the logits.
            lse_size = abs(lse) + max(abs(value) for value in row if np.isfinite(value))
            true = mpmath.fsum(terms) + z_loss * lse**2
            assert_exact(loss, [true], [mpmath.fsum(terms) + z_loss * lse_size**2])
            pull = mass + 2 * z_loss * lse
            pull_size = mass + 2 * z_loss * lse_size
            # p * mass - a is p (mass - a) - a (1 - p): what rounding may cost is relative to these two.
            true = [p[c] * (mass - a[c] + 2 * z_loss * lse) - a[c] * rest[c] for c in range(4)]
            size = [p[c] * (mass - a[c] + 2 * z_loss * lse_size) + a[c] * rest[c] for c in range(4)]
            assert_exact(grad, true, size)
            true = [p[c] * (pull * rest[c] + 2 * z_loss * p[c]) for c in range(4)]
            size = [p[c] * (pull_size * rest[c] + 2 * z_loss * p[c]) for c in range(4)]
            assert_exact(hess, true, size)


@pytest.mark.parametrize(
    "generator",
    [hard_rows.confident, hard_rows.next_to_the_maximum, hard_rows.offsets, hard_rows.wide, hard_rows.masked],
    ids=lambda generator: generator.__name__,
)
def test_plain_calls_keep_the_guaranteed_accuracy(generator, dtype, rng):
    for logits, targets in generator(dtype, rng):
        if logits.size < 20_000:
            assert_accurate(logits, targets, *reference.cross_entropy_with_grad(logits, targets, reduction="none"))


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_scale_and_cap_are_exact(row):
    scale, cap = 0.7, 30.0
    row = np.where(np.abs(row) > 1e6, 0.5, row)
    for targets in range(4):
        _, grad = reference.cross_entropy_with_grad(row, targets, logit_scale=scale, softcap=cap, reduction="sum")
        with mpmath.workdps(60):
            inside = [mpmath.mpf(scale) * mpmath.mpf(float(x)) / cap for x in row]
            z = [cap * mpmath.tanh(u) if u > -mpmath.inf else u for u in inside]
            slope = [mpmath.sech(u) ** 2 * scale if u > -mpmath.inf else mpmath.mpf(0) for u in inside]
            p, rest, _, _ = exact_softmax(z)
            true = [slope[c] * (-rest[c] if c == targets else p[c]) for c in range(4)]
            # z is rounded before it is used: an error of |z| units, once in z_c and once in the largest.
            assert_exact(grad, true, true, factor=8 * (1 + max(abs(u) for u in inside if mpmath.isfinite(u)) * cap))


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_focal_and_poly_losses_are_exact(row):
    logits = np.array(row)
    for target, parameter in product(range(4), (0.0, 0.5, 1.0, 2.0, 5.0)):
        focal = reference.focal_loss_with_grad(logits, target, gamma=parameter, reduction="sum")
        poly = reference.poly_loss_with_grad(logits, target, epsilon=parameter, reduction="sum")
        with mpmath.workdps(60):
            p, rest, minus_log_p, _ = exact_softmax(row)
            p_t, rest_t, minus_log = p[target], rest[target], minus_log_p[target]
            onehot = [-rest[c] if c == target else p[c] for c in range(4)]
            damping = rest_t**parameter
            true = damping * minus_log
            # Powers multiply the relative error of their base.
            assert_exact(focal[0], [true], [true], factor=8 * (1 + parameter))
            slope = damping
            if p_t and rest_t:
                slope += parameter * p_t * rest_t ** (parameter - 1) * minus_log
            assert_exact(focal[1], [slope * g for g in onehot], [slope * g for g in onehot], factor=8 * (1 + parameter))
            true = minus_log + parameter * rest_t
            assert_exact(poly[0], [true], [true])
            slope = 1 + parameter * p_t
            assert_exact(poly[1], [slope * g for g in onehot], [slope * g for g in onehot])


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_kl_divergence_is_exact(row):
    for target in ([0.25] * 4, [0.5, 0.5, 0, 0], [0.125, 0.125, 0.5, 0.25], [2, 0, 0.5, 1], [0, 0.3, 0.1, 0], [0] * 4):
        loss, grad = reference.kl_divergence_with_grad(np.array(row), np.array(target, float), reduction="sum")
        with mpmath.workdps(60):
            p, rest, minus_log_p, _ = exact_softmax(row)
            q = [mpmath.mpf(value) for value in target]
            mass = mpmath.fsum(q)
            terms = [q[c] * (mpmath.log(q[c]) + minus_log_p[c]) if q[c] else mpmath.mpf(0) for c in range(4)]
            # Beside its value, one unit of what makes it up: the mass, and the logits' differences.
            size = abs(mpmath.fsum(terms)) + sum(abs(term) for term in terms) + mass
            assert_exact(loss, [mpmath.fsum(terms)], [size])
            true = [p[c] * (mass - q[c]) - q[c] * rest[c] for c in range(4)]
            assert_exact(grad, true, [p[c] * (mass - q[c]) + q[c] * rest[c] for c in range(4)])


def test_kl_divergence_of_almost_equal_rows_keeps_its_digits_and_its_sign(rng):
    logits = rng.integers(-4096, 4096, (50, 6)) / 1024.0
    for distance in (2.0**-10, 2.0**-20, 2.0**-30):
        moved = logits + distance * rng.integers(-3, 4, logits.shape)
        losses = reference.kl_divergence(logits, moved, from_logits=True, reduction="none")
        assert (losses >= 0).all()
        for row in range(5):
            with mpmath.workdps(60):
                (_, _, minus_log_p, _), (q, _, minus_log_q, _) = exact_softmax(logits[row]), exact_softmax(moved[row])
                true = mpmath.fsum(q[c] * (minus_log_p[c] - minus_log_q[c]) for c in range(6))
                # Differences of 3 * distance are known to some units of the logits.
                assert abs(losses[row] - true) <= 1e-14 / distance * true + 1e-30


def test_kl_divergence_of_a_row_with_its_own_softmax_is_zero_and_never_below(dtype, rng):
    logits = rng.normal(0, 3, (200, 50)).astype(dtype)
    assert not reference.kl_divergence(logits, logits, from_logits=True, reduction="none").any()
    for softmax in (reference.softmax(logits), scipy.special.softmax(logits, axis=1)):
        losses = reference.kl_divergence(logits, softmax, reduction="none")
        assert (losses >= 0).all() and losses.max() < 16 * np.finfo(dtype).eps


@pytest.mark.parametrize("z", [0.0, 1e-300, -1e-300, 0.7, -0.7, 36.0, -36.0, 40.0, -40.0, 700.0, -700.0, 1e4, -1e4])
def test_binary_cross_entropy_is_exact(z):
    for y, weight, smoothing in product((0, 1, 0.25), (1.0, 0.3, 7.0), (0.0, 0.1)):
        loss, grad = reference.binary_cross_entropy_with_grad(
            z, y, pos_weight=weight, label_smoothing=smoothing, reduction="sum"
        )
        with mpmath.workdps(60):
            up, down = mpmath.log1p(mpmath.exp(mpmath.mpf(z))), mpmath.log1p(mpmath.exp(mpmath.mpf(-z)))
            smooth = (1 - mpmath.mpf(smoothing)) * y + mpmath.mpf(smoothing) / 2
            yes, no = mpmath.mpf(weight) * smooth, 1 - smooth
            assert_exact(loss, [yes * down + no * up], [yes * down + no * up])
            one, other = 1 / (1 + mpmath.exp(mpmath.mpf(-z))), 1 / (1 + mpmath.exp(mpmath.mpf(z)))
            assert_exact(grad, [no * one - yes * other], [no * one + yes * other])


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_activations_are_exact(row):
    logits = np.array(row)
    with mpmath.workdps(60):
        p, _, minus_log_p, lse = exact_softmax(row)
        assert_exact(reference.softmax(logits), p, p)
        assert_exact(reference.log_softmax(logits), [-value for value in minus_log_p], minus_log_p)
        size = max(abs(value) for value in row if np.isfinite(value)) + abs(lse)
        assert_exact(reference.logsumexp(logits), [lse], [size])


# Every combination of options against the formulas of the contract, written out, and against differences

CHOICES = {
    "weight": (None, np.array([0.5, 2.0, 0.0, 1.5])),
    "sample_weight": (None, np.array([1.0, 0.0, -2.0, 0.5, 3.0])),
    "label_smoothing": (0.0, 0.3),
    "logit_scale": (1.0, 0.6),
    "softcap": (None, 4.0),
    "z_loss": (0.0, 0.2),
    "class_mask": (None, np.array([True, True, False, True])),
}
TARGETS = {
    "ids": np.array([0, 3, 1, -100, 3]),
    "distributions": np.array([[0.1, 0.2, 0, 0.7], [1, 0, 0, 0], [2, 1, 0, 3], [0, 0, 0, 0], [0.5, 0.25, 0, 0.25]]),
    "sparse": sparse([[0, 3], [1, 1], [3, 0], [0, 1], [1, 3]], [[0.1, 0.9], [0.5, 0.5], [1.0, 0], [0, 0], [2, 1]]),
}


def combinations():
    for chosen in product(*CHOICES.values()):
        yield dict(zip(CHOICES, chosen, strict=True))


def losses_by_the_book(logits, targets, options):
    """The rows' losses and what the mean divides by, as the contract states them, row by row with SciPy."""
    losses, counts = [], []
    is_sparse = hasattr(targets, "indices")
    targets = scattered(targets, 4) if is_sparse else targets
    mask = np.ones(4, bool) if options["class_mask"] is None else options["class_mask"]
    w = np.ones(4) if options["weight"] is None else options["weight"]
    sample_weight = np.ones(len(logits)) if options["sample_weight"] is None else options["sample_weight"]
    e, shown = options["label_smoothing"], mask.sum()
    for x, target, s in zip(logits, targets, sample_weight, strict=True):
        z = options["logit_scale"] * x
        if options["softcap"]:
            z = options["softcap"] * np.tanh(z / options["softcap"])
        loss_of_class = np.where(mask, scipy.special.logsumexp(z[mask]) - z, 0)
        if np.ndim(target):
            smooth = (1 - e) * target + e / shown
            loss, count = (w * smooth * loss_of_class)[mask].sum(), 1
        elif target != -100:
            loss = (1 - e) * w[target] * loss_of_class[target] + e / shown * (w * loss_of_class)[mask].sum()
            count = w[target]
        else:
            s, loss, count = 0, 0, 0
        losses.append(s * (loss + options["z_loss"] * scipy.special.logsumexp(z[mask]) ** 2))
        counts.append(s * count)
    return np.array(losses), sum(counts)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_combination_of_options_gives_the_value_of_the_formula(kind, rng):
    logits, targets = rng.normal(0, 2, (5, 4)), TARGETS[kind]
    for options in combinations():
        losses, count = losses_by_the_book(logits, targets, options)
        assert_close(reference.cross_entropy(logits, targets, reduction="none", **options), losses)
        assert_close(reference.cross_entropy(logits, targets, reduction="sum", **options), losses.sum())
        assert_close(reference.cross_entropy(logits, targets, **options), losses.sum() / count)
        assert_close(reference.cross_entropy(logits, targets, denominator=2.5, **options), losses.sum() / 2.5)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_combination_of_options_has_the_gradient_of_its_loss(kind, rng):
    logits, targets = rng.normal(0, 2, (5, 4)), TARGETS[kind]
    grad_output = rng.normal(0, 2, 5)
    for options in combinations():

        def loss(x, options=options):
            return reference.cross_entropy(x, targets, reduction="none", **options)

        losses, grad = reference.cross_entropy_with_grad(logits, targets, reduction="none", **options)
        np.testing.assert_array_equal(losses, loss(logits))
        assert_close(grad, central_differences(loss, logits), rtol=1e-8, atol=1e-9)
        # The other reductions, and the factor that comes in, scale it.
        scaled = {"none": grad_output, "sum": -0.5, "mean": 3.0}
        count = losses_by_the_book(logits, targets, options)[1]
        for reduction, factor in scaled.items():
            got = reference.cross_entropy_with_grad(
                logits, targets, reduction=reduction, grad_output=factor, **options
            )[1]
            divisor = count if reduction == "mean" else 1.0
            assert_close(got, grad * np.reshape(factor, (-1, 1)) / divisor)


@pytest.mark.parametrize("kind", TARGETS)
def test_every_combination_of_options_has_the_hessian_of_its_gradient(kind, rng):
    logits, targets = rng.normal(0, 2, (5, 4)), TARGETS[kind]
    for options, reduction in product(combinations(), ("none", "mean")):
        if options["softcap"] is None:

            def gradient(x, options=options, reduction=reduction):
                return reference.cross_entropy_with_grad(x, targets, reduction=reduction, grad_output=1.5, **options)[1]

            loss, grad, hess = reference.cross_entropy_with_grad_hess(
                logits, targets, reduction=reduction, grad_output=1.5, **options
            )
            assert_same(loss, reference.cross_entropy(logits, targets, reduction=reduction, **options))
            assert_same(grad, gradient(logits))
            assert_close(hess, central_differences(gradient, logits), rtol=1e-8, atol=1e-9)


def test_further_losses_have_the_gradient_of_their_loss(rng):
    logits, ids = rng.normal(0, 2, (6, 4)), np.array([0, 1, 2, 3, -100, 0])
    weights = {"weight": np.array([0.5, 1, 2, 0]), "sample_weight": np.array([1, -2, 0.5, 3, 1, 0])}
    rows = rng.dirichlet(np.ones(4), 6) * rng.uniform(0, 2, (6, 1))
    sample_weight = {"sample_weight": weights["sample_weight"]}
    calls = [("focal_loss", ids, {"gamma": gamma} | weights) for gamma in (0, 0.5, 1, 2, 3.5)]
    calls += [("poly_loss", ids, {"epsilon": epsilon} | weights) for epsilon in (-1, 0, 0.5, 2)]
    calls += [("kl_divergence", rows, sample_weight), ("kl_divergence", rows, {"from_logits": True} | sample_weight)]
    calls += [("kl_divergence", TARGETS["sparse"], {"sample_weight": weights["sample_weight"][:5]})]
    for name, targets, options in calls:
        x = logits[:5] if name == "kl_divergence" and targets is TARGETS["sparse"] else logits

        def loss(z, name=name, targets=targets, options=options):
            return getattr(reference, name)(z, targets, reduction="none", **options)

        losses, grad = getattr(reference, f"{name}_with_grad")(x, targets, reduction="none", **options)
        np.testing.assert_array_equal(losses, loss(x))
        assert_close(grad, central_differences(loss, x), rtol=1e-8, atol=1e-9)
        assert_close(getattr(reference, name)(x, targets, reduction="sum", **options), losses.sum())
        total, of_mean = getattr(reference, f"{name}_with_grad")(x, targets, denominator=4, grad_output=-2, **options)
        assert_close(total, losses.sum() / 4)
        assert_close(of_mean, grad * -2 / 4)


def test_binary_cross_entropy_has_the_gradient_of_its_loss(rng):
    logits = rng.normal(0, 3, (6, 4))
    targets, weight = rng.uniform(0, 1, (6, 4)), rng.normal(0, 1, (6, 1))
    for pos_weight, sample_weight, smoothing in product((None, rng.uniform(0, 3, 4)), (None, weight), (0.0, 0.2)):
        options = {"pos_weight": pos_weight, "sample_weight": sample_weight, "label_smoothing": smoothing}

        def loss(z, options=options):
            # One column is differentiated at a time, and an entry depends on itself alone.
            return reference.binary_cross_entropy(z, targets, reduction="none", **options)

        losses, grad = reference.binary_cross_entropy_with_grad(logits, targets, reduction="none", **options)
        assert_close(grad, central_differences(loss, logits), rtol=1e-8, atol=1e-9)
        count = logits.size if sample_weight is None else 4 * weight.sum()
        loss, of_mean = reference.binary_cross_entropy_with_grad(logits, targets, **options)
        assert_close(loss, losses.sum() / count)
        assert_close(of_mean, grad / count)


# Means


@pytest.mark.parametrize("loss", ["focal_loss", "poly_loss", "cross_entropy"])
def test_means_over_class_ids_divide_by_their_weights(loss, rng):
    logits, ids = rng.normal(0, 1, (5, 3)), np.array([0, 2, 7, 1, 2])
    weight, sample_weight = np.array([0.5, 2, 1]), np.array([1, -2, 3, 4, 0])
    function = getattr(reference, loss)
    for options, count in (
        ({}, 4),
        ({"weight": weight}, 0.5 + 1 + 2 + 1),
        ({"sample_weight": sample_weight}, 1 - 2 + 4),
        ({"weight": weight, "sample_weight": sample_weight}, 0.5 - 2 + 8),
    ):
        total = function(logits, ids, weight=options.get("weight"), sample_weight=options.get("sample_weight"),
                         ignore_index=7, reduction="sum")  # fmt: skip
        assert_close(function(logits, ids, ignore_index=7, **options), total / count)


def test_means_over_distributions_divide_by_the_sample_weights(rng):
    logits, rows = rng.normal(0, 1, (4, 3)), rng.dirichlet(np.ones(3), 4)
    sample_weight, weight = np.array([1, 0, 2.5, -1]), np.array([3.0, 2, 1])
    chosen = sparse(rng.integers(0, 3, (4, 2)), rng.uniform(0, 1, (4, 2)))
    for function, targets, options in (
        (reference.cross_entropy, rows, {"weight": weight}),
        (reference.cross_entropy, chosen, {"weight": weight}),
        (reference.kl_divergence, rows, {}),
    ):
        for given, count in ((None, 4), (sample_weight, 2.5)):
            total = function(logits, targets, sample_weight=given, reduction="sum", **options)
            assert_close(function(logits, targets, sample_weight=given, **options), total / count)


def test_a_mean_over_nothing_is_nan_with_gradient_zero(rng):
    logits = rng.normal(0, 1, (2, 3))
    logits[0, 0] = NAN
    rows = np.full((2, 3), 1 / 3)
    for targets, options in (
        ([-100, -100], {}),
        ([0, 1], {"sample_weight": [0, 0]}),
        ([0, 1], {"sample_weight": [1, -1]}),
        ([0, 1], {"weight": [0, 0, 1]}),
        (rows, {"sample_weight": [2, -2]}),
    ):
        loss, grad, hess = reference.cross_entropy_with_grad_hess(logits, targets, **options)
        assert np.isnan(loss)
        assert not grad.any() and not hess.any()
    assert np.isnan(reference.cross_entropy(np.zeros((0, 3)), []))
    assert reference.cross_entropy(np.zeros((0, 3)), [], reduction="sum") == 0.0


# Special values


@pytest.mark.parametrize("dead", [{"targets": [1, -100, 0]}, {"targets": [1, 2, 0], "sample_weight": [1, 0, 2]}])
def test_rows_that_do_not_count_are_never_read(dead, rng):
    options = dict(dead)
    targets = options.pop("targets")
    clean = rng.normal(0, 1, (3, 4))
    spoiled = clean.copy()
    spoiled[1] = NAN
    for name in ("cross_entropy_with_grad_hess", "focal_loss_with_grad", "poly_loss_with_grad"):
        function = getattr(reference, name)
        for one, other in zip(
            function(spoiled, targets, reduction="none", grad_output=INF, **options),
            function(clean, targets, reduction="none", grad_output=INF, **options),
            strict=True,
        ):
            assert not one[1].any() and not np.signbit(one[1]).any()
            np.testing.assert_array_equal(one, other)
    q = np.where(np.isnan(spoiled), NAN, 0.25)
    for name in ("cross_entropy_with_grad", "kl_divergence_with_grad"):
        loss, grad = getattr(reference, name)(spoiled, q, sample_weight=[1, 0, 2])
        assert np.isfinite(loss) and np.isfinite(grad).all() and not grad[1].any()


@pytest.mark.parametrize("row", [[NAN, 0, 1], [0, INF, 1], [-INF] * 3, [INF, INF, 0], [INF, -INF, NAN]], ids=str)
def test_rows_without_a_softmax_are_nan_and_touch_no_other(row):
    logits = np.array([row, [1.0, 2.0, 3.0]])
    q = np.array([[0.5, 0.5, 0], [1.0, 0, 0]])
    for targets, options in (
        ([1, 0], {}),
        ([1, 0], {"weight": [1, 0, 1]}),
        (q, {}),
        (q, {"label_smoothing": 0.1, "z_loss": 1.0, "logit_scale": 2.0}),
    ):
        results = reference.cross_entropy_with_grad_hess(logits, targets, reduction="none", **options)
        clean = reference.cross_entropy_with_grad_hess(logits[1:], targets[1:], reduction="none", **options)
        for result, expected in zip(results, clean, strict=True):
            assert np.isnan(result[0]).all()
            np.testing.assert_array_equal(result[1], expected[0])
    for result in (
        *reference.focal_loss_with_grad(logits, [1, 0], gamma=0, weight=[1, 0, 1], reduction="none"),
        *reference.poly_loss_with_grad(logits, [1, 0], weight=[1, 0, 1], reduction="none"),
        *reference.kl_divergence_with_grad(logits, 0 * q, reduction="none"),
        *reference.kl_divergence_with_grad(np.zeros((2, 3)), logits, from_logits=True, reduction="none"),
        reference.softmax(logits),
        reference.log_softmax(logits),
    ):
        assert np.isnan(result[0]).all() and np.isfinite(result[1]).all()
    assert_close(reference.logsumexp(logits), scipy.special.logsumexp(logits, axis=1))


def test_minus_infinity_is_a_class_of_no_probability():
    logits = np.array([[0.0, -INF, 0.0]])
    # Elsewhere than at the target it changes nothing.
    loss, grad, hess = reference.cross_entropy_with_grad_hess(logits, [0])
    assert_close(loss, np.log(2))
    assert_close(grad, [[-0.5, 0, 0.5]])
    assert_close(hess, [[0.25, 0, 0.25]])
    # At the target the loss is infinite, and the gradient is not.
    loss, grad = reference.cross_entropy_with_grad(logits, [1])
    assert loss == INF
    assert_same(grad, [[0.5, -1, 0.5]])
    # No mass, or no weight, makes it nothing.
    assert_close(reference.cross_entropy(logits, [[0.5, 0, 0.5]]), np.log(2))
    assert reference.cross_entropy(logits, [1], weight=[1, 0, 1], reduction="sum") == 0.0
    assert reference.cross_entropy(logits, [0], label_smoothing=0.1) == INF
    assert_close(reference.kl_divergence(logits, np.array([[0.5, 0, 0.5]])), 0)
    assert reference.kl_divergence(logits, np.array([[0.5, 0.5, 0]])) == INF
    assert reference.focal_loss(logits, [1]) == INF and reference.poly_loss(logits, [1]) == INF
    assert reference.focal_loss(logits, [1], weight=[1, 0, 1], reduction="sum") == 0.0
    # A cap leaves it where it is, with no gradient.
    loss, grad = reference.cross_entropy_with_grad(logits, [0], softcap=5.0)
    assert_close(loss, np.log(2))
    assert_close(grad, [[-0.5, 0, 0.5]])
    assert reference.cross_entropy_with_grad(logits, [1], softcap=5.0)[1][0, 1] == 0


def test_masked_classes_do_not_exist(rng):
    logits = rng.normal(0, 2, (3, 4))
    mask = np.array([[True, False, True, True], [True, True, True, True], [False, True, True, False]])
    for bad in (0.0, NAN, INF, -INF, 1e300):
        given = np.where(mask, logits, bad)
        loss, grad, hess = reference.cross_entropy_with_grad_hess(
            given, [0, 1, 2], class_mask=mask, label_smoothing=0.2, z_loss=0.1, reduction="none", grad_output=INF
        )
        assert not grad[~mask].any() and not hess[~mask].any()
        for row in range(3):
            shown = np.flatnonzero(mask[row])
            expected = reference.cross_entropy_with_grad_hess(
                logits[row, shown], np.searchsorted(shown, row), label_smoothing=0.2, z_loss=0.1, reduction="none",
                grad_output=INF,
            )  # fmt: skip
            for got, value in zip((loss, grad[:, shown], hess[:, shown]), expected, strict=True):
                assert_close(got[row], value)
    # A target that does not exist: an infinite loss, and a gradient that is finite and 0 where nothing exists.
    loss, grad = reference.cross_entropy_with_grad(logits[0], 1, class_mask=mask[0])
    assert loss == INF and grad[1] == 0
    assert_close(grad.sum(), 1)
    loss, grad = reference.cross_entropy_with_grad(logits[0], np.array([0.5, 0.5, 0, 0]), class_mask=mask[0])
    assert loss == INF and grad[1] == 0
    assert_close(grad.sum(), 0.5)
    # A row that is nan is so where classes exist.
    loss, grad = reference.cross_entropy_with_grad(np.array([NAN, 1, 2, 3]), 0, class_mask=mask[0])
    np.testing.assert_array_equal(np.isnan(grad), mask[0])


def test_masks_and_weights_broadcast_over_any_axes(rng):
    logits = rng.normal(0, 1, (2, 4, 3))
    targets = np.array([[0, 3, 1], [1, 0, 3]])
    mask = np.array([True, True, False, True])[:, None]
    rows = np.moveaxis(logits, 1, -1).reshape(6, 4)
    expected = reference.cross_entropy_with_grad(
        rows, targets.ravel(), class_mask=mask[:, 0], weight=[1, 2, 3, 4], sample_weight=np.arange(6.0)
    )
    loss, grad = reference.cross_entropy_with_grad(
        logits, targets, axis=1, class_mask=mask, weight=[1, 2, 3, 4], sample_weight=np.arange(6.0).reshape(2, 3)
    )
    assert loss == expected[0]
    np.testing.assert_array_equal(np.moveaxis(grad, 1, -1).reshape(6, 4), expected[1])


def test_losses_are_never_minus_zero():
    certain, unsure = np.array([1000.0, 0.0]), np.array([1.0, 0.0])
    for loss in (
        reference.cross_entropy(certain, 0),
        reference.cross_entropy(certain, np.zeros(2)),
        reference.focal_loss(certain, 0),
        reference.poly_loss(certain, 0),
        reference.kl_divergence(certain, unsure),
        reference.binary_cross_entropy(certain[:1], [1]),
        reference.cross_entropy_from_probs(unsure, 0),
        reference.binary_cross_entropy_from_probs(unsure, [1, 0]),
        reference.log_softmax(certain[:1])[0],
    ):
        assert loss == 0 and not np.signbit(loss)


def test_binary_infinities():
    logits, targets = np.array([INF, -INF, INF, -INF, INF, NAN, NAN]), np.array([1, 0, 0, 1, 0.5, 0, 1])
    losses, grad = reference.binary_cross_entropy_with_grad(logits, targets, reduction="none")
    assert_same(losses, [0, 0, INF, INF, INF, NAN, NAN])
    assert_same(grad, [0, 0, 1, -1, 0.5, NAN, NAN])
    # What does not count is not read.
    losses, grad = reference.binary_cross_entropy_with_grad(
        logits, targets, sample_weight=[1, 1, 0, 0, 0, 0, 0], reduction="none"
    )
    assert not losses.any() and not grad.any()


def test_probabilities_of_zero_and_one():
    probs = np.array([[0.0, 1.0], [0.0, 1.0], [0.5, 0.5]])
    losses = reference.cross_entropy_from_probs(probs, [0, 1, -100], reduction="none")
    assert_same(losses, [INF, 0, 0])
    assert reference.cross_entropy_from_probs(probs[0], [0.0, 2.0]) == 0
    assert reference.cross_entropy_from_probs(probs[0], 0, weight=[0, 1], reduction="sum") == 0
    assert_same(
        reference.binary_cross_entropy_from_probs([0, 1, 0, 1.0], [0, 1, 1, 0], reduction="none"), [0, 0, INF, INF]
    )


def test_a_certain_row_has_no_loss_and_no_gradient():
    for row in ([1000.0, 0.0], [5.0, -INF], [7.0]):
        for gamma in (0, 0.5, 1, 2):
            loss, grad = reference.focal_loss_with_grad(np.array(row), 0, gamma=gamma)
            assert loss == 0 and not grad.any() and not np.isnan(grad).any()
        for function in (reference.cross_entropy_with_grad_hess, reference.poly_loss_with_grad):
            for result in function(np.array(row), 0):
                assert not np.any(result)


# Shapes, dtypes, buffers


def test_sparse_targets_mean_the_rows_they_scatter_to(rng):
    logits = rng.normal(0, 1, (2, 5, 3))
    targets = sparse(rng.integers(0, 5, (2, 3, 4)), rng.uniform(0, 1, (2, 3, 4)))
    dense = np.moveaxis(scattered(targets, 5), -1, 1)
    weights = {"sample_weight": rng.normal(0, 1, (2, 3)), "axis": 1}
    for name, options in (
        ("cross_entropy_with_grad_hess", {"weight": rng.uniform(0, 2, 5), "label_smoothing": 0.1} | weights),
        ("kl_divergence_with_grad", weights),
        ("cross_entropy_stats", {"axis": 1}),
    ):
        function = getattr(reference, name)
        for got, expected in zip(function(logits, targets, **options), function(logits, dense, **options), strict=True):
            assert_close(got, expected)
    probs = reference.softmax(logits, 1)
    assert_close(
        reference.cross_entropy_from_probs(probs, targets, axis=1),
        reference.cross_entropy_from_probs(probs, dense, axis=1),
    )


def test_class_ids_are_their_one_hot_rows(rng):
    logits, ids = rng.normal(0, 3, (6, 5)), np.array([0, 4, 2, 2, 1, 3])
    options = {"weight": rng.uniform(0, 2, 5), "label_smoothing": 0.2, "z_loss": 0.1, "reduction": "none"}
    for got, expected in zip(
        reference.cross_entropy_with_grad_hess(logits, ids, **options),
        reference.cross_entropy_with_grad_hess(logits, np.eye(5)[ids], **options),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


def test_results_have_the_documented_dtypes(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype, of_losses in ((np.float16, "f4"), (ml_dtypes.bfloat16, "f4"), (np.float32, "f4"), (">f8", "=f8")):
        logits, ids = rng.normal(0, 2, (4, 3)).astype(dtype), np.array([0, 1, 2, -100])
        native = logits.dtype.newbyteorder("=")
        losses, grad, hess = reference.cross_entropy_with_grad_hess(logits, ids, reduction="none")
        assert losses.dtype == np.dtype(of_losses) and grad.dtype == hess.dtype == native
        # One rounding of what the logits, taken as float64, give.
        exact = reference.cross_entropy_with_grad_hess(logits.astype(np.float64), ids, reduction="none")
        for got, true in zip((losses, grad, hess), exact, strict=True):
            np.testing.assert_array_equal(got.astype(float), true.astype(got.dtype).astype(float))
        assert reference.softmax(logits).dtype == reference.log_softmax(logits).dtype == native
        assert reference.logsumexp(logits).dtype == np.dtype(of_losses)
        assert type(reference.cross_entropy(logits, ids)) is float
        stats = reference.cross_entropy_stats(logits, ids)
        assert stats.loss.dtype == stats.lse.dtype == stats.probability.dtype == stats.entropy.dtype == losses.dtype
        assert stats.predicted.dtype == np.int64 and stats.correct.dtype == bool
        loss, grad = reference.binary_cross_entropy_with_grad(logits, 1, reduction="none")
        assert loss.dtype == np.dtype(of_losses) and grad.dtype == native and grad.flags.c_contiguous


def test_scaled_logits_are_rounded_as_they_are_used(rng):
    logits = rng.normal(0, 3, (20, 5)).astype(np.float32)
    scaled = logits * np.float32(0.3)
    ids = rng.integers(0, 5, 20)
    assert_same(
        reference.cross_entropy(logits, ids, logit_scale=0.3, reduction="none"),
        reference.cross_entropy(scaled, ids, reduction="none"),
    )
    capped = (2.0 * np.tanh(float(np.float32(0.3)) * logits.astype(float) / 2.0)).astype(np.float32)
    assert_same(
        reference.cross_entropy(logits, ids, logit_scale=0.3, softcap=2.0, reduction="none"),
        reference.cross_entropy(capped, ids, reduction="none"),
    )


def test_buffers_of_any_order_and_float_dtype_are_filled_and_returned(rng):
    logits, ids = rng.normal(0, 2, (6, 5)), np.arange(6) % 5
    _, grad, hess = reference.cross_entropy_with_grad_hess(logits, ids)
    out, hess_out = np.empty((6, 5), np.float32, order="F"), np.empty((12, 5))[::2]
    _, got, got_hess = reference.cross_entropy_with_grad_hess(logits, ids, out=out, hess_out=hess_out)
    assert got is out and got_hess is hess_out
    np.testing.assert_array_equal(out, grad.astype(np.float32))
    np.testing.assert_array_equal(hess_out, hess)
    for name in ("cross_entropy_with_grad", "focal_loss_with_grad", "poly_loss_with_grad"):
        function = getattr(reference, name)
        expected, in_place = function(logits, ids), logits.copy()
        loss, got = function(in_place, ids, out=in_place)
        assert got is in_place and loss == expected[0]
        np.testing.assert_array_equal(in_place, expected[1])
    in_place = logits.copy()
    assert reference.softmax(in_place, 0, out=in_place) is in_place
    np.testing.assert_array_equal(in_place, reference.softmax(logits, 0))
    in_place = logits.copy()
    assert reference.binary_cross_entropy_with_grad(in_place, 1, out=in_place)[1] is in_place
    np.testing.assert_array_equal(in_place, reference.binary_cross_entropy_with_grad(logits, 1)[1])


def test_any_axis_and_no_rows_at_all(rng):
    logits = rng.normal(0, 1, (3, 4, 5))
    for axis in range(-3, 3):
        rows = np.moveaxis(logits, axis, -1)
        ids = rng.integers(0, rows.shape[-1], rows.shape[:-1])
        for got, expected in zip(
            reference.cross_entropy_with_grad_hess(logits, ids, axis=axis, reduction="none"),
            reference.cross_entropy_with_grad_hess(rows, ids, reduction="none"),
            strict=True,
        ):
            np.testing.assert_array_equal(got if got.ndim == 2 else np.moveaxis(got, axis, -1), expected)
        assert reference.cross_entropy_stats(logits, ids, axis=axis).correct.shape == ids.shape
        assert_close(reference.log_softmax(logits, axis), scipy.special.log_softmax(logits, axis))
        assert_close(reference.softmax(logits, axis), scipy.special.softmax(logits, axis))
        for keepdims in (False, True):
            got = reference.logsumexp(logits, axis, keepdims=keepdims)
            expected = scipy.special.logsumexp(logits, axis, keepdims=keepdims)
            assert got.shape == expected.shape
            assert_close(got, expected)
    assert reference.softmax(np.zeros((0, 3))).shape == (0, 3)
    assert reference.logsumexp(np.zeros((0, 3))).shape == (0,)
    assert reference.logsumexp(np.zeros(3)).shape == ()
    assert reference.binary_cross_entropy(3.0, 1, reduction="none").shape == ()


def test_blocks_of_rows_change_nothing(rng):
    logits, ids = rng.normal(0, 2, (3000, 50)), rng.integers(0, 50, 3000)
    losses, grad = reference.cross_entropy_with_grad(logits, ids, reduction="none")
    for rows in (slice(0, 7), slice(1290, 1330), slice(2999, 3000)):
        part = reference.cross_entropy_with_grad(logits[rows], ids[rows], reduction="none")
        assert_close(losses[rows], part[0], rtol=4 * EPS, atol=0)
        assert_close(grad[rows], part[1], rtol=4 * EPS, atol=0)


# Statistics


def test_stats_are_those_of_each_row(rng):
    logits = rng.normal(0, 3, (40, 6))
    ids = rng.integers(0, 6, 40)
    ids[[3, 8]] = -100
    mask = rng.random((40, 6)) < 0.7
    mask[np.arange(40), np.where(ids < 0, 0, ids)] = True
    options = {"logit_scale": 0.7, "softcap": 5.0, "class_mask": mask}
    z = np.where(mask, 5.0 * np.tanh(0.7 * logits / 5.0), -INF)
    p = scipy.special.softmax(z, axis=1)
    live, rows = ids >= 0, np.arange(40)
    stats = reference.cross_entropy_stats(logits, ids, **options)
    np.testing.assert_array_equal(stats.loss, reference.cross_entropy(logits, ids, reduction="none", **options))
    assert_close(stats.lse, np.where(live, scipy.special.logsumexp(z, axis=1), NAN))
    np.testing.assert_array_equal(stats.predicted, np.where(live, z.argmax(axis=1), -1))
    np.testing.assert_array_equal(stats.correct, live & (z.argmax(axis=1) == ids))
    assert_close(stats.probability, np.where(live, p[rows, ids * live], NAN))
    assert_close(stats.entropy, np.where(live, scipy.stats.entropy(p, axis=1), NAN))
    assert_close(np.exp(-stats.loss[live]), stats.probability[live])

    q = rng.dirichlet(np.ones(6), 40)
    stats = reference.cross_entropy_stats(logits, q)
    p = scipy.special.softmax(logits, axis=1)
    np.testing.assert_array_equal(stats.loss, reference.cross_entropy(logits, q, reduction="none"))
    np.testing.assert_array_equal(stats.correct, logits.argmax(axis=1) == q.argmax(axis=1))
    assert_close(stats.probability, (p * q).sum(axis=1))


def test_stats_of_special_rows():
    logits = np.array([[1, 1, 0], [NAN, 0, 0], [INF, 0, 0], [-INF] * 3, [0, -INF, 0], [2000, 0, 0], [40.0, 0, -INF]])
    stats = reference.cross_entropy_stats(logits, [1, 0, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(stats.predicted, [0, -1, -1, -1, 0, 0, 0])
    np.testing.assert_array_equal(stats.correct, [False] * 5 + [True, True])
    for values in (stats.loss, stats.lse, stats.probability, stats.entropy):
        assert np.isnan(values[1:4]).all() and not np.isnan(values[[0, 4, 5, 6]]).any()
    assert stats.loss[4] == INF and stats.probability[4] == 0
    assert_close(stats.entropy[[4, 5]], [np.log(2), 0])
    assert_close(stats.entropy[6], 41 * np.exp(-40), rtol=1e-13, atol=0)


# Against other libraries


def test_probabilities_agree_with_scikit_learn(rng):
    probs = rng.dirichlet(np.ones(4), 30)
    ids, sample_weight = rng.integers(0, 4, 30), rng.uniform(0, 2, 30)
    sample_weight[5] = 0
    assert_close(reference.cross_entropy_from_probs(probs, ids), log_loss(ids, probs, labels=range(4)))
    for total in ("mean", "sum"):
        assert_close(
            reference.cross_entropy_from_probs(probs, ids, sample_weight=sample_weight, reduction=total),
            log_loss(ids, probs, labels=range(4), sample_weight=sample_weight, normalize=total == "mean"),
        )
    labels = rng.integers(0, 2, 30)
    assert_close(
        reference.binary_cross_entropy_from_probs(probs[:, 0], labels, sample_weight=sample_weight),
        log_loss(labels, probs[:, 0], sample_weight=sample_weight),
    )
    assert_close(reference.cross_entropy_from_probs(reference.softmax(probs), ids), reference.cross_entropy(probs, ids))
    np.testing.assert_allclose(reference.cross_entropy_from_probs([0.1, 0.6, 0.3], 0), 2.302585092994046, rtol=1e-15)


def test_gradients_and_hessians_agree_with_scikit_learn(rng):
    logits, ids, sample_weight = rng.normal(0, 2, (30, 4)), rng.integers(0, 4, 30), rng.uniform(0, 2, 30)
    grad, hess = HalfMultinomialLoss(n_classes=4).gradient_hessian(ids.astype(float), logits, sample_weight)
    got = reference.cross_entropy_with_grad_hess(logits, ids, sample_weight=sample_weight, reduction="sum")
    assert_close(got[1], grad)
    assert_close(got[2], hess)
    labels = rng.uniform(0, 1, 30)
    losses, grad = HalfBinomialLoss().loss_gradient(labels, logits[:, 0].copy(), sample_weight)
    got = reference.binary_cross_entropy_with_grad(logits[:, 0], labels, sample_weight=sample_weight, reduction="none")
    assert_close(got[0], losses)
    assert_close(got[1], grad)


def test_divergences_agree_with_scipy(rng):
    logits, q = rng.normal(0, 2, (30, 5)), rng.dirichlet(np.ones(5), 30)
    q[:, 0] = 0
    p = scipy.special.softmax(logits, axis=1)
    assert_close(reference.kl_divergence(logits, q, reduction="none"), scipy.special.rel_entr(q, p).sum(axis=1))
    other = rng.normal(0, 2, (30, 5))
    assert_close(
        reference.kl_divergence(logits, other, from_logits=True, reduction="none"),
        scipy.stats.entropy(scipy.special.softmax(other, axis=1), p, axis=1),
    )
    assert_close(reference.binary_cross_entropy(logits, 1, reduction="none"), -scipy.special.log_expit(logits))


def torch_loss_and_gradient(function, logits):
    torch = pytest.importorskip("torch")
    leaf = torch.tensor(logits, requires_grad=True)
    loss = function(leaf)
    loss.sum().backward()
    return loss.detach().numpy(), leaf.grad.numpy()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", ["ids", "distributions"])
def test_cross_entropy_agrees_with_torch(kind, reduction, rng):
    torch = pytest.importorskip("torch")
    logits = rng.normal(0, 2, (3, 5, 4))
    targets = rng.integers(0, 5, (3, 4)) if kind == "ids" else rng.uniform(0, 1, (3, 5, 4))
    for weight, smoothing, ignore in product((None, rng.uniform(0, 2, 5)), (0.0, 0.3, 1.0), (-100, 2)):
        if kind == "distributions" and ignore != -100:
            continue
        expected = torch_loss_and_gradient(
            lambda z, w=weight, e=smoothing, i=ignore: torch.nn.functional.cross_entropy(
                z, torch.tensor(targets), weight=None if w is None else torch.tensor(w), label_smoothing=e,
                ignore_index=i, reduction=reduction,
            ),
            logits,
        )  # fmt: skip
        got = reference.cross_entropy_with_grad(
            logits, targets, axis=1, weight=weight, label_smoothing=smoothing, ignore_index=ignore, reduction=reduction
        )
        assert_close(got[0], expected[0])
        assert_close(got[1], expected[1])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_binary_cross_entropy_agrees_with_torch(reduction, rng):
    torch = pytest.importorskip("torch")
    logits, targets = rng.normal(0, 5, (4, 3)), rng.uniform(0, 1, (4, 3))
    for pos_weight in (None, rng.uniform(0, 4, 3)):
        expected = torch_loss_and_gradient(
            lambda z, v=pos_weight: torch.nn.functional.binary_cross_entropy_with_logits(
                z, torch.tensor(targets), pos_weight=None if v is None else torch.tensor(v), reduction=reduction
            ),
            logits,
        )
        got = reference.binary_cross_entropy_with_grad(logits, targets, pos_weight=pos_weight, reduction=reduction)
        assert_close(got[0], expected[0])
        assert_close(got[1], expected[1])
    probs = torch.tensor(rng.uniform(0, 1, (4, 3)))
    assert_close(
        reference.binary_cross_entropy_from_probs(probs.numpy(), targets, reduction=reduction),
        torch.nn.functional.binary_cross_entropy(probs, torch.tensor(targets), reduction=reduction).numpy(),
    )


def test_kl_divergence_agrees_with_torch(rng):
    torch = pytest.importorskip("torch")
    logits, other = rng.normal(0, 2, (6, 5)), rng.normal(0, 2, (6, 5))
    rows = rng.uniform(0, 1, (6, 5))  # torch too takes any non-negative row
    for from_logits, targets in ((False, rows), (True, other)):
        given = torch.tensor(targets).log_softmax(1) if from_logits else torch.tensor(targets)
        expected = torch_loss_and_gradient(
            lambda z, q=given, log=from_logits: torch.nn.functional.kl_div(
                z.log_softmax(1), q, reduction="batchmean", log_target=log
            ),
            logits,
        )
        got = reference.kl_divergence_with_grad(logits, targets, from_logits=from_logits)
        assert_close(got[0], expected[0])
        assert_close(got[1], expected[1])


@pytest.fixture
def optax():
    jax = pytest.importorskip("jax")
    library = pytest.importorskip("optax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield library
    jax.config.update("jax_enable_x64", before)


def optax_losses_and_gradient(function, logits):
    jax = pytest.importorskip("jax")
    losses, pull_back = jax.vjp(function, logits)
    return np.asarray(losses), np.asarray(pull_back(np.ones_like(losses))[0])


def test_softmax_losses_agree_with_optax(optax, rng):
    logits, q, ids = rng.normal(0, 2, (8, 5)), rng.dirichlet(np.ones(5), 8), rng.integers(0, 5, 8)
    mask = rng.random((8, 5)) < 0.6
    mask[np.arange(8), ids] = True
    hidden = np.where(mask, q, 0)
    minus_infinity = np.where(mask, logits, -INF)
    onehot = np.eye(5)[ids]
    ce, poly = reference.cross_entropy_with_grad, reference.poly_loss_with_grad
    cases = [
        (lambda z: optax.softmax_cross_entropy(z, q), ce(logits, q, reduction="none")),
        (
            lambda z: optax.softmax_cross_entropy(z, hidden, where=mask),
            ce(logits, hidden, class_mask=mask, reduction="none"),
        ),
        (
            lambda z: optax.softmax_cross_entropy(z, optax.smooth_labels(q, 0.2)),
            ce(logits, q, label_smoothing=0.2, reduction="none"),
        ),
        (
            lambda z: optax.softmax_cross_entropy_with_integer_labels(z, ids, where=mask),
            ce(logits, ids, class_mask=mask, reduction="none"),
        ),
        (
            lambda z: optax.losses.poly_loss_cross_entropy(z, onehot, epsilon=2.0),
            poly(logits, ids, epsilon=2.0, reduction="none"),
        ),
        (
            lambda z: optax.losses.poly_loss_cross_entropy(z, onehot, epsilon=-1.0),
            poly(logits, ids, epsilon=-1, reduction="none"),
        ),
    ]
    for function, got in cases:
        expected = optax_losses_and_gradient(function, logits)
        assert_close(got[0], expected[0])
        assert_close(got[1], expected[1])
    # 0 at a logit of -inf is where only the safe variant has a value.
    expected = optax_losses_and_gradient(lambda z: optax.safe_softmax_cross_entropy(z, hidden), minus_infinity)
    got = ce(minus_infinity, hidden, reduction="none")
    assert_close(got[0], expected[0])
    assert_close(got[1], expected[1])


def test_sigmoid_losses_and_divergences_agree_with_optax(optax, rng):
    logits, labels = rng.normal(0, 3, (8, 5)), rng.uniform(0, 1, (8, 5))
    q = rng.dirichlet(np.ones(5), 8)
    jax = pytest.importorskip("jax")
    cases = [
        (
            lambda z: optax.sigmoid_binary_cross_entropy(z, labels),
            reference.binary_cross_entropy_with_grad(logits, labels, reduction="none"),
        ),
        (
            lambda z: optax.losses.kl_divergence(jax.nn.log_softmax(z), q),
            reference.kl_divergence_with_grad(logits, q, reduction="none"),
        ),
        (
            lambda z: optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(z), jax.nn.log_softmax(labels)),
            reference.kl_divergence_with_grad(logits, labels, from_logits=True, reduction="none"),
        ),
    ]
    for function, got in cases:
        expected = optax_losses_and_gradient(function, logits)
        assert_close(got[0], expected[0], atol=1e-12)
        assert_close(got[1], expected[1], atol=1e-12)


def test_a_focal_loss_without_focus_is_cross_entropy(rng):
    logits, ids = rng.normal(0, 3, (8, 5)), rng.integers(0, 5, 8)
    weight = rng.uniform(0, 2, 5)
    expected = reference.cross_entropy_with_grad(logits, ids, weight=weight)
    for loss, grad in (
        reference.focal_loss_with_grad(logits, ids, gamma=0, weight=weight),
        reference.poly_loss_with_grad(logits, ids, epsilon=0, weight=weight),
    ):
        assert_close(loss, expected[0])
        assert_close(grad, expected[1])


# The module itself


def test_every_name_is_there_and_only_numpy_is_imported():
    for name in reference.__all__:
        assert callable(getattr(reference, name)) and getattr(reference, name).__doc__
    lines = Path(reference.__file__).read_text().splitlines()
    imported = [line for line in lines if line.lstrip().startswith(("import ", "from "))]
    assert imported == ["from typing import NamedTuple", "import numpy as np"]


def test_no_call_warns_or_trips_the_callers_floating_point_error_state():
    logits = np.array([[NAN, 0, 1], [INF, 0, 0], [-INF] * 3, [0, -INF, 0], [1e308, -1e308, 0], [1e-310, 0, 0]])
    ids, q = [0, 1, 2, 1, 1, 0], np.array([[0.0, 0.5, 0.5]] * 6)
    halves = np.array([[NAN, 0, 1], [INF, 0, 0], [-INF] * 3, [0, -INF, 0], [6e4, -6e4, 0], [6e-8, 0, 0]], np.float16)
    with np.errstate(all="raise"):
        for given in (logits, halves):
            for reduction in ("none", "sum", "mean"):
                for targets in (ids, q):
                    reference.cross_entropy_with_grad_hess(
                        given, targets, reduction=reduction, logit_scale=2.0, z_loss=0.1, label_smoothing=0.1
                    )
                    reference.cross_entropy_with_grad(given, targets, reduction=reduction, softcap=3.0)
                    reference.cross_entropy_stats(given, targets)
                reference.focal_loss_with_grad(given, ids, gamma=0.5, reduction=reduction)
                reference.poly_loss_with_grad(given, ids, reduction=reduction)
                reference.kl_divergence_with_grad(given, q, reduction=reduction)
                reference.kl_divergence_with_grad(given, given, from_logits=True, reduction=reduction)
                reference.binary_cross_entropy_with_grad(given, 1, reduction=reduction)
            reference.softmax(given)
            reference.log_softmax(given)
            reference.logsumexp(given)
        reference.cross_entropy_from_probs(q, [0, 1, 2, 0, 1, 2])
        reference.binary_cross_entropy_from_probs(q, 1)
