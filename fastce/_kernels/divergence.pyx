"""The compiled entry points for Kullback-Leibler divergences: of a softmax from distributions, or from another softmax.

Compiled once per CPU target (setup.py). Rows of float32 or float64 are computed in float64. With e the exponentials of
a row's logits and S their sum, p = e/S; q is given, or is a softmax likewise (a teacher's):

    loss   = sum_c h(p_c, q_c) + sum_c q_c - 1          h(p, q) = p - q + q log(q/p),  h(p, 0) = p
    grad_c = p_c - q_c                                  for a teacher; soft.pyx has that for distributions

No h is negative, so tiny divergences keep their digits. Where p and q are near each other h is a difference of almost
equal numbers; so it is not computed as it stands. With p = 2^k near, 2/3 <= near/q <= 3/2, and

    s = (near - q) / (near + q),  log(near/q) = 2 atanh(s) = 2s + s^3 R(s^2)

q is (near + q)(1 - s)/2, and what the 2s costs q is what near - q brings, but for (near - q) s:

    h = (p - near) + (near - q) s - q (k ln2 + s^3 R(s^2))

Nothing cancels where k = 0: near - q is exact, and the last product at most s/3 of the one before. Elsewhere no term
is above 20 h. So h is as good as p and q are: a relative error u in p is one of |p - q| u in h, in q at most one of
(|p - q| + h) u. Every sum has a fixed order that depends on the row's length alone.
"""

from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY, fabs
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cimport numpy as cnp

from fastce._kernels.cpu cimport team_for
from fastce._kernels.lanes cimport (
    LANES,
    SUM_BLOCK,
    Rounding,
    Sum,
    add_block,
    add_lane,
    clear,
    finite_total_of,
    larger,
    larger_of,
    next_line,
    round_as_before,
    round_to_nearest,
    row_maximum,
    smaller,
    window_below,
)
from fastce._kernels.plain cimport (
    GENERAL_SLAB_ELEMENTS,
    are_apart,
    are_few_logits,
    classes_of,
    copy_losses,
    is_denominator,
    is_gradient,
    is_like,
    new_array,
    pairwise_sum,
    threads_of,
)
from fastce._kernels.vexp cimport (
    ExpWindow,
    bits_of_double,
    double_of_bits,
    exp_shifted,
    floating,
    log_exponent,
    log_mantissa,
    multiply_add_double,
)

cdef extern from "target.h" nogil:
    double most_double "fastce_most_double" (const double* row, Py_ssize_t n)

cnp.import_array()

cdef enum:
    PIECE = 4096            # elements of a row that are in work at a time; their three buffers take 96 KB
    SHORT_CLASSES = SUM_BLOCK   # rows up to this length go through each step together,
    BLOCK_ROWS = 32         # so many
    BLOCK_ELEMENTS = 1024   # of so many elements in all
    VECTOR = 4              # rows in work are filled up to a multiple of this
    FEW = 32                # numbers that are not worth LANES lanes
    TASKS_PER_THREAD = 8    # so that a thread that starts late or is slow is not waited for
    TASK_ELEMENTS = 4096    # the least that a thread takes at a time
    GIL_ELEMENTS = 512      # batches below keep the GIL


# The dtype of the targets, which may be another than that of the logits.
ctypedef fused other:
    float
    double


# One call's batch. Rows of logits, targets and out lie contiguous.
cdef struct Batch:
    Py_ssize_t n_rows
    Py_ssize_t n_classes
    char* logits
    Py_ssize_t logits_stride
    char* targets
    Py_ssize_t targets_stride
    bint from_logits        # the targets are logits
    double* sample_weight   # or NULL
    double* losses
    char* out               # a teacher's gradient, in the logits' dtype, or NULL
    Py_ssize_t out_stride
    double scale            # of all gradients
    double* scales          # of each row's, or NULL
    char* memory


# One side of a block of short rows, or of a row piece by piece.
cdef struct Side:
    double[PIECE] numbers       # exponentials, or distributions
    ExpWindow[BLOCK_ROWS] window
    double[BLOCK_ROWS] total    # S


