"""The row kernels: softmax cross-entropy of rows of logits and its gradient, float32 and float64, one text.

Compiled once per CPU target (setup.py). Knows pointers, lengths and numbers and trusts them: class ids are in range
or -1 (an ignored row, whose logits are never read); rows are contiguous, aligned and native.

With t the row's class and e_j = e^(z_j) * 2^-shift for some integer shift (vexp.pxd):

    others = sum_{j != t} e_j          summed without the target, never by subtracting it
    S      = others + e_t
    loss   = -log1p(-others/S)         where p_t >= 1/2: keeps every digit of a tiny loss
           = log(S) + shift*ln2 - z_t  elsewhere, where it is at least log 2 and nothing cancels
    grad_j = e_j * (scale/S),  grad_t = -(others/S) * scale, never p_t - 1

Rounding in units of u = 2^-24 (2^-53): e_j 1.2; S 1.2 and 3 for its sum (three levels of additions in the dtype, then
float64, compensated for float64 rows); scale/S 1; the product 1. Together 7.4 u = 4.4e-7 (8.2e-16). Every sum has a
fixed order that depends on the row's length alone, so a row's bits depend on nothing but the row.
"""

from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY, NAN, fabs
from libc.stdint cimport int32_t, int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cimport numpy as cnp

from fastce._kernels.vexp cimport (
    ExpWindow,
    bits_of_double,
    double_of_bits,
    exp_shifted,
    exp_window,
    floating,
    log_exponent,
    log_mantissa,
    shift_for,
)

cdef extern from "target.h" nogil:
    int OPENMP "FASTCE_OPENMP"
    int omp_get_max_threads "fastce_openmp_limit" ()
    int watch_forks "fastce_watch_forks" ()
    bint is_forked_child "fastce_is_forked_child" ()
    void stream_block_float "fastce_stream_block_float" (float* out, const float* terms, float factor)
    void stream_block_double "fastce_stream_block_double" (double* out, const double* terms, double factor)
    void prefetch "fastce_prefetch" (const void* address)
    void stream_fence "fastce_stream_fence" ()
    void sum_lanes_float "fastce_sum_lanes_float" (const float* row, Py_ssize_t n, int64_t t, double* lanes)
    void sum_lanes_double "fastce_sum_lanes_double" (const double* row, Py_ssize_t n, int64_t t, double* lanes)

cnp.import_array()
watch_forks()

cdef enum:
    LANES = 16              # of the sums: one 512-bit vector of float32
    SUM_BLOCK = 128         # elements that meet in the dtype before they are added in float64
    CHUNK = 4096            # elements of a row that are added up before the next are looked at; half an L1 cache
    SMALL_LANES = 4         # of the sums of small rows, once folded
    SMALL_CLASSES = 96      # rows up to this length are taken many at a time
    MEDIUM_CLASSES = 4096   # rows up to this length go through a pipeline of three rows, longer ones one by one
    BLOCK_ELEMENTS = 4096   # of a block of rows that share one pass through the phases
    BLOCK_ROWS = 128
    TASK_ELEMENTS = 16384   # the least that a thread takes at a time
    TASKS_PER_THREAD = 8    # so that a thread that starts late or is slow is not waited for
    SPLIT_CLASSES = 16384   # rows of at least so many elements are shared among the threads when there are few
    GIL_ELEMENTS = 4096     # batches below keep the GIL: handing it over and back costs more than 1 us of work
    PLAIN_ELEMENTS = 1 << 26  # batches above are walked in slabs, between which Ctrl-C is noticed
    IGNORE_INDEX = -100
    PREFETCH_BYTES = 2048   # how far ahead logits are asked for: the processor's own prefetch stops at each page
    KEEP_BYTES = 1 << 20    # the most that exponentials may take of the scratch
    STREAM_BYTES = 1 << 24  # gradients of this size and more are written past the caches

cdef double LN2_HIGH = 0.6931471805582987       # 38 bits: exact times any shift
cdef double LN2_LOW = 1.6465949582897082e-12


# One call's batch. `out` is NULL when no gradient is wanted, `scales` when every row's gradient is scaled alike.
cdef struct Batch:
    char* logits
    Py_ssize_t logits_stride
    char* out
    Py_ssize_t out_stride
    int64_t* ids
    double* scales
    double scale
    double* losses
    Py_ssize_t n_rows
    Py_ssize_t n_classes
    bint stream             # the gradient is too large for the caches and not written over the logits


# One thread's working memory: a number of each kind for each row of a block, and the block's exponentials. Arrays in
# one struct, so that the compiler knows them apart and takes the rows in vectors.
cdef struct Scratch:
    double[BLOCK_ROWS] others
    double[BLOCK_ROWS] at_target        # e_t
    double[BLOCK_ROWS] z_target
    double[BLOCK_ROWS] shift
    double[BLOCK_ROWS] scale            # of the row's gradient
    double[BLOCK_ROWS] inverse          # 1/S
    double[BLOCK_ROWS] miss             # others/S = 1 - p_t
    double[BLOCK_ROWS] loss
    double[BLOCK_ROWS * SMALL_LANES] partial
    double[BLOCK_ELEMENTS + SUM_BLOCK] gathered   # small rows side by side, when they do not lie so
    double[LANES] slack
    double[1] terms                     # e_j; as many as the block needs, from here on


