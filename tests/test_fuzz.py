"""Calls decoded from anything keep every promise, and so do those that once did not; longer: tests/torture/fuzz.py."""

import os

import fuzz
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_layouts import assert_same_bits
from truth import GRADIENT_BOUND

import fastce

SANITIZED = "FASTCE_SANITIZED" in os.environ  # several times slower: fewer examples
# Signalling ones: a cast, and even a comparison, may raise "invalid".
NANS = [np.array([0x7F812345, 0, 0], np.uint32).view(np.float32), np.array([0x7D01, 0, 0], np.uint16).view(np.float16)]


@settings(
    max_examples=80 if SANITIZED else 250, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.data())
def test_any_drawn_call_keeps_its_promises(data):
    fuzz.check(fuzz.decode(fuzz.Drawn(data.draw)))


@pytest.mark.parametrize("first", range(0, 400 if SANITIZED else 2000, 200))
def test_calls_of_consecutive_numbers_keep_their_promises(first):
    refused = 0
    for number in range(first, first + 200):
        call = fuzz.decode(fuzz.Seeded(number))
        try:
            refused += fuzz.check(call)
        except Exception as error:
            raise AssertionError(f"python tests/torture/fuzz.py --case {number}") from error
    assert 20 < refused < 120


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=400))
def test_any_bytes_make_a_call_that_keeps_its_promises(data):
    fuzz.check(fuzz.decode(fuzz.Bytes(data)))


def test_every_function_is_called_and_every_argument_spoiled():
    calls = [fuzz.decode(fuzz.Seeded(number)) for number in range(1500)]
    assert {call.name for call in calls} == set(fuzz.NAMES) and len(fuzz.NAMES) == 17
    arguments = set().union(*fuzz.PARAMETERS.values()) - {"hess_out"}
    assert {name for call in calls for name, _ in call.faults} == arguments | {"reductoin"}


# What was found


@pytest.mark.parametrize("call", ["focal_loss_with_grad", "poly_loss_with_grad", "kl_divergence_with_grad"])
def test_numpy_s_error_state_is_not_met_with(call, dtype):
    # Probabilities and weighted losses under- and overflow inside, also where NumPy was told to raise.
    logits = np.array([[0, 800, -2000], [0, 0, 0]], dtype)
    targets = np.eye(3)[[0, 1]] if call.startswith("kl") else np.array([0, 1])
    weights = {"sample_weight": np.array([1e308, 1.0]), "grad_output": np.array([1e308, np.inf]), "reduction": "none"}
    with np.errstate(all="raise"):
        getattr(fastce, call)(logits, targets, **weights)


@pytest.mark.parametrize("row", NANS, ids=lambda row: row.dtype.name)
def test_a_signalling_nan_is_data_like_any_other(row):
    with np.errstate(all="raise"):
        assert np.isnan(fastce.kl_divergence(row, np.array([1.0, 0, 0])))
        assert np.isnan(fastce.kl_divergence(np.zeros(3), row, from_logits=True))
        assert np.isnan(fastce.cross_entropy(row.astype(row.dtype.newbyteorder()), 1))
        with pytest.raises(ValueError, match="targets"):
            fastce.cross_entropy(np.zeros(3, np.float32), row[::-1])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.7, "weight": np.array([1e-300, 1.0, 1.0])}])
def test_masses_below_the_dtype_s_range_warn_of_nothing(options):
    with np.errstate(all="raise"):
        loss = fastce.cross_entropy(np.zeros(3, np.float32), np.array([1e-300, 0.5, 0.5]), **options)
    np.testing.assert_allclose(loss, np.log(3), rtol=0.5)


@pytest.mark.parametrize("q", [1e-300, 1e-307, 1e-312, 5e-324])
def test_a_divergence_is_finite_where_a_target_is_almost_zero(q):
    # q log(q/p) - q + p is p there, although p/q is beyond float64.
    np.testing.assert_allclose(fastce.kl_divergence(np.zeros(2), np.array([q, 1.0])), np.log(2), rtol=1e-15)
    teacher = np.array([np.log(q), 0.0])
    np.testing.assert_allclose(fastce.kl_divergence(np.zeros(2), teacher, from_logits=True), np.log(2), rtol=1e-15)