# One thread's working memory.
cdef struct Own:
    Side student
    Side teacher
    double[PIECE] terms         # h
    double[BLOCK_ROWS] excess   # sum of h
    double[BLOCK_ROWS] mass     # sum of q, where that need not be 1


cdef inline Py_ssize_t whole_vectors(Py_ssize_t n) noexcept nogil:
    return (n + VECTOR - 1) // VECTOR * VECTOR


cdef inline Py_ssize_t parts_of(Py_ssize_t n, Py_ssize_t size) noexcept nogil:
    return (n + size - 1) // size


# The smallest normal number: bits say what a number is from there on.
cdef inline double smallest_normal() noexcept nogil:
    return 2.2250738585072014e-308


# ---- steps ---------------------------------------------------------------------------------------------------------

# n numbers in float64, filled up to whole vectors.
cdef inline void load(const floating* x, Py_ssize_t n, double rest, double* numbers) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        numbers[i] = x[i]
    for i in range(n, whole_vectors(n)):
        numbers[i] = rest


# The exponentials of n logits, filled up with zeros; in place, or not where `numbers` are.
cdef inline void exponentiate(const floating* x, Py_ssize_t n, const ExpWindow* window, double* numbers) noexcept nogil:
    cdef double offset = window.offset, low = window.low, high = window.high, magic = window.magic
    cdef double[VECTOR] last
    cdef Py_ssize_t i, whole = n - n % VECTOR
    for i in range(whole):
        numbers[i] = exp_shifted(<double>x[i], offset, low, high, magic)
    if whole < n:
        for i in range(VECTOR):
            last[i] = -INFINITY
        for i in range(n - whole):
            last[i] = x[whole + i]
        for i in range(VECTOR):
            numbers[whole + i] = exp_shifted(last[i], offset, low, high, magic)


