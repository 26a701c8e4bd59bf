"""Cross-entropy of rows of probabilities: one pass that validates, takes logarithms and adds; its entry points.

Compiled once per CPU target (setup.py), float32 and float64 from one text. With probabilities p, class weights w and a
row's sample weight s, all of it in float64:

    loss = -s w_t log p_t            for a class id t
    loss = -s sum_c w_c q_c log p_c  for a distribution q, without the terms in which q_c or w_c is 0

Errors in units of u = 2^-53: a logarithm 6 (vexp.pxd), its products with q, w and s 1 each. Terms have one sign; their
sum rounds by 9 in rows of more than 128 classes, as 8 terms meet before they are added with their rounding errors
carried along (lanes.pxd), and in shorter ones, of which a lane has 16 terms, by 11 where they are equal. Together 20 u;
what is promised is 18 u = 2e-15, the largest seen among millions of rows 3.7 u.

A row is in order if its p are in [0, 1] and sum to 1 within a tolerance, its q finite and >= 0. The kernels only say
which row is the first that is not; what is wrong with it is said in Python (probabilities.py). Rows of s = 0 and of a
negative id are not read. A row is read more than once, to be checked and to be computed: where another thread writes to
it in between, its loss may be anything.
"""

from cython.parallel cimport prange, threadid
from cpython.long cimport PyLong_AsLongLongAndOverflow
from libc.float cimport DBL_MAX, FLT_MAX
from libc.math cimport INFINITY, fabs
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

cimport numpy as cnp

from fastce._kernels.cpu cimport team_for
from fastce._kernels.lanes cimport (
    PREFETCH_BYTES,
    SUM_BLOCK,
    Rounding,
    Sum,
    add_block,
    buffer_elements,
    clear,
    finite_total_of,
    larger,
    next_line,
    round_as_before,
    round_to_nearest,
    smaller,
)
from fastce._kernels.plain cimport (
    DEFAULT_IGNORED,
    GENERAL_SLAB_ELEMENTS,
    are_few_logits,
    are_ids,
    are_plain_factors,
    classes_of,
    copy_ids,
    copy_losses,
    doubles_of,
    is_denominator,
    is_like,
    is_plain_weight,
    new_array,
    pairwise_sum,
    threads_of,
)
from fastce._kernels.vexp cimport floating, take_logs
from fastce._kernels.weights cimport are_weights

cdef extern from "target.h" nogil:
    double look_float "fastce_look_float" (
        const float* x, Py_ssize_t n, float most, Py_ssize_t ahead, uint32_t* outside
    )
    double look_double "fastce_look_double" (
        const double* x, Py_ssize_t n, double most, Py_ssize_t ahead, uint64_t* outside
    )

cnp.import_array()

cdef enum:
    BLOCK_ROWS = 64         # rows whose targets' logarithms are taken together
    PIECE = 2048            # terms that are held: half an L1 cache; a multiple of SUM_BLOCK
    TASK_ELEMENTS = 16384   # the least that a thread takes at a time
    TASKS_PER_THREAD = 8    # so that a thread that starts late or is slow is not waited for
    GIL_ELEMENTS = 2048     # batches below keep the GIL


# One call's rows. Either `ids` or `distributions` are NULL, and what is not wanted of the weights.
cdef struct Batch:
    Py_ssize_t n_rows
    Py_ssize_t n_classes
    char* probs
    Py_ssize_t probs_stride
    const int64_t* ids
    char* distributions     # of the dtype of `probs`
    Py_ssize_t distributions_stride
    const double* weight
    const double* sample_weight
    double tolerance
    double* losses
    double* factors         # of the rows, whose sum a mean divides by, or NULL
    Own* own                # one for each thread


# One thread's room to work in. Arrays in one struct, so that the compiler knows them apart.
cdef struct Own:
    double[PIECE] terms
    double[PIECE] ratios
    double[BLOCK_ROWS] target
    double[BLOCK_ROWS] log
    Py_ssize_t first_bad    # the first row not in order that this thread has seen, at least `n_rows` if there is none
    Py_ssize_t[7] slack     # so that each may begin at a line of the cache