cdef inline Py_ssize_t smaller(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a < b else b


cdef inline Py_ssize_t larger(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a > b else b


# The elements of a buffer for a row's exponentials: whole blocks.
cdef inline Py_ssize_t buffer_elements(Py_ssize_t n) noexcept nogil:
    return (n + SUM_BLOCK - 1) // SUM_BLOCK * SUM_BLOCK


# A row whose gradient is written block by block while the next row's exponentials are computed: the one is bound by
# the caches, the other by arithmetic.
cdef struct Pending:
    char* out               # what is still to be written, from a 64-byte boundary on
    char* terms
    Py_ssize_t left         # elements
    double factor           # scale/S
    bint stream             # past the caches


# ---- exponentials and sums of one row ------------------------------------------------------------------------------

# terms[i] = e^(x[i] - offset) * 2^-shift for i < n. What is left after the whole vectors goes through a buffer filled
# up with -inf: no scalar loop, and nothing is read beyond x[n - 1].
cdef void exp_terms(const floating* x, floating* terms, Py_ssize_t n, const ExpWindow* window) noexcept nogil:
    cdef floating offset = <floating>window.offset
    cdef floating low = <floating>window.low
    cdef floating high = <floating>window.high
    cdef floating magic = <floating>window.magic
    cdef Py_ssize_t i, whole = n - n % LANES
    cdef floating[LANES] last
    for i in range(whole):
        terms[i] = exp_shifted(x[i], offset, low, high, magic)
    if whole < n:
        for i in range(LANES):
            last[i] = -INFINITY
        memcpy(last, x + whole, (n - whole) * sizeof(floating))
        for i in range(LANES):
            last[i] = exp_shifted(last[i], offset, low, high, magic)
        memcpy(terms + whole, last, (n - whole) * sizeof(floating))


# LANES float64 sums in the making. float64 rows carry the rounding errors along (two-sum), which costs next to nothing:
# the adders are idle while the multipliers work on exponentials.
cdef struct Sum:
    double[LANES] total
    double[LANES] error


cdef inline void clear(Sum* sums) noexcept nogil:
    cdef Py_ssize_t lane
    for lane in range(LANES):
        sums.total[lane] = 0.0
        sums.error[lane] = 0.0


cdef inline void add_block(const floating* t, Sum* sums) noexcept nogil:
    cdef double block, before, after, part
    cdef Py_ssize_t lane
    for lane in range(LANES):
        block = <double>(
            ((t[lane] + t[lane + 16]) + (t[lane + 32] + t[lane + 48]))
            + ((t[lane + 64] + t[lane + 80]) + (t[lane + 96] + t[lane + 112]))
        )
        if floating is float:
            sums.total[lane] += block
        else:
            before = sums.total[lane]
            after = before + block
            part = after - before
            sums.error[lane] += (before - (after - part)) + (block - part)
            sums.total[lane] = after


cdef inline double total_of(Sum* sums) noexcept nogil:
    cdef Py_ssize_t lane
    for lane in range(LANES):
        sums.total[lane] += sums.error[lane]
    for lane in range(8):
        sums.total[lane] += sums.total[lane + 8]
    for lane in range(4):
        sums.total[lane] += sums.total[lane + 4]
    return (sums.total[0] + sums.total[2]) + (sums.total[1] + sums.total[3])


# The sum of a chunk's terms without element t (outside the chunk: of all), which goes to at_target. Every block is
# added while it is on its way to the cache; where `keep` is not set the blocks overwrite each other. The last vector of
# the row overlaps the one before it: rows have at least LANES elements here, and `terms` has LANES of slack in front.
cdef double sum_chunk(
    const floating* x, floating* terms, Py_ssize_t n, Py_ssize_t t, bint keep, const ExpWindow* window,
    double* at_target, Pending* pending,
) noexcept nogil:
    cdef floating offset = <floating>window.offset
    cdef floating low = <floating>window.low
    cdef floating high = <floating>window.high
    cdef floating magic = <floating>window.magic
    cdef Py_ssize_t _block, lane, rest, step = SUM_BLOCK if keep else 0, n_blocks = n // SUM_BLOCK
    cdef floating nothing = <floating>(0.0 * window.magic)  # 0, but not to gcc, which makes a slow "rep stos" of it
    cdef Sum sums
    clear(&sums)
    for _block in range(n_blocks):
        for lane in range(0, SUM_BLOCK * <Py_ssize_t>sizeof(floating) // 64):
            prefetch(<char*>x + PREFETCH_BYTES + lane * 64)
        for lane in range(SUM_BLOCK):
            terms[lane] = exp_shifted(x[lane], offset, low, high, magic)
        if 0 <= t < SUM_BLOCK:
            at_target[0] = terms[t]
            terms[t] = 0
        add_block(terms, &sums)
        if pending.left >= SUM_BLOCK:
            write_block(x, pending)
        x += SUM_BLOCK
        terms += step
        t -= SUM_BLOCK
    rest = n - n_blocks * SUM_BLOCK
    if rest:
        for lane in range(SUM_BLOCK):
            terms[lane] = nothing
        for lane in range(rest - rest % LANES):
            terms[lane] = exp_shifted(x[lane], offset, low, high, magic)
        if rest % LANES:
            terms += rest - LANES
            x += rest - LANES
            for lane in range(LANES):
                terms[lane] = exp_shifted(x[lane], offset, low, high, magic)
            terms -= rest - LANES
        if 0 <= t < rest:
            at_target[0] = terms[t]
            terms[t] = 0
        add_block(terms, &sums)
    return total_of(&sums)


cdef double row_maximum(const floating* x, Py_ssize_t n) noexcept nogil:
    cdef floating[64] largest
    cdef floating maximum
    cdef Py_ssize_t i, lane
    for lane in range(64):
        largest[lane] = -INFINITY
    for i in range(n // 64):
        for lane in range(64):
            largest[lane] = x[i * 64 + lane] if x[i * 64 + lane] > largest[lane] else largest[lane]
    for i in range(n - n % 64, n):
        largest[0] = x[i] if x[i] > largest[0] else largest[0]
    maximum = largest[0]
    for lane in range(1, 64):
        maximum = largest[lane] if largest[lane] > maximum else maximum
    return maximum


# The largest magnitude that exp_shifted takes without an offset: n * ln2_high stays exact, and beyond it the
# difference to the maximum is exact wherever a term is not 0 (Sterbenz: those lie within a factor 2 of the maximum).
cdef inline double exp_limit(const floating* x) noexcept nogil:
    if floating is float:
        return 1000.0
    else:
        return 4096.0


# The sum below which no term of a row was clamped at its window's high end.
cdef inline double sum_limit(const floating* x) noexcept nogil:
    if floating is float:
        return 1.5e37    # 2^123.5
    else:
        return 3.9e306   # 2^1018.5


# One sweep over the row: returns the sum without the target's term, which goes to at_target; where `keep` is set all
# terms are kept.
cdef double sum_row(
    const floating* x, floating* terms, Py_ssize_t n, Py_ssize_t t, bint keep, const ExpWindow* window,
    double* at_target, Pending* pending,
) noexcept nogil:
    cdef Py_ssize_t i, start
    cdef double chunk
    cdef double[2] total
    total[0] = total[1] = 0.0
    for i in range((n + CHUNK - 1) // CHUNK):
        start = i * CHUNK
        chunk = sum_chunk(
            x + start, terms + start if keep else terms, smaller(n - start, CHUNK), t - start, keep, window, at_target,
            pending,
        )
        add_chunk(total, chunk)
    return total[0] + total[1]


# total[0] + chunk with what the addition rounded off in total[1] (two-sum).
cdef inline void add_chunk(double* total, double chunk) noexcept nogil:
    cdef double after = total[0] + chunk
    cdef double part = after - total[0]
    total[1] += (total[0] - (after - part)) + (chunk - part)
    total[0] = after


cdef double sum_of_chunks(const double* chunks, Py_ssize_t n) noexcept nogil:
    cdef double[2] total
    cdef Py_ssize_t i
    total[0] = total[1] = 0.0
    for i in range(n):
        add_chunk(total, chunks[i])
    return total[0] + total[1]


# Row r of the block: its numbers into the rows. The first try scales by the target's own term and needs no
# maximum; it fails when a logit exceeds the target's by more than the window (or is nan, or the target is -inf).
cdef void take_row(
    const floating* x, floating* terms, Py_ssize_t n, Py_ssize_t t, bint keep, Scratch* rows, Py_ssize_t r,
    ExpWindow* window, Pending* pending,
) noexcept nogil:
    cdef double others, maximum, offset = 0.0, at_target = 0.0
    if fabs(x[t]) <= exp_limit(x):
        window[0] = exp_window(x, shift_for(x, x[t]), 0.0)
        others = sum_row(x, terms, n, t, keep, window, &at_target, pending)
        if others < sum_limit(x):
            put_row(rows, r, others, at_target, x[t], window.shift)
            return
    maximum = row_maximum(x, n)
    if fabs(maximum) == INFINITY:
        window[0] = exp_window(x, 0.0, NAN)
        put_row(rows, r, NAN, NAN, NAN, 0.0)
        return
    if fabs(maximum) > exp_limit(x):
        offset = maximum
    window[0] = exp_window(x, shift_for(x, maximum - offset), offset)
    others = sum_row(x, terms, n, t, keep, window, &at_target, pending)
    put_row(rows, r, others, at_target, x[t] - offset, window.shift)


cdef inline void put_row(
    Scratch* rows, Py_ssize_t r, double others, double at_target, double z_target, double shift
) noexcept nogil:
    rows.others[r] = others
    rows.at_target[r] = at_target
    rows.z_target[r] = z_target
    rows.shift[r] = shift


# 1 - p_t. Exactly 1 where the target is out of reach, which others * (1/S) alone may miss by an ulp.
cdef inline double miss_of(double others, double at_target) noexcept nogil:
    cdef double total = others + at_target
    return 1.0 if others == total else others * (1.0 / total)


# ---- losses and gradients ------------------------------------------------------------------------------------------

# Losses and gradient factors of the block's rows, in float64 vectors: no scalar logarithm, no library call.
# log(1 - miss) is taken at its rounded argument and corrected by what the rounding lost. 0 * S carries a nan into the
# loss (the bit tricks of the logarithm drop it) and turns -0.0 into 0.0.
cdef void finish_rows(Scratch* rows, Py_ssize_t n) noexcept nogil:
    cdef double total, miss, x, lost, logarithm, exponent, z
    cdef Py_ssize_t r
    for r in range(n):
        total = rows.others[r] + rows.at_target[r]
        rows.inverse[r] = 1.0 / total
        miss = miss_of(rows.others[r], rows.at_target[r])
        rows.miss[r] = miss
        x = 1.0 - miss if rows.at_target[r] >= rows.others[r] else total
        lost = (1.0 - x) - miss if rows.at_target[r] >= rows.others[r] else 0.0
        logarithm = log_mantissa(x) + lost * (2.0 - x)
        exponent = log_exponent(x)
        z = 0.0 if rows.at_target[r] >= rows.others[r] else rows.z_target[r]
        logarithm = -logarithm if rows.at_target[r] >= rows.others[r] else logarithm
        exponent = -exponent if rows.at_target[r] >= rows.others[r] else exponent + rows.shift[r]
        rows.loss[r] = (exponent * LN2_HIGH - z) + (exponent * LN2_LOW + logarithm) + 0.0 * total


# out[j] = terms[j] * (scale/S). Where scale/S leaves the normal numbers of the dtype the product is taken in two steps,
# by the power of two in 1/S and by the rest: the same bits, no underflow in between.
cdef void scale_terms(
    floating* out, const floating* terms, Py_ssize_t n, double scale, double inverse
) noexcept nogil:
    cdef double factor = scale * inverse
    cdef floating single = <floating>factor
    cdef floating power, rest
    cdef double inverse_power
    cdef Py_ssize_t j
    if is_normal(out, factor):
        for j in range(n):
            out[j] = terms[j] * single
    else:
        inverse_power = double_of_bits(bits_of_double(inverse) & <uint64_t>0x7ff0000000000000)
        power = <floating>inverse_power
        rest = <floating>(scale * (inverse / inverse_power))
        for j in range(n):
            out[j] = (terms[j] * power) * rest


# Row r's gradient becomes pending. Streamed rows write the elements before the first 64-byte boundary at once; a factor
# out of range leaves nothing pending.
cdef void begin_row(
    floating* out, floating* terms, Py_ssize_t n, Scratch* rows, Py_ssize_t r, bint stream, Pending* pending
) noexcept nogil:
    cdef Py_ssize_t head = 0
    pending.factor = rows.scale[r] * rows.inverse[r]
    if not is_normal(out, pending.factor):
        head = n
    elif stream:
        head = smaller(n, (64 - <uintptr_t>out % 64) % 64 // sizeof(floating))
    if head:
        scale_terms(out, terms, head, rows.scale[r], rows.inverse[r])
    pending.out = <char*>(out + head)
    pending.terms = <char*>(terms + head)
    pending.left = n - head
    pending.stream = stream


cdef inline void write_block(const floating* like, Pending* pending) noexcept nogil:
    cdef floating* out = <floating*>pending.out
    cdef const floating* terms = <const floating*>pending.terms
    cdef floating factor = <floating>pending.factor
    cdef Py_ssize_t lane
    if pending.stream:
        if floating is float:
            stream_block_float(out, terms, factor)
        else:
            stream_block_double(out, terms, factor)
    else:
        for lane in range(SUM_BLOCK):
            out[lane] = terms[lane] * factor
    pending.out += SUM_BLOCK * sizeof(floating)
    pending.terms += SUM_BLOCK * sizeof(floating)
    pending.left -= SUM_BLOCK


# What is left of the pending row; its last vector overlaps the one before it where there is room.
cdef void end_row(const floating* like, Pending* pending) noexcept nogil:
    cdef floating* out
    cdef const floating* terms
    cdef floating factor = <floating>pending.factor
    cdef Py_ssize_t j, left
    while pending.left >= SUM_BLOCK:
        write_block(like, pending)
    left = pending.left
    pending.left = 0
    out = <floating*>pending.out
    terms = <const floating*>pending.terms
    if left >= LANES:
        for j in range(left - left % LANES):
            out[j] = terms[j] * factor
        out += left - LANES
        terms += left - LANES
        left = LANES if left % LANES else 0
    for j in range(left):
        out[j] = terms[j] * factor


# Whether `factor` is 0, nan or a normal number of the dtype, with room to spare.
cdef inline bint is_normal(const floating* like, double factor) noexcept nogil:
    cdef double magnitude = 1.0 if factor == 0.0 else fabs(factor)
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


# ---- blocks of rows ------------------------------------------------------------------------------------------------

cdef void load_scales(const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(n):
        rows.scale[r] = batch.scale if batch.scales == NULL else batch.scales[first + r]


# Rows [first, first + n) of more than SMALL_CLASSES and at most MEDIUM_CLASSES classes, in a pipeline of three: while
# one row's exponentials are computed, those of the row before are summed and the gradient of the row before that is
# written, block by block, so that multipliers, adders and caches are busy together and no row waits for another's sum.
cdef void take_medium_rows(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes, width = buffer_elements(n_classes)
    cdef floating* terms = <floating*>rows.terms
    cdef const floating* x
    cdef floating* row_terms
    cdef floating* summed
    cdef Py_ssize_t[BLOCK_ROWS] live
    cdef Py_ssize_t i, r, before, n_live = 0
    cdef int64_t t
    cdef ExpWindow window, own
    cdef Pending pending
    cdef double others
    pending.left = 0
    load_scales(batch, rows, first, n)
    for r in range(n):
        if batch.ids[first + r] >= 0:
            live[n_live] = r
            n_live += 1
        else:
            put_row(rows, r, 0.0, 1.0, 0.0, 0.0)
            if batch.out != NULL:
                memset(batch.out + (first + r) * batch.out_stride, 0, n_classes * sizeof(floating))
    for i in range(n_live + 1):
        row_terms = terms + i % 3 * width
        summed = terms + (i + 2) % 3 * width if i > 0 else NULL
        x = NULL
        if i < n_live:
            r = live[i]
            t = batch.ids[first + r]
            x = <const floating*>(batch.logits + (first + r) * batch.logits_stride)
            window = exp_window(x, shift_for(x, x[t] if fabs(x[t]) <= exp_limit(x) else 0.0), 0.0)
        others = sweep(x, row_terms, n_classes, &window, summed, &pending)
        if batch.out != NULL:
            end_row(like, &pending)
            if i > 1:
                pull_target(batch, rows, first, live[i - 2], like)
        if i > 0:
            before = live[i - 1]
            rows.others[before] = others
            if not others < sum_limit(like) or not fabs(rows.z_target[before]) <= exp_limit(like):
                x = <const floating*>(batch.logits + (first + before) * batch.logits_stride)
                take_row(x, summed, n_classes, batch.ids[first + before], True, rows, before, &own, &pending)
            if batch.out != NULL:
                rows.inverse[before] = 1.0 / (rows.others[before] + rows.at_target[before])
                begin_row(
                    <floating*>(batch.out + (first + before) * batch.out_stride), summed, n_classes, rows, before,
                    batch.stream, &pending,
                )
        if i < n_live:
            x = <const floating*>(batch.logits + (first + r) * batch.logits_stride)
            put_row(rows, r, 0.0, row_terms[t], x[t], window.shift)
            row_terms[t] = 0
    if batch.out != NULL and n_live > 0:
        end_row(like, &pending)
        pull_target(batch, rows, first, live[n_live - 1], like)
    finish_rows(rows, n)
    memcpy(batch.losses + first, rows.loss, n * sizeof(double))


# One turn of the pipeline: exponentials of x into terms, the sum of another row's terms, a third row's gradient. Each
# of the three may be absent (x or summed NULL, nothing pending).
cdef double sweep(
    const floating* x, floating* terms, Py_ssize_t n, const ExpWindow* window, const floating* summed,
    Pending* pending,
) noexcept nogil:
    cdef floating offset = <floating>window.offset
    cdef floating low = <floating>window.low
    cdef floating high = <floating>window.high
    cdef floating magic = <floating>window.magic
    cdef floating nothing = <floating>(0.0 * window.magic)  # 0, but not to gcc, which makes a slow "rep stos" of it
    cdef Py_ssize_t block, lane, start, rest
    cdef Sum sums
    clear(&sums)
    for block in range((n + SUM_BLOCK - 1) // SUM_BLOCK):
        start = block * SUM_BLOCK
        rest = n - start
        if x != NULL:
            for lane in range(0, SUM_BLOCK * <Py_ssize_t>sizeof(floating) // 64):
                prefetch(<char*>(x + start) + PREFETCH_BYTES + lane * 64)
            if rest >= SUM_BLOCK:
                for lane in range(SUM_BLOCK):
                    terms[start + lane] = exp_shifted(x[start + lane], offset, low, high, magic)
            else:
                for lane in range(SUM_BLOCK):
                    terms[start + lane] = nothing
                for lane in range(rest - rest % LANES):
                    terms[start + lane] = exp_shifted(x[start + lane], offset, low, high, magic)
                for lane in range(n - LANES, n):
                    terms[lane] = exp_shifted(x[lane], offset, low, high, magic)
        if summed != NULL:
            add_block(summed + start, &sums)
        if pending.left >= SUM_BLOCK:
            write_block(terms, pending)
    return total_of(&sums)


# Rows [first, first + n) of more than MEDIUM_CLASSES classes. While one row's exponentials go into one buffer, the
# gradient of the row before is written from the other; all logarithms come at the end, in vectors. Rows of more than
# TWO_BUFFERS elements have one buffer, rows of more than KEEP_ELEMENTS none: they compute their exponentials twice.
cdef void take_rows(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes
    cdef bint keep = batch.out != NULL and keeps_terms(like, n_classes)
    cdef Py_ssize_t other = buffer_elements(n_classes) if has_two_buffers(like, n_classes) else 0
    cdef floating* terms = <floating*>rows.terms
    cdef const floating* x
    cdef floating* out
    cdef int64_t t
    cdef Py_ssize_t r, row_before = -1
    cdef ExpWindow window
    cdef Pending pending
    pending.left = 0
    load_scales(batch, rows, first, n)
    for r in range(n):
        t = batch.ids[first + r]
        if t < 0:
            put_row(rows, r, 0.0, 1.0, 0.0, 0.0)
            if batch.out != NULL:
                memset(batch.out + (first + r) * batch.out_stride, 0, n_classes * sizeof(floating))
            continue
        x = <const floating*>(batch.logits + (first + r) * batch.logits_stride)
        take_row(x, terms, n_classes, t, keep, rows, r, &window, &pending)
        if batch.out == NULL:
            continue
        end_row(x, &pending)
        if row_before >= 0:
            pull_target(batch, rows, first, row_before, like)
        rows.inverse[r] = 1.0 / (rows.others[r] + rows.at_target[r])
        out = <floating*>(batch.out + (first + r) * batch.out_stride)
        if keep:
            begin_row(out, terms, n_classes, rows, r, batch.stream, &pending)
            if other == 0:
                end_row(x, &pending)
            terms += other
            other = -other
        else:
            repeat_row(x, out, terms, n_classes, rows, r, &window)
        row_before = r
    end_row(like, &pending)
    if row_before >= 0:
        pull_target(batch, rows, first, row_before, like)
    finish_rows(rows, n)
    memcpy(batch.losses + first, rows.loss, n * sizeof(double))


# The gradient at the target of row r, from the others: -(others/S) * scale, never p_t - 1.
cdef void pull_target(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t r, const floating* like
) noexcept nogil:
    cdef floating* out = <floating*>(batch.out + (first + r) * batch.out_stride)
    out[batch.ids[first + r]] = <floating>(0.0 - miss_of(rows.others[r], rows.at_target[r]) * rows.scale[r])


# The gradient of a row that was too long to keep: its exponentials once more, chunk by chunk.
cdef void repeat_row(
    const floating* x, floating* out, floating* terms, Py_ssize_t n, Scratch* rows, Py_ssize_t r,
    const ExpWindow* window,
) noexcept nogil:
    cdef Py_ssize_t i, start, size
    for i in range((n + CHUNK - 1) // CHUNK):
        start = i * CHUNK
        size = smaller(n - start, CHUNK)
        exp_terms(x + start, terms, size, window)
        scale_terms(out + start, terms, size, rows.scale[r], rows.inverse[r])


cdef inline bint has_two_buffers(const floating* like, Py_ssize_t n_classes) noexcept nogil:
    return 2 * n_classes * <Py_ssize_t>sizeof(floating) <= KEEP_BYTES


cdef inline bint keeps_terms(const floating* like, Py_ssize_t n_classes) noexcept nogil:
    return n_classes * <Py_ssize_t>sizeof(floating) <= KEEP_BYTES


# Rows [first, first + n) of at most SMALL_CLASSES classes: one sweep of exponentials over all of them, with one shift
# for all (2^50: exact for rows whose sum lies between 2^-20 and 2^73); a row outside is taken by itself.
cdef void take_small_rows(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes
    cdef Py_ssize_t row_bytes = n_classes * sizeof(floating)
    cdef floating* terms = <floating*>rows.terms
    cdef const floating* x = <const floating*>(batch.logits + first * batch.logits_stride)
    cdef floating* gathered = <floating*>rows.gathered
    cdef int64_t* ids = batch.ids + first
    cdef double total
    cdef Py_ssize_t r, n_outside = 0
    cdef ExpWindow window
    if batch.logits_stride != row_bytes:
        for r in range(n):
            memcpy(gathered + r * n_classes, batch.logits + (first + r) * batch.logits_stride, row_bytes)
        x = gathered
    window = exp_window(like, small_shift(like), 0.0)
    exp_terms(x, terms, n * n_classes, &window)
    for r in range(n):
        rows.shift[r] = window.shift
    sum_small_rows(x, terms, n_classes, ids, n, rows)
    for r in range(n):
        total = rows.others[r] + rows.at_target[r]
        n_outside += 0 if small_sum_low(like) <= total < sum_limit(like) else 1
    if n_outside:
        for r in range(n):
            total = rows.others[r] + rows.at_target[r]
            if not small_sum_low(like) <= total < sum_limit(like):
                take_small_row(x + r * n_classes, terms + r * n_classes, n_classes, ids[r], rows, r)
    load_scales(batch, rows, first, n)
    finish_rows(rows, n)
    memcpy(batch.losses + first, rows.loss, n * sizeof(double))
    if batch.out != NULL:
        write_small_rows(
            <floating*>(batch.out + first * batch.out_stride), batch.out_stride, terms, n_classes, ids, n, rows,
        )


# One small row by itself, filled up with -inf to the least length that take_row knows.
cdef void take_small_row(
    const floating* x, floating* terms, Py_ssize_t n_classes, Py_ssize_t t, Scratch* rows, Py_ssize_t r
) noexcept nogil:
    cdef floating[SMALL_CLASSES] logits
    cdef floating[LANES + SUM_BLOCK] alone
    cdef Py_ssize_t j
    cdef ExpWindow window
    cdef Pending nothing
    nothing.left = 0
    for j in range(SMALL_CLASSES):
        logits[j] = -INFINITY
    memcpy(logits, x, n_classes * sizeof(floating))
    take_row(logits, alone + LANES, larger(n_classes, LANES), t, True, rows, r, &window, &nothing)
    memcpy(terms, alone + LANES, n_classes * sizeof(floating))


# others[r], e_t and z_t of each row; the sums in float64, lanes over the row, then a tree over the lanes of many rows at
# a time. Loads run up to 15 elements past a row's end, into the next row or the slack behind the block.
cdef void sum_small_rows(
    const floating* x, floating* terms, Py_ssize_t n_classes, const int64_t* ids, Py_ssize_t n, Scratch* rows
) noexcept nogil:
    cdef double* p = rows.partial
    cdef floating* row
    cdef int64_t t
    cdef Py_ssize_t r, i
    for r in range(n):
        row = terms + r * n_classes
        t = ids[r]
        if t < 0:
            memset(row, 0, n_classes * sizeof(floating))
            t = 0
            rows.at_target[r] = small_sum_low(x)
            rows.z_target[r] = 0.0
        else:
            rows.at_target[r] = row[t]
            rows.z_target[r] = x[r * n_classes + t]
        if floating is float:
            sum_lanes_float(row, n_classes, t, p + r * SMALL_LANES)
        else:
            sum_lanes_double(row, n_classes, t, p + r * SMALL_LANES)
    for r in range(n):
        i = r * SMALL_LANES
        rows.others[r] = (p[i] + p[i + 1]) + (p[i + 2] + p[i + 3])


# The gradients of a block of small rows. A row is written in whole vectors that run over into the next row, which is
# written after it; the last rows, where that would leave the block, and rows apart are written exactly.
cdef void write_small_rows(
    floating* out, Py_ssize_t out_stride, const floating* terms, Py_ssize_t n_classes, const int64_t* ids,
    Py_ssize_t n, Scratch* rows,
) noexcept nogil:
    cdef Py_ssize_t r, j, lane, n_special = 0, n_vectors = (n_classes + LANES - 1) // LANES
    cdef Py_ssize_t n_over = n - (n_vectors * LANES + n_classes - 1) // n_classes
    cdef floating* factor = <floating*>rows.partial
    cdef floating* pull = factor + BLOCK_ROWS
    cdef double both, magnitude
    cdef floating[LANES] vector
    cdef floating* row = out
    for r in range(n):
        both = rows.scale[r] * rows.inverse[r]
        factor[r] = <floating>both
        magnitude = 1.0 if both == 0.0 else fabs(both)
        n_special += 1 if magnitude < smallest_factor(out) else 0
        n_special += 1 if magnitude > largest_factor(out) else 0
        pull[r] = <floating>(0.0 - rows.miss[r] * rows.scale[r])
    if n_special or out_stride != n_classes * <Py_ssize_t>sizeof(floating):
        n_over = 0
    for r in range(n_over):
        for j in range(n_vectors):
            for lane in range(LANES):
                vector[lane] = terms[j * LANES + lane] * factor[r]
            memcpy(row + j * LANES, vector, sizeof(vector))
        row[ids[r] if ids[r] > 0 else 0] = pull[r] if ids[r] >= 0 else 0
        terms += n_classes
        row += n_classes
    for r in range(n_over if n_over > 0 else 0, n):
        row = <floating*>(<char*>out + r * out_stride)
        if ids[r] < 0:
            memset(row, 0, n_classes * sizeof(floating))
        else:
            scale_terms(row, terms, n_classes, rows.scale[r], rows.inverse[r])
            row[ids[r]] = pull[r]
        terms += n_classes


cdef inline double small_shift(const floating* like) noexcept nogil:
    if floating is float:
        return -50.0
    else:
        return -500.0


cdef inline double small_sum_low(const floating* like) noexcept nogil:
    if floating is float:
        return 1073741824.0      # 2^30: what was flushed is below 2^-127 * 96 / 2^30 of the row's sum
    else:
        return 4.0e138           # 2^460


# ---- the batch -----------------------------------------------------------------------------------------------------

# Rows [first, first + n) in blocks; every thread calls this with its own rows.
cdef void take_task(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n, Py_ssize_t block_rows, const floating* like
) noexcept nogil:
    cdef Py_ssize_t i, start, size
    for i in range((n + block_rows - 1) // block_rows):
        start = i * block_rows
        size = smaller(block_rows, n - start)
        if batch.n_classes <= SMALL_CLASSES:
            take_small_rows(batch, rows, first + start, size, like)
        elif batch.n_classes <= MEDIUM_CLASSES:
            take_medium_rows(batch, rows, first + start, size, like)
        else:
            take_rows(batch, rows, first + start, size, like)
    if batch.stream:
        stream_fence()


# How a batch is divided. The scratch of thread i lies at memory + i * thread_bytes.
cdef struct Plan:
    int num_threads
    Py_ssize_t block_rows
    Py_ssize_t task_rows
    Py_ssize_t n_tasks
    Py_ssize_t thread_bytes
    char* memory
    bint split              # columns instead of rows


cdef Py_ssize_t terms_needed(const Batch* batch, const floating* like) noexcept nogil:
    if batch.n_classes <= SMALL_CLASSES:
        return BLOCK_ELEMENTS
    if batch.n_classes <= MEDIUM_CLASSES:
        return 3 * buffer_elements(batch.n_classes)
    if batch.out == NULL:
        return CHUNK
    if has_two_buffers(like, batch.n_classes):
        return larger(CHUNK, 2 * buffer_elements(batch.n_classes))
    if keeps_terms(like, batch.n_classes):
        return buffer_elements(batch.n_classes)
    return CHUNK


# Tasks are small enough to share the work evenly, and large enough to hide that sharing costs a microsecond or two.
cdef Plan plan_batch(const Batch* batch, int num_threads, const floating* like) noexcept nogil:
    cdef Plan plan
    cdef Py_ssize_t n_rows = batch.n_rows, n_classes = batch.n_classes
    plan.block_rows = BLOCK_ROWS
    if n_classes <= SMALL_CLASSES:
        plan.block_rows = smaller(BLOCK_ROWS, BLOCK_ELEMENTS // n_classes)
    plan.task_rows = larger(n_rows // (TASKS_PER_THREAD * num_threads), TASK_ELEMENTS // n_classes)
    if plan.task_rows > plan.block_rows:
        plan.task_rows -= plan.task_rows % plan.block_rows
    plan.task_rows = larger(plan.task_rows, plan.block_rows if n_classes <= SMALL_CLASSES else 1)
    plan.n_tasks = (n_rows + plan.task_rows - 1) // plan.task_rows
    if is_forked_child():
        num_threads = 1
    plan.split = num_threads > 1 and n_classes >= SPLIT_CLASSES and n_rows < TASKS_PER_THREAD * num_threads
    plan.num_threads = num_threads if plan.split else <int>smaller(num_threads, plan.n_tasks)
    plan.thread_bytes = sizeof(Scratch) + (terms_needed(batch, like) + SUM_BLOCK) * sizeof(floating)
    plan.thread_bytes += (64 - plan.thread_bytes % 64) % 64
    return plan


# The whole batch; returns False when the scratch cannot be had, before anything is written. One thread never enters
# OpenMP, nor does a forked child, in which the parent's pool is dead and would hang it.
cdef bint take_batch(Batch* batch, int num_threads, const floating* like) noexcept nogil:
    cdef Py_ssize_t n_rows = batch.n_rows, n_classes = batch.n_classes
    cdef Plan plan
    cdef Py_ssize_t task, n_bytes
    cdef char* memory
    if n_rows == 0:
        return True
    batch.stream = n_rows * n_classes * <Py_ssize_t>sizeof(floating) >= STREAM_BYTES and batch.out != batch.logits
    plan = plan_batch(batch, num_threads, like)
    n_bytes = plan.num_threads * plan.thread_bytes + 64
    if plan.split:
        n_bytes += split_terms_bytes(batch, plan.num_threads, like) + split_bytes(batch)
    memory = <char*>malloc(n_bytes)
    if memory == NULL:
        return False
    plan.memory = memory + (64 - <uintptr_t>memory % 64) % 64
    if plan.split:
        split_rows(batch, &plan, like)
    elif plan.num_threads == 1:
        take_task(batch, <Scratch*>plan.memory, 0, n_rows, plan.block_rows, like)
    else:
        for task in prange(plan.n_tasks, num_threads=plan.num_threads, schedule="dynamic", chunksize=1):
            take_task(
                batch, <Scratch*>(plan.memory + threadid() * plan.thread_bytes), task * plan.task_rows,
                smaller(plan.task_rows, n_rows - task * plan.task_rows), plan.block_rows, like,
            )
    free(memory)
    return True


# ---- few rows, many classes: the columns over the threads ----------------------------------------------------------

# What is known of a row while its chunks are spread over the threads.
cdef struct SplitRow:
    ExpWindow window
    double at_target
    bint whole              # to be taken by take_rows after all: ignored, or its target's window does not fit


cdef struct Split:
    SplitRow* rows
    double* sums            # of the chunks, row by row
    char* terms             # of the chunks, each behind a vector of slack; NULL: to be computed twice
    Py_ssize_t n_chunks     # of a row


cdef inline Py_ssize_t chunks_of(Py_ssize_t n_classes) noexcept nogil:
    return (n_classes + CHUNK - 1) // CHUNK


cdef Py_ssize_t split_bytes(const Batch* batch) noexcept nogil:
    return batch.n_rows * (sizeof(SplitRow) + chunks_of(batch.n_classes) * sizeof(double)) + 64


cdef Py_ssize_t split_terms_bytes(const Batch* batch, int num_threads, const floating* like) noexcept nogil:
    cdef Py_ssize_t n_bytes = batch.n_rows * chunks_of(batch.n_classes) * (CHUNK + LANES) * sizeof(floating)
    return n_bytes if batch.out != NULL and n_bytes <= num_threads * KEEP_BYTES else 0


# The same numbers as take_rows, to the bit: chunks of the same size are summed in the same order. First all chunk
# sums; then, once S is known, all gradients, from exponentials that were kept or are computed a second time.
cdef void split_rows(Batch* batch, const Plan* plan, const floating* like) noexcept nogil:
    cdef Py_ssize_t n_rows = batch.n_rows, r, task, n_tasks
    cdef Scratch* rows = <Scratch*>plan.memory
    cdef char* memory = plan.memory + plan.num_threads * plan.thread_bytes
    cdef Split split
    cdef SplitRow* row
    cdef const floating* x
    cdef int64_t t
    cdef double others
    split.terms = memory if split_terms_bytes(batch, plan.num_threads, like) else NULL
    memory += split_terms_bytes(batch, plan.num_threads, like)
    split.n_chunks = chunks_of(batch.n_classes)
    split.rows = <SplitRow*>memory
    split.sums = <double*>(split.rows + n_rows)
    n_tasks = n_rows * split.n_chunks
    for r in range(n_rows):
        row = split.rows + r
        t = batch.ids[r]
        x = <const floating*>(batch.logits + r * batch.logits_stride)
        row.whole = t < 0 or not fabs(x[larger(t, 0)]) <= exp_limit(x)
        if not row.whole:
            row.window = exp_window(x, shift_for(x, x[t]), 0.0)
    for task in prange(n_tasks, num_threads=plan.num_threads, schedule="static"):
        sum_split(batch, plan, &split, task, like)
    load_scales(batch, rows, 0, n_rows)
    for r in range(n_rows):
        row = split.rows + r
        put_row(rows, r, 0.0, 1.0, 0.0, 0.0)
        if not row.whole:
            x = <const floating*>(batch.logits + r * batch.logits_stride)
            others = sum_of_chunks(split.sums + r * split.n_chunks, split.n_chunks)
            row.whole = not others < sum_limit(x)
            put_row(rows, r, others, row.at_target, x[batch.ids[r]], row.window.shift)
    finish_rows(rows, n_rows)
    memcpy(batch.losses, rows.loss, n_rows * sizeof(double))
    if batch.out != NULL:
        for task in prange(n_tasks, num_threads=plan.num_threads, schedule="static"):
            write_split(batch, plan, &split, rows, task, like)
        for r in range(n_rows):
            if not split.rows[r].whole:
                pull_target(batch, rows, 0, r, like)
    for r in range(n_rows):
        if split.rows[r].whole:
            take_rows(batch, rows, r, 1, like)


# The exponentials of a chunk: kept for the second round, or in the thread's own scratch.
cdef inline floating* split_terms(
    const Plan* plan, const Split* split, Py_ssize_t task, const floating* like
) noexcept nogil:
    if split.terms == NULL:
        return <floating*>(<Scratch*>(plan.memory + threadid() * plan.thread_bytes)).terms
    return <floating*>split.terms + task * (CHUNK + LANES) + LANES


cdef void sum_split(
    const Batch* batch, const Plan* plan, const Split* split, Py_ssize_t task, const floating* like
) noexcept nogil:
    cdef Py_ssize_t r = task // split.n_chunks, start = task % split.n_chunks * CHUNK
    cdef const floating* x = <const floating*>(batch.logits + r * batch.logits_stride)
    cdef SplitRow* row = split.rows + r
    cdef Pending nothing
    nothing.left = 0
    if not row.whole:
        split.sums[task] = sum_chunk(
            x + start, split_terms(plan, split, task, like), smaller(batch.n_classes - start, CHUNK),
            batch.ids[r] - start, True, &row.window, &row.at_target, &nothing,
        )


cdef void write_split(
    const Batch* batch, const Plan* plan, const Split* split, const Scratch* rows, Py_ssize_t task,
    const floating* like,
) noexcept nogil:
    cdef Py_ssize_t r = task // split.n_chunks, start = task % split.n_chunks * CHUNK
    cdef const floating* x = <const floating*>(batch.logits + r * batch.logits_stride)
    cdef floating* out = <floating*>(batch.out + r * batch.out_stride)
    cdef floating* terms = split_terms(plan, split, task, like)
    cdef Py_ssize_t size = smaller(batch.n_classes - start, CHUNK)
    if not split.rows[r].whole:
        if split.terms == NULL:
            exp_terms(x + start, terms, size, &split.rows[r].window)
        scale_terms(out + start, terms, size, rows.scale[r], rows.inverse[r])


# ---- entry points --------------------------------------------------------------------------------------------------

def cross_entropy_rows(
    cnp.ndarray logits, cnp.ndarray ids, cnp.ndarray losses, double scale, cnp.ndarray scales, cnp.ndarray out,
    int num_threads,
):
    """Fill `losses` (N,) float64 and, unless None, `out` (N, C) with d(sum of scale * loss)/d(logits).

    `logits` (N, C) has contiguous rows; `ids` (N,) int64 are in range or negative (ignored); `scales` (N,) float64
    multiplies each row's gradient, or None for `scale` throughout; `out` may be `logits`.
    """
    cdef Batch batch
    batch.logits = <char*>cnp.PyArray_DATA(logits)
    batch.logits_stride = cnp.PyArray_STRIDE(logits, 0)
    batch.out = NULL if out is None else <char*>cnp.PyArray_DATA(out)
    batch.out_stride = 0 if out is None else cnp.PyArray_STRIDE(out, 0)
    batch.ids = <int64_t*>cnp.PyArray_DATA(ids)
    batch.scales = NULL if scales is None else <double*>cnp.PyArray_DATA(scales)
    batch.scale = scale
    batch.losses = <double*>cnp.PyArray_DATA(losses)
    batch.n_rows = cnp.PyArray_DIM(logits, 0)
    batch.n_classes = cnp.PyArray_DIM(logits, 1)
    if not take_any_batch(&batch, num_threads, cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32):
        raise MemoryError("fastce could not allocate its working memory")


# The plain case in one call: C-contiguous native (N, C) logits, int64 or int32 ids (N,), no options, the mean. Whatever
# is not plain, errors included, is left to the general way: the answer is None and nothing has been written.
def plain_cross_entropy(logits, targets, out, bint with_grad, Py_ssize_t serial_elements, choose_threads):
    """Return (mean loss, gradient or None) of a plain call, or None if it is not one."""
    cdef Batch batch
    cdef Py_ssize_t n_rows, n_classes, n_live
    cdef int num_threads = 1
    cdef int kind
    cdef bint done
    cdef double total
    cdef char* memory
    if not is_plain(logits, 2) or not is_plain(targets, 1):
        return None
    kind = cnp.PyArray_TYPE(logits)
    n_rows = cnp.PyArray_DIM(logits, 0)
    n_classes = cnp.PyArray_DIM(logits, 1)
    if (
        kind not in (cnp.NPY_FLOAT32, cnp.NPY_FLOAT64)
        or cnp.PyArray_TYPE(targets) not in (cnp.NPY_INT64, cnp.NPY_INT32)
        or cnp.PyArray_DIM(targets, 0) != n_rows
        or n_rows == 0
        or n_classes == 0
        or n_rows * n_classes > PLAIN_ELEMENTS
        or (out is not None and not is_plain_out(out, logits))
    ):
        return None
    memory = <char*>malloc(n_rows * (sizeof(int64_t) + sizeof(double)))
    if memory == NULL:
        raise MemoryError("fastce could not allocate its working memory")
    batch.losses = <double*>memory
    batch.ids = <int64_t*>(memory + n_rows * sizeof(double))
    n_live = copy_ids(<cnp.ndarray>targets, batch.ids, n_rows, n_classes)
    if n_live <= 0:
        free(memory)
        return None
    try:
        if n_rows * n_classes >= serial_elements:
            num_threads = choose_threads()
        if with_grad and out is None:
            out = cnp.PyArray_EMPTY(2, cnp.PyArray_DIMS(logits), kind, 0)
        batch.logits = <char*>cnp.PyArray_DATA(logits)
        batch.out = <char*>cnp.PyArray_DATA(out) if with_grad else NULL
        batch.logits_stride = n_classes * cnp.PyArray_ITEMSIZE(logits)
        batch.out_stride = batch.logits_stride
        batch.scales = NULL
        batch.scale = 1.0 / n_live
        batch.n_rows = n_rows
        batch.n_classes = n_classes
        done = take_any_batch(&batch, num_threads, kind == cnp.NPY_FLOAT32)
        total = pairwise_sum(batch.losses, n_rows)
    finally:
        free(memory)
    if not done:
        raise MemoryError("fastce could not allocate its working memory")
    return total / n_live, out


cdef inline bint is_plain(array, int n_axes) noexcept:
    return (
        cnp.PyArray_CheckExact(array)
        and cnp.PyArray_NDIM(array) == n_axes
        and cnp.PyArray_ISCARRAY_RO(array)
    )


cdef inline bint is_plain_out(out, logits) noexcept:
    cdef char* a
    cdef char* b
    if not (
        is_plain(out, 2)
        and cnp.PyArray_ISWRITEABLE(out)
        and cnp.PyArray_TYPE(out) == cnp.PyArray_TYPE(logits)
        and cnp.PyArray_DIM(out, 0) == cnp.PyArray_DIM(logits, 0)
        and cnp.PyArray_DIM(out, 1) == cnp.PyArray_DIM(logits, 1)
    ):
        return False
    a, b = <char*>cnp.PyArray_DATA(out), <char*>cnp.PyArray_DATA(logits)
    return a == b or a + cnp.PyArray_NBYTES(out) <= b or b + cnp.PyArray_NBYTES(out) <= a


# Copies ids with IGNORE_INDEX as -1; returns how many are live, or -1 if one is out of range.
cdef Py_ssize_t copy_ids(cnp.ndarray targets, int64_t* ids, Py_ssize_t n, Py_ssize_t n_classes) noexcept nogil:
    cdef const int64_t* wide = <const int64_t*>cnp.PyArray_DATA(targets)
    cdef const int32_t* narrow = <const int32_t*>cnp.PyArray_DATA(targets)
    cdef bint is_wide = cnp.PyArray_TYPE(targets) == cnp.NPY_INT64
    cdef Py_ssize_t i, n_ignored = 0, n_outside = 0
    cdef int64_t t
    for i in range(n):
        t = wide[i] if is_wide else narrow[i]
        n_outside += 1 if <uint64_t>t >= <uint64_t>n_classes else 0
        n_ignored += 1 if t == IGNORE_INDEX else 0
        ids[i] = -1 if t == IGNORE_INDEX else t
    return n - n_ignored if n_outside == n_ignored else -1


cdef bint take_any_batch(Batch* batch, int num_threads, bint single):
    cdef bint done
    if num_threads == 1 and batch.n_rows * batch.n_classes < GIL_ELEMENTS:
        return take_batch_of(batch, 1, single)
    with nogil:
        done = take_batch_of(batch, num_threads, single)
    return done


cdef bint take_batch_of(Batch* batch, int num_threads, bint single) noexcept nogil:
    if single:
        return take_batch(batch, num_threads, <const float*>NULL)
    return take_batch(batch, num_threads, <const double*>NULL)


def encode_ids(cnp.ndarray ids, Py_ssize_t n_classes, cnp.ndarray ignored):
    """Return (lowest row whose id is neither ignored nor in [0, n_classes) or -1, number of live rows).

    If there is no such row, ignored ids in `ids` (N,) int64 are replaced by -1, which is what the kernels skip.
    """
    cdef int64_t* t = <int64_t*>cnp.PyArray_DATA(ids)
    cdef int64_t* skip = <int64_t*>cnp.PyArray_DATA(ignored)
    cdef Py_ssize_t n = cnp.PyArray_DIM(ids, 0), n_skip = cnp.PyArray_DIM(ignored, 0)
    cdef Py_ssize_t i, j, hits, n_bad = 0, n_ignored = 0, first_bad = -1
    with nogil:
        for i in range(n):
            n_bad += <uint64_t>t[i] >= <uint64_t>n_classes
        for j in range(n_skip):
            hits = 0
            for i in range(n):
                hits += t[i] == skip[j]
            n_ignored += hits
            if <uint64_t>skip[j] >= <uint64_t>n_classes:
                n_bad -= hits
        if n_bad:
            first_bad = 0
            while not is_bad(t[first_bad], n_classes, skip, n_skip):
                first_bad += 1
        elif n_ignored:
            for j in range(n_skip):
                for i in range(n):
                    t[i] = -1 if t[i] == skip[j] else t[i]
    return first_bad, n - n_ignored


cdef bint is_bad(int64_t t, Py_ssize_t n_classes, const int64_t* skip, Py_ssize_t n_skip) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n_skip):
        if t == skip[j]:
            return False
    return <uint64_t>t >= <uint64_t>n_classes


cdef double pairwise_sum(const double* x, Py_ssize_t n) noexcept nogil:
    cdef double[8] lanes
    cdef Py_ssize_t i, lane, half
    if n > 256:
        half = n // 512 * 256 if n >= 512 else 256
        return pairwise_sum(x, half) + pairwise_sum(x + half, n - half)
    for lane in range(8):
        lanes[lane] = 0.0
    for i in range(0, n - 7, 8):
        for lane in range(8):
            lanes[lane] += x[i + lane]
    for i in range(n - n % 8, n):
        lanes[i % 8] += x[i]
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))


def sum_losses(cnp.ndarray losses):
    """Return the sum of `losses` (N,) float64: pairwise over fixed blocks, so its bits depend on the values alone."""
    return pairwise_sum(<double*>cnp.PyArray_DATA(losses), cnp.PyArray_DIM(losses, 0))


def has_openmp():
    """Return whether this module was built with OpenMP."""
    return OPENMP != 0


def openmp_limit():
    """Return the number of threads that OpenMP would use for the calling thread, 1 without it."""
    return omp_get_max_threads()
