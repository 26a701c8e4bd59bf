"""General rows: a call's batch, what a thread knows of a block's rows, how that becomes losses and gradients."""

from libc.math cimport INFINITY, NAN, fabs
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy, memset

from fastce._kernels.block cimport BLOCK_ROWS, SMALL_LANES, Scratch, is_normal
from fastce._kernels.lanes cimport add_chunk, next_line
from fastce._kernels.staged cimport Transform
from fastce._kernels.vexp cimport (
    ExpWindow,
    bits_of_double,
    double_of_bits,
    floating,
    multiply_add_double,
    multiply_add_float,
)

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
    Py_ssize_t out_bytes    # of the call's whole gradient
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
    double[BLOCK_ROWS * SMALL_LANES] mass_lanes     # of short rows
    double[BLOCK_ROWS * SMALL_LANES] linear_lanes
    double[BLOCK_ROWS * SMALL_LANES] spread_lanes
    double[BLOCK_ROWS] hit              # sum of e_c by the target's own, unweighted mass
    double[BLOCK_ROWS] largest_mass
    double[BLOCK_ROWS] steepness        # 2 z_loss lse
    double[BLOCK_ROWS] factor           # of the row's gradient
    double[BLOCK_ROWS] loss
    double[BLOCK_ROWS] infinite         # the log-sum-exp where the largest logit is infinite
    int64_t[BLOCK_ROWS] argmax          # -1: the row is not looked at
    Py_ssize_t[BLOCK_ROWS] turn         # how many rows of the block are looked at before this one
    Py_ssize_t[BLOCK_ROWS] n_shown      # classes that exist, where there is no base
    ExpWindow[BLOCK_ROWS] window


# The memory behind Own from the next cache line on: vectors that straddle two lines take twice as long.
cdef inline char* behind(Own* own) noexcept nogil:
    return next_line(<char*>(own + 1))


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
    const floating* a, const floating* z, double top, Py_ssize_t n
) noexcept nogil:
    cdef double[2] total
    cdef Py_ssize_t i
    total[0] = total[1] = 0.0
    for i in range(n):
        if a[i] != 0:
            add_chunk(total, 2.0 * (a[i] * (0.5 * top - 0.5 * z[i])))
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


# The log-sum-exp of row r, of logits z, where its largest logit is infinite.
cdef inline void settle_maximum(const Batch* batch, Own* own, Py_ssize_t r, const floating* z) noexcept nogil:
    cdef Py_ssize_t i
    if fabs(own.maximum[r]) == INFINITY:
        own.infinite[r] = own.maximum[r]
        for i in range(batch.n_classes):
            own.infinite[r] = own.infinite[r] if z[i] == z[i] else NAN


# How many classes share row r's smoothing.
cdef inline void count_shown(const Batch* batch, Own* own, Py_ssize_t row, Py_ssize_t r) noexcept nogil:
    cdef const uint8_t* mask = mask_of(batch, row)
    cdef Py_ssize_t i, n_shown = 0
    for i in range(batch.n_classes):
        n_shown += mask[i] != 0
    own.n_shown[r] = n_shown


# Whether the classes that share the smoothing are each row's own.
cdef inline bint shares_by_row(const Batch* batch) noexcept nogil:
    return batch.smoothing != 0.0 and batch.base == NULL


# The gradient at the largest logit: from the others where all mass is there.
cdef inline double pull_at_maximum(const Own* own, Py_ssize_t r) noexcept nogil:
    cdef const Scratch* rows = &own.rows
    cdef double pull = (own.mass[r] + own.steepness[r]) * (rows.at_target[r] * rows.inverse[r])
    pull -= own.mass_at_maximum[r] * rows.miss[r]
    return pull * own.factor[r]


