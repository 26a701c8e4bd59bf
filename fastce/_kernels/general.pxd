"""General rows: one call's batch, what a thread knows of the rows of a block, and how that becomes losses."""

from libc.math cimport INFINITY, NAN, fabs
from libc.stdint cimport int64_t, uint8_t, uintptr_t

from fastce._kernels.block cimport BLOCK_ROWS, Scratch, miss_of
from fastce._kernels.lanes cimport add_chunk
from fastce._kernels.staged cimport Transform
from fastce._kernels.vexp cimport ExpWindow, floating

cdef enum:
    # What is written for a row.
    GRADIENT = 0
    LOG_SOFTMAX = 1


# One call's batch. Rows of logits, distribution, out and hess lie contiguous; a NULL means that there is none.
cdef struct Batch:
    Py_ssize_t n_rows
    Py_ssize_t n_classes
    char* logits
    Py_ssize_t logits_stride
    Transform transform
    char* distribution      # dense targets, in the logits' dtype
    Py_ssize_t distribution_stride
    int64_t* indices        # (N, n_entries) targets by index; -1 in the first: the row is not looked at
    double* values          # (N, n_entries); NULL: all 1
    Py_ssize_t n_entries
    double* weight          # of the classes
    double* sample_weight
    double certain          # 1 - label_smoothing, the part of the target that stays where it is
    double smoothing        # label_smoothing, the part that is spread over the classes
    char* base              # (C,) smoothing/K * weight for all rows; NULL without smoothing or where K is the row's
    double z_loss
    double scale            # of all gradients
    double* scales          # of each row's gradient
    double* losses
    int kind
    bint stream             # the gradient is too large for the caches and not written over the logits
    char* out
    Py_ssize_t out_stride
    char* hess
    Py_ssize_t hess_stride
    double* lse
    double* probability
    double* entropy
    int64_t* predicted
    uint8_t* correct
    char* memory


# One thread's working memory, followed by the pieces. What finish_rows needs is in `rows`, by the largest logit instead
# of the target's: rows.loss is log(S/e_m).
cdef struct Own:
    Scratch rows
    double[BLOCK_ROWS] maximum
    double[BLOCK_ROWS] mass             # A - a_m
    double[BLOCK_ROWS] mass_at_maximum  # a_m
    double[BLOCK_ROWS] linear           # sum a_c (z_m - z_c)
    double[BLOCK_ROWS] spread           # sum e_c (z_m - z_c)
    double[BLOCK_ROWS] hit              # sum of e_c by the target's own, unweighted mass
    double[BLOCK_ROWS] largest_mass
    double[BLOCK_ROWS] steepness        # 2 z_loss lse
    double[BLOCK_ROWS] factor           # of the row's gradient
    double[BLOCK_ROWS] infinite         # the log-sum-exp where the largest logit is infinite
    Py_ssize_t[BLOCK_ROWS] argmax       # -1: the row is not looked at
    Py_ssize_t[BLOCK_ROWS] n_shown      # classes that exist, where there is no base
    ExpWindow[BLOCK_ROWS] window


# The memory behind Own from the next cache line on: vectors that straddle two lines take twice as long.
cdef inline char* behind(Own* own) noexcept nogil:
    cdef char* end = <char*>(own + 1)
    return end + (64 - <uintptr_t>end % 64) % 64


cdef inline const uint8_t* mask_of(const Batch* batch, Py_ssize_t row) noexcept nogil:
    return NULL if batch.transform.mask == NULL else batch.transform.mask + row * batch.transform.mask_stride


cdef inline bint is_skipped(const Batch* batch, Py_ssize_t row) noexcept nogil:
    if batch.indices != NULL and batch.n_entries > 0 and batch.indices[row * batch.n_entries] < 0:
        return True
    return batch.sample_weight != NULL and batch.sample_weight[row] == 0.0


cdef inline bint has_dense_mass(const Batch* batch) noexcept nogil:
    return batch.distribution != NULL or batch.smoothing != 0.0


cdef inline bint has_base_alone(const Batch* batch) noexcept nogil:
    return batch.distribution == NULL and batch.base != NULL


