"""The kernels' exponential and logarithm by themselves: compiled as every target's modules hold them, and measured.

The modules do not export them. So a few lines of Cython, which call the very text of lanes.pxd and vexp.pxd, are
compiled with the very flags of setup.py. An error is counted in ulp of the true value, as a real number: 0.5 is the
best that rounding allows.
"""

import contextlib
import importlib.machinery
import importlib.util
import runpy
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SOURCE = '''
from libc.stdint cimport uintptr_t
from fastce._kernels.lanes cimport exp_terms
from fastce._kernels.vexp cimport ExpWindow, exp_window, floating, log_exponent, log_mantissa, run_time_value


cdef void set_terms(const floating* x, floating* terms, Py_ssize_t n, double shift, double offset) noexcept nogil:
    cdef ExpWindow window = exp_window(x, run_time_value(shift), offset)
    exp_terms(x, terms, n, &window)


def exponentials(uintptr_t x, uintptr_t terms, Py_ssize_t n, bint single, double shift, double offset):
    if single:
        set_terms(<const float*>x, <float*>terms, n, shift, offset)
    else:
        set_terms(<const double*>x, <double*>terms, n, shift, offset)


def logarithms(uintptr_t x, uintptr_t mantissas, uintptr_t exponents, Py_ssize_t n):
    cdef Py_ssize_t i
    for i in range(n):
        (<double*>mantissas)[i] = log_mantissa((<const double*>x)[i])
        (<double*>exponents)[i] = log_exponent((<const double*>x)[i])
'''


def build(targets, folder):
    """Compile the functions for each of the targets in a folder; return {target: module}."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    source = Path(folder, "elementary.pyx")
    source.write_text(SOURCE)
    modules = {}
    with contextlib.chdir(ROOT):
        with mock.patch("setuptools.setup"), mock.patch("Cython.Build.cythonize", return_value=[]):
            recipe = runpy.run_path("setup.py")
        directives = {"language_level": 3, "boundscheck": False, "wraparound": False, "cdivision": True}
        directives["freethreading_compatible"] = True
        whole = Extension("elementary", [str(source)])
        (generated,) = cythonize([whole], build_dir=str(folder), compiler_directives=directives, quiet=True)
        for target in targets:
            extension = recipe["extension"]("elementary", source, target, [])
            extension.name, extension.sources = "elementary", generated.sources
            command = build_ext(Distribution({"ext_modules": [extension]}))
            command.build_lib, command.build_temp = str(Path(folder, target)), str(Path(folder, target, "objects"))
            command.ensure_finalized()
            command.run()
            modules[target] = load(command.get_ext_fullpath("elementary"))
    return modules


def load(path):
    loader = importlib.machinery.ExtensionFileLoader("elementary", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("elementary", loader))
    loader.exec_module(module)
    return module


def exponentials(module, x, shift=0.0, offset=0.0):
    """Return e^(x - offset) * 2^-shift as the kernels compute it."""
    x = np.ascontiguousarray(x)
    terms = np.empty_like(x)
    module.exponentials(x.ctypes.data, terms.ctypes.data, x.size, x.dtype == np.float32, shift, offset)
    return terms


def logarithms(module, x):
    """Return (log of the mantissa, exponent) of float64 numbers."""
    x = np.ascontiguousarray(x)
    mantissas, exponents = np.empty_like(x), np.empty_like(x)
    module.logarithms(x.ctypes.data, mantissas.ctypes.data, exponents.ctypes.data, x.size)
    return mantissas, exponents


# ---- float32: the truth is the float64 exponential, whose error is 2^-29 ulp of float32 -----------------------------

CHUNK = 1 << 14
# The bits of 1000, exp_limit; those of -0.0 are SIGN, and so on.
LAST = int(np.float32(1000).view(np.uint32))
SIGN = 0x80000000


def errors(module, x, shift):
    """Return the errors in ulp of float32 exponentials that the window of this even shift neither clamps nor zeroes."""
    half = x.astype(np.float64)
    half *= 0.5
    truth = np.exp(half, out=half)  # e^(x/2), which float64 holds for every |x| <= 1000
    truth *= 2.0 ** (-shift // 2)
    truth *= truth
    binade = (truth.view(np.uint64) & np.uint64(0x7FF0000000000000)).view(np.float64)
    error = exponentials(module, x, shift).astype(np.float64)
    error -= truth
    np.abs(error, out=error)
    error /= binade
    error *= 2.0**23
    return error


def shift_around(x):
    """Return the even shift that brings e^x near 1."""
    return 2.0 * round(float(x) / (2 * np.log(2)))


def numbers(first, last):
    """Return the float32 numbers whose bits are first, ..., last."""
    return np.arange(first, last + 1, dtype=np.uint32).view(np.float32)


def chunks(step=1):
    """Yield consecutive float32 numbers, CHUNK at a time: all from 0 to 1000 and -0 to -1000, or every `step`-th."""
    for sign in (0, SIGN):
        for first in range(sign, sign + LAST + 1, CHUNK * step):
            yield numbers(first, min(first + CHUNK - 1, sign + LAST))


def critical_numbers():
    """Return the float32 numbers around each power of two and around each border k/2 ln 2 of the reduction."""
    borders = np.arange(-2885, 2886) / 2 * np.log(2)
    powers = 2.0 ** np.arange(-149, 10)
    centres = np.concatenate([borders, powers, -powers, [1000, -1000, 0]]).astype(np.float32)
    bits = (centres.view(np.uint32)[:, None] + np.arange(-16, 17).astype(np.uint32)).reshape(-1)
    x = bits.view(np.float32)
    return x[np.abs(x) <= 1000]


# ---- float64: the truth is the exponential in long double, 11 bits longer -------------------------------------------


def errors_of_doubles(module, x, shift):
    """Return the errors in ulp of float64 exponentials that the window of this shift neither clamps nor zeroes."""
    truth = np.ldexp(np.exp(x.astype(np.longdouble)), int(-shift))
    error = np.abs(exponentials(module, x, shift) - truth)
    return (error / np.spacing(truth.astype(np.float64))).astype(np.float64)


def errors_of_logarithms(module, x):
    """Return the errors in ulp of log_mantissa, for numbers in [sqrt(1/2), sqrt(2)) other than 1."""
    truth = np.log(x.astype(np.longdouble))
    mantissas, exponents = logarithms(module, x)
    assert not exponents.any()
    return (np.abs(mantissas - truth) / np.spacing(np.abs(truth).astype(np.float64))).astype(np.float64)