# Sums of at most SUM_BLOCK numbers, whole vectors, in LANES lanes.
cdef inline void sum_lanes(const double* x, Py_ssize_t n, double* lanes) noexcept nogil:
    cdef Py_ssize_t _, lane
    for lane in range(LANES):
        lanes[lane] = 0.0
    for _ in range(n // LANES):
        for lane in range(LANES):
            lanes[lane] += x[lane]
        x += LANES
    for lane in range(n % LANES):
        lanes[lane] += x[lane]


# Adds n numbers, whole vectors.
cdef inline void add_piece(const double* x, Py_ssize_t n, Sum* sums) noexcept nogil:
    cdef double[LANES] lanes
    cdef Py_ssize_t _, lane
    for _ in range(n // SUM_BLOCK):
        add_block(x, sums)
        x += SUM_BLOCK
    if n % SUM_BLOCK:
        sum_lanes(x, n % SUM_BLOCK, lanes)
        for lane in range(LANES):
            add_lane(sums, lane, lanes[lane], x)


# The sum of at most SHORT_CLASSES numbers, whole vectors; of few of them in as many lanes as there are in a vector.
cdef inline double short_sum(const double* x, Py_ssize_t n) noexcept nogil:
    cdef double[LANES] lanes
    cdef Py_ssize_t _, lane
    if n > FEW:
        sum_lanes(x, n, lanes)
        for lane in range(8):
            lanes[lane] += lanes[lane + 8]
        for lane in range(VECTOR):
            lanes[lane] += lanes[lane + VECTOR]
    else:
        for lane in range(VECTOR):
            lanes[lane] = x[lane]
        for _ in range(n // VECTOR - 1):
            x += VECTOR
            for lane in range(VECTOR):
                lanes[lane] += x[lane]
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])


# h(p, q) of a normal p, or of any p where q is not normal: q log(q/p) is then below 2^-1012 and left out. A number's
# bits, as an integer, are 2^52 times its exponent plus its mantissa's fraction, which is log2 of the mantissa but for
# 0.0861: so k is the difference of bits by 2^52, rounded, and p is divided by 2^k through its bits, exactly and within
# the range. R is tools/coefficients.py's "log of a ratio": its error is 2^-55.8 of the logarithm.
cdef inline double divergence_of(double p, double q) noexcept nogil:
    cdef uint64_t bits = bits_of_double(p)
    cdef uint64_t apart = (bits - bits_of_double(q)) + <uint64_t>0x8008000000000000     # (2048 + 1/2) * 2^52
    cdef double k = double_of_bits((apart >> 52) | <uint64_t>0x4330000000000000) - (4503599627370496.0 + 2048.0)
    cdef double near = double_of_bits(
        (bits - (apart & <uint64_t>0xfff0000000000000)) + <uint64_t>0x8000000000000000
    )
    cdef double difference = near - q
    cdef double s = difference / (near + q)
    cdef double z = s * s
    cdef double r = multiply_add_double(0.15372172809991355, z, 0.15249637575465388)
    cdef double h
    r = multiply_add_double(r, z, 0.18186386251965647)
    r = multiply_add_double(r, z, 0.22222137673160863)
    r = multiply_add_double(r, z, 0.28571429407117194)
    r = multiply_add_double(r, z, 0.39999999996080327)
    r = multiply_add_double(r, z, 0.6666666666667291)
    h = multiply_add_double(s * z, r, k * 0.6931471805599453)
    h = multiply_add_double(-q, h, multiply_add_double(difference, s, p - near))
    return fabs(p - q) if q < smallest_normal() else h


cdef inline void scale(double* numbers, Py_ssize_t n, double factor) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        numbers[i] *= factor


# The terms of n classes, p = e * inverse and q = f * teacher_inverse; returns how many have q, but no normal p (nan may
# be counted). Whether a number is normal is asked of its bits: SSE2 counts no comparisons in vectors.
cdef inline Py_ssize_t compare(
    const double* e, double inverse, const double* f, double teacher_inverse, Py_ssize_t n, double* terms
) noexcept nogil:
    cdef Py_ssize_t i, n_deep = 0
    cdef double p, q
    for i in range(n):
        p = e[i] * inverse
        q = f[i] * teacher_inverse
        terms[i] = divergence_of(p, q)
        p = p if q > 0.0 else 1.0
        n_deep += (bits_of_double(p) - <uint64_t>0x0010000000000000) >> 63
    return n_deep


# The terms of those of n classes of row r, of logits x, whose p is not a normal number, by p's logarithm. One that is
# rounded below 0 was next to it.
cdef inline void mend_deep(
    const Side* student, Py_ssize_t r, const floating* x, const double* e, double inverse, const double* f,
    double teacher_inverse, Py_ssize_t n, double* terms,
) noexcept nogil:
    cdef double total = student.total[r], offset = student.window[r].offset, q, log_q
    cdef double log_total = (log_exponent(total) + student.window[r].shift) * 0.6931471805599453 + log_mantissa(total)
    cdef Py_ssize_t i
    for i in range(n):
        q = f[i] * teacher_inverse
        if e[i] * inverse >= smallest_normal():
            continue
        if q >= smallest_normal():
            log_q = log_exponent(q) * 0.6931471805599453 + log_mantissa(q)
            terms[i] = larger_of(0.0, q * ((log_q + log_total) + (offset - x[i])) - q + e[i] * inverse)
        elif q > 0.0 and x[i] == -INFINITY:
            terms[i] = INFINITY


# ---- rows ----------------------------------------------------------------------------------------------------------

cdef inline bint is_skipped(const Batch* batch, Py_ssize_t row) noexcept nogil:
    return batch.sample_weight != NULL and batch.sample_weight[row] == 0.0


cdef inline const floating* logits_of(const Batch* batch, Py_ssize_t row, const floating* like) noexcept nogil:
    return <const floating*>(batch.logits + row * batch.logits_stride)


cdef inline const other* targets_of(const Batch* batch, Py_ssize_t row, const other* like) noexcept nogil:
    return <const other*>(batch.targets + row * batch.targets_stride)


# Rows [first, first + n), each step for all of them: one row's steps wait for each other. Those that are skipped are
# never read.
cdef inline Py_ssize_t take_short_rows(
    const Batch* batch, Own* own, Py_ssize_t first, Py_ssize_t n, const floating* like, const other* targets_like
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes, width = whole_vectors(n_classes), r, n_unfit = 0
    cdef double* p = own.student.numbers
    cdef double* q = own.teacher.numbers
    cdef double rest = -INFINITY if batch.from_logits else 0.0
    for r in range(n):
        if is_skipped(batch, first + r):
            memset(p + r * width, 0, width * sizeof(double))
            memset(q + r * width, 0, width * sizeof(double))
        else:
            load(logits_of(batch, first + r, like), n_classes, -INFINITY, p + r * width)
            load(targets_of(batch, first + r, targets_like), n_classes, rest, q + r * width)
    soften(&own.student, n, n_classes)
    if batch.from_logits:
        soften(&own.teacher, n, n_classes)
    else:
        n_unfit = sum_masses(own, n, width)
    if compare(p, 1.0, q, 1.0, n * width, own.terms):
        for r in range(n):
            mend_deep(
                &own.student, r, logits_of(batch, first + r, like), p + r * width, 1.0, q + r * width, 1.0, n_classes,
                own.terms + r * width,
            )
    for r in range(n):
        own.excess[r] = short_sum(own.terms + r * width, width)
    put_losses(batch, own, first, n)
    if batch.out != NULL:
        for r in range(n):
            put_gradient(batch, first + r, 0, p + r * width, 1.0, q + r * width, 1.0, n_classes, like)
    return n_unfit


# Logits of n rows become their softmax.
cdef inline void soften(Side* side, Py_ssize_t n, Py_ssize_t n_classes) noexcept nogil:
    cdef Py_ssize_t width = whole_vectors(n_classes), r
    for r in range(n):
        side.window[r] = window_below(side.numbers, most_double(side.numbers + r * width, n_classes))
    for r in range(n):
        exponentiate(side.numbers + r * width, width, &side.window[r], side.numbers + r * width)
    for r in range(n):
        side.total[r] = short_sum(side.numbers + r * width, width)
    for r in range(n):
        scale(side.numbers + r * width, width, 1.0 / side.total[r])


# The sums of n distributions; returns how many numbers in them are negative, and how many sums not finite.
cdef inline Py_ssize_t sum_masses(Own* own, Py_ssize_t n, Py_ssize_t width) noexcept nogil:
    cdef Py_ssize_t r, n_unfit = 0
    for r in range(n):
        own.mass[r] = short_sum(own.teacher.numbers + r * width, width)
    for r in range(n):
        n_unfit += 0 if own.mass[r] < INFINITY else 1
    return n_unfit + count_negative(own.teacher.numbers, n * width)


cdef inline Py_ssize_t count_negative(const double* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, count = 0
    for i in range(n):
        count += 1 if x[i] < 0.0 else 0
    return count


# Losses of n rows from their sums. A sum of q beyond 2^1022 makes an infinite loss whatever became of the terms; only a
# softmax of nan beats it.
cdef inline void put_losses(const Batch* batch, const Own* own, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t r
    cdef double loss
    for r in range(n):
        loss = own.excess[r]
        if not batch.from_logits:
            loss += own.mass[r] - 1.0
            if own.mass[r] > 4.49423283715579e307:
                loss = own.student.total[r] * INFINITY
        if batch.sample_weight != NULL:
            loss = 0.0 if is_skipped(batch, first + r) else loss * batch.sample_weight[first + r]
        batch.losses[first + r] = loss


# The gradient of n classes of a row from class `start` on.
cdef inline void put_gradient(
    const Batch* batch, Py_ssize_t row, Py_ssize_t start, const double* e, double inverse, const double* f,
    double teacher_inverse, Py_ssize_t n, const floating* like,
) noexcept nogil:
    cdef floating* out = <floating*>(batch.out + row * batch.out_stride) + start
    cdef double factor = batch.scale
    cdef Py_ssize_t i
    if is_skipped(batch, row):
        memset(out, 0, n * sizeof(floating))
        return
    if batch.sample_weight != NULL:
        factor *= batch.sample_weight[row]
    if batch.scales != NULL:
        factor *= batch.scales[row]
    for i in range(n):
        out[i] = <floating>((e[i] * inverse - f[i] * teacher_inverse) * factor)


# A row of any length. Exponentials of one longer than a piece are computed twice: once for their sum.
cdef inline Py_ssize_t take_row(
    const Batch* batch, Own* own, Py_ssize_t row, const floating* like, const other* targets_like
) noexcept nogil:
    cdef const floating* x = logits_of(batch, row, like)
    cdef const other* y = targets_of(batch, row, targets_like)
    cdef double* e = own.student.numbers
    cdef double* f = own.teacher.numbers
    cdef double inverse = 1.0, teacher_inverse = 1.0
    cdef Py_ssize_t piece, start, n, width, n_unfit = 0
    cdef bint skipped = is_skipped(batch, row)
    cdef Sum excess, mass
    clear(&excess)
    clear(&mass)
    if not skipped:
        inverse = measure(&own.student, x, batch.n_classes)
        if batch.from_logits:
            teacher_inverse = measure(&own.teacher, y, batch.n_classes)
    for piece in range(parts_of(batch.n_classes, PIECE)):
        start = piece * PIECE
        n = smaller(PIECE, batch.n_classes - start)
        width = whole_vectors(n)
        if not skipped:
            if batch.n_classes > PIECE:
                exponentiate(x + start, n, &own.student.window[0], e)
                if batch.from_logits:
                    exponentiate(y + start, n, &own.teacher.window[0], f)
            if not batch.from_logits:
                load(y + start, n, 0.0, f)
                add_piece(f, width, &mass)
                n_unfit += count_negative(f, width)
            if compare(e, inverse, f, teacher_inverse, width, own.terms):
                mend_deep(&own.student, 0, x + start, e, inverse, f, teacher_inverse, n, own.terms)
            add_piece(own.terms, width, &excess)
        if batch.out != NULL:
            put_gradient(batch, row, start, e, inverse, f, teacher_inverse, n, like)
    own.excess[0] = finite_total_of(&excess)
    own.mass[0] = finite_total_of(&mass)
    put_losses(batch, own, row, 1)
    return n_unfit if own.mass[0] < INFINITY else 1


# What is known of a row's softmax; returns 1/S. The exponentials of the last piece stay.
cdef inline double measure(Side* side, const floating* x, Py_ssize_t n_classes) noexcept nogil:
    cdef Py_ssize_t piece, start, n
    cdef Sum sums
    side.window[0] = window_below(side.numbers, row_maximum(x, n_classes))
    clear(&sums)
    for piece in range(parts_of(n_classes, PIECE)):
        start = piece * PIECE
        n = smaller(PIECE, n_classes - start)
        exponentiate(x + start, n, &side.window[0], side.numbers)
        add_piece(side.numbers, whole_vectors(n), &sums)
    side.total[0] = finite_total_of(&sums)
    return 1.0 / side.total[0]


# ---- the batch -----------------------------------------------------------------------------------------------------

cdef struct Plan:
    int num_threads
    Py_ssize_t block_rows
    Py_ssize_t task_rows
    Py_ssize_t n_tasks
    Py_ssize_t thread_bytes


cdef Plan plan_batch(Py_ssize_t n_rows, Py_ssize_t n_classes, int num_threads) noexcept nogil:
    cdef Plan plan
    plan.block_rows = 1
    if n_classes <= SHORT_CLASSES:
        plan.block_rows = smaller(BLOCK_ROWS, BLOCK_ELEMENTS // whole_vectors(n_classes))
    plan.task_rows = larger(n_rows // (TASKS_PER_THREAD * num_threads), TASK_ELEMENTS // n_classes)
    if plan.task_rows > plan.block_rows:
        plan.task_rows -= plan.task_rows % plan.block_rows
    plan.task_rows = larger(plan.task_rows, plan.block_rows)
    plan.n_tasks = (n_rows + plan.task_rows - 1) // plan.task_rows
    plan.num_threads = <int>larger(1, smaller(num_threads, plan.n_tasks))
    plan.thread_bytes = (sizeof(Own) + 63) // 64 * 64
    return plan


cdef Py_ssize_t take_task(
    const Batch* batch, const Plan* plan, char* memory, Py_ssize_t task, const floating* like, const other* targets_like
) noexcept nogil:
    cdef Own* own = <Own*>memory
    cdef Py_ssize_t first = task * plan.task_rows, end = smaller(batch.n_rows, first + plan.task_rows), n_unfit = 0
    cdef Rounding rounding
    round_to_nearest(&rounding)
    while first < end:
        if batch.n_classes <= SHORT_CLASSES:
            n_unfit += take_short_rows(batch, own, first, smaller(plan.block_rows, end - first), like, targets_like)
        else:
            n_unfit += take_row(batch, own, first, like, targets_like)
        first += plan.block_rows
    round_as_before(&rounding)
    return n_unfit


# Returns how much is wrong with the distributions, 0 unless one has a number that none may have, or too large a sum.
cdef Py_ssize_t take_batch(
    const Batch* batch, int num_threads, const floating* like, const other* targets_like
) noexcept nogil:
    cdef Plan plan = plan_batch(batch.n_rows, batch.n_classes, num_threads)
    cdef char* memory = next_line(batch.memory)
    cdef Py_ssize_t task, n_unfit = 0
    cdef int team = team_for(plan.num_threads)
    if team == 1:
        for task in range(plan.n_tasks):
            n_unfit += take_task(batch, &plan, memory, task, like, targets_like)
    else:
        for task in prange(plan.n_tasks, num_threads=team, schedule="dynamic", chunksize=1):
            n_unfit += take_task(
                batch, &plan, memory + threadid() * plan.thread_bytes, task, like, targets_like
            )
    return n_unfit


# ---- entry points --------------------------------------------------------------------------------------------------

def memory_needed(Py_ssize_t n_rows, Py_ssize_t n_classes, int num_threads):
    """Return the bytes of working memory for calls of at most `n_rows` rows."""
    return memory_for(n_rows, n_classes, num_threads)


cdef Py_ssize_t memory_for(Py_ssize_t n_rows, Py_ssize_t n_classes, int num_threads) noexcept:
    return larger(1, smaller(num_threads, n_rows)) * plan_batch(n_rows, n_classes, num_threads).thread_bytes + 64


cdef Py_ssize_t run(const Batch* batch, bint single, bint targets_single, int num_threads):
    if batch.n_rows * batch.n_classes < GIL_ELEMENTS:
        return take_batch_of(batch, single, targets_single, 1)
    with nogil:
        return take_batch_of(batch, single, targets_single, num_threads)


cdef Py_ssize_t take_batch_of(
    const Batch* batch, bint single, bint targets_single, int num_threads
) noexcept nogil:
    if single and targets_single:
        return take_batch(batch, num_threads, <const float*>NULL, <const float*>NULL)
    if single:
        return take_batch(batch, num_threads, <const float*>NULL, <const double*>NULL)
    if targets_single:
        return take_batch(batch, num_threads, <const double*>NULL, <const float*>NULL)
    return take_batch(batch, num_threads, <const double*>NULL, <const double*>NULL)


cdef Batch batch_of(cnp.ndarray logits, cnp.ndarray targets, bint from_logits) noexcept:
    cdef Batch batch
    memset(&batch, 0, sizeof(batch))
    batch.n_rows = cnp.PyArray_DIM(logits, 0)
    batch.n_classes = cnp.PyArray_DIM(logits, 1)
    batch.logits = <char*>cnp.PyArray_DATA(logits)
    batch.logits_stride = cnp.PyArray_STRIDE(logits, 0)
    batch.targets = <char*>cnp.PyArray_DATA(targets)
    batch.targets_stride = cnp.PyArray_STRIDE(targets, 0)
    batch.from_logits = from_logits
    batch.scale = 1.0
    return batch


cdef inline bint is_single(array) noexcept:
    return cnp.PyArray_TYPE(<cnp.ndarray>array) == cnp.NPY_FLOAT32


def divergence_rows(
    cnp.ndarray logits, cnp.ndarray targets, bint from_logits, cnp.ndarray losses, sample_weight, double scale, scales,
    out, memory, int num_threads,
):
    """Fill `losses` (N,) float64 and, unless None, `out` (N, C) with the gradient of divergences from a teacher.

    Rows of `logits`, `targets` and `out` (N, C) are contiguous and native, `out` of the logits' dtype. Distributions
    have been checked. `sample_weight` and `scales`, the gradients' factors beside `scale`, are float64 (N,) or None.
    """
    cdef Batch batch = batch_of(logits, targets, from_logits)
    batch.losses = <double*>cnp.PyArray_DATA(losses)
    batch.memory = <char*>cnp.PyArray_DATA(<cnp.ndarray>memory)
    batch.scale = scale
    if sample_weight is not None:
        batch.sample_weight = <double*>cnp.PyArray_DATA(<cnp.ndarray>sample_weight)
    if scales is not None:
        batch.scales = <double*>cnp.PyArray_DATA(<cnp.ndarray>scales)
    if out is not None:
        batch.out = <char*>cnp.PyArray_DATA(<cnp.ndarray>out)
        batch.out_stride = cnp.PyArray_STRIDE(<cnp.ndarray>out, 0)
    run(&batch, is_single(logits), is_single(targets), num_threads)


# The plain case in one call, as in soft.pyx.
def plain_divergence(
    logits, targets, out, bint with_grad, from_logits, sample_weight, str reduction, denominator, num_threads,
    grad_output, Py_ssize_t serial_elements, choose_threads,
):
    """Return (reduced losses, gradient or None) of rows without options; targets are of the logits' dtype.

    Only a teacher's gradient is written; for that against distributions, soft.pyx's, `out` and `grad_output` are looked
    at, so that the losses are not computed in vain.
    """
    cdef Batch batch
    cdef int kind, threads
    cdef bint mean = reduction == "mean"
    cdef double divisor = 1.0
    cdef double* losses
    if not cnp.PyArray_CheckExact(targets) or not (from_logits is True or from_logits is False):
        return None
    threads = threads_of(logits, num_threads, serial_elements, choose_threads)
    if (
        threads == 0
        or not are_few_logits(logits, GENERAL_SLAB_ELEMENTS)
        or not is_like(targets, logits)
        or sample_weight is not None
        or not (grad_output is None or type(grad_output) is float)
        or not is_denominator(denominator, mean)
        or (out is not None and not (is_gradient(out, logits) and are_apart(out, targets)))
    ):
        return None
    kind = cnp.PyArray_TYPE(logits)
    memset(&batch, 0, sizeof(batch))
    batch.n_classes = classes_of(logits)
    batch.n_rows = cnp.PyArray_SIZE(logits) // batch.n_classes
    batch.logits = <char*>cnp.PyArray_DATA(logits)
    batch.targets = <char*>cnp.PyArray_DATA(targets)
    batch.logits_stride = batch.targets_stride = batch.n_classes * cnp.PyArray_ITEMSIZE(logits)
    batch.from_logits = from_logits
    if mean:
        divisor = batch.n_rows if denominator is None else denominator
    batch.scale = (1.0 if grad_output is None else <double>grad_output) / divisor
    losses = <double*>malloc(batch.n_rows * sizeof(double) + memory_for(batch.n_rows, batch.n_classes, threads))
    if losses == NULL:
        raise MemoryError("fastce could not allocate its working memory")
    batch.losses = losses
    batch.memory = <char*>(losses + batch.n_rows)
    try:
        if with_grad and batch.from_logits:
            out = new_array(logits, cnp.PyArray_NDIM(logits)) if out is None else out
            batch.out = <char*>cnp.PyArray_DATA(<cnp.ndarray>out)
            batch.out_stride = batch.logits_stride
        by_rows = new_array(logits, cnp.PyArray_NDIM(logits) - 1) if reduction == "none" else None
        if run(&batch, kind == cnp.NPY_FLOAT32, kind == cnp.NPY_FLOAT32, threads) and not batch.from_logits:
            return None
        if by_rows is None:
            return pairwise_sum(losses, batch.n_rows) / divisor, out
        copy_losses(by_rows, losses, batch.n_rows)
        return by_rows, out
    finally:
        free(losses)