# The entry's weighted mass, and where it is.
cdef inline double entry(const Batch* batch, Py_ssize_t row, Py_ssize_t i, Py_ssize_t* index) noexcept nogil:
    cdef Py_ssize_t place = row * batch.n_entries + i
    cdef double mass = batch.certain if batch.values == NULL else batch.certain * batch.values[place]
    index[0] = batch.indices[place]
    return mass if batch.weight == NULL else mass * batch.weight[index[0]]


# sum of a_c * (z_m - z_c) where the difference may overflow: element by element, by halves, the rounding errors carried
# along.
cdef inline double sum_far_below(
    const floating* a, const floating* z, double top, Py_ssize_t n, Py_ssize_t step
) noexcept nogil:
    cdef double[2] total
    cdef Py_ssize_t i
    total[0] = total[1] = 0.0
    for i in range(n):
        if a[i * step] != 0:
            add_chunk(total, 2.0 * (a[i * step] * (0.5 * top - 0.5 * z[i * step])))
    return total[0] + total[1] if total[0] < INFINITY else total[0]


# All of a row's entries at one index: entries may repeat.
cdef inline double entry_mass(const Batch* batch, Py_ssize_t row, Py_ssize_t index) noexcept nogil:
    cdef Py_ssize_t i, other
    cdef double a, total = 0.0
    for i in range(batch.n_entries):
        a = entry(batch, row, i, &other)
        if other == index:
            total += a
    return total


# sum of a_c where sums in the dtype overflow.
cdef inline double sum_far(const floating* a, Py_ssize_t n) noexcept nogil:
    cdef double[2] total
    cdef Py_ssize_t i
    total[0] = total[1] = 0.0
    for i in range(n):
        add_chunk(total, a[i])
    return total[0] + total[1] if total[0] < INFINITY else total[0]


# The gradient at the largest logit: from the others where all mass is there.
cdef inline double pull_at_maximum(const Own* own, Py_ssize_t r) noexcept nogil:
    cdef const Scratch* rows = &own.rows
    cdef double pull = (own.mass[r] + own.steepness[r]) * (rows.at_target[r] * rows.inverse[r])
    pull -= own.mass_at_maximum[r] * miss_of(rows.others[r], rows.at_target[r])
    return pull * own.factor[r]


# Losses and statistics from the sums, once finish_rows has taken the logarithms; the factor of each row's gradient.
cdef inline void settle(const Batch* batch, Own* own, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef Scratch* rows = &own.rows
    cdef Py_ssize_t r, row
    cdef double lse, loss, sample_weight
    cdef bint is_whole
    for r in range(n):
        row = first + r
        is_whole = rows.loss[r] == rows.loss[r]
        lse = own.maximum[r] + rows.loss[r]
        sample_weight = 1.0 if batch.sample_weight == NULL else batch.sample_weight[row]
        own.factor[r] = batch.scale * sample_weight * batch.transform.scale
        if batch.scales != NULL:
            own.factor[r] *= batch.scales[row]
        if own.argmax[r] < 0:
            lse = NAN
            loss = 0.0
            rows.scale[r] = 0.0
        else:
            rows.scale[r] = own.mass[r] + own.mass_at_maximum[r]
            loss = rows.scale[r] * rows.loss[r] + own.linear[r]
            own.steepness[r] = 0.0
            if batch.z_loss != 0.0:
                loss += batch.z_loss * lse * lse
                own.steepness[r] = 2.0 * batch.z_loss * lse
                rows.scale[r] += own.steepness[r]
            loss *= sample_weight
        if batch.losses != NULL:
            batch.losses[row] = loss
        if batch.lse != NULL:
            batch.lse[row] = own.infinite[r] if batch.kind != GRADIENT and fabs(own.maximum[r]) == INFINITY else lse
        if batch.predicted != NULL:
            is_whole = is_whole and own.argmax[r] >= 0
            batch.predicted[row] = own.argmax[r] if is_whole else -1
            batch.correct[row] = is_whole and 0.0 < own.mass_at_maximum[r] >= own.largest_mass[r]
            batch.probability[row] = own.hit[r] * rows.inverse[r] if own.argmax[r] >= 0 else NAN
            batch.entropy[row] = rows.loss[r] + own.spread[r] * rows.inverse[r] if own.argmax[r] >= 0 else NAN
