"""The weights of a batch's rows: read, checked and summed in an order that depends on their number alone."""

from libc.math cimport INFINITY, fabs
from libc.stdint cimport int64_t

from fastce._kernels.lanes cimport add_chunk, larger, smaller
from fastce._kernels.plain cimport pairwise_sum


# The weights of a batch: float64, or NULL for 1 throughout.
cdef struct Weights:
    const int64_t* ids          # the class of each row, negative: the row does not count; NULL: soft targets
    const double* of_classes    # only with ids
    const double* of_samples


# What is known of a batch's weights once they are summed.
cdef struct WeightSum:
    double total
    Py_ssize_t n_weightless     # rows of sample weight 0
    bint are_finite             # the sample weights


# The weights of rows [first, first + n), where they lie or in `place`; one of the two kinds is there.
cdef inline const double* weights_of(
    const Weights* weights, Py_ssize_t first, Py_ssize_t n, double* place
) noexcept nogil:
    cdef Py_ssize_t r
    if weights.of_classes == NULL:
        return weights.of_samples + first
    for r in range(n):
        place[r] = weights.of_classes[larger(weights.ids[first + r], 0)]
    if weights.of_samples != NULL:
        for r in range(n):
            place[r] *= weights.of_samples[first + r]
    return place


# Whether n weights are finite and not less than `least`.
cdef inline bint are_weights(const double* weights, Py_ssize_t n, double least) noexcept nogil:
    cdef Py_ssize_t i, n_bad = 0
    for i in range(n):
        n_bad += 0 if least <= weights[i] and fabs(weights[i]) < INFINITY else 1
    return n_bad == 0


# The sum of the weights of the n rows that count (`all_live`: all do); `kept`, had with class weights, gets them, 0 of
# others. All that asks for every sample weight is done here, block by block: they do not stay in the nearest cache.
cdef inline WeightSum total_weight(const Weights* weights, Py_ssize_t n, double* kept, bint all_live) noexcept nogil:
    cdef double[256] part
    cdef double[2] total
    cdef double* live = part
    cdef const double* numbers
    cdef Py_ssize_t block, start, i, size
    cdef WeightSum sum
    total[0] = total[1] = 0.0
    sum.n_weightless = 0
    sum.are_finite = True
    for block in range((n + 255) // 256):
        start = block * 256
        size = smaller(256, n - start)
        if weights.of_samples != NULL:
            sum.are_finite = are_weights(weights.of_samples + start, size, -INFINITY) and sum.are_finite
            for i in range(size):
                sum.n_weightless += 1 if weights.of_samples[start + i] == 0.0 else 0
        if kept != NULL:
            live = kept + start
        numbers = weights_of(weights, start, size, live)
        if not all_live:
            for i in range(size):
                live[i] = 0.0 if weights.ids[start + i] < 0 else numbers[i]
            numbers = live
        add_chunk(total, pairwise_sum(numbers, size))
    sum.total = total[0] + total[1]
    return sum
