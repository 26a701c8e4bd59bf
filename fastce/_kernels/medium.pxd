"""Rows of a few hundred to a few thousand classes, in a pipeline of three."""

from libc.math cimport fabs
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from fastce._kernels.block cimport (
    BLOCK_ROWS,
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
    terms_of,
    write_block,
)
from fastce._kernels.lanes cimport (
    SUM_BLOCK,
    Sum,
    add_block,
    buffer_elements,
    clear,
    exceeds_window,
    exp_last_block,
    exp_limit,
    row_maximum,
    sum_limit,
    total_of,
)
from fastce._kernels.large cimport PREFETCH_BYTES, take_row
from fastce._kernels.vexp cimport ExpWindow, exp_shifted, exp_window, floating, shift_for

cdef extern from "target.h" nogil:
    void prefetch "fastce_prefetch" (const void* address)


# Rows [first, first + n) in a pipeline of three: while one row's exponentials are computed, those of the row before are
# summed and the gradient of the row before that is written, block by block, so that multipliers, adders and caches are
# busy together and no row waits for another's sum.
cdef inline void take_medium_rows(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes, width = buffer_elements(n_classes)
    cdef floating* terms = <floating*>terms_of(rows)
    cdef const floating* x
    cdef floating* row_terms
    cdef floating* summed
    cdef Py_ssize_t[BLOCK_ROWS] live
    cdef Py_ssize_t i, r, before, n_live = 0
    cdef int64_t t
    cdef bint wide = False
    cdef double pivot
    cdef ExpWindow window, own
    cdef Pending pending = nothing_pending()
    cdef double others
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
            pivot = x[t]
            if wide:
                pivot = row_maximum(x, n_classes)
                wide = exceeds_window(x, pivot, x[t])
                pivot = pivot if wide else x[t]
            window = exp_window(x, shift_for(x, pivot if fabs(pivot) <= exp_limit(x) else 0.0), 0.0)
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
                take_row(x, summed, n_classes, batch.ids[first + before], True, rows, before, &own, &pending, &wide)
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
    put_losses(batch, rows, first, n)


# One turn of the pipeline: exponentials of x into terms, the sum of another row's terms, a third row's gradient. Each
# of the three may be absent (x or summed NULL, nothing pending).
cdef inline double sweep(
    const floating* x, floating* terms, Py_ssize_t n, const ExpWindow* window, const floating* summed,
    Pending* pending,
) noexcept nogil:
    cdef floating offset = <floating>window.offset
    cdef floating low = <floating>window.low
    cdef floating high = <floating>window.high
    cdef floating magic = <floating>window.magic
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
                exp_last_block(x + start, terms + start, rest, offset, low, high, magic)
        if summed != NULL:
            add_block(summed + start, &sums)
        if pending.left >= SUM_BLOCK:
            write_block(terms, pending)
    return total_of(&sums)