# Losses of rows [start, end) of a block from their sums, once finish_row has taken the logarithms, and the factors of
# their gradients. One thing a loop: loops without branches become vectors.
cdef inline void settle_rows(
    const Batch* batch, Own* own, Py_ssize_t first, Py_ssize_t start, Py_ssize_t end
) noexcept nogil:
    cdef Scratch* rows = &own.rows
    cdef Py_ssize_t r
    for r in range(start, end):
        rows.lse[r] = own.maximum[r] + rows.loss[r]
    if batch.kind == LOG_SOFTMAX:
        put_lse(batch, own, first, start, end)
        return
    for r in range(start, end):
        rows.scale[r] = own.mass[r] + own.mass_at_maximum[r]
        own.loss[r] = rows.scale[r] * rows.loss[r] + own.linear[r]
        own.steepness[r] = 0.0
        own.factor[r] = batch.scale
    if batch.z_loss != 0.0:
        for r in range(start, end):
            own.loss[r] += batch.z_loss * rows.lse[r] * rows.lse[r]
            own.steepness[r] = 2.0 * batch.z_loss * rows.lse[r]
            rows.scale[r] += own.steepness[r]
    if batch.sample_weight != NULL:
        for r in range(start, end):
            own.loss[r] *= batch.sample_weight[first + r]
            own.factor[r] *= batch.sample_weight[first + r]
    for r in range(start, end):
        own.factor[r] *= batch.transform.scale
    if batch.scales != NULL:
        for r in range(start, end):
            own.factor[r] *= batch.scales[first + r]
    for r in range(start, end):
        rows.lse[r] = NAN if own.argmax[r] < 0 else rows.lse[r]
        rows.scale[r] = 0.0 if own.argmax[r] < 0 else rows.scale[r]
        own.loss[r] = 0.0 if own.argmax[r] < 0 else own.loss[r]
    if batch.losses != NULL:
        memcpy(batch.losses + first + start, own.loss + start, (end - start) * sizeof(double))
    if batch.lse != NULL:
        memcpy(batch.lse + first + start, rows.lse + start, (end - start) * sizeof(double))
    if batch.predicted != NULL:
        put_statistics(batch, own, first, start, end)


# The log-sum-exp of rows for their own sake: that of a row whose largest logit is infinite may be infinite too.
cdef inline void put_lse(
    const Batch* batch, const Own* own, Py_ssize_t first, Py_ssize_t start, Py_ssize_t end
) noexcept nogil:
    cdef Py_ssize_t r
    if batch.lse != NULL:
        memcpy(batch.lse + first + start, own.rows.lse + start, (end - start) * sizeof(double))
        for r in range(start, end):
            if fabs(own.maximum[r]) == INFINITY:
                batch.lse[first + r] = own.infinite[r]


cdef inline void put_statistics(
    const Batch* batch, const Own* own, Py_ssize_t first, Py_ssize_t start, Py_ssize_t end
) noexcept nogil:
    cdef const Scratch* rows = &own.rows
    cdef Py_ssize_t r
    for r in range(start, end):
        batch.predicted[first + r] = own.argmax[r] if rows.loss[r] == rows.loss[r] else -1
    for r in range(start, end):
        batch.correct[first + r] = (
            (batch.predicted[first + r] >= 0)
            & (own.mass_at_maximum[r] > 0.0)
            & (own.mass_at_maximum[r] >= own.largest_mass[r])
        )
    for r in range(start, end):
        batch.probability[first + r] = NAN if own.argmax[r] < 0 else own.hit[r] * rows.inverse[r]
        batch.entropy[first + r] = NAN if own.argmax[r] < 0 else rows.loss[r] + own.spread[r] * rows.inverse[r]


# ---- mass, gradient, Hessian of a piece of a row ---------------------------------------------------------------------

cdef inline bint is_distribution_alone(const Batch* batch) noexcept nogil:
    return batch.distribution != NULL and batch.smoothing == 0.0 and batch.weight == NULL


# The dense mass of the classes from `start` on where it lies as it is, else NULL.
cdef inline const floating* lying_mass(
    const Batch* batch, Py_ssize_t row, Py_ssize_t start, const floating* like
) noexcept nogil:
    if has_base_alone(batch):
        return <const floating*>batch.base + start
    if is_distribution_alone(batch):
        return <const floating*>(batch.distribution + row * batch.distribution_stride) + start
    return NULL


# The dense mass of a chunk, where it lies or in `mass`; `n_shown` classes share the smoothing.
cdef inline const floating* stage_mass(
    const Batch* batch, Py_ssize_t row, Py_ssize_t start, Py_ssize_t n, Py_ssize_t n_shown, floating* mass,
    const floating* like,
) noexcept nogil:
    cdef const uint8_t* mask = mask_of(batch, row)
    cdef const floating* base = <const floating*>batch.base
    cdef const floating* lying = lying_mass(batch, row, start, like)
    cdef double uniform
    cdef Py_ssize_t i
    if lying != NULL:
        return lying
    if batch.distribution == NULL:
        for i in range(n):
            mass[i] = 0
    else:
        memcpy(
            mass, batch.distribution + row * batch.distribution_stride + start * sizeof(floating), n * sizeof(floating)
        )
        if batch.weight != NULL:
            for i in range(n):
                mass[i] = <floating>(mass[i] * batch.certain * batch.weight[start + i])
        elif batch.certain != 1.0:
            for i in range(n):
                mass[i] = <floating>(mass[i] * batch.certain)
    if batch.smoothing != 0.0:
        if base != NULL:
            for i in range(n):
                mass[i] += base[start + i]
        else:
            uniform = batch.smoothing / n_shown
            for i in range(n):
                if mask[start + i]:
                    mass[i] += <floating>(uniform if batch.weight == NULL else uniform * batch.weight[start + i])
    return mass


