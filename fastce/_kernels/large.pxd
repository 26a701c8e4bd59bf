"""Long rows, one by one, and the careful way for any row whose target does not set the scale."""

from libc.math cimport INFINITY, NAN, fabs
from libc.stdint cimport int64_t, uint8_t

from fastce._kernels.block cimport (
    Batch,
    Curve,
    Pending,
    Scratch,
    add_options,
    begin_row,
    clear_row,
    curve_of,
    curve_terms,
    end_row,
    finish_rows,
    load_scales,
    mask_of,
    nothing_pending,
    pull_target,
    put_losses,
    put_row,
    scale_terms,
    steepen,
    terms_of,
    write_block,
)
from fastce._kernels.lanes cimport (
    CHUNK,
    PREFETCH_BYTES,
    SUM_BLOCK,
    Sum,
    add_block,
    add_chunk,
    buffer_elements,
    chunks_of,
    clear,
    exceeds_window,
    exp_limit,
    exp_terms,
    prefetch,
    smaller,
    sum_limit,
    total_of,
    window_below,
)
from fastce._kernels.staged cimport Options, exp_block, far_below, stage_block, staged_logit, staged_maximum
from fastce._kernels.vexp cimport ExpWindow, exp_window, floating, shift_for

cdef enum:
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
    cdef const Options* options = &batch.options
    cdef const uint8_t* mask
    cdef const floating* x
    cdef int64_t t
    cdef Py_ssize_t r, row_before = -1
    cdef bint wide = False
    cdef ExpWindow window
    cdef Pending pending = nothing_pending()
    load_scales(batch, rows, first, n)
    for r in range(n):
        t = batch.ids[first + r]
        if t < 0:
            put_row(rows, r, 0.0, 1.0, 0.0, 0.0, 0.0)
            clear_row(batch, first + r, like)
            continue
        x = <const floating*>(batch.logits + (first + r) * batch.logits_stride)
        mask = mask_of(batch, first + r)
        take_row(options, x, mask, terms, n_classes, t, keep, rows, r, &window, &pending, &wide)
        steepen(batch, rows, r)
        if batch.out == NULL:
            continue
        end_row(x, &pending)
        if row_before >= 0:
            pull_target(batch, rows, first, row_before, pending.n_leading, like)
        rows.inverse[r] = 1.0 / (rows.others[r] + rows.at_target[r])
        if keep:
            begin_row(batch, terms, rows, first + r, r, &pending)
            if other == 0:
                end_row(x, &pending)
            terms += other
            other = -other
        else:
            pending.n_leading = repeat_row(batch, x, mask, terms, rows, first + r, r, &window)
        row_before = r
    end_row(like, &pending)
    if row_before >= 0:
        pull_target(batch, rows, first, row_before, pending.n_leading, like)
    finish_rows(rows, n)
    add_options(batch, rows, n)
    put_losses(batch, rows, first, n)


# Row r's numbers. The first try scales by the target's own term and needs no maximum; it fails when a logit exceeds the
# target's by more than the window (or is nan, or the target is -inf). After a row that failed (`wide`) the maximum is
# taken first, which tells most failures in advance: logits of spread 60 took 1.05 ns each without and 0.49 with it
# ((1024, 1000), 1 thread), others cost nothing. The numbers are the same either way.
cdef inline void take_row(
    const Options* options, const floating* x, const uint8_t* mask, floating* terms, Py_ssize_t n, Py_ssize_t t,
    bint keep, Scratch* rows, Py_ssize_t r, ExpWindow* window, Pending* pending, bint* wide,
) noexcept nogil:
    cdef floating z_target = staged_logit(options, x, mask, t)
    cdef double others, maximum = NAN, at_target = 0.0, below = 0.0
    if wide[0]:
        maximum = staged_maximum(options, x, mask, n)
        wide[0] = exceeds_window(x, maximum, z_target)
    if not wide[0] and fabs(z_target) <= exp_limit(x):
        window[0] = exp_window(x, shift_for(x, z_target), 0.0)
        others = sum_row(options, x, mask, terms, n, t, keep, window, z_target, &at_target, &below, pending)
        if others < sum_limit(x):
            put_row(rows, r, others, at_target, z_target, window.shift, 0.0)
            put_below(options, x, n, t, rows, r, below)
            return
    wide[0] = True
    if maximum != maximum:
        maximum = staged_maximum(options, x, mask, n)
    window[0] = window_below(x, maximum)
    if fabs(maximum) == INFINITY:
        put_row(rows, r, NAN, NAN, NAN, 0.0, 0.0)
        return
    others = sum_row(options, x, mask, terms, n, t, keep, window, z_target, &at_target, &below, pending)
    put_row(rows, r, others, at_target, z_target - window.offset, window.shift, window.offset)
    put_below(options, x, n, t, rows, r, below)


# Smoothing's part of the loss, from the sum of z_t - z_c.
cdef inline void put_below(
    const Options* options, const floating* x, Py_ssize_t n, Py_ssize_t t, Scratch* rows, Py_ssize_t r, double below
) noexcept nogil:
    if options.share != 0.0:
        rows.linear[r] = options.share * below
        if not fabs(below) < INFINITY:
            rows.linear[r] = far_below(options, x, n, t)


