"""Short rows side by side: the log-softmax of columns.pxd's rows, with the numbers of short.pxd."""

from libc.math cimport INFINITY, fabs
from libc.stdint cimport int32_t

from fastce._kernels.block cimport BLOCK_ROWS, Scratch, finish_rows, stream_piece
from fastce._kernels.columns cimport COLUMNS_AHEAD, ask_for_column, exp_column, sum_columns, take_lone_column
from fastce._kernels.general cimport Batch, Own, behind, settle_maximum, settle_rows
from fastce._kernels.lanes cimport sum_limit
from fastce._kernels.small cimport SMALL_CLASSES, small_shift, small_sum_low
from fastce._kernels.vexp cimport ExpWindow, exp_window, floating, run_time_value


# Rows [first, first + n), n <= BLOCK_ROWS: row r's class c lies r elements and c * stride bytes behind x, its
# log-softmax likewise behind `out`, which may be NULL. The numbers are those of take_short_rows to the bit.
cdef inline void take_log_columns(
    const Batch* batch, Own* own, Py_ssize_t first, Py_ssize_t n, const char* x, Py_ssize_t stride, char* out,
    Py_ssize_t out_stride, const floating* like,
) noexcept nogil:
    cdef Scratch* rows = &own.rows
    cdef floating* terms = <floating*>behind(own)
    cdef double total
    cdef Py_ssize_t r, top, n_apart = 0
    exp_and_note_columns(own, x, stride, batch.n_classes, n, terms)
    for r in range(n):
        top = own.argmax[r] * BLOCK_ROWS + r
        rows.at_target[r] = terms[top]
        rows.z_target[r] = own.maximum[r]
        terms[top] = 0
    sum_columns(terms, batch.n_classes, n, rows.others)
    for r in range(n):
        total = rows.others[r] + rows.at_target[r]
        n_apart += 0 if small_sum_low(like) <= total < sum_limit(like) else 1
    if n_apart:
        take_columns_apart(batch, own, n, x, stride, terms)
    finish_rows(rows, n)
    settle_rows(batch, own, first, 0, n)
    if out != NULL:
        write_log_columns(batch, own, n, x, stride, out, out_stride, terms)


# The exponentials, the largest logit of each row and where it is first, class by class. A nan is passed over.
cdef inline void exp_and_note_columns(
    Own* own, const char* x, Py_ssize_t stride, Py_ssize_t n_classes, Py_ssize_t n, floating* terms
) noexcept nogil:
    cdef ExpWindow window = exp_window(terms, run_time_value(small_shift(terms)), 0.0)
    cdef floating[BLOCK_ROWS] largest
    cdef floating[BLOCK_ROWS] where
    cdef floating nothing = <floating>(0.0 * window.shift)   # 0, but not to gcc, which makes a slow "rep stos" of it
    cdef Py_ssize_t c, r
    for r in range(n):
        largest[r] = -INFINITY
        where[r] = nothing
        own.rows.shift[r] = window.shift
    for c in range(n_classes):
        ask_for_column(x, stride, c + COLUMNS_AHEAD, n_classes, n * sizeof(floating))
        exp_column(<const floating*>(x + c * stride), terms + c * BLOCK_ROWS, n, &window)
        note_column(<const floating*>(x + c * stride), <floating>c, n, largest, where)
    for r in range(n):
        own.maximum[r] = largest[r]
        own.argmax[r] = <int32_t>where[r]


cdef inline void note_column(
    const floating* column, floating c, Py_ssize_t n, floating* largest, floating* where
) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(n):
        # By a product: gcc makes a branch of a choice between a new number and the one that is there.
        where[r] += (c - where[r]) * <floating>(column[r] > largest[r])
        largest[r] = column[r] if column[r] > largest[r] else largest[r]


# Rows that leave the common window, or whose largest logit is infinite.
cdef inline void take_columns_apart(
    const Batch* batch, Own* own, Py_ssize_t n, const char* x, Py_ssize_t stride, floating* terms
) noexcept nogil:
    cdef floating[SMALL_CLASSES] row
    cdef double total
    cdef Py_ssize_t r, c
    for r in range(n):
        total = own.rows.others[r] + own.rows.at_target[r]
        if not small_sum_low(terms) <= total < sum_limit(terms):
            take_lone_column(
                terms + r, batch.n_classes, own.argmax[r], &own.rows, r, x + r * sizeof(floating), stride
            )
        if fabs(own.maximum[r]) == INFINITY:
            for c in range(batch.n_classes):
                row[c] = (<const floating*>(x + c * stride))[r]
            settle_maximum(batch, own, r, row)


cdef inline void write_log_columns(
    const Batch* batch, const Own* own, Py_ssize_t n, const char* x, Py_ssize_t stride, char* out,
    Py_ssize_t out_stride, floating* terms,
) noexcept nogil:
    cdef floating[BLOCK_ROWS] maximum
    cdef floating[BLOCK_ROWS] least
    cdef floating* place
    cdef Py_ssize_t c, r
    for r in range(n):
        maximum[r] = <floating>own.maximum[r]
        least[r] = <floating>own.rows.loss[r]
    for c in range(batch.n_classes):
        place = terms if batch.stream else <floating*>(out + c * out_stride)
        lower_column(<const floating*>(x + c * stride), maximum, least, place, n)
        if batch.stream:
            stream_piece(<floating*>(out + c * out_stride), terms, n)


cdef inline void lower_column(
    const floating* column, const floating* maximum, const floating* least, floating* place, Py_ssize_t n
) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(n):
        place[r] = (column[r] - maximum[r]) - least[r]