cdef inline void multiply(floating* out, const floating* chain, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = out[i] * chain[i]


# The gradient of n classes from `start` on at the row's entries, and at its largest logit.
cdef inline void correct_piece(
    const Batch* batch, const Own* own, Py_ssize_t row, Py_ssize_t r, Py_ssize_t start, floating* out, Py_ssize_t n
) noexcept nogil:
    cdef double a
    cdef Py_ssize_t i, index
    for i in range(batch.n_entries):
        a = entry(batch, row, i, &index)
        if 0 <= index - start < n and a != 0.0:
            out[index - start] = <floating>(out[index - start] - a * own.factor[r])
    if 0 <= own.argmax[r] - start < n:
        out[own.argmax[r] - start] = <floating>pull_at_maximum(own, r)


# out = (terms * (scale/S) - mass) * factor by row r's numbers, in the dtype where all factors are normal numbers of it,
# else in float64 and by the power of two in 1/S first: nothing then under- or overflows on the way.
cdef inline void combine(
    const Own* own, Py_ssize_t r, floating* out, const floating* terms, const floating* mass, Py_ssize_t n
) noexcept nogil:
    cdef double inverse = own.rows.inverse[r], power, rest
    cdef Py_ssize_t i
    if is_plain_row(own, r, out, mass != NULL):
        weigh_terms(out, terms, mass, n, <floating>push_of(own, r), <floating>(-own.factor[r]))
        return
    power = double_of_bits(bits_of_double(inverse) & <uint64_t>0x7ff0000000000000)
    rest = own.rows.scale[r] * (inverse / power)
    for i in range(n):
        out[i] = <floating>(((terms[i] * power) * rest - (0.0 if mass == NULL else mass[i])) * own.factor[r])


cdef inline bint is_plain_row(const Own* own, Py_ssize_t r, const floating* like, bint dense) noexcept nogil:
    if dense and not is_normal(like, own.factor[r], 1.0):
        return False
    return is_normal(like, own.rows.scale[r] * own.factor[r], own.rows.inverse[r])


# What the terms are multiplied by; the mass is by -factor.
cdef inline double push_of(const Own* own, Py_ssize_t r) noexcept nogil:
    return own.rows.scale[r] * own.factor[r] * own.rows.inverse[r]


# out = terms * push + mass * pull; `mass` may be NULL.
cdef inline void weigh_terms(
    floating* out, const floating* terms, const floating* mass, Py_ssize_t n, floating push, floating pull
) noexcept nogil:
    cdef Py_ssize_t i
    if mass == NULL:
        for i in range(n):
            out[i] = terms[i] * push
    else:
        for i in range(n):
            if floating is float:
                out[i] = multiply_add_float(terms[i], push, mass[i] * pull)
            else:
                out[i] = multiply_add_double(terms[i], push, mass[i] * pull)


# p * ((A + 2 z_loss lse)(1 - p) + 2 z_loss p) by the row's factor; at the largest logit 1 - p is others/S.
cdef inline void write_hessian(
    const Batch* batch, Own* own, Py_ssize_t r, const floating* terms, floating* hess, Py_ssize_t n, Py_ssize_t top
) noexcept nogil:
    cdef Scratch* rows = &own.rows
    cdef double factor = own.factor[r] * batch.transform.scale
    cdef double curve = rows.scale[r] * factor, square = 2.0 * batch.z_loss * factor, p
    cdef floating inverse = <floating>rows.inverse[r]
    cdef floating curved = <floating>curve, squared = <floating>square, probability
    cdef Py_ssize_t i
    if is_normal(hess, curve, 1.0) and is_normal(hess, square, 1.0):
        for i in range(n):
            probability = terms[i] * inverse
            hess[i] = probability * (curved * (1 - probability) + squared * probability)
    else:
        for i in range(n):
            p = terms[i] * rows.inverse[r]
            hess[i] = <floating>(p * (curve * (1.0 - p) + square * p))
    if 0 <= top < n:
        p = rows.at_target[r] * rows.inverse[r]
        hess[top] = <floating>(p * (curve * rows.miss[r] + square * p))


# The log-softmax of a row with this largest logit, whose own is -`least`.
cdef inline void write_log_softmax(
    floating* out, const floating* z, Py_ssize_t n, floating maximum, floating least
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = (z[i] - maximum) - least


# A row that is not looked at.
cdef inline void clear_row(const Batch* batch, Py_ssize_t row, const floating* like) noexcept nogil:
    if batch.out != NULL:
        memset(batch.out + row * batch.out_stride, 0, batch.n_classes * sizeof(floating))
    if batch.hess != NULL:
        memset(batch.hess + row * batch.hess_stride, 0, batch.n_classes * sizeof(floating))
