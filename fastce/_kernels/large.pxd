"""Long rows, one by one, and the careful way for any row whose target does not set the scale."""

from libc.math cimport INFINITY, NAN, fabs
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from fastce._kernels.block cimport (
    Batch,
    Pending,
    Scratch,
    begin_row,
    end_row,
    finish_rows,
    load_scales,
    nothing_pending,
    pull_target,
    put_losses,
    put_row,
    scale_terms,
    terms_of,
    write_block,
)
from fastce._kernels.lanes cimport (
    CHUNK,
    LANES,
    SUM_BLOCK,
    Sum,
    add_block,
    add_chunk,
    buffer_elements,
    chunks_of,
    clear,
    exceeds_window,
    exp_last_block,
    exp_limit,
    exp_terms,
    row_maximum,
    smaller,
    sum_limit,
    total_of,
)
from fastce._kernels.vexp cimport ExpWindow, exp_shifted, exp_window, floating, shift_for

cdef extern from "target.h" nogil:
    void prefetch "fastce_prefetch" (const void* address)

cdef enum:
    # How far ahead logits are asked for: the processor's own prefetch stops at each page of 4 KB. (2048, 32000) took
    # 0.32 ns a logit without, 0.20 with 2 KB, 0.22 with 1, 4 or 8 KB (2 threads).
    PREFETCH_BYTES = 2048
    # The most that a thread keeps of exponentials. Rows that fit it twice are written while the next is read: with
    # half of it (512, 128256), which then has one buffer, took 0.28 ns a logit instead of 0.19 (2 threads).
    KEEP_BYTES = 1 << 20


# Rows [first, first + n). While one row's exponentials go into one buffer, the gradient of the row before is written
# from the other; all logarithms come at the end, in vectors. Rows that do not fit KEEP_BYTES twice have one buffer,
# rows that do not fit it once have none: they compute their exponentials twice.
cdef inline void take_rows(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes
    cdef bint keep = batch.out != NULL and keeps_terms(like, n_classes)
    cdef Py_ssize_t other = buffer_elements(n_classes) if has_two_buffers(like, n_classes) else 0
    cdef floating* terms = <floating*>terms_of(rows)
    cdef const floating* x
    cdef floating* out
    cdef int64_t t
    cdef Py_ssize_t r, row_before = -1
    cdef bint wide = False
    cdef ExpWindow window
    cdef Pending pending = nothing_pending()
    load_scales(batch, rows, first, n)
    for r in range(n):
        t = batch.ids[first + r]
        if t < 0:
            put_row(rows, r, 0.0, 1.0, 0.0, 0.0)
            if batch.out != NULL:
                memset(batch.out + (first + r) * batch.out_stride, 0, n_classes * sizeof(floating))
            continue
        x = <const floating*>(batch.logits + (first + r) * batch.logits_stride)
        take_row(x, terms, n_classes, t, keep, rows, r, &window, &pending, &wide)
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
    put_losses(batch, rows, first, n)


# Row r's numbers. The first try scales by the target's own term and needs no maximum; it fails when a logit exceeds the
# target's by more than the window (or is nan, or the target is -inf). After a row that failed (`wide`) the maximum is
# taken first, which tells most failures in advance: logits of spread 60 took 1.05 ns each without and 0.49 with it
# ((1024, 1000), 1 thread), others cost nothing. The numbers are the same either way.
cdef inline void take_row(
    const floating* x, floating* terms, Py_ssize_t n, Py_ssize_t t, bint keep, Scratch* rows, Py_ssize_t r,
    ExpWindow* window, Pending* pending, bint* wide,
) noexcept nogil:
    cdef double others, maximum = NAN, offset = 0.0, at_target = 0.0
    if wide[0]:
        maximum = row_maximum(x, n)
        wide[0] = exceeds_window(x, maximum, x[t])
    if not wide[0] and fabs(x[t]) <= exp_limit(x):
        window[0] = exp_window(x, shift_for(x, x[t]), 0.0)
        others = sum_row(x, terms, n, t, keep, window, &at_target, pending)
        if others < sum_limit(x):
            put_row(rows, r, others, at_target, x[t], window.shift)
            return
    wide[0] = True
    if maximum != maximum:
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


# One sweep over the row: returns the sum without the target's term, which goes to at_target; where `keep` is set all
# terms are kept.
cdef inline double sum_row(
    const floating* x, floating* terms, Py_ssize_t n, Py_ssize_t t, bint keep, const ExpWindow* window,
    double* at_target, Pending* pending,
) noexcept nogil:
    cdef Py_ssize_t i, start
    cdef double chunk
    cdef double[2] total
    total[0] = total[1] = 0.0
    for i in range(chunks_of(n)):
        start = i * CHUNK
        chunk = sum_chunk(
            x + start, terms + start if keep else terms, smaller(n - start, CHUNK), t - start, keep, window, at_target,
            pending,
        )
        add_chunk(total, chunk)
    return total[0] + total[1]


# The sum of a chunk's terms without element t (outside the chunk: of all), which goes to at_target. Every block is
# added while it is on its way to the cache; where `keep` is not set the blocks overwrite each other.
cdef inline double sum_chunk(
    const floating* x, floating* terms, Py_ssize_t n, Py_ssize_t t, bint keep, const ExpWindow* window,
    double* at_target, Pending* pending,
) noexcept nogil:
    cdef floating offset = <floating>window.offset
    cdef floating low = <floating>window.low
    cdef floating high = <floating>window.high
    cdef floating magic = <floating>window.magic
    cdef Py_ssize_t _block, lane, rest, step = SUM_BLOCK if keep else 0, n_blocks = n // SUM_BLOCK
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
        exp_last_block(x, terms, rest, offset, low, high, magic)
        if 0 <= t < rest:
            at_target[0] = terms[t]
            terms[t] = 0
        add_block(terms, &sums)
    return total_of(&sums)


# The gradient of a row that was too long to keep: its exponentials once more, chunk by chunk.
cdef inline void repeat_row(
    const floating* x, floating* out, floating* terms, Py_ssize_t n, Scratch* rows, Py_ssize_t r,
    const ExpWindow* window,
) noexcept nogil:
    cdef Py_ssize_t i, start, size
    for i in range(chunks_of(n)):
        start = i * CHUNK
        size = smaller(n - start, CHUNK)
        exp_terms(x + start, terms, size, window)
        scale_terms(out + start, terms, size, rows.scale[r], rows.inverse[r])


cdef inline bint has_two_buffers(const floating* like, Py_ssize_t n_classes) noexcept nogil:
    return 2 * n_classes * <Py_ssize_t>sizeof(floating) <= KEEP_BYTES


cdef inline bint keeps_terms(const floating* like, Py_ssize_t n_classes) noexcept nogil:
    return n_classes * <Py_ssize_t>sizeof(floating) <= KEEP_BYTES
