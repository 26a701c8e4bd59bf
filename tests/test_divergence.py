"""The kernel of the Kullback-Leibler divergence: how exact its terms are, every length, what is not a normal number."""

import mpmath
import numpy as np
import pytest
from test_further_losses import assert_true_divergence
from test_layouts import assert_same_bits

import fastce

INF, NAN = np.inf, np.nan
EPS = 2.0**-53
# The borders of whole vectors, of blocks of rows, of short rows, of blocks of sums and of the pieces of a row.
LENGTHS = [*range(1, 36), 63, 64, 65, 126, 127, 128, 129, 130, 132, 255, 257, 4095, 4096, 4097, 4099, 8193]
each_kind = pytest.mark.parametrize("from_logits", [False, True])


def losses_of(logits, targets, **options):
    return fastce.kl_divergence(logits, targets, reduction="none", **options)


def both(logits, targets, **options):
    return fastce.kl_divergence_with_grad(logits, targets, reduction="none", **options)


def exact(logits, targets, from_logits):
    """Return (divergence, sum of |p - q|) of one row, to 60 digits."""
    with mpmath.workdps(60):
        x, y = ([mpmath.mpf(float(value)) for value in row] for row in (logits, targets))
        e = [mpmath.exp(value) for value in x]
        p = [value / mpmath.fsum(e) for value in e]
        f = [mpmath.exp(value) for value in y]
        q = [value / mpmath.fsum(f) for value in f] if from_logits else y
        loss = mpmath.fsum(b * mpmath.log(b / a) for a, b in zip(p, q, strict=True) if b > 0)
        return loss, float(mpmath.fsum(abs(a - b) for a, b in zip(p, q, strict=True)))


def distributions(shape, rng):
    return rng.dirichlet(np.ones(shape[1]), shape[0])


@pytest.mark.parametrize("classes", LENGTHS)
def test_rows_of_every_length_are_accurate(classes, dtype, rng):
    rows = 40 if classes < 36 else 3
    logits, teacher = (rng.normal(0, 3, (rows, classes)).astype(dtype) for _ in range(2))
    q = (distributions((rows, classes), rng) * (rng.random((rows, classes)) < 0.9)).astype(dtype)
    assert_true_divergence(logits, q, classes)
    assert_true_divergence(logits, teacher, classes, from_logits=True)


@each_kind
@pytest.mark.parametrize("distance", [4, 1, 0.4, 0.1, 1e-4, 1e-8, 1e-12])
def test_an_error_is_a_few_roundings_of_what_p_and_q_differ_by(distance, from_logits, rng):
    for classes in (2, 3, 7, 40, 300):
        teacher = rng.normal(0, 2, (3, classes))
        logits = teacher + distance * rng.normal(0, 1, teacher.shape)
        q = np.exp(teacher - teacher.max(1, keepdims=True))
        targets = teacher if from_logits else q / q.sum(1, keepdims=True)
        for row, loss in enumerate(losses_of(logits, targets, from_logits=from_logits)):
            truth, difference = exact(logits[row], targets[row], from_logits)
            # What the sum of a distribution is beside 1 is rounded as a number near 1.
            allowed = EPS * (8 * difference + 8 * float(abs(truth)) + (0 if from_logits else 6))
            assert abs(loss - truth) <= allowed, (classes, row)


def test_terms_are_exact_across_every_border_of_their_reduction(rng):
    # Two classes, q = (1, r) and p = (1/2, 1/2): r from 2^-12 to 2^12, and densely where p/q is near 2/3, 4/3, 3/2, ...
    ratios = np.concatenate([2.0 ** rng.uniform(-12, 12, 400), *(b * (1 + 1e-6 * rng.normal(0, 1, 60)) for b in
                             (2 / 3, 3 / 4, 4 / 3, 3 / 2, 1, 2, 0.5, np.sqrt(2), np.sqrt(0.5)))])  # fmt: skip
    q = np.stack([np.ones_like(ratios), ratios], axis=1)
    for row, loss in enumerate(losses_of(np.zeros_like(q), q)):
        with mpmath.workdps(40):
            a, b = mpmath.mpf(q[row, 0]), mpmath.mpf(q[row, 1])
            truth = a * mpmath.log(2 * a) + b * mpmath.log(2 * b)
            assert abs(loss - truth) <= 4 * EPS * (2 + abs(truth) + a + b)


def test_a_distance_of_one_rounding_is_seen():
    # p = (1/2, 1/2), q = (1 + d, 1 - d)/2: the divergence is d^2/2 + ..., with all its digits.
    for d in (2.0**-8, 2.0**-20, 2.0**-30, 2.0**-40, 2.0**-52):
        q = np.array([0.5 + d / 2, 0.5 - d / 2])
        truth = sum(d ** (2 * k) / (2 * k * (2 * k - 1)) for k in (4, 3, 2, 1))
        np.testing.assert_allclose(fastce.kl_divergence(np.zeros(2), q), truth, rtol=1e-15)


