"""The compiled entry points for rows with options: soft targets, class masks, transformed logits, Hessians, statistics
and activations.

Compiled once per CPU target (setup.py), like rows.pyx, whose rows this is the general form of. With z the transformed
logits (staged.pxd), a_c the target's mass at class c and m the class of the largest logit:

    A      = sum_c a_c
    others = sum_{c != m} e_c,  S = others + e_m          the largest is left out, never subtracted
    loss   = A * log(S/e_m) + sum_c a_c (z_m - z_c) + z_loss * lse^2,   lse = z_m + log(S/e_m)
    grad_c = p_c (A + 2 z_loss lse) - a_c,                at m: p_m (A - a_m) - a_m others/S + p_m 2 z_loss lse
    hess_c = p_c ((A + 2 z_loss lse)(1 - p_c) + 2 z_loss p_c)

No term of the loss is negative but z_loss's neighbours, so tiny losses keep their digits; where all mass is at m the
gradient there is -others/S, where it is elsewhere p_t <= 1/2 and p_t - 1 keeps them too. Mass has a dense part (a
distribution, smoothing) and entries (class ids, sparse targets). Errors are those of rows.pyx, and for the dense sums 6
roundings of terms of one sign. Every sum has a fixed order that depends on the row's length alone.
"""

from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY, NAN, fabs
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

cimport numpy as cnp

from fastce._kernels.block cimport BLOCK_ROWS, Scratch, finish_rows, is_normal, miss_of, put_row
from fastce._kernels.lanes cimport (
    CHUNK,
    LANES,
    SUM_BLOCK,
    Sum,
    add_block,
    add_chunk,
    chunks_of,
    clear,
    exp_limit,
    larger,
    smaller,
    total_of,
)
from fastce._kernels.staged cimport Transform, padded, stage_logits
from fastce._kernels.vexp cimport (
    ExpWindow,
    bits_of_double,
    double_of_bits,
    exp_shifted,
    exp_window,
    floating,
    multiply_add_double,
    multiply_add_float,
    shift_for,
)

cdef extern from "target.h" nogil:
    int watch_forks "fastce_watch_forks" ()
    bint is_forked_child "fastce_is_forked_child" ()

cnp.import_array()
watch_forks()

cdef enum:
    # Rows up to this length keep their logits, exponentials and mass; longer ones compute them again for the gradient.
    KEEP_CLASSES = 65536
    TASK_ELEMENTS = 8192    # the least that a thread takes at a time
    TASKS_PER_THREAD = 8
    GIL_ELEMENTS = 2048     # batches below keep the GIL

    # What is written for a row.
    GRADIENT = 0
    SOFTMAX = 1
    LOG_SOFTMAX = 2


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
    char* base              # (C,) smoothing/K * weight, one for all rows; NULL without smoothing or where K is the row's
    double base_mass
    double z_loss
    double scale            # of all gradients
    double* scales          # of each row's gradient
    double* losses
    int kind
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
    double[BLOCK_ROWS] mass             # A
    double[BLOCK_ROWS] mass_at_maximum  # a_m
    double[BLOCK_ROWS] linear           # sum a_c (z_m - z_c)
    double[BLOCK_ROWS] spread           # sum e_c (z_m - z_c)
    double[BLOCK_ROWS] hit              # sum of e_c by the target's own, unweighted mass
    double[BLOCK_ROWS] largest_mass
    double[BLOCK_ROWS] factor           # of the row's gradient
    double[BLOCK_ROWS] infinite         # the log-sum-exp where the largest logit is infinite
    Py_ssize_t[BLOCK_ROWS] argmax       # -1: the row is not looked at
    Py_ssize_t[BLOCK_ROWS] n_shown      # classes that exist, where there is no base
    ExpWindow[BLOCK_ROWS] window
    double[LANES] slack


# The pieces of a block of rows (or of one chunk of a long row): pointers into the memory behind Own.
cdef struct Pieces:
    char* z
    char* terms
    char* mass
    char* chain
    Py_ssize_t width        # elements from one row's piece to the next
    Py_ssize_t step         # elements from one chunk's piece to the next: 0 where chunks overwrite each other


# ---- pieces --------------------------------------------------------------------------------------------------------