@pytest.mark.parametrize("factor", [1e3, 1e9])
def test_a_factor_that_is_a_normal_number_loses_no_digits_on_its_way(factor, dtype):
    # The sum of this row is near 2^1010 (float64) beside a mass of 2^-20: their quotient is not normal, until it is
    # multiplied by the factor.
    logits = np.array([[354, 354 - (280 if dtype == np.float64 else 80)]], dtype)
    targets = np.array([[2.0**-20, 0]], dtype)
    gradient = fastce.cross_entropy_with_grad(logits, targets, denominator=1 / factor)[1][0, 1]
    p = np.exp(np.longdouble(logits[0, 1]) - np.longdouble(logits[0, 0]))
    np.testing.assert_allclose(gradient, float(p * 2.0**-20 * factor), rtol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("factor", [1e-30, 1e30, np.inf, np.nan, np.float64(2e19)])
def test_binary_losses_do_not_know_the_gradient_s_factor(factor, dtype, rng):
    logits, targets = rng.normal(0, 5, 40_000).astype(dtype), rng.random(40_000).astype(dtype)
    for options in ({}, {"sample_weight": rng.random(40_000)}, {"reduction": "sum"}, {"pos_weight": 2.0}):
        loss, gradient = fastce.binary_cross_entropy_with_grad(logits, targets, grad_output=factor, **options)
        assert_same_bits(loss, fastce.binary_cross_entropy(logits, targets, **options), options)
        if np.isfinite(factor):
            plain = fastce.binary_cross_entropy_with_grad(logits, targets, **options)[1]
            np.testing.assert_allclose(gradient, plain * dtype.type(factor), rtol=1e-6)


def test_the_reference_knows_no_right_answer_without_a_target():
    for targets in (np.zeros((1, 3)), fastce.SparseTargets([[0, 1]], [[0.0, 0.0]])):
        for functions in (fastce, fastce.reference):
            assert not functions.cross_entropy_stats(np.array([[0.0, 1.0, 2.0]]), targets).correct.any()


def test_where_a_gradient_cancels_it_may_end_on_either_side_of_the_dtype_s_range():
    # p sum(q) - q is a rounding error here, and 0 in float32; times 5e29 the error alone is beyond float16.
    logits = np.array([[0, -23.58, 0]], np.float16)
    options = {"sample_weight": np.array([0.5181945630854733]), "grad_output": np.array([9.066223474987855e29])}
    arguments = {"logits": logits, "targets": np.array([[5e-7, 0, 5e-7]], np.float16), "reduction": "none", **options}
    call = fuzz.Call("kl_divergence_with_grad", arguments)
    fuzz.check(call)
    loss, true, allowed = (fuzz.EXTENDED(values) for values in ([0.0], [[0, 0, -6.4e12]], [[1, 1, 1e12]]))
    for wrong in (0.0, np.inf):
        results = loss.astype(np.float32), np.array([[0, 0, wrong]], np.float16)
        with pytest.raises(AssertionError, match="inf"):
            fuzz.check_values(call, results, [(loss, loss), (true, allowed)])


@pytest.mark.parametrize("z_loss", [0.0625, 0.5, 1.0, 1.5, 100.0])
@pytest.mark.parametrize("other", [-2, -5, -20, -80])
def test_a_log_sum_exp_near_0_keeps_its_digits_however_steep_its_loss(other, z_loss, dtype):
    logits = np.array([[8.557e-4, other], [-8.557e-4, other], [0.0, other]], dtype)
    z = logits.astype(np.longdouble)
    lse = np.log1p(np.exp(z[:, 1:] - z[:, :1])) + z[:, :1]
    p = np.exp(z - lse)
    for target in np.eye(2):
        gradient = fastce.cross_entropy_with_grad(logits, [target.argmax()] * 3, z_loss=z_loss, reduction="sum")[1]
        size = p * (1 + 2 * z_loss * np.abs(lse)) + target
        true = p * (1 + 2 * z_loss * lse) - target
        assert (np.abs(gradient - true) <= size * GRADIENT_BOUND[dtype.name]).all()
