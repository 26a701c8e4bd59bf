"""The exponential of the kernels errs by less than 1 ulp; tests/torture/exponential.py tries every float32 number."""

import os

import elementary
import numpy as np
import pytest

import fastce

# As vexp.pxd states them.
MOST_ULP = {"float32": 0.902, "float64": 0.9}
TARGETS = fastce.build_info()["available_targets"]
pytestmark = pytest.mark.skipif(
    "FASTCE_SANITIZED" in os.environ, reason="compiles its own functions, which would be the same without a sanitizer"
)


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    return elementary.build(TARGETS, tmp_path_factory.mktemp("elementary"))


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


def test_float32_exponentials_are_within_their_bound(target, modules):
    sample = [x[:: 4 + i % 3] for i, x in enumerate(elementary.chunks(128))]
    tried = 0
    for x in sample:
        error = elementary.errors(modules[target], x, elementary.shift_around(x[x.size // 2]))
        assert error.max() <= MOST_ULP["float32"], x[error.argmax()]
        tried += x.size
    assert tried > 3_000_000


def test_float32_exponentials_around_every_border_of_the_reduction(target, modules):
    x = np.sort(elementary.critical_numbers())
    for part in np.array_split(x, 400):
        for exponent in (0, -100, 100):
            window = elementary.shift_around(part[part.size // 2]) - exponent
            assert elementary.errors(modules[target], part, window).max() <= MOST_ULP["float32"]


def test_float64_exponentials_are_within_their_bound(target, modules, rng):
    borders = rng.choice(np.arange(-1000, 1001), 100_000) / 2 * np.log(2)
    x = np.concatenate([rng.uniform(-340, 340, 300_000), borders * (1 + rng.normal(0, 1e-12, borders.size))])
    for shift in (0.0, 500.0, -500.0):
        assert elementary.errors_of_doubles(modules[target], x, shift).max() <= MOST_ULP["float64"]
    beyond = rng.uniform(-4096, 4096, 100)
    for number in beyond:
        shift = np.round(number / np.log(2))
        assert elementary.errors_of_doubles(modules[target], np.array([number]), shift).max() <= 1


def test_the_mantissa_does_not_know_the_shift(target, modules, rng, dtype):
    x = rng.uniform(-40, 40, 10_001).astype(dtype)
    for shift in (-50, -1, 3, 60):
        shifted = elementary.exponentials(modules[target], x, float(shift))
        np.testing.assert_array_equal(shifted, np.ldexp(elementary.exponentials(modules[target], x), -shift))


def test_exponentials_fall_with_their_argument_by_one_place_at_most(target, modules):
    for bits in (0, 0x3E800000, 0x3EB17218, 0x3F800000, 0x42B00000, 0x44700000):
        x = elementary.numbers(bits, bits + 200_000)
        for signed in (x, -x[::-1]):
            terms = elementary.exponentials(modules[target], signed, elementary.shift_around(signed[-1]))
            assert (np.diff(terms.view(np.int32)) >= -1).all()
            assert (terms[::1000][1:] >= terms[::1000][:-1]).all()


def test_exponentials_at_the_ends_of_their_window(target, modules, dtype):
    high, low = (124, -127) if dtype == np.float32 else (1019, -1023)
    special = np.array([0.0, -0.0, -np.inf, np.nan, -np.finfo(dtype).max], dtype)
    terms = elementary.exponentials(modules[target], special)
    np.testing.assert_array_equal(terms, np.array([1, 1, 0, np.nan, 0], dtype))
    assert not np.signbit(terms).any() or np.isnan(terms[np.signbit(terms)]).all()
    for shift in (0.0, 31.0, -77.0):
        # Beyond the window: exactly 0 below, at most about 2^124 (2^1019) above, so that a sum shows it.
        beyond = np.log(2) * (shift + np.array([low - 0.51, low - 3, -3000, high + 0.51, high + 3, 3000]))
        terms = elementary.exponentials(modules[target], beyond.astype(dtype), shift)
        assert not terms[:3].any() and not np.signbit(terms[:3]).any()
        np.testing.assert_allclose(terms[3:], 2.0**high, rtol=0.01)
        within = np.log(2) * (shift + np.array([low + 1.01, high - 0.01]))
        terms = elementary.exponentials(modules[target], within.astype(dtype), shift)
        assert terms[0] >= np.finfo(dtype).smallest_normal and terms[1] < 2.0**high


def test_logarithms_err_by_less_than_one_ulp(target, modules, rng):
    near_one = 1 + rng.choice([-1, 1], 50_000) * 2.0 ** rng.uniform(-52, -2, 50_000)
    x = np.concatenate([rng.uniform(np.sqrt(0.5), np.sqrt(2), 200_000), near_one])
    assert elementary.errors_of_logarithms(modules[target], x[x != 1]).max() <= 0.9


def test_logarithms_take_numbers_apart(target, modules, rng):
    x = np.ldexp(rng.uniform(0.5, 1, 100_000), rng.integers(-1021, 1025, 100_000))
    mantissas, exponents = elementary.logarithms(modules[target], x)
    np.testing.assert_array_equal(exponents, np.round(exponents))
    assert (np.abs(mantissas) <= np.log(2) / 2 * (1 + 1e-15)).all()
    np.testing.assert_allclose(np.log(np.ldexp(x, -exponents.astype(int))), mantissas, rtol=1e-14, atol=1e-16)
