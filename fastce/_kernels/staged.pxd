"""Pieces of a row copied into whole vectors: logits scaled, capped and masked, and the target's mass beside them."""

from libc.math cimport INFINITY, fabs
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fastce._kernels.lanes cimport (
    LANES,
    SUM_BLOCK,
    Sum,
    add_block_below,
    add_chunk,
    exp_last_block,
    row_maximum,
    smaller,
)
from fastce._kernels.vexp cimport (
    ExpWindow,
    double_of_bits,
    exp_shifted,
    exp_window,
    float_of_bits,
    floating,
    multiply_add_double,
    run_time_value,
)


# What is done to logits before their softmax: z = cap * tanh(scale * x / cap), and -inf where the mask says no.
cdef struct Transform:
    double scale
    bint is_single          # whether `scale` is a float32
    double cap              # 0: none
    uint8_t* mask           # NULL: every class exists
    Py_ssize_t mask_stride  # bytes from one row's mask to the next; 0: one mask for all rows


# A scale is rounded to the logits' dtype, as in NumPy's logits * scale, unless float32 cannot hold it.
cdef inline void set_scale(Transform* transform, double scale, bint single) noexcept nogil:
    transform.is_single = single and 0.0 < <float>scale < <float>INFINITY
    transform.scale = <float>scale if transform.is_single else scale


# What may go with class ids on the plain kernels (rows.pyx): the transform, smoothing without weights or masks, z_loss.
cdef struct Options:
    bint none
    bint is_staged          # whether the transform does anything
    bint is_scaled          # whether that is only a scale, in the logits' dtype
    Transform transform     # without a cap
    double smoothing        # at most 1/2
    char* limits            # of one mask for all rows, (C,): limit_of each class; NULL without such a mask
    double share            # smoothing / C, the target's part of every class
    double z_loss


cdef inline Options no_options() noexcept nogil:
    cdef Options options
    memset(&options, 0, sizeof(options))
    set_scale(&options.transform, 1.0, True)
    options.none = True
    return options


cdef inline bint is_identity(const Transform* transform) noexcept nogil:
    return transform.scale == 1.0 and transform.cap == 0.0 and transform.mask == NULL


# Elements that `n` of them take in whole vectors.
cdef inline Py_ssize_t padded(Py_ssize_t n) noexcept nogil:
    return (n + LANES - 1) // LANES * LANES


cdef inline floating scaled(const Transform* transform, floating x) noexcept nogil:
    return <floating>(x * transform.scale)


# z[0, n): the transformed logits x. With a cap `chain` gets the factors dz/dx by the scale: 1 - tanh^2.
cdef inline void stage_logits(
    const floating* x, Py_ssize_t n, const uint8_t* mask, const Transform* transform, floating* z, floating* chain
) noexcept nogil:
    cdef Py_ssize_t i
    if transform.cap != 0.0:
        cap_logits(x, n, transform, z, chain)
    elif transform.scale == 1.0:
        if z != x:
            memcpy(z, x, n * sizeof(floating))
    elif floating is float and not transform.is_single:
        for i in range(n):
            z[i] = <float>(x[i] * transform.scale)
    else:
        for i in range(n):
            z[i] = x[i] * <floating>transform.scale
    if mask != NULL:
        for i in range(n):
            z[i] = lesser(z[i], limit_of(mask[i], z))


# Infinity for a class that exists, -infinity for one that does not: the lesser of this and a logit hides those. A nan
# becomes infinity, which makes the same of its row.
cdef inline floating limit_of(uint8_t shown, const floating* like) noexcept nogil:
    if floating is float:
        return float_of_bits(<uint32_t>0xff800000 ^ ((0 - <uint32_t>shown) & <uint32_t>0x80000000))
    else:
        return double_of_bits(<uint64_t>0xfff0000000000000 ^ ((0 - <uint64_t>shown) & <uint64_t>0x8000000000000000))


cdef inline floating lesser(floating z, floating limit) noexcept nogil:
    return z if z < limit else limit


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


