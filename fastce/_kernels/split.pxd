"""Few rows of many classes: their columns are shared among the threads."""

from libc.math cimport fabs
from libc.stdint cimport int64_t

from fastce._kernels.block cimport Batch, Pending, Scratch, mask_of, nothing_pending, put_row, terms_of
from fastce._kernels.lanes cimport (
    CHUNK,
    LANES,
    Rounding,
    chunks_of,
    exp_limit,
    larger,
    round_as_before,
    round_to_nearest,
    smaller,
    sum_limit,
    sum_of_chunks,
)
from fastce._kernels.large cimport KEEP_BYTES, put_below, repeat_terms, sum_chunk, write_chunk
from fastce._kernels.staged cimport staged_logit
from fastce._kernels.vexp cimport ExpWindow, exp_window, floating, shift_for

cdef enum:
    # Rows of at least so many classes are worth splitting: one of 32000 took 14 us on one thread and 8 on two, one of
    # 128256 55 and 30.
    SPLIT_CLASSES = 16384


# What is known of a row while its chunks are spread over the threads.
cdef struct SplitRow:
    ExpWindow window
    double at_target
    double z_target
    bint whole              # to be taken by take_rows after all: ignored, or its target's window does not fit


cdef struct Split:
    SplitRow* rows
    double* sums            # of the chunks, row by row
    double* below           # with smoothing, of their z_t - z
    int* leading            # how many of their classes lead
    char* terms             # of the chunks, each behind a vector of slack; NULL: to be computed twice
    Py_ssize_t n_chunks     # of a row


cdef inline Py_ssize_t split_bytes(const Batch* batch, Py_ssize_t n_rows) noexcept nogil:
    return n_rows * (sizeof(SplitRow) + 3 * chunks_of(batch.n_classes) * sizeof(double)) + 64


cdef inline Py_ssize_t split_terms_bytes(const Batch* batch, int num_threads, const floating* like) noexcept nogil:
    cdef Py_ssize_t n_bytes = batch.n_rows * chunks_of(batch.n_classes) * (CHUNK + LANES) * sizeof(floating)
    return n_bytes if batch.with_grad and n_bytes <= num_threads * KEEP_BYTES else 0


# The rows' windows, by their targets' logits, and where the rest of the working memory lies.
cdef inline void begin_split(
    const Batch* batch, Split* split, char* memory, int num_threads, const floating* like
) noexcept nogil:
    cdef Py_ssize_t r, n_bytes = split_terms_bytes(batch, num_threads, like)
    cdef const floating* x
    cdef SplitRow* row
    cdef int64_t t
    split.terms = memory if n_bytes else NULL
    split.n_chunks = chunks_of(batch.n_classes)
    split.rows = <SplitRow*>(memory + n_bytes)
    split.sums = <double*>(split.rows + batch.n_rows)
    split.below = split.sums + batch.n_rows * split.n_chunks
    split.leading = <int*>(split.below + batch.n_rows * split.n_chunks)
    for r in range(batch.n_rows):
        row = split.rows + r
        t = batch.ids[r]
        x = <const floating*>(batch.logits + r * batch.logits_stride)
        row.z_target = staged_logit(&batch.options, x, mask_of(batch, r), larger(t, 0))
        row.whole = t < 0 or not fabs(row.z_target) <= exp_limit(x)
        if not row.whole:
            row.window = exp_window(x, shift_for(x, row.z_target), 0.0)


cdef inline void sum_split(
    const Batch* batch, const Split* split, Scratch* own, Py_ssize_t task, const floating* like
) noexcept nogil:
    cdef Py_ssize_t r = task // split.n_chunks, start = task % split.n_chunks * CHUNK
    cdef const floating* x = <const floating*>(batch.logits + r * batch.logits_stride)
    cdef SplitRow* row = split.rows + r
    cdef Pending nothing = nothing_pending()
    cdef Rounding rounding
    round_to_nearest(&rounding)
    if not row.whole:
        split.sums[task] = sum_chunk(
            &batch.options, x, mask_of(batch, r), start, smaller(batch.n_classes, start + CHUNK),
            split_terms(split, own, task, like), batch.ids[r], True, &row.window, <floating>row.z_target,
            &row.at_target, split.below + task, &nothing,
        )
    round_as_before(&rounding)


# The chunks' sums become the rows' sums, in the order of sum_row.
cdef inline void join_split(const Batch* batch, Split* split, Scratch* rows, const floating* like) noexcept nogil:
    cdef Py_ssize_t r
    cdef const floating* x
    cdef SplitRow* row
    cdef double others, below
    for r in range(batch.n_rows):
        row = split.rows + r
        put_row(rows, r, 0.0, 1.0, 0.0, 0.0, 0.0)
        if not row.whole:
            x = <const floating*>(batch.logits + r * batch.logits_stride)
            others = sum_of_chunks(split.sums + r * split.n_chunks, split.n_chunks)
            row.whole = not others < sum_limit(x)
            put_row(rows, r, others, row.at_target, row.z_target, row.window.shift, 0.0)
            if batch.options.share != 0.0:
                below = sum_of_chunks(split.below + r * split.n_chunks, split.n_chunks)
                put_below(&batch.options, x, batch.n_classes, batch.ids[r], rows, r, below)


cdef inline void write_split(
    const Batch* batch, const Split* split, Scratch* own, const Scratch* rows, Py_ssize_t task,
    const floating* like,
) noexcept nogil:
    cdef Py_ssize_t r = task // split.n_chunks, start = task % split.n_chunks * CHUNK
    cdef const floating* x = <const floating*>(batch.logits + r * batch.logits_stride)
    cdef floating* terms = split_terms(split, own, task, like)
    cdef Py_ssize_t size = smaller(batch.n_classes - start, CHUNK)
    cdef Rounding rounding
    round_to_nearest(&rounding)
    if not split.rows[r].whole:
        if split.terms == NULL:
            repeat_terms(
                &batch.options, x, mask_of(batch, r), start, size, terms, &split.rows[r].window
            )
        split.leading[task] = write_chunk(batch, terms, start, size, rows, r, r)
    round_as_before(&rounding)


cdef inline int leading_of(const Split* split, Py_ssize_t r) noexcept nogil:
    cdef Py_ssize_t i
    cdef int n_leading = 0
    for i in range(split.n_chunks):
        n_leading += split.leading[r * split.n_chunks + i]
    return n_leading


# The exponentials of a chunk: kept for the second round, or in the thread's own scratch.
cdef inline floating* split_terms(
    const Split* split, Scratch* own, Py_ssize_t task, const floating* like
) noexcept nogil:
    if split.terms == NULL:
        return <floating*>terms_of(own)
    return <floating*>split.terms + task * (CHUNK + LANES) + LANES
