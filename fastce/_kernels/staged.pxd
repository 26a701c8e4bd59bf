"""Pieces of a row copied into whole vectors: logits scaled, capped and masked, and the target's mass beside them."""

from libc.math cimport INFINITY, fabs
from libc.stdint cimport uint8_t
from libc.string cimport memcpy

from fastce._kernels.lanes cimport LANES
from fastce._kernels.vexp cimport ExpWindow, exp_shifted, exp_window, floating, multiply_add_double, run_time_value


# What is done to logits before their softmax: z = cap * tanh(scale * x / cap), and -inf where the mask says no.
cdef struct Transform:
    double scale
    double cap              # 0: none
    uint8_t* mask           # NULL: every class exists
    Py_ssize_t mask_stride  # bytes from one row's mask to the next; 0: one mask for all rows
    bint is_single          # whether `scale` is a float32, and products in float32 are rounded once all the same


cdef inline bint is_identity(const Transform* transform) noexcept nogil:
    return transform.scale == 1.0 and transform.cap == 0.0 and transform.mask == NULL


# Elements that `n` of them take in whole vectors.
cdef inline Py_ssize_t padded(Py_ssize_t n) noexcept nogil:
    return (n + LANES - 1) // LANES * LANES


# z[0, n): the transformed logits x. With a cap `chain` gets the factors dz/dx by the scale: 1 - tanh^2.
cdef inline void stage_logits(
    const floating* x, Py_ssize_t n, const uint8_t* mask, const Transform* transform, floating* z, floating* chain
) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating single = <floating>transform.scale
    if transform.cap != 0.0:
        cap_logits(x, n, transform, z, chain)
    elif transform.scale == 1.0:
        memcpy(z, x, n * sizeof(floating))
    elif floating is float and not transform.is_single:
        for i in range(n):
            z[i] = <float>(x[i] * transform.scale)
    else:
        for i in range(n):
            z[i] = x[i] * single
    if mask != NULL:
        for i in range(n):
            z[i] = z[i] if mask[i] else -INFINITY


# z = cap * tanh(y), chain = 1 - tanh(y)^2 with y = scale * x / cap, in float64, rounded once. With E = e^(-2|y|)
#
#     tanh |y| = (1 - E) / (1 + E),  1 - tanh^2 = 4 E / (1 + E)^2
#
# and below 0.3, where 1 - E cancels, tanh y = y + y^3 T(y^2), whose polynomial errs by 2^-60 (tools/coefficients.py).
# Infinite logits stay what they are.
cdef inline void cap_logits(
    const floating* x, Py_ssize_t n, const Transform* transform, floating* z, floating* chain
) noexcept nogil:
    cdef double y, e, square, t, magnitude
    cdef double ratio = transform.scale / transform.cap
    cdef ExpWindow window = exp_window(<const double*>NULL, run_time_value(0.0), 0.0)
    cdef Py_ssize_t i
    for i in range(n):
        y = fabs(x[i]) * ratio
        e = exp_shifted(-2.0 * y, 0.0, window.low, window.high, window.magic)
        square = y * y
        t = multiply_add_double(0.0005023816622564501, square, -0.0014416308121699202)
        t = multiply_add_double(t, square, 0.003590870627678578)
        t = multiply_add_double(t, square, -0.00886317054303852)
        t = multiply_add_double(t, square, 0.02186948657256238)
        t = multiply_add_double(t, square, -0.053968253935368096)
        t = multiply_add_double(t, square, 0.13333333333306663)
        t = multiply_add_double(t, square, -0.3333333333333326)
        magnitude = multiply_add_double(t * square, y, y) if y < 0.3 else (1.0 - e) / (1.0 + e)
        magnitude = -transform.cap * magnitude if x[i] < 0.0 else transform.cap * magnitude
        chain[i] = <floating>(4.0 * e / ((1.0 + e) * (1.0 + e)))
        z[i] = x[i] if fabs(x[i]) == INFINITY else <floating>magnitude
