"""Short rows side by side: the class axis is strided, neighbouring rows lie next to each other (images)."""

from libc.stdint cimport int64_t
from libc.string cimport memcpy

from fastce._kernels.block cimport (
    BLOCK_ROWS,
    Batch,
    Scratch,
    finish_rows,
    is_normal,
    leaves_dtype,
    load_scales,
    put_losses,
    scale_terms,
    stream_piece,
    terms_of,
)
from fastce._kernels.lanes cimport prefetch, sum_limit
from fastce._kernels.small cimport SMALL_CLASSES, small_shift, small_sum_low, take_small_row
from fastce._kernels.vexp cimport ExpWindow, exp_shifted, exp_window, floating, run_time_value

cdef extern from "target.h" nogil:
    void sum_columns_float "fastce_sum_columns_float" (
        const float* tile, Py_ssize_t width, Py_ssize_t n_classes, Py_ssize_t n, double* sums
    )
    void sum_columns_double "fastce_sum_columns_double" (
        const double* tile, Py_ssize_t width, Py_ssize_t n_classes, Py_ssize_t n, double* sums
    )

cdef enum:
    # How many classes ahead logits are asked for: a piece of 128 logits is too short for the processor to notice that
    # it is read in order. No more, for classes a power of two apart share the same 8 places of the caches.
    COLUMNS_AHEAD = 4


# Elements of working memory: the block's terms, class by class.
cdef inline Py_ssize_t column_terms(Py_ssize_t n_classes) noexcept nogil:
    return BLOCK_ROWS * n_classes


# Rows [first, first + n), n <= BLOCK_ROWS: row r's class c lies r elements and c * stride bytes behind x, its gradient
# likewise. The numbers are those of take_small_rows to the bit: the same shift, and lane c % 8 of a row sums its
# classes in the same order; only that here a vector holds one class of many rows.
cdef inline void take_columns(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n, const char* x, Py_ssize_t stride, char* out,
    Py_ssize_t out_stride, const floating* like,
) noexcept nogil:
    cdef floating* terms = <floating*>terms_of(rows)
    cdef int64_t* ids = batch.ids + first
    cdef double total
    cdef Py_ssize_t c, r, t, n_outside = 0
    cdef ExpWindow window = exp_window(like, run_time_value(small_shift(like)), 0.0)
    exp_columns(x, stride, batch.n_classes, n, terms, &window)
    load_scales(batch, rows, first, n)
    for r in range(n):
        t = ids[r]
        rows.shift[r] = window.shift
        rows.offset[r] = 0.0
        if t < 0:
            for c in range(batch.n_classes):
                terms[c * BLOCK_ROWS + r] = 0
            rows.at_target[r] = small_sum_low(like)
            rows.z_target[r] = rows.scale[r] = 0.0
        else:
            rows.at_target[r] = terms[t * BLOCK_ROWS + r]
            rows.z_target[r] = (<const floating*>(x + t * stride))[r]
            terms[t * BLOCK_ROWS + r] = 0
    sum_columns(terms, batch.n_classes, n, rows.others)
    for r in range(n):
        total = rows.others[r] + rows.at_target[r]
        n_outside += 0 if small_sum_low(like) <= total < sum_limit(like) else 1
    for r in range(n if n_outside else 0):
        total = rows.others[r] + rows.at_target[r]
        if not small_sum_low(like) <= total < sum_limit(like):
            take_lone_column(terms + r, batch.n_classes, ids[r], rows, r, x + r * sizeof(floating), stride)
    finish_rows(rows, n)
    put_losses(batch, rows, first, n)
    if out != NULL:
        write_columns(terms, batch.n_classes, ids, n, rows, out, out_stride, batch.stream)


# The softmax of n rows, as they lie there and with the numbers of take_small_rows, to the bit: by class 0, as if that
# were every row's target. No losses, no logarithms.
cdef inline void take_softmax_columns(
    const Batch* batch, Scratch* rows, Py_ssize_t n, const char* x, Py_ssize_t stride, char* out,
    Py_ssize_t out_stride, const floating* like,
) noexcept nogil:
    cdef floating* terms = <floating*>terms_of(rows)
    cdef floating[BLOCK_ROWS] factor
    cdef double total
    cdef Py_ssize_t c, r, n_outside = 0, n_special = 0
    cdef ExpWindow window = exp_window(like, run_time_value(small_shift(like)), 0.0)
    exp_columns(x, stride, batch.n_classes, n, terms, &window)
    for r in range(n):
        rows.at_target[r] = terms[r]
        terms[r] = 0
    sum_columns(terms, batch.n_classes, n, rows.others)
    for r in range(n):
        total = rows.others[r] + rows.at_target[r]
        n_outside += 0 if small_sum_low(like) <= total < sum_limit(like) else 1
    for r in range(n if n_outside else 0):
        total = rows.others[r] + rows.at_target[r]
        if not small_sum_low(like) <= total < sum_limit(like):
            take_lone_column(terms + r, batch.n_classes, 0, rows, r, x + r * sizeof(floating), stride)
    for r in range(n):
        rows.inverse[r] = 1.0 / (rows.others[r] + rows.at_target[r])
        factor[r] = <floating>rows.inverse[r]
        n_special += leaves_dtype(like, rows.inverse[r], 1.0)
    for r in range(n if n_special else 0):
        if not is_normal(like, 1.0, rows.inverse[r]):
            rows.scale[r] = 1.0
            rows.steep[r] = 0.0
            factor[r] = 1
            for c in range(1, batch.n_classes):
                scale_terms(terms + c * BLOCK_ROWS + r, terms + c * BLOCK_ROWS + r, 1, rows, r, 0.0)
    for r in range(n):
        total = rows.at_target[r] * rows.inverse[r]
        terms[r] = <floating>(1.0 if rows.others[r] == 0.0 else total)
    for c in range(batch.n_classes):
        if c > 0:
            scale_column(terms + c * BLOCK_ROWS, terms + c * BLOCK_ROWS, factor, n)
        if batch.stream:
            stream_piece(<floating*>(out + c * out_stride), terms + c * BLOCK_ROWS, n)
        else:
            memcpy(out + c * out_stride, terms + c * BLOCK_ROWS, n * sizeof(floating))