@each_kind
@pytest.mark.parametrize("classes", [3, 130, 5000])
def test_probabilities_below_the_normal_numbers_have_their_logarithm(classes, from_logits, dtype, rng):
    # p of the last class is e^-depth: not a normal number of float64 from 708 on, 0 from 1064 on below the largest.
    for depth in (600, 700, 708.5, 740, 760, 1000, 1300, 3000, 60_000, 1e30):
        logits = np.zeros((2, classes), dtype)
        logits[:, -1] = -depth
        logits[1] -= 5
        targets = np.zeros((2, classes), dtype)
        if not from_logits:
            targets[:] = 1 / classes
        loss, gradient = both(logits, targets, from_logits=from_logits)
        mass = (np.full(classes, 1 / classes) if from_logits else targets[0]).astype(np.float64)
        depths = logits[:, :1].astype(np.float64) - logits[:, -1:]
        rest = mass[:-1].sum() + mass[-1]
        entropy = (mass * np.log(mass)).sum()
        expected = entropy + mass[-1] * depths[:, 0] + rest * np.log(classes - 1)
        np.testing.assert_allclose(loss, expected, rtol=1e-6 if dtype == np.float32 else 1e-13, err_msg=str(depth))
        np.testing.assert_allclose(gradient[:, -1], -1 / classes, rtol=1e-5)


@each_kind
def test_masses_below_the_normal_numbers_count_for_nothing_unless_they_have_no_probability(from_logits):
    for q in (5e-324, 1e-310, 2.2e-308):
        targets = np.array([np.log(q), 0, 0]) if from_logits else np.array([q, 0.5, 0.5])
        for lowest, expected in ((0.0, np.log(1.5)), (-800.0, 0.0), (-INF, INF)):
            loss = fastce.kl_divergence(np.array([lowest, 0, 0]), targets, from_logits=from_logits)
            np.testing.assert_allclose(loss, expected, atol=1e-300)


def test_a_teacher_deep_below_is_never_told_from_itself(dtype, rng):
    for depth in (80, 700, 708, 709, 720, 744, 745, 1100, 5000):
        for classes in (2, 9, 200):
            logits = np.zeros((3, classes), dtype)
            logits[:, 1:] = -depth - rng.random((3, classes - 1))
            loss, gradient = both(logits, logits.copy(), from_logits=True)
            assert not loss.any() and not np.signbit(loss).any() and not gradient.any()
            near = np.nextafter(logits, dtype.type(0))
            loss = losses_of(logits, near, from_logits=True)
            assert (loss >= 0).all() and not np.signbit(loss).any()


@pytest.mark.parametrize("classes", [3, 10, 128, 129, 5000])
def test_special_rows_of_every_length(classes, dtype, rng):
    logits = rng.normal(0, 3, (6, classes)).astype(dtype)
    q = np.full((6, classes), 1 / classes, dtype)
    logits[0, 1], logits[1, -1], logits[2], logits[3, 0], logits[4, 0] = NAN, INF, -INF, -INF, -INF
    q[4, 0] = 0
    teacher = np.zeros_like(logits)
    teacher[4, 0] = -INF
    for targets, from_logits in ((q, False), (teacher, True)):
        loss, gradient = both(logits, targets, from_logits=from_logits)
        np.testing.assert_array_equal(np.isnan(loss), [True, True, True, False, False, False])
        np.testing.assert_array_equal(np.isinf(loss), [False, False, False, True, False, False])
        np.testing.assert_array_equal(np.isnan(gradient).all(1), [True, True, True, False, False, False])
        assert np.isfinite(gradient[3:]).all() and gradient[4, 0] == 0
    # A teacher's rows.
    loss, gradient = both(np.zeros_like(logits), logits, from_logits=True)
    np.testing.assert_array_equal(np.isnan(loss), [True, True, True, False, False, False])
    np.testing.assert_array_equal(np.isnan(gradient).all(1), [True, True, True, False, False, False])
    # Rows of weight 0 are not read, not even where they hold what may not be.
    q[:3], weights = NAN, np.array([0, 0, 0, 0, 1, -2.0])
    expected = losses_of(logits[4:], q[4:])
    for targets, from_logits in ((q, False), (logits, True)):
        loss, gradient = both(logits, targets, sample_weight=weights, from_logits=from_logits)
        assert not loss[:4].any() and not gradient[:4].any()
        if not from_logits:
            np.testing.assert_allclose(loss[4:], expected * [1, -2], rtol=1e-6)