# ---- a row ---------------------------------------------------------------------------------------------------------

# Whether n numbers are in [0, most], and their sum in an order that depends on n alone. Vectors tell by the bits; -0.0,
# which they take for another number, and what is not in order are looked at again.
cdef inline bint look(const floating* x, Py_ssize_t n, floating most, double* total) noexcept nogil:
    cdef Py_ssize_t i, n_outside = 0
    cdef uint32_t outside32 = 0
    cdef uint64_t outside64 = 0
    if floating is float:
        total[0] = look_float(x, n, most, PREFETCH_BYTES, &outside32)
    else:
        total[0] = look_double(x, n, most, PREFETCH_BYTES, &outside64)
    if outside32 >> 31 == 0 and outside64 >> 63 == 0:
        return True
    for i in range(n):
        n_outside += 0 if x[i] >= 0 and x[i] <= most else 1
    return n_outside == 0


cdef inline bint are_probabilities(const floating* p, Py_ssize_t n, double tolerance) noexcept nogil:
    cdef double total
    return look(p, n, <floating>1.0, &total) and fabs(total - 1.0) <= tolerance


cdef inline bint is_mass(const floating* q, Py_ssize_t n) noexcept nogil:
    cdef double total
    if floating is float:
        return look(q, n, FLT_MAX, &total)
    else:
        return look(q, n, DBL_MAX, &total)


# A weight of 0 makes an infinite term 0.
cdef inline void weigh_terms(const double* weight, Py_ssize_t n, double* terms) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        terms[i] = terms[i] * weight[i] if weight[i] != 0 else 0.0


