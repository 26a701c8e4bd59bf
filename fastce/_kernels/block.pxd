"""A block of rows on its way through the kernels: what is known of each row, its loss, the writing of its gradient."""

from libc.math cimport INFINITY, fabs
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

from fastce._kernels.lanes cimport LANES, SUM_BLOCK, larger, row_maximum, smaller
from fastce._kernels.staged cimport Options, hide
from fastce._kernels.vexp cimport (
    bits_of_double,
    double_of_bits,
    floating,
    log_exponent,
    log_mantissa,
    multiply_add_double,
    multiply_add_float,
)

cdef extern from "target.h" nogil:
    void stream_float "fastce_stream_float" (float* out, const float* terms, Py_ssize_t n, float factor, float shift)
    void stream_double "fastce_stream_double" (
        double* out, const double* terms, Py_ssize_t n, double factor, double shift
    )

cdef enum:
    BLOCK_ROWS = 128        # rows that share one pass through the logarithms
    BLOCK_ELEMENTS = 4096   # of a block of small rows; half an L1 cache of float32
    SMALL_LANES = 4         # of the sums of small rows, once folded


# One call's batch. `out` is NULL when no gradient is wanted, `scales` when every row's gradient is scaled alike.
cdef struct Batch:
    char* logits
    Py_ssize_t logits_stride
    char* out
    Py_ssize_t out_stride
    char* hess              # the Hessian's diagonal, or NULL
    Py_ssize_t hess_stride
    int64_t* ids
    double* scales
    double scale
    double* weight          # of the classes, or NULL
    double* sample_weight   # of the rows, or NULL
    double* losses
    Options options
    Py_ssize_t n_rows
    Py_ssize_t n_classes
    char* memory            # working memory, as much as memory_for says
    bint with_grad
    bint stream             # the gradient is too large for the caches and not written over the logits


# One thread's working memory: a number of each kind for each row of a block, and the block's exponentials. Arrays in
# one struct, so that the compiler knows them apart and takes the rows in vectors.
cdef struct Scratch:
    double[BLOCK_ROWS] others
    double[BLOCK_ROWS] at_target        # e_t
    double[BLOCK_ROWS] z_target
    double[BLOCK_ROWS] shift
    double[BLOCK_ROWS] offset           # what was subtracted from z_t
    double[BLOCK_ROWS] linear           # share * sum(z_t - z_c)
    double[BLOCK_ROWS] lse              # with z_loss
    double[BLOCK_ROWS] steep            # 2 z_loss lse
    double[BLOCK_ROWS] weight           # of the row and its class
    double[BLOCK_ROWS] scale            # of the row's gradient
    double[BLOCK_ROWS] inverse          # 1/S
    double[BLOCK_ROWS] miss             # others/S = 1 - p_t
    double[BLOCK_ROWS] loss
    double[BLOCK_ROWS * SMALL_LANES] partial
    double[BLOCK_ELEMENTS + SUM_BLOCK] gathered   # small rows side by side, when they do not lie so
    uint8_t[BLOCK_ELEMENTS] masks                 # theirs
    double[BLOCK_ELEMENTS] limits                 # of one mask for all of them
    double[LANES] slack                 # before the exponentials, which follow the struct


cdef inline char* terms_of(Scratch* rows) noexcept nogil:
    return <char*>(rows + 1)


# A row whose gradient is written block by block while the next row's exponentials are computed: the one is bound by
# the caches, the other by arithmetic.
cdef struct Pending:
    char* out               # what is still to be written; streamed, from a 64-byte boundary on
    char* terms
    Py_ssize_t left         # elements
    double factor           # scale/S
    double shift            # -scale * share
    bint stream             # past the caches


cdef inline Pending nothing_pending() noexcept nogil:
    cdef Pending pending
    memset(&pending, 0, sizeof(pending))
    return pending