@each_kind
@pytest.mark.parametrize("shape", [(1, 1), (8, 10), (33, 31), (3, 129), (2, 5000)], ids=str)
def test_the_short_way_has_the_bits_of_the_long_one(shape, from_logits, dtype, rng):
    logits, teacher = (rng.normal(0, 3, shape).astype(dtype) for _ in range(2))
    targets = teacher if from_logits else distributions(shape, rng).astype(dtype)
    other = np.dtype(dtype).newbyteorder()
    for reduction, denominator in (("none", None), ("sum", None), ("mean", None), ("mean", 3.5)):
        for factor in (None, 0.25):
            options = {"reduction": reduction, "denominator": denominator, "from_logits": from_logits}
            loss, gradient = fastce.kl_divergence_with_grad(logits, targets, grad_output=factor, **options)
            assert type(loss) is (np.ndarray if reduction == "none" else float)
            assert_same_bits(fastce.kl_divergence(logits, targets, **options), loss)
            ones = np.ones(shape[0])
            for args, more in (
                ((np.asfortranarray(logits), targets), {}),
                ((logits, np.asfortranarray(targets)), {}),
                ((logits.astype(other), targets.astype(other)), {}),
                ((logits[None], targets[None]), {}),
                ((logits.T, targets.T), {"axis": 0}),
                ((logits, targets), {"sample_weight": ones, "denominator": denominator or shape[0] * 1.0}
                 if reduction == "mean" else {"sample_weight": ones}),
                ((logits, targets), {"num_threads": 2}),
                ((logits, targets), {"out": np.full_like(logits, 7)}),
                ((np.repeat(logits, 2, 1)[:, ::2], targets), {"out": np.full((2, *shape), 7, dtype)[0]}),
            ):  # fmt: skip
                got = fastce.kl_divergence_with_grad(*args, **{"grad_output": factor, **options, **more})
                assert_same_bits(np.squeeze(got[0]), np.squeeze(loss))
                turned = got[1].T if more.get("axis") == 0 else got[1].reshape(shape)
                assert_same_bits(turned.astype(dtype), gradient)


@each_kind
def test_logits_and_targets_of_two_dtypes_are_both_exact(from_logits, rng):
    for shape in ((9, 7), (2, 150), (2, 5000)):
        wide, narrow = rng.normal(0, 3, shape), rng.normal(0, 3, shape).astype(np.float32)
        if not from_logits:
            narrow, wide = distributions(shape, rng).astype(np.float32), distributions(shape, rng)
        for logits, targets in ((rng.normal(0, 3, shape).astype(np.float32), wide), (rng.normal(0, 3, shape), narrow)):
            loss, gradient = both(logits, targets, from_logits=from_logits)
            expected = both(logits.astype(float), targets.astype(float), from_logits=from_logits)
            assert loss.dtype == gradient.dtype == logits.dtype
            assert_same_bits(loss, expected[0].astype(logits.dtype))
            if from_logits:
                assert_same_bits(gradient, expected[1].astype(logits.dtype))
            given = logits.copy()
            assert_same_bits(both(given, targets, from_logits=from_logits, out=given)[1], gradient)


@pytest.mark.parametrize("bad", [-1e-30, NAN, INF, -INF])
@pytest.mark.parametrize("shape", [(4, 3), (4, 200), (2, 5000)], ids=str)
def test_no_mass_is_negative_or_infinite(bad, shape, dtype, rng):
    q = distributions(shape, rng).astype(dtype)
    q[1, -1] = bad
    out = np.full(shape, 7, dtype)
    for call in (lambda: fastce.kl_divergence(out, q), lambda: fastce.kl_divergence_with_grad(out, q, out=out)):
        with pytest.raises(ValueError, match=rf"targets\[1, {shape[1] - 1}\]"):
            call()
    assert (out == 7).all()
    q[1, -1] = -0.0
    assert np.isfinite(fastce.kl_divergence(out, q))


def test_sums_beyond_the_dtype_are_infinite():
    for dtype, much in ((np.float32, 3e38), (np.float64, 1.7e308)):
        for classes in (4, 200, 5000):
            q = np.full((2, classes), much, dtype)
            q[1] = 0
            with np.errstate(all="raise"):
                loss = losses_of(np.zeros((2, classes), dtype), q)
            np.testing.assert_array_equal(loss, [INF, 0])


@each_kind
def test_a_gradient_times_a_factor_beyond_numbers_is_what_it_would_be(from_logits, dtype, rng):
    logits, targets = rng.normal(0, 1, (3, 5)).astype(dtype), distributions((3, 5), rng).astype(dtype)
    for factor in (INF, NAN, -INF):
        loss, gradient = fastce.kl_divergence_with_grad(
            logits, targets, grad_output=factor, from_logits=from_logits, reduction="sum"
        )
        assert np.isfinite(loss) and not np.isfinite(gradient).any()


def test_no_rows_have_no_divergence(dtype):
    for from_logits in (False, True):
        nothing = np.empty((0, 3), dtype)
        loss, gradient = both(nothing, nothing.copy(), from_logits=from_logits)
        assert loss.shape == (0,) and gradient.shape == (0, 3)
        assert np.isnan(fastce.kl_divergence(nothing, nothing, from_logits=from_logits))
        assert fastce.kl_divergence(nothing, nothing, from_logits=from_logits, reduction="sum") == 0


def test_from_logits_is_true_or_false_on_the_short_way_too():
    z = np.zeros((2, 3))
    for value in (1, 0, "yes", None):
        with pytest.raises(TypeError, match="from_logits"):
            fastce.kl_divergence(z, z, from_logits=value)
    assert fastce.kl_divergence(z, z, from_logits=np.True_) == 0