# One sweep over the row: returns the sum without the target's term, which goes to at_target; where `keep` is set all
# terms are kept. With smoothing the sum of z_t - z goes to `below`.
cdef inline double sum_row(
    const Options* options, const floating* x, const uint8_t* mask, floating* terms, Py_ssize_t n, Py_ssize_t t,
    bint keep, const ExpWindow* window, floating z_target, double* at_target, double* below, Pending* pending,
) noexcept nogil:
    cdef Py_ssize_t i, start, stop
    cdef double chunk, chunk_below = 0.0
    cdef double[2] total
    cdef double[2] total_below
    total[0] = total[1] = total_below[0] = total_below[1] = 0.0
    for i in range(chunks_of(n)):
        start = i * CHUNK
        stop = smaller(n, start + CHUNK)
        chunk = sum_chunk(
            options, x, mask, start, stop, terms + start if keep else terms, t, keep, window, z_target, at_target,
            &chunk_below, pending,
        )
        add_chunk(total, chunk)
        add_chunk(total_below, chunk_below)
    below[0] = total_below[0] + total_below[1]
    return total[0] + total[1]


# The sum of the terms of a chunk, classes [first, stop) of a row, without that of t, which goes to at_target. Every
# block is added while it is on its way to the cache; where `keep` is not set the blocks overwrite each other.
cdef inline double sum_chunk(
    const Options* options, const floating* x, const uint8_t* mask, Py_ssize_t first, Py_ssize_t stop, floating* terms,
    Py_ssize_t t, bint keep, const ExpWindow* window, floating z_target, double* at_target, double* below,
    Pending* pending,
) noexcept nogil:
    cdef floating offset = <floating>window.offset
    cdef floating low = <floating>window.low
    cdef floating high = <floating>window.high
    cdef floating magic = <floating>window.magic
    cdef Py_ssize_t block, start, lane, step = SUM_BLOCK if keep else 0
    cdef Sum sums, differences
    clear(&sums)
    if options.share != 0.0:
        clear(&differences)
    for block in range((stop - first + SUM_BLOCK - 1) // SUM_BLOCK):
        start = first + block * SUM_BLOCK
        for lane in range(0, SUM_BLOCK * <Py_ssize_t>sizeof(floating) // 64):
            prefetch(<char*>(x + start) + PREFETCH_BYTES + lane * 64)
        exp_block(options, x, mask, start, stop, terms, offset, low, high, magic, z_target, &differences)
        if 0 <= t - start < SUM_BLOCK:
            at_target[0] = terms[t - start]
            terms[t - start] = 0
        add_block(terms, &sums)
        if pending.left >= SUM_BLOCK:
            write_block(x, pending)
        terms += step
    if options.share != 0.0:
        below[0] = total_of(&differences)
    return total_of(&sums)


# The gradient and Hessian of a row that was too long to keep: its exponentials once more, chunk by chunk. Returns how
# many classes lead.
cdef inline int repeat_row(
    const Batch* batch, const floating* x, const uint8_t* mask, floating* terms, Scratch* rows, Py_ssize_t row,
    Py_ssize_t r, const ExpWindow* window,
) noexcept nogil:
    cdef int n_leading = 0
    cdef Py_ssize_t i, start, size
    for i in range(chunks_of(batch.n_classes)):
        start = i * CHUNK
        size = smaller(batch.n_classes - start, CHUNK)
        repeat_terms(&batch.options, x, mask, start, size, terms, window)
        n_leading += write_chunk(batch, terms, start, size, rows, row, r)
    return n_leading


cdef inline int write_chunk(
    const Batch* batch, const floating* terms, Py_ssize_t start, Py_ssize_t size, const Scratch* rows, Py_ssize_t row,
    Py_ssize_t r,
) noexcept nogil:
    cdef floating* out = <floating*>(batch.out + row * batch.out_stride) + start
    cdef Curve curve
    scale_terms(out, terms, size, rows, r, batch.options.share)
    if batch.hess == NULL:
        return 0
    curve = curve_of(batch, rows, r)
    return curve_terms(<floating*>(batch.hess + row * batch.hess_stride) + start, terms, size, &curve)


# The terms of n classes from `start` on once more; transformed logits take their place first.
cdef inline void repeat_terms(
    const Options* options, const floating* x, const uint8_t* mask, Py_ssize_t start, Py_ssize_t n, floating* terms,
    const ExpWindow* window,
) noexcept nogil:
    if options.is_staged:
        stage_block(options, x, mask, start, n, terms)
    exp_terms(terms if options.is_staged else x + start, terms, n, window)


cdef inline bint has_two_buffers(const floating* like, Py_ssize_t n_classes) noexcept nogil:
    return 2 * n_classes * <Py_ssize_t>sizeof(floating) <= KEEP_BYTES


cdef inline bint keeps_terms(const floating* like, Py_ssize_t n_classes) noexcept nogil:
    return n_classes * <Py_ssize_t>sizeof(floating) <= KEEP_BYTES