cdef inline floating piece_maximum(const floating* z, Py_ssize_t n) noexcept nogil:
    cdef floating[4 * LANES] largest
    cdef Py_ssize_t i, lane, many = n - n % (4 * LANES)
    for lane in range(4 * LANES):
        largest[lane] = -INFINITY
    for i in range(many // (4 * LANES)):
        for lane in range(4 * LANES):
            largest[lane] = z[lane] if z[lane] > largest[lane] else largest[lane]
        z += 4 * LANES
    for i in range((n - many) // LANES):
        for lane in range(LANES):
            largest[lane] = z[lane] if z[lane] > largest[lane] else largest[lane]
        z += LANES
    for lane in range(2 * LANES):
        largest[lane] = largest[lane] if largest[lane] > largest[lane + 2 * LANES] else largest[lane + 2 * LANES]
    for lane in range(LANES):
        largest[lane] = largest[lane] if largest[lane] > largest[lane + LANES] else largest[lane + LANES]
    for lane in range(8):
        largest[lane] = largest[lane] if largest[lane] > largest[lane + 8] else largest[lane + 8]
    for lane in range(4):
        largest[lane] = largest[lane] if largest[lane] > largest[lane + 4] else largest[lane + 4]
    for lane in range(1, 4):
        largest[0] = largest[0] if largest[0] > largest[lane] else largest[lane]
    return largest[0]


cdef inline Py_ssize_t first_index_of(const floating* z, floating value, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, lane
    cdef int hits
    for i in range(n // LANES):
        hits = 0
        for lane in range(LANES):
            hits |= z[i * LANES + lane] == value
        if hits:
            for lane in range(LANES):
                if z[i * LANES + lane] == value:
                    return i * LANES + lane
    return 0


cdef inline void add_vectors(const floating* t, Py_ssize_t n, Sum* sums) noexcept nogil:
    cdef Py_ssize_t i, lane
    for i in range(n // LANES):
        for lane in range(LANES):
            sums.total[lane] += t[i * LANES + lane]


cdef inline double sum_piece(const floating* t, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, many = n - n % SUM_BLOCK
    cdef Sum sums
    clear(&sums)
    for i in range(many // SUM_BLOCK):
        add_block(t + i * SUM_BLOCK, &sums)
    add_vectors(t + many, n - many, &sums)
    return total_of(&sums)


# a * (top - z), where a = 0 beats an infinite difference.
cdef inline floating below(floating a, floating top, floating z) noexcept nogil:
    return a * (top - z) if a != 0 else 0


# sum of a_c * (z_m - z_c).
cdef inline double sum_below(const floating* a, const floating* z, floating top, Py_ssize_t n) noexcept nogil:
    cdef floating[SUM_BLOCK] products
    cdef Py_ssize_t i, lane, many = n - n % SUM_BLOCK
    cdef Sum sums
    clear(&sums)
    for i in range(many // SUM_BLOCK):
        for lane in range(SUM_BLOCK):
            products[lane] = below(a[i * SUM_BLOCK + lane], top, z[i * SUM_BLOCK + lane])
        add_block(products, &sums)
    for i in range(many, n):
        products[i - many] = below(a[i], top, z[i])
    add_vectors(products, n - many, &sums)
    for lane in range(LANES):
        sums.error[lane] = sums.error[lane] if fabs(sums.total[lane]) < INFINITY else 0.0
    return total_of(&sums)


cdef inline double sum_products(const floating* a, const floating* b, Py_ssize_t n) noexcept nogil:
    cdef floating[SUM_BLOCK] products
    cdef Py_ssize_t i, lane, many = n - n % SUM_BLOCK
    cdef Sum sums
    clear(&sums)
    for i in range(many // SUM_BLOCK):
        for lane in range(SUM_BLOCK):
            products[lane] = a[i * SUM_BLOCK + lane] * b[i * SUM_BLOCK + lane]
        add_block(products, &sums)
    for i in range(many, n):
        products[i - many] = a[i] * b[i]
    add_vectors(products, n - many, &sums)
    return total_of(&sums)


cdef inline void exp_piece(const floating* z, floating* terms, Py_ssize_t n, const ExpWindow* window) noexcept nogil:
    cdef floating offset = <floating>window.offset
    cdef floating low = <floating>window.low
    cdef floating high = <floating>window.high
    cdef floating magic = <floating>window.magic
    cdef Py_ssize_t i
    for i in range(n):
        terms[i] = exp_shifted(z[i], offset, low, high, magic)


# ---- one row, first time -------------------------------------------------------------------------------------------

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


# The dense mass of a chunk, padded with 0; `n_shown` classes share the smoothing.
cdef inline const floating* stage_mass(
    const Batch* batch, Py_ssize_t row, Py_ssize_t start, Py_ssize_t n, Py_ssize_t n_shown, floating* mass,
    const floating* like,
) noexcept nogil:
    cdef const uint8_t* mask = mask_of(batch, row)
    cdef const floating* base = <const floating*>batch.base
    cdef double uniform
    cdef Py_ssize_t i
    if has_base_alone(batch):
        return base + start
    for i in range(n - n % LANES, padded(n)):
        mass[i] = 0
    if batch.distribution == NULL:
        for i in range(n):
            mass[i] = 0
    else:
        memcpy(mass, batch.distribution + row * batch.distribution_stride + start * sizeof(floating), n * sizeof(floating))
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


cdef inline void stage(
    const Batch* batch, const Pieces* pieces, Py_ssize_t row, Py_ssize_t r, Py_ssize_t start, Py_ssize_t n,
    const floating* like,
) noexcept nogil:
    cdef const uint8_t* mask = mask_of(batch, row)
    cdef Py_ssize_t place = r * pieces.width + start // CHUNK * pieces.step
    stage_logits(
        <const floating*>(batch.logits + row * batch.logits_stride) + start, n, NULL if mask == NULL else mask + start,
        &batch.transform, <floating*>pieces.z + place, <floating*>pieces.chain + place,
    )


# The largest logit of a row and where it is first; all pieces of the row are staged on the way.
cdef inline void find_maximum(
    const Batch* batch, Own* own, const Pieces* pieces, Py_ssize_t row, Py_ssize_t r, const floating* like
) noexcept nogil:
    cdef const uint8_t* mask = mask_of(batch, row)
    cdef const floating* z
    cdef floating maximum = -INFINITY, largest
    cdef Py_ssize_t chunk, start, n, i, index = 0, n_shown = 0
    for chunk in range(chunks_of(batch.n_classes)):
        start = chunk * CHUNK
        n = smaller(CHUNK, batch.n_classes - start)
        stage(batch, pieces, row, r, start, n, like)
        z = <const floating*>pieces.z + r * pieces.width + start // CHUNK * pieces.step
        largest = piece_maximum(z, padded(n))
        if largest > maximum:
            maximum = largest
            index = start + first_index_of(z, largest, padded(n))
    if batch.smoothing != 0.0 and batch.base == NULL:
        for i in range(batch.n_classes):
            n_shown += mask[i] != 0
    own.maximum[r] = maximum
    own.argmax[r] = index
    own.n_shown[r] = n_shown
    if fabs(maximum) == INFINITY:
        own.window[r] = exp_window(like, 0.0, NAN)
        own.infinite[r] = maximum
        for i in range(batch.n_classes):
            if (<const floating*>(batch.logits + row * batch.logits_stride))[i] != (
                <const floating*>(batch.logits + row * batch.logits_stride))[i]:
                own.infinite[r] = NAN
    else:
        own.window[r] = exp_window(
            like, shift_for(like, maximum if fabs(maximum) <= exp_limit(like) else 0.0),
            0.0 if fabs(maximum) <= exp_limit(like) else maximum,
        )


# All sums of a row: exponentials and mass. Sums over chunks carry their rounding errors along.
cdef inline void measure_row(
    const Batch* batch, Own* own, const Pieces* pieces, Py_ssize_t row, Py_ssize_t r, const floating* like
) noexcept nogil:
    cdef Py_ssize_t chunk, start, n, i, index, place, top
    cdef double a, at_maximum = 0.0
    cdef double[2] total
    cdef double[2] mass
    cdef double[2] linear
    cdef double[2] spread
    cdef floating* z
    cdef floating* terms
    cdef const floating* dense
    total[0] = total[1] = mass[0] = mass[1] = linear[0] = linear[1] = spread[0] = spread[1] = 0.0
    own.mass_at_maximum[r] = own.hit[r] = own.largest_mass[r] = 0.0
    find_maximum(batch, own, pieces, row, r, like)
    for chunk in range(chunks_of(batch.n_classes)):
        start = chunk * CHUNK
        n = smaller(CHUNK, batch.n_classes - start)
        place = r * pieces.width + start // CHUNK * pieces.step
        z = <floating*>pieces.z + place
        terms = <floating*>pieces.terms + place
        if pieces.step == 0 and batch.n_classes > CHUNK:
            stage(batch, pieces, row, r, start, n, like)
        exp_piece(z, terms, padded(n), &own.window[r])
        top = own.argmax[r] - start
        if has_dense_mass(batch):
            dense = stage_mass(batch, row, start, n, own.n_shown[r], <floating*>pieces.mass + place, like)
            if has_base_alone(batch):
                add_chunk(mass, batch.base_mass if start == 0 else 0.0)
            else:
                add_chunk(mass, sum_piece(dense, padded(n)))
            add_chunk(linear, sum_below(dense, z, <floating>own.maximum[r], padded(n)))
            if 0 <= top < n:
                own.mass_at_maximum[r] += dense[top]
            if batch.probability != NULL:
                own.hit[r] += sum_products(dense, terms, padded(n))
                own.largest_mass[r] = larger_of(own.largest_mass[r], piece_maximum(dense, padded(n)))
        for i in range(batch.n_entries):
            a = entry(batch, row, i, &index)
            if a != 0.0 and 0 <= index - start < n:
                add_chunk(mass, a)
                add_chunk(linear, a * (own.maximum[r] - z[index - start]))
                if index - start == top:
                    own.mass_at_maximum[r] += a
                if batch.probability != NULL:
                    own.hit[r] += a * terms[index - start]
                    own.largest_mass[r] = larger_of(own.largest_mass[r], entry_mass(batch, row, index))
        if 0 <= top < n:
            at_maximum = terms[top]
            terms[top] = 0
        if batch.entropy != NULL:
            add_chunk(spread, sum_below(terms, z, <floating>own.maximum[r], padded(n)))
        add_chunk(total, sum_piece(terms, padded(n)))
    own.mass[r] = mass[0] + mass[1]
    own.linear[r] = linear[0] + linear[1] if linear[0] < INFINITY else linear[0]
    own.spread[r] = spread[0] + spread[1]
    put_row(
        &own.rows, r, total[0] + total[1], at_maximum, own.maximum[r] - own.window[r].offset, own.window[r].shift
    )
    if own.window[r].offset != own.window[r].offset:
        put_row(&own.rows, r, NAN, NAN, NAN, 0.0)


cdef inline double larger_of(double a, double b) noexcept nogil:
    return a if a > b else b


# All of a row's entries at one index: entries may repeat.
cdef inline double entry_mass(const Batch* batch, Py_ssize_t row, Py_ssize_t index) noexcept nogil:
    cdef Py_ssize_t i, other
    cdef double a, total = 0.0
    for i in range(batch.n_entries):
        a = entry(batch, row, i, &other)
        if other == index:
            total += a
    return total


# ---- the block -----------------------------------------------------------------------------------------------------

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
            loss = own.mass[r] * rows.loss[r] + own.linear[r]
            rows.scale[r] = own.mass[r]
            if batch.z_loss != 0.0:
                loss += batch.z_loss * lse * lse
                rows.scale[r] += 2.0 * batch.z_loss * lse
            loss *= sample_weight
        if batch.losses != NULL:
            batch.losses[row] = loss
        if batch.lse != NULL:
            batch.lse[row] = lse
        if batch.predicted != NULL:
            is_whole = is_whole and own.argmax[r] >= 0
            batch.predicted[row] = own.argmax[r] if is_whole else -1
            batch.correct[row] = is_whole and own.mass_at_maximum[r] > 0.0 and own.mass_at_maximum[r] >= own.largest_mass[r]
            batch.probability[row] = own.hit[r] * rows.inverse[r] if own.argmax[r] >= 0 else NAN
            batch.entropy[row] = rows.loss[r] + own.spread[r] * rows.inverse[r] if own.argmax[r] >= 0 else NAN


cdef inline void take_block(
    const Batch* batch, Own* own, const Pieces* pieces, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(n):
        if is_skipped(batch, first + r):
            own.argmax[r] = -1
            own.maximum[r] = 0.0
            put_row(&own.rows, r, 0.0, 1.0, 0.0, 0.0)
        else:
            measure_row(batch, own, pieces, first + r, r, like)
    finish_rows(&own.rows, n)
    settle(batch, own, first, n)
    if batch.out != NULL or batch.hess != NULL:
        for r in range(n):
            write_row(batch, own, pieces, first + r, r, like)


# ---- one row, second time ------------------------------------------------------------------------------------------

cdef inline void write_row(
    const Batch* batch, Own* own, const Pieces* pieces, Py_ssize_t row, Py_ssize_t r, const floating* like
) noexcept nogil:
    cdef floating* out = <floating*>(batch.out + row * batch.out_stride)
    cdef floating* hess = <floating*>(batch.hess + row * batch.hess_stride)
    cdef Py_ssize_t chunk, start, n, place, top
    cdef floating* z
    cdef floating* terms
    cdef const floating* mass
    if own.argmax[r] < 0:
        if batch.out != NULL:
            memset(out, 0, batch.n_classes * sizeof(floating))
        if batch.hess != NULL:
            memset(hess, 0, batch.n_classes * sizeof(floating))
        return
    for chunk in range(chunks_of(batch.n_classes)):
        start = chunk * CHUNK
        n = smaller(CHUNK, batch.n_classes - start)
        place = r * pieces.width + start // CHUNK * pieces.step
        z = <floating*>pieces.z + place
        terms = <floating*>pieces.terms + place
        mass = NULL
        top = own.argmax[r] - start
        if pieces.step == 0 and batch.n_classes > CHUNK:
            stage(batch, pieces, row, r, start, n, like)
            exp_piece(z, terms, padded(n), &own.window[r])
            if 0 <= top < n:
                terms[top] = 0
        if batch.kind == GRADIENT and has_dense_mass(batch):
            mass = <floating*>pieces.mass + place
            if has_base_alone(batch):
                mass = <const floating*>batch.base + start
            elif pieces.step == 0 and batch.n_classes > CHUNK:
                mass = stage_mass(batch, row, start, n, own.n_shown[r], <floating*>pieces.mass + place, like)
        if batch.kind != GRADIENT:
            write_activation(batch, own, r, z, terms, out + start, n, top)
            continue
        # The Hessian first: the gradient may be written over logits, never over terms.
        if batch.hess != NULL:
            write_hessian(batch, own, r, terms, hess + start, n, top)
            hide(mask_of(batch, row), start, hess + start, n)
        if batch.out != NULL:
            write_gradient(batch, own, row, r, start, terms, mass, out + start, n, top)
            if batch.transform.cap != 0.0:
                multiply(out + start, <const floating*>pieces.chain + place, n)
            hide(mask_of(batch, row), start, out + start, n)


# A class that does not exist has gradient 0, also where mass lies on it and in rows that are nan.
cdef inline void hide(const uint8_t* mask, Py_ssize_t start, floating* out, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    if mask != NULL:
        for i in range(n):
            out[i] = out[i] if mask[start + i] else 0


cdef inline void multiply(floating* out, const floating* chain, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = out[i] * chain[i]


cdef inline void write_gradient(
    const Batch* batch, Own* own, Py_ssize_t row, Py_ssize_t r, Py_ssize_t start, const floating* terms,
    const floating* mass, floating* out, Py_ssize_t n, Py_ssize_t top,
) noexcept nogil:
    cdef Scratch* rows = &own.rows
    cdef double factor = own.factor[r], inverse = rows.inverse[r], a, pull
    cdef Py_ssize_t i, index
    combine(out, terms, mass, n, rows.scale[r] * factor, inverse, factor)
    for i in range(batch.n_entries):
        a = entry(batch, row, i, &index)
        if 0 <= index - start < n and a != 0.0:
            out[index - start] = <floating>(out[index - start] - a * factor)
    if 0 <= top < n:
        a = own.mass_at_maximum[r]
        pull = (rows.scale[r] - a) * (rows.at_target[r] * inverse) - a * miss_of(rows.others[r], rows.at_target[r])
        out[top] = <floating>(pull * factor)


# out = terms * (scale/S) - mass * factor, in the dtype where all factors are normal numbers of it, else in float64 and
# by the power of two in 1/S first: nothing then under- or overflows on the way.
cdef inline void combine(
    floating* out, const floating* terms, const floating* mass, Py_ssize_t n, double scale, double inverse, double factor
) noexcept nogil:
    cdef floating push = <floating>(scale * inverse)
    cdef floating pull = <floating>(-factor)
    cdef double power, rest
    cdef Py_ssize_t i
    if is_normal(out, scale * inverse) and (mass == NULL or is_normal(out, factor)):
        if mass == NULL:
            for i in range(n):
                out[i] = terms[i] * push
        else:
            for i in range(n):
                if floating is float:
                    out[i] = multiply_add_float(terms[i], push, mass[i] * pull)
                else:
                    out[i] = multiply_add_double(terms[i], push, mass[i] * pull)
        return
    power = double_of_bits(bits_of_double(inverse) & <uint64_t>0x7ff0000000000000)
    rest = scale * (inverse / power)
    for i in range(n):
        out[i] = <floating>((terms[i] * power) * rest - (0.0 if mass == NULL else mass[i] * factor))


# p * ((A + 2 z_loss lse)(1 - p) + 2 z_loss p) by the row's factor; at the largest logit 1 - p is others/S.
cdef inline void write_hessian(
    const Batch* batch, Own* own, Py_ssize_t r, const floating* terms, floating* hess, Py_ssize_t n, Py_ssize_t top
) noexcept nogil:
    cdef Scratch* rows = &own.rows
    cdef double factor = own.factor[r] * batch.transform.scale
    cdef double curve = rows.scale[r] * factor, square = 2.0 * batch.z_loss * factor, p, miss
    cdef floating inverse = <floating>rows.inverse[r]
    cdef floating curved = <floating>curve, squared = <floating>square, probability
    cdef Py_ssize_t i
    if is_normal(hess, curve) and is_normal(hess, square):
        for i in range(n):
            probability = terms[i] * inverse
            hess[i] = probability * (curved * (1 - probability) + squared * probability)
    else:
        for i in range(n):
            p = terms[i] * rows.inverse[r]
            hess[i] = <floating>(p * (curve * (1.0 - p) + square * p))
    if 0 <= top < n:
        p = rows.at_target[r] * rows.inverse[r]
        miss = miss_of(rows.others[r], rows.at_target[r])
        hess[top] = <floating>(p * (curve * miss + square * p))


cdef inline void write_activation(
    const Batch* batch, Own* own, Py_ssize_t r, const floating* z, const floating* terms, floating* out, Py_ssize_t n,
    Py_ssize_t top,
) noexcept nogil:
    cdef floating inverse = <floating>own.rows.inverse[r]
    cdef floating maximum = <floating>own.maximum[r]
    cdef floating least = <floating>own.rows.loss[r]
    cdef Py_ssize_t i
    if batch.kind == LOG_SOFTMAX:
        for i in range(n):
            out[i] = (z[i] - maximum) - least
        return
    for i in range(n):
        out[i] = terms[i] * inverse
    if 0 <= top < n:
        out[top] = <floating>(own.rows.at_target[r] * own.rows.inverse[r])


# ---- the batch -----------------------------------------------------------------------------------------------------

cdef struct Plan:
    int num_threads
    Py_ssize_t block_rows
    Py_ssize_t width
    Py_ssize_t piece
    Py_ssize_t task_rows
    Py_ssize_t n_tasks
    Py_ssize_t thread_bytes


cdef Plan plan_batch(Py_ssize_t n_rows, Py_ssize_t n_classes, Py_ssize_t itemsize, int num_threads) noexcept nogil:
    cdef Plan plan
    plan.block_rows = smaller(BLOCK_ROWS, larger(1, CHUNK // padded(n_classes)))
    plan.width = padded(n_classes)
    plan.piece = plan.width * plan.block_rows if n_classes <= KEEP_CLASSES else CHUNK
    plan.task_rows = larger(n_rows // (TASKS_PER_THREAD * num_threads), TASK_ELEMENTS // n_classes)
    plan.task_rows = larger(plan.task_rows - plan.task_rows % plan.block_rows, plan.block_rows)
    plan.n_tasks = (n_rows + plan.task_rows - 1) // plan.task_rows
    plan.num_threads = 1 if is_forked_child() else <int>larger(1, smaller(num_threads, plan.n_tasks))
    # 64 bytes more a buffer keep rows whose length is a power of two from meeting in one set of the cache.
    plan.thread_bytes = sizeof(Own) + 4 * (plan.piece * itemsize + 64)
    plan.thread_bytes += (64 - plan.thread_bytes % 64) % 64
    return plan


cdef void take_task(
    const Batch* batch, const Plan* plan, char* memory, Py_ssize_t task, const floating* like
) noexcept nogil:
    cdef Own* own = <Own*>memory
    cdef Py_ssize_t n_bytes = plan.piece * sizeof(floating) + 64
    cdef Py_ssize_t first = task * plan.task_rows, end = smaller(batch.n_rows, first + plan.task_rows)
    cdef Pieces pieces
    pieces.z = <char*>(own + 1)
    pieces.terms = pieces.z + n_bytes
    pieces.mass = pieces.terms + n_bytes
    pieces.chain = pieces.mass + n_bytes
    pieces.width = plan.width if batch.n_classes <= KEEP_CLASSES else 0
    pieces.step = CHUNK if batch.n_classes <= KEEP_CLASSES else 0
    while first < end:
        take_block(batch, own, &pieces, first, smaller(plan.block_rows, end - first), like)
        first += plan.block_rows


cdef void take_batch(Batch* batch, int num_threads, const floating* like) noexcept nogil:
    cdef Plan plan = plan_batch(batch.n_rows, batch.n_classes, sizeof(floating), num_threads)
    cdef char* memory = batch.memory + (64 - <uintptr_t>batch.memory % 64) % 64
    cdef Py_ssize_t task
    if batch.base != NULL:
        memory += place_base(batch, <floating*>memory)
    if plan.num_threads == 1:
        for task in range(plan.n_tasks):
            take_task(batch, &plan, memory, task, like)
    else:
        for task in prange(plan.n_tasks, num_threads=plan.num_threads, schedule="dynamic", chunksize=1):
            take_task(batch, &plan, memory + threadid() * plan.thread_bytes, task, like)


# Copies the base to the front of the working memory, in whole vectors, and sums it; returns the bytes that takes.
cdef Py_ssize_t place_base(Batch* batch, floating* base) noexcept nogil:
    cdef Py_ssize_t i, chunk, start, n_classes = batch.n_classes
    cdef double[2] mass
    mass[0] = mass[1] = 0.0
    memcpy(base, batch.base, n_classes * sizeof(floating))
    for i in range(n_classes, padded(n_classes)):
        base[i] = 0
    for chunk in range(chunks_of(n_classes)):
        start = chunk * CHUNK
        add_chunk(mass, sum_piece(base + start, padded(smaller(CHUNK, n_classes - start))))
    batch.base = <char*>base
    batch.base_mass = mass[0] + mass[1]
    return base_bytes(n_classes, sizeof(floating))


cdef inline Py_ssize_t base_bytes(Py_ssize_t n_classes, Py_ssize_t itemsize) noexcept nogil:
    return (padded(n_classes) * itemsize + 63) // 64 * 64


# ---- entry points --------------------------------------------------------------------------------------------------

def memory_needed(Py_ssize_t n_rows, Py_ssize_t n_classes, Py_ssize_t itemsize, int num_threads):
    """Return the bytes of working memory for calls of at most `n_rows` rows."""
    cdef Plan plan
    cdef Py_ssize_t most = 0, rows = larger(1, n_rows)
    plan = plan_batch(rows, n_classes, itemsize, num_threads)
    most = larger(1, smaller(num_threads, (rows + plan.block_rows - 1) // plan.block_rows))
    return most * plan.thread_bytes + base_bytes(n_classes, itemsize) + 64


cdef inline char* data_of(array) noexcept:
    return NULL if array is None else <char*>cnp.PyArray_DATA(<cnp.ndarray>array)


cdef inline Py_ssize_t stride_of(array) noexcept:
    return 0 if array is None else cnp.PyArray_STRIDE(<cnp.ndarray>array, 0)


cdef Batch batch_of(cnp.ndarray logits, cnp.ndarray memory):
    cdef Batch batch
    memset(&batch, 0, sizeof(batch))
    batch.n_rows = cnp.PyArray_DIM(logits, 0)
    batch.n_classes = cnp.PyArray_DIM(logits, 1)
    batch.logits = <char*>cnp.PyArray_DATA(logits)
    batch.logits_stride = cnp.PyArray_STRIDE(logits, 0)
    batch.transform.scale = batch.scale = batch.certain = 1.0
    batch.transform.is_single = True
    batch.memory = <char*>cnp.PyArray_DATA(memory)
    return batch


cdef void run(Batch* batch, bint single, int num_threads):
    if batch.n_rows * batch.n_classes < GIL_ELEMENTS:
        take_batch_of(batch, single, 1)
    else:
        with nogil:
            take_batch_of(batch, single, num_threads)


cdef void take_batch_of(Batch* batch, bint single, int num_threads) noexcept nogil:
    if single:
        take_batch(batch, num_threads, <const float*>NULL)
    else:
        take_batch(batch, num_threads, <const double*>NULL)


def soft_rows(
    cnp.ndarray logits, cnp.ndarray losses, memory, int num_threads, *, indices=None, values=None, distribution=None,
    weight=None, sample_weight=None, double smoothing=0.0, base=None, double logit_scale=1.0,
    double cap=0.0, mask=None, double z_loss=0.0, double scale=1.0, scales=None, out=None, hess=None, statistics=None,
):
    """Fill `losses` (N,) float64 and, unless None, `out` and `hess` (N, C) in the logits' dtype.

    Rows of `logits`, `distribution`, `out` and `hess` (N, C) are contiguous, native and of one dtype; `indices` (N, m)
    int64 with `values` (N, m) float64 or None (all 1); a negative first index, or `sample_weight` 0, leaves a row out.
    `base` (C,) in the logits' dtype is smoothing/K by weight, None where each row has its own K. `mask` (N or 1, C) uint8.
    `statistics`: (lse, probability, entropy, predicted, correct), of which the first three are float64.
    """
    cdef Batch batch = batch_of(logits, memory)
    batch.losses = <double*>cnp.PyArray_DATA(losses)
    batch.indices = <int64_t*>data_of(indices)
    batch.values = <double*>data_of(values)
    batch.n_entries = 0 if indices is None else cnp.PyArray_DIM(<cnp.ndarray>indices, 1)
    batch.distribution = data_of(distribution)
    batch.distribution_stride = stride_of(distribution)
    batch.weight = <double*>data_of(weight)
    batch.sample_weight = <double*>data_of(sample_weight)
    batch.certain = 1.0 - smoothing
    batch.smoothing = smoothing
    batch.base = data_of(base)
    batch.transform.scale = logit_scale
    batch.transform.is_single = <float>logit_scale == logit_scale
    batch.transform.cap = cap
    batch.transform.mask = <uint8_t*>data_of(mask)
    batch.transform.mask_stride = 0 if mask is None or len(mask) == 1 else stride_of(mask)
    batch.z_loss = z_loss
    batch.scale = scale
    batch.scales = <double*>data_of(scales)
    batch.out = data_of(out)
    batch.out_stride = stride_of(out)
    batch.hess = data_of(hess)
    batch.hess_stride = stride_of(hess)
    if statistics is not None:
        batch.lse = <double*>data_of(statistics[0])
        batch.probability = <double*>data_of(statistics[1])
        batch.entropy = <double*>data_of(statistics[2])
        batch.predicted = <int64_t*>data_of(statistics[3])
        batch.correct = <uint8_t*>data_of(statistics[4])
    run(&batch, cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32, num_threads)


def activation_rows(cnp.ndarray logits, out, lse, bint logarithm, memory, int num_threads):
    """Fill, unless None, `out` (N, C) with softmax or log_softmax and `lse` (N,) float64 with logsumexp."""
    cdef Batch batch = batch_of(logits, memory)
    batch.kind = LOG_SOFTMAX if logarithm else SOFTMAX
    batch.out = data_of(out)
    batch.out_stride = stride_of(out)
    batch.lse = <double*>data_of(lse)
    run(&batch, cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32, num_threads)