# The exponentials of a block, class by class.
cdef inline void exp_columns(
    const char* x, Py_ssize_t stride, Py_ssize_t n_classes, Py_ssize_t n, floating* terms, const ExpWindow* window
) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(n_classes):
        ask_for_column(x, stride, c + COLUMNS_AHEAD, n_classes, n * sizeof(floating))
        exp_column(<const floating*>(x + c * stride), terms + c * BLOCK_ROWS, n, window)


# Class c of these rows or, beyond the last one, the first ones of the rows after them.
cdef inline void ask_for_column(
    const char* x, Py_ssize_t stride, Py_ssize_t c, Py_ssize_t n_classes, Py_ssize_t n_bytes
) noexcept nogil:
    cdef const char* column = x + (c if c < n_classes else c - n_classes) * stride + (0 if c < n_classes else n_bytes)
    cdef Py_ssize_t i
    for i in range(0, n_bytes, 64):
        prefetch(column + i)


cdef inline void exp_column(const floating* x, floating* terms, Py_ssize_t n, const ExpWindow* window) noexcept nogil:
    cdef floating low = <floating>window.low
    cdef floating high = <floating>window.high
    cdef floating magic = <floating>window.magic
    cdef Py_ssize_t r
    for r in range(n):
        terms[r] = exp_shifted(x[r], 0, low, high, magic)


# The sums over the classes of a tile, one a row.
cdef inline void sum_columns(const floating* tile, Py_ssize_t n_classes, Py_ssize_t n, double* sums) noexcept nogil:
    if floating is float:
        sum_columns_float(tile, BLOCK_ROWS, n_classes, n, sums)
    else:
        sum_columns_double(tile, BLOCK_ROWS, n_classes, n, sums)


# A row that leaves the common window goes its own way.
cdef inline void take_lone_column(
    floating* terms, Py_ssize_t n_classes, Py_ssize_t t, Scratch* rows, Py_ssize_t r, const char* x, Py_ssize_t stride
) noexcept nogil:
    cdef floating[SMALL_CLASSES] row
    cdef floating[SMALL_CLASSES] row_terms
    cdef Py_ssize_t c
    for c in range(n_classes):
        row[c] = (<const floating*>(x + c * stride))[0]
    take_small_row(row, row_terms, n_classes, t, rows, r)
    for c in range(n_classes):
        terms[c * BLOCK_ROWS] = row_terms[c]


# The gradients of a block; streamed ones are finished where the terms are, so that each line leaves once.
cdef inline void write_columns(
    floating* terms, Py_ssize_t n_classes, const int64_t* ids, Py_ssize_t n, Scratch* rows, char* out,
    Py_ssize_t out_stride, bint streamed,
) noexcept nogil:
    cdef floating[BLOCK_ROWS] factor
    cdef floating[BLOCK_ROWS] pull
    cdef double both
    cdef Py_ssize_t c, r, n_special = 0
    for r in range(n):
        both = rows.scale[r] * rows.inverse[r]
        factor[r] = <floating>both
        pull[r] = <floating>(0.0 - rows.miss[r] * rows.scale[r])
        n_special += leaves_dtype(terms, both, rows.scale[r])
    if streamed and not n_special:
        for c in range(n_classes):
            scale_column(terms + c * BLOCK_ROWS, terms + c * BLOCK_ROWS, factor, n)
        for r in range(n):
            if ids[r] >= 0:
                terms[ids[r] * BLOCK_ROWS + r] = pull[r]
        for c in range(n_classes):
            stream_piece(<floating*>(out + c * out_stride), terms + c * BLOCK_ROWS, n)
        return
    for c in range(n_classes):
        scale_column(<floating*>(out + c * out_stride), terms + c * BLOCK_ROWS, factor, n)
    for r in range(n):
        if n_special and not is_normal(terms, rows.scale[r], rows.inverse[r]):
            for c in range(n_classes):
                scale_terms(<floating*>(out + c * out_stride) + r, terms + c * BLOCK_ROWS + r, 1, rows, r, 0.0)
        if ids[r] >= 0:
            (<floating*>(out + ids[r] * out_stride))[r] = pull[r]


cdef inline void scale_column(
    floating* column, const floating* terms, const floating* factor, Py_ssize_t n
) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(n):
        column[r] = terms[r] * factor[r]
