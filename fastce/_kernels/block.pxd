"""A block of rows on its way through the kernels: what is known of each row, its loss, the writing of its gradient."""

from libc.math cimport INFINITY, fabs
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

from fastce._kernels.lanes cimport LANES, SUM_BLOCK, add_chunk, smaller
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
from fastce._kernels.weights cimport Weights, weights_of

cdef extern from "target.h" nogil:
    void stream_float "fastce_stream_float" (float* out, const float* terms, Py_ssize_t n, float factor, float shift)
    void stream_double "fastce_stream_double" (
        double* out, const double* terms, Py_ssize_t n, double factor, double shift
    )

cdef enum:
    BLOCK_ROWS = 128        # rows that share one pass through the logarithms
    BLOCK_ELEMENTS = 4096   # of a block of small rows; half an L1 cache of float32
    SMALL_LANES = 4         # of the sums of small rows, once folded
    TASKS_PER_THREAD = 8    # so that a thread that starts late or is slow is not waited for
    # Gradients of this size and more are written past the caches (32 MB of last-level cache): (256, 32000) took 0.33 ns
    # a logit without and 0.29 with it, (3000, 1000), 12 MB, 0.20 and 0.25 (2 threads).
    STREAM_BYTES = 1 << 24


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
    bint is_softmax         # `out` gets probabilities; class `ids[r]` is then only what sets row r's scale
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
    double[BLOCK_ROWS] lse              # with z_loss; of general rows always
    double[BLOCK_ROWS] steep            # 2 z_loss lse
    double[BLOCK_ROWS] weight           # of the row and its class, where classes have weights
    double[BLOCK_ROWS] scale            # of the row's gradient
    double[BLOCK_ROWS] inverse          # 1/S
    double[BLOCK_ROWS] miss             # others/S = 1 - p_t
    double[BLOCK_ROWS] loss
    double[BLOCK_ROWS * SMALL_LANES] partial
    double[BLOCK_ROWS * SMALL_LANES] below          # of the differences that make up linear, in small rows
    double[BLOCK_ROWS] largest_part     # of the sums that make up others, in small rows: no term is larger
    double[BLOCK_ELEMENTS + SUM_BLOCK] gathered   # small rows side by side, when they do not lie so
    uint8_t[BLOCK_ELEMENTS] masks                 # theirs
    double[BLOCK_ELEMENTS] limits                 # of one mask for all of them
    double[LANES] slack                 # before the exponentials, which follow the struct


cdef inline char* terms_of(Scratch* rows) noexcept nogil:
    return <char*>(rows + 1)


# What makes a row's Hessian of its terms: with p = terms/S it is p * (curved * (1 - p) + squared * p), where curved
# is the gradient's scale times logit_scale and squared the part of z_loss; p * (curved + bend * p) with bend =
# squared - curved.
cdef struct Curve:
    double inverse          # 1/S
    double curved
    double squared
    double bend


# A row whose gradient is written block by block while the next row's exponentials are computed: the one is bound by
# the caches, the other by arithmetic.
cdef struct Pending:
    char* out               # what is still to be written; streamed, from a 64-byte boundary on
    char* terms
    Py_ssize_t left         # elements
    double factor           # scale/S
    double shift            # -scale * share
    bint stream             # past the caches
    char* hess              # of the Hessian, or NULL
    bint stream_hess
    Curve curve
    int n_leading           # whether a class has most of the probability; the target may count as well


# Whether a batch's results of so many bytes are written past the caches.
cdef inline bint is_streamed(Py_ssize_t n_bytes, const char* out, const char* logits) noexcept nogil:
    return n_bytes >= STREAM_BYTES and out != logits


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
    cdef Weights kinds
    cdef const double* weights
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
        kinds = weights_in(batch)
        weights = weights_of(&kinds, first, n, rows.weight)
        for r in range(n):
            rows.scale[r] *= weights[r]


cdef inline bint has_weights(const Batch* batch) noexcept nogil:
    return batch.weight != NULL or batch.sample_weight != NULL


cdef inline Weights weights_in(const Batch* batch) noexcept nogil:
    cdef Weights weights
    weights.ids = batch.ids
    weights.of_classes = batch.weight
    weights.of_samples = batch.sample_weight
    return weights