# sum_c w_c q_c log p_c of a row of more than SUM_BLOCK classes, piece by piece.
cdef inline double sum_long_row(
    const Batch* batch, Own* own, const floating* p, const floating* q
) noexcept nogil:
    cdef double* terms = own.terms
    cdef Py_ssize_t piece, start, block, n, i
    cdef Sum sums
    clear(&sums)
    for piece in range((batch.n_classes + PIECE - 1) // PIECE):
        start = piece * PIECE
        n = smaller(PIECE, batch.n_classes - start)
        take_logs(p + start, NULL, q + start, n, own.ratios, terms)
        if batch.weight != NULL:
            weigh_terms(batch.weight + start, n, terms)
        for i in range(n, buffer_elements(n)):
            terms[i] = 0.0
        for block in range(buffer_elements(n) // SUM_BLOCK):
            add_block(<const double*>terms + block * SUM_BLOCK, &sums)
    return finite_total_of(&sums)


# ---- a block of rows -----------------------------------------------------------------------------------------------
# These return the first row that is not in order, or -1.

cdef inline const floating* probs_of(const Batch* batch, Py_ssize_t row, const floating* like) noexcept nogil:
    return <const floating*>(batch.probs + row * batch.probs_stride)


cdef inline const floating* mass_of(const Batch* batch, Py_ssize_t row, const floating* like) noexcept nogil:
    return <const floating*>(batch.distributions + row * batch.distributions_stride)


cdef inline bint is_read(const Batch* batch, Py_ssize_t row) noexcept nogil:
    if batch.ids != NULL and batch.ids[row] < 0:
        return False
    return batch.sample_weight == NULL or batch.sample_weight[row] != 0


cdef inline double factor_of(const Batch* batch, Py_ssize_t row) noexcept nogil:
    cdef double factor = 1.0
    if batch.ids != NULL and batch.ids[row] < 0:
        return 0.0
    if batch.ids != NULL and batch.weight != NULL:
        factor = batch.weight[batch.ids[row]]
    return factor if batch.sample_weight == NULL else factor * batch.sample_weight[row]


cdef inline Py_ssize_t take_ids(
    const Batch* batch, Own* own, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef const floating* row
    cdef Py_ssize_t r
    for r in range(n):
        own.target[r] = 1.0
        if is_read(batch, first + r):
            row = probs_of(batch, first + r, like)
            if not are_probabilities(row, batch.n_classes, batch.tolerance):
                return first + r
            own.target[r] = row[batch.ids[first + r]]
    take_logs(<const double*>own.target, NULL, NULL, n, own.ratios, own.log)
    return -1


cdef inline Py_ssize_t take_distributions(
    const Batch* batch, Own* own, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t width = batch.n_classes, row_bytes = width * sizeof(floating)
    cdef bint short = width <= SUM_BLOCK
    cdef bint at_once = short and batch.probs_stride == row_bytes and batch.distributions_stride == row_bytes
    cdef Py_ssize_t r
    for r in range(n):
        if not is_read(batch, first + r):
            at_once = False
        elif not (
            are_probabilities(probs_of(batch, first + r, like), width, batch.tolerance)
            and is_mass(mass_of(batch, first + r, like), width)
        ):
            return first + r
    if at_once:
        take_logs(
            probs_of(batch, first, like), NULL, mass_of(batch, first, like), n * width, own.ratios, own.terms
        )
    for r in range(n):
        own.log[r] = 0.0
        if not is_read(batch, first + r):
            continue
        if not short:
            own.log[r] = sum_long_row(
                batch, own, probs_of(batch, first + r, like), mass_of(batch, first + r, like)
            )
            continue
        if not at_once:
            take_logs(
                probs_of(batch, first + r, like), NULL, mass_of(batch, first + r, like), width, own.ratios,
                own.terms + r * width,
            )
        if batch.weight != NULL:
            weigh_terms(batch.weight, width, own.terms + r * width)
        own.log[r] = pairwise_sum(own.terms + r * width, width)
    return -1


cdef inline Py_ssize_t take_block(
    const Batch* batch, Own* own, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t r, bad
    cdef double factor
    if batch.ids != NULL:
        bad = take_ids(batch, own, first, n, like)
    else:
        bad = take_distributions(batch, own, first, n, like)
    if bad >= 0:
        return bad
    for r in range(n):
        factor = factor_of(batch, first + r)
        batch.losses[first + r] = 0.0 - factor * own.log[r] if factor != 0 else 0.0    # a negation would make -0 of 0
        if batch.factors != NULL:
            batch.factors[first + r] = factor
    return -1


# ---- the batch -----------------------------------------------------------------------------------------------------

cdef inline Py_ssize_t rows_of_block(Py_ssize_t n_classes) noexcept nogil:
    return larger(1, smaller(BLOCK_ROWS, PIECE // n_classes))


cdef inline Py_ssize_t rows_of_task(Py_ssize_t n_rows, Py_ssize_t n_classes, int num_threads) noexcept nogil:
    cdef Py_ssize_t block = rows_of_block(n_classes)
    cdef Py_ssize_t n = larger(n_rows // (TASKS_PER_THREAD * num_threads), TASK_ELEMENTS // n_classes)
    return larger(block, n - n % block)


# How many of so many threads have work.
cdef inline int useful_threads(Py_ssize_t n_rows, Py_ssize_t n_classes, int num_threads) noexcept nogil:
    cdef Py_ssize_t size = rows_of_task(n_rows, n_classes, num_threads)
    return <int>larger(1, smaller(num_threads, (n_rows + size - 1) // size))


cdef void take_task(
    const Batch* batch, Own* own, Py_ssize_t first, Py_ssize_t end, const floating* like
) noexcept nogil:
    cdef Py_ssize_t step = rows_of_block(batch.n_classes), bad
    cdef Rounding rounding
    round_to_nearest(&rounding)
    while first < end and first < own.first_bad:
        bad = take_block(batch, own, first, smaller(step, end - first), like)
        if bad >= 0:
            own.first_bad = bad
        first += step
    round_as_before(&rounding)


cdef Py_ssize_t take_batch(const Batch* batch, int num_threads, const floating* like) noexcept nogil:
    cdef Py_ssize_t size = rows_of_task(batch.n_rows, batch.n_classes, num_threads)
    cdef Py_ssize_t task, thread, first_bad = batch.n_rows
    num_threads = useful_threads(batch.n_rows, batch.n_classes, num_threads)
    for thread in range(num_threads):
        batch.own[thread].first_bad = batch.n_rows
    num_threads = team_for(num_threads)
    if num_threads == 1:
        take_task(batch, batch.own, 0, batch.n_rows, like)
    else:
        for task in prange((batch.n_rows + size - 1) // size, num_threads=num_threads, schedule="dynamic", chunksize=1):
            take_task(
                batch, batch.own + threadid(), task * size, smaller(batch.n_rows, (task + 1) * size), like
            )
    for thread in range(num_threads):
        first_bad = smaller(first_bad, batch.own[thread].first_bad)
    return first_bad if first_bad < batch.n_rows else -1


# ---- entry points --------------------------------------------------------------------------------------------------

cdef Py_ssize_t run(const Batch* batch, int num_threads, bint single):
    cdef Py_ssize_t bad
    if num_threads == 1 and batch.n_rows * batch.n_classes < GIL_ELEMENTS:
        return run_without_python(batch, 1, single)
    with nogil:
        bad = run_without_python(batch, num_threads, single)
    return bad


cdef Py_ssize_t run_without_python(const Batch* batch, int num_threads, bint single) noexcept nogil:
    if single:
        return take_batch(batch, num_threads, <const float*>NULL)
    return take_batch(batch, num_threads, <const double*>NULL)


cdef Py_ssize_t memory_for(Py_ssize_t n_rows, Py_ssize_t n_classes, int num_threads) noexcept:
    return useful_threads(n_rows, n_classes, num_threads) * sizeof(Own) + 64


def memory_needed(Py_ssize_t n_rows, Py_ssize_t n_classes, int num_threads):
    """Return the bytes of working memory that rows_of_probabilities needs."""
    return memory_for(n_rows, n_classes, num_threads)


def rows_of_probabilities(
    cnp.ndarray probs, cnp.ndarray losses, cnp.ndarray memory, double tolerance, int num_threads, *, ids=None,
    distributions=None, weight=None, sample_weight=None, factors=None,
):
    """Fill `losses` and, unless None, `factors` (N,) float64; return the first row that is not in order, or -1.

    The sum of the factors is what a mean divides by.

    Rows of `probs` and `distributions` (N, C) are contiguous, native and of one dtype; `ids` (N,) are int64, negative
    in rows that are left out; `weight` (C,) and `sample_weight` (N,) are float64. The sums of `probs` are 1 within
    `tolerance`.
    """
    cdef Batch batch
    batch.n_rows = cnp.PyArray_DIM(probs, 0)
    batch.n_classes = cnp.PyArray_DIM(probs, 1)
    batch.probs = <char*>cnp.PyArray_DATA(probs)
    batch.probs_stride = cnp.PyArray_STRIDE(probs, 0)
    batch.ids = <const int64_t*>data_of(ids)
    batch.distributions = data_of(distributions)
    batch.distributions_stride = 0 if distributions is None else cnp.PyArray_STRIDE(<cnp.ndarray>distributions, 0)
    batch.weight = <const double*>data_of(weight)
    batch.sample_weight = <const double*>data_of(sample_weight)
    batch.tolerance = tolerance
    batch.losses = <double*>cnp.PyArray_DATA(losses)
    batch.factors = <double*>data_of(factors)
    batch.own = <Own*>next_line(<char*>cnp.PyArray_DATA(memory))
    return run(&batch, num_threads, cnp.PyArray_TYPE(probs) == cnp.NPY_FLOAT32)


cdef inline char* data_of(array) noexcept:
    return NULL if array is None else <char*>cnp.PyArray_DATA(<cnp.ndarray>array)


def row_total(cnp.ndarray row):
    """Return the sum of a contiguous float64 row as the kernels take it."""
    cdef double total
    look(<const double*>cnp.PyArray_DATA(row), cnp.PyArray_SIZE(row), 1.0, &total)
    return total


# The plain case in one call, as in rows.pyx. Whatever is not plain, rows that are not in order included, is left to the
# general way: the answer is None.
def plain_probabilities(
    probs, targets, weight, sample_weight, ignore_index, str reduction, denominator, num_threads, double tolerance32,
    double tolerance64, Py_ssize_t serial_elements, choose_threads,
):
    """Return the reduced losses of rows, the classes last, against class ids or distributions like them, or None.

    The tolerances are those of float32 and float64.
    """
    cdef Batch batch
    cdef bint mean = reduction == "mean"
    cdef bint single, by_id
    cdef Py_ssize_t n_live, n_rows, n_classes, own_bytes
    cdef int64_t ignored
    cdef int threads, overflow = 0
    cdef double divisor = 1.0
    cdef char* memory
    if type(ignore_index) is not int or not cnp.PyArray_CheckExact(targets):
        return None
    threads = threads_of(probs, num_threads, serial_elements, choose_threads)
    ignored = PyLong_AsLongLongAndOverflow(ignore_index, &overflow)
    if (
        threads == 0
        or overflow
        or not are_few_logits(probs, GENERAL_SLAB_ELEMENTS)
        or not (are_ids(targets, probs) or (is_like(targets, probs) and ignored == DEFAULT_IGNORED))
        or not is_denominator(denominator, mean)
        or not (weight is None or is_plain_weight(weight, probs, None, None))
        or not (sample_weight is None or are_plain_factors(sample_weight, probs, None, None))
    ):
        return None
    by_id = are_ids(targets, probs)
    n_classes = classes_of(probs)
    n_rows = cnp.PyArray_SIZE(probs) // n_classes
    single = cnp.PyArray_TYPE(probs) == cnp.NPY_FLOAT32
    batch.n_rows, batch.n_classes = n_rows, n_classes
    batch.probs = <char*>cnp.PyArray_DATA(probs)
    batch.distributions = NULL if by_id else <char*>cnp.PyArray_DATA(targets)
    batch.probs_stride = batch.distributions_stride = n_classes * cnp.PyArray_ITEMSIZE(probs)
    batch.tolerance = tolerance32 if single else tolerance64
    # While the kernel runs other threads do, and may give the probabilities another shape.
    losses = new_array(probs, cnp.PyArray_NDIM(probs) - 1) if reduction == "none" else None
    own_bytes = memory_for(n_rows, n_classes, threads)
    memory = <char*>malloc((4 * n_rows + n_classes) * sizeof(double) + own_bytes)
    if memory == NULL:
        raise MemoryError("fastce could not allocate its working memory")
    batch.own = <Own*>next_line(memory)
    batch.losses = <double*>(memory + own_bytes)
    batch.ids = <int64_t*>(batch.losses + n_rows) if by_id else NULL
    batch.factors = batch.losses + 2 * n_rows if mean and denominator is None else NULL
    batch.sample_weight = doubles_of(sample_weight, batch.losses + 3 * n_rows)
    batch.weight = doubles_of(weight, batch.losses + 4 * n_rows)
    try:
        n_live = n_rows
        if by_id:
            n_live = copy_ids(<cnp.ndarray>targets, <int64_t*>batch.ids, n_rows, n_classes, ignored)
        if (
            n_live < 0
            or not (batch.weight == NULL or are_weights(batch.weight, n_classes, 0.0))
            or not (batch.sample_weight == NULL or are_weights(batch.sample_weight, n_rows, -INFINITY))
            or run(&batch, threads, single) >= 0
        ):
            return None
        if losses is not None:
            copy_losses(losses, batch.losses, n_rows)
            return losses
        if mean:
            divisor = denominator if denominator is not None else pairwise_sum(batch.factors, n_rows)
        return pairwise_sum(batch.losses, n_rows) / divisor if divisor != 0.0 else None
    finally:
        free(memory)
