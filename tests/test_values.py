"""Losses and gradients are those of the formula: worked by hand, against the reference, and against other libraries."""

import math

import numpy as np
import pytest
from sklearn._loss import HalfMultinomialLoss
from sklearn.metrics import log_loss

import fastce
from fastce import reference

LN2 = math.log(2)


def tolerance(dtype):
    """What the reference, in float64 and rounded once, and fastce's own bound allow together."""
    return {"rtol": 5.6e-7, "atol": 2e-38} if dtype == np.float32 else {"rtol": 1e-13, "atol": 1e-300}


def assert_same_as_reference(logits, targets, **options):
    loss, gradient = fastce.cross_entropy_with_grad(logits, targets, **options)
    true_loss, true_gradient = reference.cross_entropy_with_grad(logits, targets, **options)
    close = tolerance(logits.dtype)
    np.testing.assert_allclose(loss, true_loss, **close)
    np.testing.assert_allclose(gradient, true_gradient, **close)
    assert gradient.shape == logits.shape and gradient.dtype == logits.dtype
    assert np.asarray(loss).shape == np.asarray(true_loss).shape
    options.pop("grad_output", None)
    np.testing.assert_array_equal(fastce.cross_entropy(logits, targets, **options), loss)


# By hand


@pytest.mark.parametrize(
    ("row", "target", "loss", "gradient"),
    [
        ([0, 0], 0, LN2, [-0.5, 0.5]),
        ([0, 0], 1, LN2, [0.5, -0.5]),
        ([1e8, 1e8], 1, LN2, [0.5, -0.5]),
        ([-1e8, -1e8, -1e8, -1e8], 2, 2 * LN2, [0.25, 0.25, -0.75, 0.25]),
        ([20, 0], 0, 2.0611536e-09, [-2.0611536e-09, 2.0611536e-09]),
        ([0, 20], 1, 2.0611536e-09, [2.0611536e-09, -2.0611536e-09]),
        ([20, 0], 1, 20.0, [1, -1]),
        ([87, 0], 0, 1.6458115e-38, [-1.6458115e-38, 1.6458115e-38]),
        ([1000, 0], 0, 0.0, [0, 0]),
        ([1000, 0], 1, 1000.0, [1, -1]),
        ([5], 0, 0.0, [0]),
        ([1, 2, 3], 2, 0.40760596444438, [0.09003057317038, 0.24472847105479, -0.33475904422518]),
    ],
)
def test_rows_worked_by_hand(row, target, loss, gradient, dtype):
    for library in (fastce, reference):
        got_loss, got_gradient = library.cross_entropy_with_grad(np.array(row, dtype), target, reduction="none")
        np.testing.assert_allclose(got_loss, loss, rtol=5e-7, atol=0)
        np.testing.assert_allclose(got_gradient, gradient, rtol=5e-7, atol=0)


def test_a_confident_row_keeps_its_tiny_loss():
    loss = fastce.cross_entropy(np.array([[20, 0]], np.float32), [0])
    assert f"{loss:.7e}" in ("2.0611536e-09", "2.0611537e-09")
    assert loss == pytest.approx(math.log1p(math.exp(-20)), rel=5e-7, abs=0)


def test_a_loss_of_float64_far_below_one():
    loss, gradient = fastce.cross_entropy_with_grad([[700.0, 0.0]], [0])
    assert loss == pytest.approx(9.8596765437597708e-305, rel=2e-15, abs=0)
    np.testing.assert_allclose(gradient[0], [-9.8596765437597708e-305, 9.8596765437597708e-305], rtol=2e-15, atol=0)


def test_a_float32_loss_below_the_normal_numbers():
    loss = fastce.cross_entropy(np.array([88, 0], np.float32), 0, reduction="none")
    assert abs(float(loss) - math.exp(-88)) <= 2.0**-126


def test_logits_that_are_logarithms_of_probabilities(dtype):
    probabilities = np.array([[0.5, 0.25, 0.125, 0.125], [0.125, 0.125, 0.25, 0.5]])
    loss, gradient = fastce.cross_entropy_with_grad(np.log(probabilities).astype(dtype), [0, 0], reduction="sum")
    assert loss == pytest.approx(4 * LN2, rel=1e-6)
    np.testing.assert_allclose(gradient, probabilities - [[1, 0, 0, 0]], rtol=1e-6)


def test_a_constant_row_is_log_of_the_class_count(dtype):
    loss, gradient = fastce.cross_entropy_with_grad(np.full((1, 1000), 3.7, dtype), [17])
    assert loss == pytest.approx(math.log(1000), rel=5e-7)
    assert gradient[0, 0] == pytest.approx(0.001, rel=5e-7)
    assert gradient[0, 17] == pytest.approx(-0.999, rel=5e-7)