# The losses of rows [first, first + n) leave the block, weighted; a weight of 0 makes an infinite loss 0.
cdef inline void put_losses(const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef const double* weights
    cdef double loss
    cdef Py_ssize_t r
    if has_weights(batch):
        weights = &rows.weight[0] if batch.weight != NULL else batch.sample_weight + first
        for r in range(n):
            loss = 0.0 if weights[r] == 0.0 and rows.loss[r] == INFINITY else rows.loss[r]
            rows.loss[r] = weights[r] * loss + 0.0      # never -0.0
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


# log(sum e^z) of a finished row: from its loss where the target has the most of it, else without z_t, which may be
# -inf.
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
# overflow on the way: float32 rounds its mantissa alone and takes the product in float64, float64 takes it in two
# steps, by the power of two in 1/S and by the rest. The bits are those of an unbounded exponent.
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
        rest = <float>(factor / power) * power if 0.0 < power < INFINITY else factor
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


# Row r's gradient and Hessian become pending. Streamed rows write the elements before the first 64-byte boundary at
# once; a factor out of range leaves nothing pending.
cdef inline void begin_row(
    const Batch* batch, floating* terms, Scratch* rows, Py_ssize_t row, Py_ssize_t r, Pending* pending
) noexcept nogil:
    cdef floating* out = <floating*>(batch.out + row * batch.out_stride)
    cdef floating* hess = <floating*>batch.hess
    cdef double share = batch.options.share
    cdef Py_ssize_t n = batch.n_classes, head = 0
    pending.factor = rows.scale[r] * (1.0 + rows.steep[r]) * rows.inverse[r]
    pending.shift = shift_of(rows, r, share)
    if hess != NULL:
        hess = <floating*>(batch.hess + row * batch.hess_stride)
        pending.curve = curve_of(batch, rows, r)
        pending.n_leading = 0
        pending.stream_hess = batch.stream and <uintptr_t>hess % 64 == <uintptr_t>out % 64
    if not is_normal_row(out, rows, r, share) or (hess != NULL and not is_normal_curve(out, &pending.curve)):
        head = n
    elif batch.stream:
        head = before_line(out, n)
    if head:
        scale_terms(out, terms, head, rows, r, share)
        if hess != NULL:
            pending.n_leading += curve_terms(hess, terms, head, &pending.curve)
    pending.out = <char*>(out + head)
    pending.hess = NULL if hess == NULL else <char*>(hess + head)
    pending.terms = <char*>(terms + head)
    pending.left = n - head
    pending.stream = batch.stream


# How many of n elements lie before the first 64-byte boundary, from which on they may be streamed.
cdef inline Py_ssize_t before_line(const floating* out, Py_ssize_t n) noexcept nogil:
    return smaller(n, (64 - <uintptr_t>out % 64) % 64 // sizeof(floating))


cdef inline void write_block(const floating* like, Pending* pending) noexcept nogil:
    cdef floating* out = <floating*>pending.out
    cdef const floating* terms = <const floating*>pending.terms
    if pending.stream:
        stream(out, terms, SUM_BLOCK, <floating>pending.factor, <floating>pending.shift)
    else:
        shift_terms(out, terms, SUM_BLOCK, <floating>pending.factor, <floating>pending.shift)
    if pending.hess != NULL:
        curve_block(terms, SUM_BLOCK, pending)
    pending.out += SUM_BLOCK * sizeof(floating)
    pending.terms += SUM_BLOCK * sizeof(floating)
    pending.left -= SUM_BLOCK


cdef inline void stream(
    floating* out, const floating* terms, Py_ssize_t n, floating factor, floating shift
) noexcept nogil:
    if floating is float:
        stream_float(out, terms, n, factor, shift)
    else:
        stream_double(out, terms, n, factor, shift)


# A piece of a gradient leaves past the caches, but for the ends that do not fill a line.
cdef inline void stream_piece(floating* out, const floating* results, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t line = 64 // <Py_ssize_t>sizeof(floating)
    cdef Py_ssize_t head = before_line(out, n)
    cdef Py_ssize_t body = (n - head) // line * line
    memcpy(out, results, head * sizeof(floating))
    stream(out + head, results + head, body, 1, -0.0)
    memcpy(out + head + body, results + head + body, (n - head - body) * sizeof(floating))


# The Hessian of the next n <= SUM_BLOCK pending elements; a streamed one passes through a buffer.
cdef inline void curve_block(const floating* terms, Py_ssize_t n, Pending* pending) noexcept nogil:
    cdef floating[SUM_BLOCK] buffer
    cdef floating* hess = <floating*>pending.hess
    cdef floating* place = hess
    cdef Py_ssize_t lines = n - n % (64 // <Py_ssize_t>sizeof(floating))
    if pending.stream_hess:
        place = buffer
    pending.n_leading += curve_normal_terms(
        place, terms, n, <floating>pending.curve.inverse, <floating>pending.curve.curved, <floating>pending.curve.bend
    )
    if pending.stream_hess:
        stream(hess, buffer, lines, 1, -0.0)
        memcpy(hess + lines, buffer + lines, (n - lines) * sizeof(floating))
    pending.hess += n * sizeof(floating)


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
    if left > 0 and pending.hess != NULL:
        curve_block(terms, left, pending)
    if pending.stream:
        lines = left - left % (64 // <Py_ssize_t>sizeof(floating))
        stream(out, terms, lines, factor, shift)
        out += lines
        terms += lines
        left -= lines
    elif left >= LANES:
        shift_terms(out, terms, left - left % LANES, factor, shift)
        out += left - LANES
        terms += left - LANES
        left = LANES if left % LANES else 0
    shift_terms(out, terms, left, factor, shift)


# ---- the Hessian -----------------------------------------------------------------------------------------------------

cdef inline Curve curve_of(const Batch* batch, const Scratch* rows, Py_ssize_t r) noexcept nogil:
    cdef double scale = rows.scale[r] * batch.options.transform.scale
    cdef Curve curve
    curve.inverse = rows.inverse[r]
    curve.curved = scale * (1.0 + rows.steep[r])
    curve.squared = 0.0 if batch.options.z_loss == 0.0 else 2.0 * batch.options.z_loss * scale
    curve.bend = curve.squared - curve.curved
    return curve


# Whether a row's Hessian may be taken in the dtype.
cdef inline bint is_normal_curve(const floating* like, const Curve* curve) noexcept nogil:
    return (
        is_normal(like, curve.curved, 1.0)
        and is_normal(like, curve.bend, 1.0)
        and is_normal(like, 1.0, curve.inverse)
    )


# hess[j] of terms[j], but for the target and for a class that has three quarters of the probability or more, where 1
# - p would cancel; returns how many of the latter there are.
cdef inline int curve_terms(
    floating* hess, const floating* terms, Py_ssize_t n, const Curve* curve
) noexcept nogil:
    if is_normal_curve(hess, curve):
        return curve_normal_terms(
            hess, terms, n, <floating>curve.inverse, <floating>curve.curved, <floating>curve.bend
        )
    return curve_exactly(hess, terms, n, curve)


# The same in float64.
cdef inline int curve_exactly(
    floating* hess, const floating* terms, Py_ssize_t n, const Curve* curve
) noexcept nogil:
    cdef double p
    cdef int n_leading = 0
    cdef Py_ssize_t j
    for j in range(n):
        p = terms[j] * curve.inverse
        hess[j] = <floating>(p * (curve.curved * (1.0 - p) + curve.squared * p))
        n_leading += 1 if p > 0.75 else 0
    return n_leading


cdef inline int curve_normal_terms(
    floating* hess, const floating* terms, Py_ssize_t n, floating inverse, floating curved, floating bend
) noexcept nogil:
    cdef floating p, most = 0.75
    cdef int n_leading = 0
    cdef Py_ssize_t j
    for j in range(n):
        p = terms[j] * inverse
        if floating is float:
            hess[j] = p * multiply_add_float(p, bend, curved)
        else:
            hess[j] = p * multiply_add_double(p, bend, curved)
        n_leading += 1 if p > most else 0
    return n_leading


# The Hessian at the target, where 1 - p is others/S.
cdef inline double curve_at_target(const Curve* curve, const Scratch* rows, Py_ssize_t r, double miss) noexcept nogil:
    cdef double p = rows.at_target[r] * curve.inverse
    return p * (curve.curved * miss + curve.squared * p)


# The Hessian at the class that leads without being the target: 1 - p is what all others have together, which their
# gradients tell, unless smoothing hides them or they leave the dtype's normal numbers.
cdef inline void curve_leader(
    const Batch* batch, const Scratch* rows, Py_ssize_t row, Py_ssize_t r, const Curve* curve, const floating* like
) noexcept nogil:
    cdef const floating* grad = <const floating*>(batch.out + row * batch.out_stride)
    cdef floating* hess = <floating*>(batch.hess + row * batch.hess_stride)
    cdef double factor = 1.0 / (rows.scale[r] * (1.0 + rows.steep[r]))
    cdef double shift = -<floating>shift_of(rows, r, batch.options.share)    # as rounded: no p is negative
    cdef double largest = 0.0, p, miss
    cdef double[2] rest
    cdef Py_ssize_t j, leader = -1
    if batch.options.share > 0.25 * fabs(1.0 + rows.steep[r]) or not is_normal_row(grad, rows, r, batch.options.share):
        return
    rest[0] = rows.at_target[r] * curve.inverse
    rest[1] = 0.0
    for j in range(batch.n_classes):
        p = (grad[j] + shift) * factor if j != batch.ids[row] else 0.0
        if not fabs(p) < 2.0:
            return
        if p > 0.5:
            leader = j
            largest = p
        else:
            add_chunk(rest, p)
    if leader >= 0:
        miss = rest[0] + rest[1]
        hess[leader] = <floating>(largest * (curve.curved * miss + curve.squared * largest))


# The gradient at the target of row r from the others, never p_t - 1: -(others/S) * scale, with smoothing and z_loss
# (steep * p_t + smoothing - share - others/S) * scale.
cdef inline double pull_of(const Batch* batch, const Scratch* rows, Py_ssize_t r, double miss) noexcept nogil:
    cdef double kept = batch.options.smoothing - batch.options.share
    if batch.is_softmax:
        return 1.0 if rows.others[r] == 0.0 else rows.at_target[r] * rows.inverse[r]
    return 0.0 - ((miss - kept) - rows.steep[r] * (rows.at_target[r] * rows.inverse[r])) * rows.scale[r]


# What is left to do once row r's gradient is written: the target, and classes that do not exist.
cdef inline void pull_target(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t r, int n_leading, const floating* like
) noexcept nogil:
    cdef floating* out = <floating*>(batch.out + (first + r) * batch.out_stride)
    cdef const uint8_t* mask = mask_of(batch, first + r)
    cdef Py_ssize_t t = batch.ids[first + r]
    cdef double miss = miss_of(rows.others[r], rows.at_target[r])
    cdef floating* hess
    cdef Curve curve
    out[t] = <floating>pull_of(batch, rows, r, miss)
    if mask != NULL:
        hide_classes(mask, out, batch.n_classes, rows, r, t)
    if batch.hess != NULL:
        hess = <floating*>(batch.hess + (first + r) * batch.hess_stride)
        curve = curve_of(batch, rows, r)
        hess[t] = <floating>curve_at_target(&curve, rows, r, miss)
        if n_leading:
            curve_leader(batch, rows, first + r, r, &curve, like)
        if mask != NULL:
            hide(mask, hess, batch.n_classes)


# An ignored row has neither.
cdef inline void clear_row(const Batch* batch, Py_ssize_t row, const floating* like) noexcept nogil:
    if batch.out != NULL:
        memset(batch.out + row * batch.out_stride, 0, batch.n_classes * sizeof(floating))
    if batch.hess != NULL:
        memset(batch.hess + row * batch.hess_stride, 0, batch.n_classes * sizeof(floating))


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


# Whether scale * inverse is nan or a normal number of the dtype, with room to spare, or 0 because `scale` is.
cdef inline bint is_normal(const floating* like, double scale, double inverse) noexcept nogil:
    cdef double magnitude = 1.0 if scale == 0.0 else fabs(scale * inverse)
    return not (magnitude < smallest_factor(like) or magnitude > largest_factor(like))


# Not 0 where is_normal(like, scale, product / scale) is false, for loops over rows: there a choice between two numbers
# becomes a branch, and the loop has no vectors.
cdef inline Py_ssize_t leaves_dtype(const floating* like, double product, double scale) noexcept nogil:
    cdef double magnitude = fabs(product) + (1.0 if scale == 0.0 else 0.0)
    return (1 if magnitude < smallest_factor(like) else 0) + (1 if magnitude > largest_factor(like) else 0)


# The sum of row r's lanes.
cdef inline double lane_sum(const double* lanes, Py_ssize_t r) noexcept nogil:
    cdef Py_ssize_t i = r * SMALL_LANES
    return (lanes[i] + lanes[i + 1]) + (lanes[i + 2] + lanes[i + 3])


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
