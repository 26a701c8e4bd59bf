"""Rows of a few hundred to a few thousand classes, in a pipeline of three."""

from libc.math cimport fabs
from libc.stdint cimport int64_t, uint8_t

from fastce._kernels.block cimport (
    BLOCK_ROWS,
    Batch,
    Pending,
    Scratch,
    add_options,
    begin_row,
    clear_row,
    end_row,
    finish_rows,
    load_scales,
    mask_of,
    nothing_pending,
    pull_target,
    put_losses,
    put_row,
    steepen,
    terms_of,
    write_block,
)
from fastce._kernels.lanes cimport (
    PREFETCH_BYTES,
    SUM_BLOCK,
    Sum,
    add_block,
    buffer_elements,
    clear,
    exceeds_window,
    exp_limit,
    prefetch,
    sum_limit,
    total_of,
)
from fastce._kernels.large cimport put_below, take_row
from fastce._kernels.staged cimport Options, exp_block, staged_logit, staged_maximum
from fastce._kernels.vexp cimport ExpWindow, exp_window, floating, shift_for


# Rows [first, first + n) in a pipeline of three: while one row's exponentials are computed, those of the row before are
# summed and the gradient of the row before that is written, block by block, so that multipliers, adders and caches are
# busy together and no row waits for another's sum.
cdef inline void take_medium_rows(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes, width = buffer_elements(n_classes)
    cdef floating* terms = <floating*>terms_of(rows)
    cdef const Options* options = &batch.options
    cdef const uint8_t* mask
    cdef const floating* x
    cdef floating* row_terms
    cdef floating* summed
    cdef Py_ssize_t[BLOCK_ROWS] live
    cdef Py_ssize_t i, r, before, n_live = 0
    cdef int64_t t
    cdef bint wide = False
    cdef floating z_target
    cdef double pivot, others, below
    cdef ExpWindow window, own
    cdef Pending pending = nothing_pending()
    load_scales(batch, rows, first, n)
    for r in range(n):
        if batch.ids[first + r] >= 0:
            live[n_live] = r
            n_live += 1
        else:
            put_row(rows, r, 0.0, 1.0, 0.0, 0.0, 0.0)
            clear_row(batch, first + r, like)
    for i in range(n_live + 1):
        row_terms = terms + i % 3 * width
        summed = terms + (i + 2) % 3 * width if i > 0 else NULL
        x = NULL
        mask = NULL
        z_target = 0
        if i < n_live:
            r = live[i]
            t = batch.ids[first + r]
            x = <const floating*>(batch.logits + (first + r) * batch.logits_stride)
            mask = mask_of(batch, first + r)
            z_target = staged_logit(options, x, mask, t)
            pivot = z_target
            if wide:
                pivot = staged_maximum(options, x, mask, n_classes)
                wide = exceeds_window(x, pivot, z_target)
                pivot = pivot if wide else z_target
            window = exp_window(x, shift_for(x, pivot if fabs(pivot) <= exp_limit(x) else 0.0), 0.0)
        others = sweep(options, x, mask, row_terms, n_classes, &window, z_target, summed, &below, &pending)
        if batch.out != NULL:
            end_row(like, &pending)
            if i > 1:
                pull_target(batch, rows, first, live[i - 2], pending.n_leading, like)
        if i > 0:
            before = live[i - 1]
            rows.others[before] = others
            if not others < sum_limit(like) or not fabs(rows.z_target[before]) <= exp_limit(like):
                x = <const floating*>(batch.logits + (first + before) * batch.logits_stride)
                take_row(
                    options, x, mask_of(batch, first + before), summed, n_classes, batch.ids[first + before], True,
                    rows, before, &own, &pending, &wide,
                )
            steepen(batch, rows, before)
            if batch.out != NULL:
                rows.inverse[before] = 1.0 / (rows.others[before] + rows.at_target[before])
                begin_row(batch, summed, rows, first + before, before, &pending)
        if i < n_live:
            x = <const floating*>(batch.logits + (first + r) * batch.logits_stride)
            put_row(rows, r, 0.0, row_terms[t], z_target, window.shift, 0.0)
            put_below(options, x, n_classes, t, rows, r, below)
            row_terms[t] = 0
    if batch.out != NULL and n_live > 0:
        end_row(like, &pending)
        pull_target(batch, rows, first, live[n_live - 1], pending.n_leading, like)
    finish_rows(rows, n)
    add_options(batch, rows, n)
    put_losses(batch, rows, first, n)


# One turn of the pipeline: exponentials of x into terms, the sum of another row's terms, a third row's gradient. Each
# of the three may be absent (x or summed NULL, nothing pending). With smoothing the sum of z_t - z goes to `below`.
cdef inline double sweep(
    const Options* options, const floating* x, const uint8_t* mask, floating* terms, Py_ssize_t n,
    const ExpWindow* window, floating z_target, const floating* summed, double* below, Pending* pending,
) noexcept nogil:
    cdef floating offset = <floating>window.offset
    cdef floating low = <floating>window.low
    cdef floating high = <floating>window.high
    cdef floating magic = <floating>window.magic
    cdef Py_ssize_t block, lane, start
    cdef Sum sums, differences
    clear(&sums)
    if options.share != 0.0:
        clear(&differences)
    for block in range((n + SUM_BLOCK - 1) // SUM_BLOCK):
        start = block * SUM_BLOCK
        if x != NULL:
            for lane in range(0, SUM_BLOCK * <Py_ssize_t>sizeof(floating) // 64):
                prefetch(<char*>(x + start) + PREFETCH_BYTES + lane * 64)
            exp_block(
                options, x, mask, start, n, terms + start, offset, low, high, magic, z_target, &differences
            )
        if summed != NULL:
            add_block(summed + start, &sums)
        if pending.left >= SUM_BLOCK:
            write_block(terms, pending)
    if options.share != 0.0:
        below[0] = total_of(&differences)
    return total_of(&sums)