def test_reductions_of_three_rows_of_which_one_is_ignored(dtype):
    logits = np.array([[0, 0], [20, 0], [0, 0]], dtype)
    targets = [0, -100, 1]
    assert fastce.cross_entropy(logits, targets, reduction="sum") == pytest.approx(2 * LN2, rel=1e-7)
    assert fastce.cross_entropy(logits, targets) == pytest.approx(LN2, rel=1e-7)
    assert fastce.cross_entropy(logits, targets, denominator=8) == pytest.approx(LN2 / 4, rel=1e-7)
    losses, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
    np.testing.assert_allclose(losses, [LN2, 0, LN2], rtol=1e-7)
    np.testing.assert_array_equal(gradient, np.array([[-0.5, 0.5], [0, 0], [0.5, -0.5]], dtype))
    _, gradient = fastce.cross_entropy_with_grad(logits, targets, denominator=8, grad_output=2)
    np.testing.assert_array_equal(gradient, np.array([[-0.125, 0.125], [0, 0], [0.125, -0.125]], dtype))


# What is returned


def test_sum_and_mean_are_python_floats(dtype):
    logits = np.zeros((3, 4), dtype)
    for reduction in ("mean", "sum"):
        assert type(fastce.cross_entropy(logits, [0, 1, 2], reduction=reduction)) is float
        assert type(fastce.cross_entropy_with_grad(logits, [0, 1, 2], reduction=reduction)[0]) is float


def test_no_reduction_returns_the_rows_shape_and_the_logits_dtype(dtype):
    logits = np.zeros((2, 5, 3), dtype)
    for axis, shape in ((0, (5, 3)), (1, (2, 3)), (2, (2, 5)), (-1, (2, 5)), (-3, (5, 3))):
        targets = np.zeros(shape, int)
        losses = fastce.cross_entropy(logits, targets, axis=axis, reduction="none")
        also, gradient = fastce.cross_entropy_with_grad(logits, targets, axis=axis, reduction="none")
        for result in (losses, also):
            assert type(result) is np.ndarray and result.shape == shape and result.dtype == dtype
        assert type(gradient) is np.ndarray and gradient.shape == logits.shape and gradient.dtype == dtype


def test_a_single_row_has_no_row_axes(dtype):
    logits = np.array([1, 2, 3], dtype)
    for target in (2, np.int8(2), np.array(2, np.uint16)):
        losses, gradient = fastce.cross_entropy_with_grad(logits, target, reduction="none")
        assert type(losses) is np.ndarray and losses.shape == () and losses.dtype == dtype
        assert gradient.shape == (3,)
        assert fastce.cross_entropy(logits, target) == pytest.approx(0.40760596444438, rel=5e-7)


def test_inputs_are_left_alone(dtype, rng):
    logits = rng.normal(0, 3, (9, 11)).astype(dtype)
    targets = rng.integers(0, 11, 9)
    before = logits.copy(), targets.copy()
    fastce.cross_entropy(logits, targets)
    fastce.cross_entropy_with_grad(logits, targets)
    np.testing.assert_array_equal(logits, before[0])
    np.testing.assert_array_equal(targets, before[1])


def test_the_defaults_are_the_documented_ones(dtype, rng):
    logits = rng.normal(0, 3, (9, 11)).astype(dtype)
    targets = rng.integers(0, 11, 9)
    targets[4] = -100
    plain = fastce.cross_entropy_with_grad(logits, targets)
    spelled = fastce.cross_entropy_with_grad(
        logits, targets, axis=-1, ignore_index=-100, reduction="mean", denominator=None, num_threads=None,
        grad_output=None, out=None,
    )  # fmt: skip
    assert plain[0] == spelled[0]
    np.testing.assert_array_equal(plain[1], spelled[1])


# Against the reference

CLASS_COUNTS = [*range(1, 71), 127, 128, 129, 1000, 1023, 1024, 1025, 4095, 4096, 4097, 40_000]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_every_class_count_agrees_with_the_reference(reduction, dtype, rng):
    for classes in CLASS_COUNTS:
        rows = 21 if classes < 200 else 3
        assert_same_as_reference(
            rng.normal(0, 4, (rows, classes)).astype(dtype), rng.integers(0, classes, rows), reduction=reduction
        )


def test_every_row_count_agrees_with_the_reference(dtype, rng):
    for rows in [*range(0, 70), 127, 128, 129, 1000, 4097]:
        for classes in (2, 10, 65):
            logits = rng.normal(0, 4, (rows, classes)).astype(dtype)
            assert_same_as_reference(logits, rng.integers(0, classes, rows), reduction="none")


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((7,), 0),
        ((7,), -1),
        ((5, 7), 0),
        ((5, 7), 1),
        ((5, 7), -2),
        ((3, 4, 6), 0),
        ((3, 4, 6), 1),
        ((3, 4, 6), -1),
        ((2, 19, 3, 4), 1),
        ((2, 3, 4, 5, 2), 2),
        ((1, 1, 1), 1),
        ((2, 3, 1), -1),
        ((1, 300, 8), 1),
        ((8, 1, 300), 2),
        ((2, 5000, 3), 1),
    ],
)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_any_axis_agrees_with_the_reference(shape, axis, reduction, dtype, rng):
    logits = rng.normal(0, 4, shape).astype(dtype)
    row_shape = np.delete(shape, axis)
    targets = rng.integers(0, shape[axis], row_shape)
    targets[rng.random(targets.shape) < 0.2] = -100
    assert_same_as_reference(logits, targets, axis=axis, reduction=reduction)