# A class that does not exist has gradient 0, also where mass lies on it and in rows that are nan.
cdef inline void hide(const uint8_t* mask, floating* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = out[i] if mask[i] else 0


# ---- rows of class ids, block by block -------------------------------------------------------------------------------

# z[0, n): the transformed logits of the classes from `start` on, of which x and mask (or NULL) are the row's.
cdef inline void stage_block(
    const Options* options, const floating* x, const uint8_t* mask, Py_ssize_t start, Py_ssize_t n, floating* z
) noexcept nogil:
    cdef const floating* limits = <const floating*>options.limits
    cdef Py_ssize_t i
    if limits == NULL:
        stage_logits(x + start, n, NULL if mask == NULL else mask + start, &options.transform, z, NULL)
        return
    limits += start
    if options.transform.scale == 1.0:
        for i in range(n):
            z[i] = lesser(x[start + i], limits[i])
    else:
        stage_logits(x + start, n, NULL, &options.transform, z, NULL)
        for i in range(n):
            z[i] = lesser(z[i], limits[i])


cdef inline floating staged_logit(
    const Options* options, const floating* x, const uint8_t* mask, Py_ssize_t i
) noexcept nogil:
    if options.none:
        return x[i]
    if mask != NULL and not mask[i]:
        return -INFINITY
    return scaled(&options.transform, x[i])


cdef inline double staged_maximum(
    const Options* options, const floating* x, const uint8_t* mask, Py_ssize_t n
) noexcept nogil:
    cdef floating[SUM_BLOCK] z
    cdef double maximum = -INFINITY, largest
    cdef Py_ssize_t block, size
    if not options.is_staged:
        return row_maximum(x, n)
    for block in range((n + SUM_BLOCK - 1) // SUM_BLOCK):
        size = smaller(SUM_BLOCK, n - block * SUM_BLOCK)
        stage_block(options, x, mask, block * SUM_BLOCK, size, z)
        largest = row_maximum(z, size)
        maximum = largest if largest > maximum else maximum
    return maximum


# The terms of a row's classes from `start` on, a block of them or as many as there are, filled up with zeros; with
# smoothing z_t - z is added to `below`. A row without options must have LANES elements, and `terms` LANES of slack in
# front; its loop is one that gcc finds worth inlining.
cdef inline void exp_block(
    const Options* options, const floating* x, const uint8_t* mask, Py_ssize_t start, Py_ssize_t n, floating* terms,
    floating offset, floating low, floating high, floating magic, floating z_target, Sum* below,
) noexcept nogil:
    cdef const floating* z = x + start
    cdef Py_ssize_t lane
    if not options.none:
        exp_staged_block(options, x, mask, start, n, terms, offset, low, high, magic, z_target, below)
    elif n - start >= SUM_BLOCK:
        for lane in range(SUM_BLOCK):
            terms[lane] = exp_shifted(z[lane], offset, low, high, magic)
    else:
        exp_last_block(z, terms, n - start, offset, low, high, magic)


cdef inline void exp_staged_block(
    const Options* options, const floating* x, const uint8_t* mask, Py_ssize_t start, Py_ssize_t n, floating* terms,
    floating offset, floating low, floating high, floating magic, floating z_target, Sum* below,
) noexcept nogil:
    cdef floating[SUM_BLOCK] staged
    cdef floating scale = <floating>options.transform.scale
    cdef const floating* z = x + start
    cdef Py_ssize_t lane, rest = n - start
    if options.is_scaled and rest >= SUM_BLOCK:
        for lane in range(SUM_BLOCK):
            terms[lane] = exp_shifted(z[lane] * scale, offset, low, high, magic)
        return
    if options.is_staged or rest < SUM_BLOCK:
        for lane in range(rest, SUM_BLOCK):
            staged[lane] = -INFINITY
        stage_block(options, x, mask, start, smaller(rest, SUM_BLOCK), staged)
        z = staged
    for lane in range(SUM_BLOCK):
        terms[lane] = exp_shifted(z[lane], offset, low, high, magic)
    if options.share != 0.0:
        for lane in range(rest, SUM_BLOCK):
            staged[lane] = z_target
        add_block_below(z, z_target, below)


# share * sum(z_t - z_c), where that overflows on the way: element by element, by halves, the rounding errors carried
# along. A target at -inf has an infinite loss without it.
cdef inline double far_below(const Options* options, const floating* x, Py_ssize_t n, Py_ssize_t t) noexcept nogil:
    cdef double z_target = staged_logit(options, x, NULL, t)
    cdef double[2] total
    cdef Py_ssize_t i
    total[0] = total[1] = 0.0
    if z_target == -INFINITY:
        return 0.0
    for i in range(n):
        add_chunk(total, 2.0 * (options.share * (0.5 * z_target - 0.5 * staged_logit(options, x, NULL, i))))
    return total[0] + total[1] if fabs(total[0]) < INFINITY else total[0]