cdef inline void put_row(
    Scratch* rows, Py_ssize_t r, double others, double at_target, double z_target, double shift, double offset
) noexcept nogil:
    rows.others[r] = others
    rows.at_target[r] = at_target
    rows.z_target[r] = z_target
    rows.shift[r] = shift
    rows.offset[r] = offset


# The factor of each row's gradient; the chain rule of logit_scale is part of it.
cdef inline void load_scales(const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t r
    if batch.scales == NULL:
        for r in range(n):
            rows.scale[r] = batch.scale
    else:
        memcpy(rows.scale, batch.scales + first, n * sizeof(double))
    for r in range(n):
        rows.scale[r] *= batch.options.transform.scale
        rows.lse[r] = rows.steep[r] = rows.linear[r] = 0.0
    if has_weights(batch):
        load_weights(batch, rows, first, n)
        for r in range(n):
            rows.scale[r] *= rows.weight[r]


cdef inline bint has_weights(const Batch* batch) noexcept nogil:
    return batch.weight != NULL or batch.sample_weight != NULL


cdef inline double weight_of(const Batch* batch, Py_ssize_t row) noexcept nogil:
    cdef double weight = 1.0 if batch.weight == NULL else batch.weight[larger(batch.ids[row], 0)]
    return weight if batch.sample_weight == NULL else weight * batch.sample_weight[row]


cdef inline void load_weights(const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t r
    if batch.weight == NULL:
        memcpy(rows.weight, batch.sample_weight + first, n * sizeof(double))
        return
    for r in range(n):
        rows.weight[r] = batch.weight[larger(batch.ids[first + r], 0)]
    if batch.sample_weight != NULL:
        for r in range(n):
            rows.weight[r] *= batch.sample_weight[first + r]


# The losses of rows [first, first + n) leave the block, weighted; a weight of 0 makes an infinite loss 0.
cdef inline void put_losses(const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t r
    if has_weights(batch):
        for r in range(n):
            rows.loss[r] = rows.weight[r] * (0.0 if rows.weight[r] == 0.0 and rows.loss[r] == INFINITY else rows.loss[r])
            rows.loss[r] += 0.0     # no loss is -0.0
    memcpy(batch.losses + first, rows.loss, n * sizeof(double))


# 1 - p_t. Exactly 1 where the target is out of reach, which others * (1/S) alone may miss by an ulp.
cdef inline double miss_of(double others, double at_target) noexcept nogil:
    cdef double total = others + at_target
    return 1.0 if others == total else others * (1.0 / total)


# Losses and gradient factors of the block's rows, in float64 vectors: no scalar logarithm, no library call.
cdef inline void finish_rows(Scratch* rows, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(n):
        finish_row(rows, r)


# log(1 - miss) is taken at its rounded argument and corrected by what the rounding lost. 0 * S carries a nan into the
# loss (the bit tricks of the logarithm drop it) and turns -0.0 into 0.0.
cdef inline void finish_row(Scratch* rows, Py_ssize_t r) noexcept nogil:
    cdef double ln2_high = 0.6931471805582987      # 38 bits: exact times any shift
    cdef double ln2_low = 1.6465949582897082e-12
    cdef double total, miss, x, lost, logarithm, exponent, z, sign, shift
    total = rows.others[r] + rows.at_target[r]
    rows.inverse[r] = 1.0 / total
    miss = miss_of(rows.others[r], rows.at_target[r])
    rows.miss[r] = miss
    x = 1.0 - miss if rows.at_target[r] >= rows.others[r] else total
    lost = (1.0 - x) - miss if rows.at_target[r] >= rows.others[r] else 0.0
    logarithm = log_mantissa(x) + lost * (2.0 - x)
    sign = -1.0 if rows.at_target[r] >= rows.others[r] else 1.0
    shift = 0.0 if rows.at_target[r] >= rows.others[r] else rows.shift[r]
    z = 0.0 if rows.at_target[r] >= rows.others[r] else rows.z_target[r]
    exponent = sign * log_exponent(x) + shift
    rows.loss[r] = (exponent * ln2_high - z) + (exponent * ln2_low + sign * logarithm) + 0.0 * total


# log(sum e^z) of a finished row: from its loss where the target has the most of it, else without z_t, which may be -inf.
cdef inline double lse_of(const Scratch* rows, Py_ssize_t r) noexcept nogil:
    cdef double total = rows.others[r] + rows.at_target[r], exponent
    if rows.at_target[r] >= rows.others[r]:
        return rows.offset[r] + (rows.z_target[r] + rows.loss[r])
    exponent = log_exponent(total) + rows.shift[r]
    return rows.offset[r] + exponent * 0.6931471805599453 + log_mantissa(total) + 0.0 * total


# What z_loss adds to the gradient's factor, once the row's sums are known.
cdef inline void steepen(const Batch* batch, Scratch* rows, Py_ssize_t r) noexcept nogil:
    if batch.options.z_loss != 0.0:
        finish_row(rows, r)
        rows.lse[r] = lse_of(rows, r)
        rows.steep[r] = 2.0 * batch.options.z_loss * rows.lse[r]


# What smoothing and z_loss add to the losses of finished rows.
cdef inline void add_options(const Batch* batch, Scratch* rows, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t r
    if not batch.options.none:
        for r in range(n):
            rows.loss[r] += rows.linear[r] + batch.options.z_loss * rows.lse[r] * rows.lse[r]


# Row r's gradient: out[j] = terms[j] * (scale/S) - scale * share, both factors rounded to the dtype; with z_loss the
# scale of the terms is steeper. Where a factor leaves the dtype's normal numbers the product must not underflow or
# overflow on the way: float32 rounds its mantissa alone and takes the product in float64, float64 takes it in two steps,
# by the power of two in 1/S and by the rest. The bits are those of an unbounded exponent.
cdef inline void scale_terms(
    floating* out, const floating* terms, Py_ssize_t n, const Scratch* rows, Py_ssize_t r, double share
) noexcept nogil:
    cdef double inverse = rows.inverse[r]
    cdef double scale = rows.scale[r] * (1.0 + rows.steep[r])
    cdef double factor = scale * inverse
    cdef double power, rest
    cdef Py_ssize_t j
    if is_normal_row(out, rows, r, share):
        shift_terms(out, terms, n, <floating>factor, <floating>shift_of(rows, r, share))
    elif share != 0.0:
        power = double_of_bits(bits_of_double(inverse) & <uint64_t>0x7ff0000000000000)
        rest = (1.0 + rows.steep[r]) * (inverse / power)
        for j in range(n):
            out[j] = <floating>(((terms[j] * power) * rest - share) * rows.scale[r])
    elif floating is float:
        power = double_of_bits(bits_of_double(factor) & <uint64_t>0x7ff0000000000000)
        rest = <float>(factor / power) * power if power < INFINITY else factor
        for j in range(n):
            out[j] = <float>(terms[j] * rest)
    else:
        power = double_of_bits(bits_of_double(inverse) & <uint64_t>0x7ff0000000000000)
        rest = scale * (inverse / power)
        for j in range(n):
            out[j] = (terms[j] * power) * rest


# What is added to row r's terms; -0.0 changes no bit of a product.
cdef inline double shift_of(const Scratch* rows, Py_ssize_t r, double share) noexcept nogil:
    return -0.0 if share == 0.0 else -rows.scale[r] * share


cdef inline void shift_terms(
    floating* out, const floating* terms, Py_ssize_t n, floating factor, floating shift
) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n):
        if floating is float:
            out[j] = multiply_add_float(terms[j], factor, shift)
        else:
            out[j] = multiply_add_double(terms[j], factor, shift)


cdef inline bint is_normal_row(const floating* like, const Scratch* rows, Py_ssize_t r, double share) noexcept nogil:
    if share != 0.0 and not is_normal(like, rows.scale[r], share):
        return False
    return is_normal(like, rows.scale[r] * (1.0 + rows.steep[r]), rows.inverse[r])


# Row r's gradient becomes pending. Streamed rows write the elements before the first 64-byte boundary at once; a factor
# out of range leaves nothing pending.
cdef inline void begin_row(
    floating* out, floating* terms, Py_ssize_t n, Scratch* rows, Py_ssize_t r, double share, bint stream,
    Pending* pending,
) noexcept nogil:
    cdef Py_ssize_t head = 0
    pending.factor = rows.scale[r] * (1.0 + rows.steep[r]) * rows.inverse[r]
    pending.shift = shift_of(rows, r, share)
    if not is_normal_row(out, rows, r, share):
        head = n
    elif stream:
        head = smaller(n, (64 - <uintptr_t>out % 64) % 64 // sizeof(floating))
    if head:
        scale_terms(out, terms, head, rows, r, share)
    pending.out = <char*>(out + head)
    pending.terms = <char*>(terms + head)
    pending.left = n - head
    pending.stream = stream


cdef inline void write_block(const floating* like, Pending* pending) noexcept nogil:
    cdef floating* out = <floating*>pending.out
    cdef const floating* terms = <const floating*>pending.terms
    if pending.stream:
        if floating is float:
            stream_float(out, terms, SUM_BLOCK, <float>pending.factor, <float>pending.shift)
        else:
            stream_double(out, terms, SUM_BLOCK, pending.factor, pending.shift)
    else:
        shift_terms(out, terms, SUM_BLOCK, <floating>pending.factor, <floating>pending.shift)
    pending.out += SUM_BLOCK * sizeof(floating)
    pending.terms += SUM_BLOCK * sizeof(floating)
    pending.left -= SUM_BLOCK


# What is left of the pending row; its last vector overlaps the one before it where there is room.
cdef inline void end_row(const floating* like, Pending* pending) noexcept nogil:
    cdef floating* out
    cdef const floating* terms
    cdef floating factor = <floating>pending.factor
    cdef floating shift = <floating>pending.shift
    cdef Py_ssize_t left, lines
    while pending.left >= SUM_BLOCK:
        write_block(like, pending)
    left = pending.left
    pending.left = 0
    out = <floating*>pending.out
    terms = <const floating*>pending.terms
    if pending.stream:
        lines = left - left % (64 // <Py_ssize_t>sizeof(floating))
        if floating is float:
            stream_float(out, terms, lines, factor, shift)
        else:
            stream_double(out, terms, lines, factor, shift)
        out += lines
        terms += lines
        left -= lines
    elif left >= LANES:
        shift_terms(out, terms, left - left % LANES, factor, shift)
        out += left - LANES
        terms += left - LANES
        left = LANES if left % LANES else 0
    shift_terms(out, terms, left, factor, shift)


# The gradient at the target of row r from the others, never p_t - 1: -(others/S) * scale, with smoothing and z_loss
# (steep * p_t + smoothing - share - others/S) * scale.
cdef inline double pull_of(const Batch* batch, const Scratch* rows, Py_ssize_t r, double miss) noexcept nogil:
    cdef double kept = batch.options.smoothing - batch.options.share
    return 0.0 - ((miss - kept) - rows.steep[r] * (rows.at_target[r] * rows.inverse[r])) * rows.scale[r]


# What is left to do once row r's gradient is written: the target, and classes that do not exist.
cdef inline void pull_target(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t r, const floating* like
) noexcept nogil:
    cdef floating* out = <floating*>(batch.out + (first + r) * batch.out_stride)
    cdef const uint8_t* mask = mask_of(batch, first + r)
    cdef Py_ssize_t t = batch.ids[first + r]
    out[t] = <floating>pull_of(batch, rows, r, miss_of(rows.others[r], rows.at_target[r]))
    if mask != NULL:
        hide_classes(mask, out, batch.n_classes, rows, r, t)


cdef inline const uint8_t* mask_of(const Batch* batch, Py_ssize_t row) noexcept nogil:
    cdef const uint8_t* mask = batch.options.transform.mask
    return NULL if mask == NULL else mask + row * batch.options.transform.mask_stride


# Classes that do not exist have terms of 0, but that is not enough for a target or where 0 met nan or an infinity.
cdef inline void hide_classes(
    const uint8_t* mask, floating* out, Py_ssize_t n, const Scratch* rows, Py_ssize_t r, Py_ssize_t t
) noexcept nogil:
    out[t] = out[t] if mask[t] else 0
    if not fabs(rows.scale[r] * (1.0 + rows.steep[r]) * rows.inverse[r]) < INFINITY:
        hide(mask, out, n)


# The Hessian's diagonal of rows [first, first + n) from their gradients, while these are in the cache: with k the row's
# scale the gradient is k p_c, so k p_c (1 - p_c) = g_c (1 - g_c / k), and at the target -g_t p_t. One rounding more
# than the gradient's, relative to k p_c.
cdef inline void curve_rows(
    const Batch* batch, const Scratch* rows, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t r, j, t
    cdef double scale, p
    cdef floating single
    cdef const floating* grad
    cdef floating* hess
    for r in range(n):
        hess = <floating*>(batch.hess + (first + r) * batch.hess_stride)
        grad = <const floating*>(batch.out + (first + r) * batch.out_stride)
        t = batch.ids[first + r]
        scale = rows.scale[r]
        single = <floating>scale
        if t < 0 or scale == 0.0:
            for j in range(batch.n_classes):
                hess[j] = grad[j] * 0       # nan in a row that is nan
            continue
        if is_normal(grad, scale, 1.0):
            for j in range(batch.n_classes):
                hess[j] = grad[j] * (1 - grad[j] / single)
        else:
            for j in range(batch.n_classes):
                p = grad[j] / scale
                hess[j] = <floating>(grad[j] * (1.0 - p))
        p = rows.at_target[r] / (rows.others[r] + rows.at_target[r])
        hess[t] = <floating>(miss_of(rows.others[r], rows.at_target[r]) * p * scale)
        if rows.others[r] > rows.at_target[r]:
            curve_leader(grad, hess, batch.n_classes, t, scale, p)


# The Hessian at a class other than the target with more than half of the probability, where 1 - g/k would cancel: 1 - p
# is what all others have together.
cdef inline void curve_leader(
    const floating* grad, floating* hess, Py_ssize_t n, Py_ssize_t t, double scale, double at_target
) noexcept nogil:
    cdef floating largest = row_maximum(grad, n)
    cdef double rest = at_target
    cdef Py_ssize_t j, leader = -1
    if scale < 0.0:
        largest = 0
        for j in range(n):
            largest = grad[j] if grad[j] < largest else largest
    if not largest / scale > 0.5:
        return
    for j in range(n):
        if leader < 0 and grad[j] == largest:
            leader = j
        elif j != t:
            rest += grad[j] / scale
    if leader >= 0:
        hess[leader] = <floating>(largest * rest)


# Whether scale * inverse is nan or a normal number of the dtype, with room to spare, or 0 because `scale` is.
cdef inline bint is_normal(const floating* like, double scale, double inverse) noexcept nogil:
    cdef double magnitude = 1.0 if scale == 0.0 else fabs(scale * inverse)
    return not (magnitude < smallest_factor(like) or magnitude > largest_factor(like))


cdef inline double smallest_factor(const floating* like) noexcept nogil:
    if floating is float:
        return 1.1754943508222875e-38
    else:
        return 2.2250738585072014e-308


cdef inline double largest_factor(const floating* like) noexcept nogil:
    if floating is float:
        return 1.7014118346046923e38
    else:
        return 8.98846567431158e307