@pytest.mark.parametrize("ignore_index", [-100, 0, 3, -1, 255, [1, 2], (0, -7), [], range(3), None, np.int16(2)])
def test_ignored_class_ids_agree_with_the_reference(ignore_index, dtype, rng):
    logits = rng.normal(0, 4, (60, 6)).astype(dtype)
    targets = rng.integers(0, 6, 60)
    if ignore_index is not None:
        for value in np.atleast_1d(np.asarray(ignore_index, int)):
            targets[rng.integers(0, 60, 5)] = value
    for reduction in ("none", "sum", "mean"):
        assert_same_as_reference(logits, targets, ignore_index=ignore_index, reduction=reduction)


def test_an_ignored_id_of_a_narrow_dtype(dtype, rng):
    logits = rng.normal(0, 4, (5, 6)).astype(dtype)
    targets = np.array([0, 255, 5, 255, 1], np.uint8)
    assert_same_as_reference(logits, targets, ignore_index=255)
    assert_same_as_reference(logits, np.array([0, -1, 5, -1, 1], np.int8), ignore_index=-1)
    # -1 is not 255, although both are the same byte.
    with pytest.raises(IndexError):
        fastce.cross_entropy(logits, targets, ignore_index=-1)


@pytest.mark.parametrize("denominator", [1, 7.5, 1e-3, np.float32(3), np.int64(4)])
def test_denominators_agree_with_the_reference(denominator, dtype, rng):
    logits = rng.normal(0, 4, (60, 6)).astype(dtype)
    targets = rng.integers(0, 6, 60)
    targets[::7] = -100
    assert_same_as_reference(logits, targets, denominator=denominator, grad_output=-0.25)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("grad_output", [1, 0, -3.5, np.float32(0.1), np.array(2.5), 1e-3])
def test_scalar_grad_outputs_agree_with_the_reference(reduction, grad_output, dtype, rng):
    logits = rng.normal(0, 4, (20, 6)).astype(dtype)
    assert_same_as_reference(logits, rng.integers(0, 6, 20), reduction=reduction, grad_output=grad_output)


def test_array_grad_outputs_agree_with_the_reference(dtype, rng):
    logits = rng.normal(0, 4, (3, 6, 5)).astype(dtype)
    targets = rng.integers(0, 6, (3, 5))
    targets[1, 2] = -100
    for kind in (np.float64, np.float32, np.int32):
        grad_output = (rng.normal(0, 9, (3, 5))).astype(kind)
        assert_same_as_reference(logits, targets, axis=1, reduction="none", grad_output=grad_output)


def test_large_batches_agree_with_the_reference(dtype, rng):
    for rows, classes in ((60_000, 10), (3000, 300)):
        logits = rng.normal(0, 4, (rows, classes)).astype(dtype)
        targets = rng.integers(0, classes, rows)
        targets[::5] = -100
        assert_same_as_reference(logits, targets)


# Against other libraries


def test_scikit_learn_agrees(rng):
    logits = rng.normal(0, 3, (50, 12))
    targets = rng.integers(0, 12, 50)
    losses, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
    their_losses, their_gradient = HalfMultinomialLoss(n_classes=12).loss_gradient(targets.astype(float), logits)
    np.testing.assert_allclose(losses, their_losses, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(gradient, their_gradient, rtol=1e-12, atol=1e-14)

    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    theirs = log_loss(targets, probabilities, labels=range(12))
    assert fastce.cross_entropy(logits, targets) == pytest.approx(theirs, rel=1e-12)


def test_scipy_agrees(rng):
    from scipy.special import log_softmax, softmax

    logits = rng.normal(0, 3, (4, 9, 5))
    targets = rng.integers(0, 9, (4, 5))
    losses, gradient = fastce.cross_entropy_with_grad(logits, targets, axis=1, reduction="none")
    at_target = targets[:, None, :]
    theirs = -np.take_along_axis(log_softmax(logits, axis=1), at_target, 1)[:, 0]
    np.testing.assert_allclose(losses, theirs, rtol=1e-12, atol=1e-14)
    expected = softmax(logits, axis=1)
    np.put_along_axis(expected, at_target, np.take_along_axis(expected, at_target, 1) - 1, 1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_torch_agrees(reduction, dtype, rng):
    torch = pytest.importorskip("torch", reason="torch, the one optional oracle, is not installed")
    logits = rng.normal(0, 3, (6, 9, 5)).astype(dtype)
    targets = rng.integers(0, 9, (6, 5))
    targets[2, 3] = -100
    theirs = torch.tensor(logits, requires_grad=True)
    their_loss = torch.nn.functional.cross_entropy(theirs, torch.tensor(targets), reduction=reduction)
    their_loss.sum().backward()
    loss, gradient = fastce.cross_entropy_with_grad(logits, targets, axis=1, reduction=reduction)
    # torch subtracts 1 from the probability of the target and log C from a logit: it is the less accurate side.
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-14}
    np.testing.assert_allclose(loss, their_loss.detach().numpy(), **close)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), **close)
