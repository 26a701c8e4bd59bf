"""The compiled entry points for general rows: soft targets, whatever options go with them, statistics, log-softmax.

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
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

cimport numpy as cnp

from fastce._kernels.block cimport (
    BLOCK_ROWS,
    STREAM_BYTES,
    TASKS_PER_THREAD,
    Scratch,
    finish_rows,
    is_normal,
    miss_of,
    put_row,
)
from fastce._kernels.general cimport (
    GRADIENT,
    LOG_SOFTMAX,
    Batch,
    Own,
    behind,
    entry,
    entry_mass,
    has_base_alone,
    has_dense_mass,
    is_skipped,
    mask_of,
    pull_at_maximum,
    settle,
    sum_far,
    sum_far_below,
)
from fastce._kernels.lanes cimport (
    CHUNK,
    LANES,
    SUM_BLOCK,
    Sum,
    add_block,
    add_block_products,
    add_chunk,
    buffer_elements,
    chunks_of,
    clear,
    exp_last_block,
    exp_limit,
    exp_terms,
    first_index_of,
    larger,
    larger_of,
    prefetch,
    row_maximum,
    smaller,
    total_of,
    window_below,
)
from fastce._kernels.staged cimport hide, is_identity, padded, set_scale, stage_logits
from fastce._kernels.tiles cimport TILE_CLASSES, take_tile, tile_elements
from fastce._kernels.vexp cimport (
    ExpWindow,
    bits_of_double,
    bits_of_float,
    double_of_bits,
    exp_shifted,
    float_of_bits,
    floating,
    multiply_add_double,
    multiply_add_float,
)

cdef extern from "target.h" nogil:
    int watch_forks "fastce_watch_forks" ()
    bint is_forked_child "fastce_is_forked_child" ()
    void stream_float "fastce_stream_float" (float* out, const float* terms, Py_ssize_t n, float factor, float shift)
    void stream_double "fastce_stream_double" (
        double* out, const double* terms, Py_ssize_t n, double factor, double shift
    )
    void stream_fence "fastce_stream_fence" ()

cnp.import_array()
watch_forks()

cdef enum:
    # Rows up to this length keep their logits, exponentials and mass; longer ones compute them again for the gradient.
    KEEP_CLASSES = 65536
    TASK_ELEMENTS = 8192    # the least that a thread takes at a time
    GIL_ELEMENTS = 2048     # batches below keep the GIL
    SLACK_BYTES = 128       # before each buffer of pieces: what exp_last_block writes in front of a short last piece


# The pieces of a block of rows (or of one chunk of a long row): pointers into the memory behind Own.
cdef struct Pieces:
    char* z
    char* terms
    char* mass
    char* chain
    Py_ssize_t width        # elements from one row's piece to the next
    Py_ssize_t step         # elements from one chunk's piece to the next: 0 where chunks overwrite each other


# ---- pieces --------------------------------------------------------------------------------------------------------

# sum of a_c * b_c.
cdef inline double sum_products(const floating* a, const floating* b, Py_ssize_t n) noexcept nogil:
    cdef floating[SUM_BLOCK] products
    cdef Py_ssize_t start, block, lane, size
    cdef Sum sums
    clear(&sums)
    for block in range((n + SUM_BLOCK - 1) // SUM_BLOCK):
        start = block * SUM_BLOCK
        size = smaller(SUM_BLOCK, n - start)
        for lane in range(size):
            products[lane] = a[start + lane] * b[start + lane]
        for lane in range(size, SUM_BLOCK):
            products[lane] = 0
        add_block(products, &sums)
    return finite_total_of(&sums)


cdef inline bint is_distribution_alone(const Batch* batch) noexcept nogil:
    return batch.distribution != NULL and batch.smoothing == 0.0 and batch.weight == NULL


# The sums of a piece of a row.
cdef struct Piece:
    double terms            # without that of `top`
    double at_top
    double mass
    double linear           # a_c * (z_m - z_c)
    double spread           # e_c * (z_m - z_c)


# Memory that sum_pieces asks for on its way, as many elements as the piece has: the next row, which is looked through
# for its maximum faster than memory delivers, and this row's results.
cdef struct Wanted:
    char* logits
    char* mass
    char* out


# The terms of a piece and all its sums, block by block while they are in the nearest cache. `mass` may be NULL.
cdef inline void sum_pieces(
    const floating* z, const floating* mass, floating* terms, Py_ssize_t n, Py_ssize_t top, const ExpWindow* window,
    floating maximum, bint with_spread, const Wanted* wanted, Piece* piece,
) noexcept nogil:
    cdef floating offset = <floating>window.offset
    cdef floating low = <floating>window.low
    cdef floating high = <floating>window.high
    cdef floating magic = <floating>window.magic
    cdef floating[SUM_BLOCK] last
    cdef floating[SUM_BLOCK] last_mass
    cdef Py_ssize_t block, lane, start, rest, i
    cdef const floating* x
    cdef const floating* a = NULL
    cdef Sum sums, masses, linear, spread
    clear(&sums)
    clear(&masses)
    clear(&linear)
    clear(&spread)
    for block in range((n + SUM_BLOCK - 1) // SUM_BLOCK):
        start = block * SUM_BLOCK
        rest = n - start
        x = z + start
        for i in range(SUM_BLOCK * <Py_ssize_t>sizeof(floating) // 64):
            prefetch(wanted.logits + start * <Py_ssize_t>sizeof(floating) + i * 64)
            prefetch(wanted.mass + start * <Py_ssize_t>sizeof(floating) + i * 64)
            prefetch(wanted.out + start * <Py_ssize_t>sizeof(floating) + i * 64)
        if mass != NULL:
            a = mass + start
        if rest >= SUM_BLOCK:
            for lane in range(SUM_BLOCK):
                terms[start + lane] = exp_shifted(x[lane], offset, low, high, magic)
        else:
            exp_last_block(x, terms + start, rest, offset, low, high, magic)
            fill_block(last, x, rest, maximum)
            x = last
            if mass != NULL:
                fill_block(last_mass, a, rest, 0)
                a = last_mass
        if 0 <= top - start < SUM_BLOCK:
            piece.at_top = terms[top]
            terms[top] = 0
        add_block(terms + start, &sums)
        if mass != NULL:
            add_block(a, &masses)
            add_block_products(a, x, maximum, &linear)
        if with_spread:
            add_block_products(terms + start, x, maximum, &spread)
    if 0 <= top < n:
        terms[top] = 0      # the last block may have overlapped it
    piece.terms = total_of(&sums)
    piece.mass = total_of(&masses)
    piece.linear = finite_total_of(&linear)
    piece.spread = finite_total_of(&spread)


# Any address will do where there is nothing to ask for.
cdef inline Wanted wanted_by(const Batch* batch, Py_ssize_t row, Py_ssize_t start) noexcept nogil:
    cdef Wanted wanted
    wanted.logits = wanted.mass = wanted.out = batch.logits + (row + 1) * batch.logits_stride + start
    if batch.distribution != NULL:
        wanted.mass = batch.distribution + (row + 1) * batch.distribution_stride + start
    if batch.out != NULL and not batch.stream:
        wanted.out = batch.out + row * batch.out_stride + start
    return wanted


cdef inline void fill_block(floating* block, const floating* numbers, Py_ssize_t n, floating rest) noexcept nogil:
    cdef Py_ssize_t i
    memcpy(block, numbers, n * sizeof(floating))
    for i in range(n, SUM_BLOCK):
        block[i] = rest


# An infinite sum has no rounding errors to carry.
cdef inline double finite_total_of(Sum* sums) noexcept nogil:
    cdef Py_ssize_t lane
    for lane in range(LANES):
        sums.error[lane] = sums.error[lane] if fabs(sums.total[lane]) < INFINITY else 0.0
    return total_of(sums)


# ---- one row, first time -------------------------------------------------------------------------------------------

# The dense mass of a chunk; `n_shown` classes share the smoothing.
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
    if is_distribution_alone(batch):
        return <const floating*>(batch.distribution + row * batch.distribution_stride) + start
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


# The logits of a chunk: where they lie, or transformed into a piece of their own if `fresh`, else where they were put.
cdef inline const floating* stage(
    const Batch* batch, const Pieces* pieces, Py_ssize_t row, Py_ssize_t r, Py_ssize_t start, Py_ssize_t n, bint fresh,
    const floating* like,
) noexcept nogil:
    cdef const uint8_t* mask = mask_of(batch, row)
    cdef const floating* x = <const floating*>(batch.logits + row * batch.logits_stride) + start
    cdef Py_ssize_t place = r * pieces.width + start // CHUNK * pieces.step
    if is_identity(&batch.transform):
        return x
    if fresh:
        stage_logits(
            x, n, NULL if mask == NULL else mask + start, &batch.transform, <floating*>pieces.z + place,
            <floating*>pieces.chain + place,
        )
    return <const floating*>pieces.z + place


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
        z = stage(batch, pieces, row, r, start, n, True, like)
        largest = row_maximum(z, n)
        if largest > maximum:
            maximum = largest
            index = start + first_index_of(z, largest, n)
    if batch.smoothing != 0.0 and batch.base == NULL:
        for i in range(batch.n_classes):
            n_shown += mask[i] != 0
    own.maximum[r] = maximum
    own.argmax[r] = index
    own.n_shown[r] = n_shown
    own.window[r] = window_below(like, maximum)
    if fabs(maximum) == INFINITY:
        own.infinite[r] = maximum
        z = <const floating*>(batch.logits + row * batch.logits_stride)
        for i in range(batch.n_classes):
            own.infinite[r] = own.infinite[r] if z[i] == z[i] else NAN


# All sums of a row: exponentials and mass. Sums over chunks carry their rounding errors along.
cdef inline void measure_row(
    const Batch* batch, Own* own, const Pieces* pieces, Py_ssize_t row, Py_ssize_t r, const floating* like
) noexcept nogil:
    cdef Py_ssize_t chunk, start, n, i, index, place, top
    cdef double a, at_maximum = 0.0
    cdef Piece piece
    cdef Wanted wanted
    cdef double[2] total
    cdef double[2] mass
    cdef double[2] linear
    cdef double[2] spread
    cdef const floating* z
    cdef floating* terms
    cdef bint again = pieces.step == 0 and batch.n_classes > CHUNK     # chunks have overwritten each other
    cdef const floating* dense
    total[0] = total[1] = mass[0] = mass[1] = linear[0] = linear[1] = spread[0] = spread[1] = 0.0
    find_maximum(batch, own, pieces, row, r, like)
    own.mass_at_maximum[r] = own.hit[r] = own.largest_mass[r] = 0.0
    for chunk in range(chunks_of(batch.n_classes)):
        start = chunk * CHUNK
        n = smaller(CHUNK, batch.n_classes - start)
        place = r * pieces.width + start // CHUNK * pieces.step
        terms = <floating*>pieces.terms + place
        z = stage(batch, pieces, row, r, start, n, again, like)
        top = own.argmax[r] - start
        dense = NULL
        if has_dense_mass(batch):
            dense = stage_mass(batch, row, start, n, own.n_shown[r], <floating*>pieces.mass + place, like)
        wanted = wanted_by(batch, row, start * sizeof(floating))
        sum_pieces(
            z, dense, terms, n, top, &own.window[r], <floating>own.maximum[r], batch.entropy != NULL, &wanted, &piece
        )
        add_chunk(total, piece.terms)
        add_chunk(spread, piece.spread)
        if 0 <= top < n:
            at_maximum = piece.at_top
        if dense != NULL:
            # A row of one mass, or none, stays exact.
            if not piece.mass < INFINITY:
                piece.mass = sum_far(dense, n)
            add_chunk(mass, piece.mass)
            if 0 <= top < n:
                own.mass_at_maximum[r] += dense[top]
                add_chunk(mass, -dense[top])
            if fabs(own.maximum[r]) > exp_limit(like) or not piece.linear < INFINITY:
                piece.linear = sum_far_below(dense, z, own.maximum[r], n, 1)
            add_chunk(linear, piece.linear)
            if batch.probability != NULL:
                own.hit[r] += sum_products(dense, terms, n)
                if 0 <= top < n:
                    own.hit[r] += dense[top] * at_maximum
                own.largest_mass[r] = larger_of(own.largest_mass[r], row_maximum(dense, n))
        for i in range(batch.n_entries):
            a = entry(batch, row, i, &index)
            if a != 0.0 and 0 <= index - start < n:
                if index - start == top:
                    own.mass_at_maximum[r] += a
                else:
                    add_chunk(mass, a)
                    add_chunk(linear, a * (own.maximum[r] - z[index - start]))
                if batch.probability != NULL:
                    own.hit[r] += a * (at_maximum if index - start == top else terms[index - start])
                    own.largest_mass[r] = larger_of(own.largest_mass[r], entry_mass(batch, row, index))
    own.mass[r] = mass[0] + mass[1]
    own.linear[r] = linear[0] + linear[1] if linear[0] < INFINITY else linear[0]
    own.spread[r] = spread[0] + spread[1]
    put_row(
        &own.rows, r, total[0] + total[1], at_maximum, own.maximum[r] - own.window[r].offset, own.window[r].shift,
        own.window[r].offset,
    )
    if own.window[r].offset != own.window[r].offset:
        put_row(&own.rows, r, NAN, NAN, NAN, 0.0, 0.0)


# ---- the block -----------------------------------------------------------------------------------------------------

cdef inline void take_block(
    const Batch* batch, Own* own, const Pieces* pieces, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(n):
        if is_skipped(batch, first + r):
            own.argmax[r] = -1
            own.maximum[r] = 0.0
            put_row(&own.rows, r, 0.0, 1.0, 0.0, 0.0, 0.0)
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
    cdef floating* results
    cdef Py_ssize_t chunk, start, n, place, top
    cdef const floating* z
    cdef floating* terms
    cdef bint again = pieces.step == 0 and batch.n_classes > CHUNK     # chunks have overwritten each other
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
        terms = <floating*>pieces.terms + place
        mass = NULL
        top = own.argmax[r] - start
        z = stage(batch, pieces, row, r, start, n, again, like)
        if again and batch.kind == GRADIENT:
            exp_terms(z, terms, n, &own.window[r])
            if 0 <= top < n:
                terms[top] = 0
        if batch.kind == GRADIENT and has_dense_mass(batch):
            mass = <floating*>pieces.mass + place
            if has_base_alone(batch):
                mass = <const floating*>batch.base + start
            elif again or is_distribution_alone(batch):
                mass = stage_mass(batch, row, start, n, own.n_shown[r], <floating*>pieces.mass + place, like)
        results = terms if batch.stream else out + start
        if batch.kind == LOG_SOFTMAX:
            write_log_softmax(own, r, z, results, n)
            if batch.stream:
                stream_piece(out + start, results, n)
            continue
        # The Hessian first: the gradient may be written over logits, never over terms.
        if batch.hess != NULL:
            write_hessian(batch, own, r, terms, hess + start, n, top)
            if mask_of(batch, row) != NULL:
                hide(mask_of(batch, row) + start, hess + start, n)
        if batch.out != NULL:
            write_gradient(batch, own, row, r, start, terms, mass, results, n, top)
            if batch.transform.cap != 0.0:
                multiply(results, <const floating*>pieces.chain + place, n)
            if mask_of(batch, row) != NULL:
                hide(mask_of(batch, row) + start, results, n)
            if batch.stream:
                stream_piece(out + start, results, n)


# A piece of a gradient leaves past the caches, but for the ends that do not fill a line.
cdef inline void stream_piece(floating* out, const floating* results, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t line = 64 // <Py_ssize_t>sizeof(floating)
    cdef Py_ssize_t head = smaller(n, (64 - <uintptr_t>out % 64) % 64 // sizeof(floating))
    cdef Py_ssize_t body = (n - head) // line * line
    memcpy(out, results, head * sizeof(floating))
    if floating is float:
        stream_float(out + head, results + head, body, 1, -0.0)
    else:
        stream_double(out + head, results + head, body, 1, -0.0)
    memcpy(out + head + body, results + head + body, (n - head - body) * sizeof(floating))


cdef inline void multiply(floating* out, const floating* chain, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = out[i] * chain[i]


cdef inline void write_gradient(
    const Batch* batch, Own* own, Py_ssize_t row, Py_ssize_t r, Py_ssize_t start, const floating* terms,
    const floating* mass, floating* out, Py_ssize_t n, Py_ssize_t top,
) noexcept nogil:
    cdef Scratch* rows = &own.rows
    cdef double factor = own.factor[r], inverse = rows.inverse[r], a
    cdef Py_ssize_t i, index
    combine(out, terms, mass, n, rows.scale[r], inverse, factor)
    for i in range(batch.n_entries):
        a = entry(batch, row, i, &index)
        if 0 <= index - start < n and a != 0.0:
            out[index - start] = <floating>(out[index - start] - a * factor)
    if 0 <= top < n:
        out[top] = <floating>pull_at_maximum(own, r)


# out = (terms * (scale/S) - mass) * factor, in the dtype where all factors are normal numbers of it, else in float64
# and by the power of two in 1/S first: nothing then under- or overflows on the way.
cdef inline void combine(
    floating* out, const floating* terms, const floating* mass, Py_ssize_t n, double scale, double inverse,
    double factor,
) noexcept nogil:
    cdef floating push = <floating>(scale * inverse * factor)
    cdef floating pull = <floating>(-factor)
    cdef double power, rest
    cdef Py_ssize_t i
    if is_normal(out, scale * factor, inverse) and (mass == NULL or is_normal(out, factor, 1.0)):
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
        out[i] = <floating>(((terms[i] * power) * rest - (0.0 if mass == NULL else mass[i])) * factor)


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
        miss = miss_of(rows.others[r], rows.at_target[r])
        hess[top] = <floating>(p * (curve * miss + square * p))


cdef inline void write_log_softmax(
    const Own* own, Py_ssize_t r, const floating* z, floating* out, Py_ssize_t n
) noexcept nogil:
    cdef floating maximum = <floating>own.maximum[r]
    cdef floating least = <floating>own.rows.loss[r]
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = (z[i] - maximum) - least


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
    plan.block_rows = larger(1, CHUNK // buffer_elements(n_classes))
    plan.width = buffer_elements(n_classes)
    plan.piece = plan.width * plan.block_rows if n_classes <= KEEP_CLASSES else CHUNK
    if n_classes <= TILE_CLASSES:
        plan.block_rows = BLOCK_ROWS
        plan.piece = tile_elements(n_classes) // 4
    plan.task_rows = larger(n_rows // (TASKS_PER_THREAD * num_threads), TASK_ELEMENTS // n_classes)
    plan.task_rows = larger(plan.task_rows - plan.task_rows % plan.block_rows, plan.block_rows)
    plan.n_tasks = (n_rows + plan.task_rows - 1) // plan.task_rows
    plan.num_threads = 1 if is_forked_child() else <int>larger(1, smaller(num_threads, plan.n_tasks))
    plan.thread_bytes = sizeof(Own) + 64 + 4 * (plan.piece * itemsize + SLACK_BYTES)
    plan.thread_bytes += (64 - plan.thread_bytes % 64) % 64
    return plan


cdef void take_task(
    const Batch* batch, const Plan* plan, char* memory, Py_ssize_t task, const floating* like
) noexcept nogil:
    cdef Own* own = <Own*>memory
    cdef Py_ssize_t n_bytes = plan.piece * sizeof(floating) + SLACK_BYTES
    cdef Py_ssize_t first = task * plan.task_rows, end = smaller(batch.n_rows, first + plan.task_rows)
    cdef Pieces pieces
    pieces.z = behind(own)
    pieces.terms = pieces.z + n_bytes
    pieces.mass = pieces.terms + n_bytes
    pieces.chain = pieces.mass + n_bytes
    pieces.width = plan.width if batch.n_classes <= KEEP_CLASSES else 0
    pieces.step = CHUNK if batch.n_classes <= KEEP_CLASSES else 0
    while first < end:
        if batch.n_classes <= TILE_CLASSES:
            take_tile(batch, own, first, smaller(plan.block_rows, end - first), like)
        else:
            take_block(batch, own, &pieces, first, smaller(plan.block_rows, end - first), like)
        first += plan.block_rows
    if batch.stream:
        stream_fence()


cdef void take_batch(Batch* batch, int num_threads, const floating* like) noexcept nogil:
    cdef Plan plan = plan_batch(batch.n_rows, batch.n_classes, sizeof(floating), num_threads)
    cdef char* memory = batch.memory + (64 - <uintptr_t>batch.memory % 64) % 64
    cdef Py_ssize_t task
    batch.stream = (
        batch.n_rows * batch.n_classes * <Py_ssize_t>sizeof(floating) >= STREAM_BYTES
        and batch.out != batch.logits
    )
    if batch.base != NULL:
        memory += place_base(batch, <floating*>memory)
    if plan.num_threads == 1:
        for task in range(plan.n_tasks):
            take_task(batch, &plan, memory, task, like)
    else:
        for task in prange(plan.n_tasks, num_threads=plan.num_threads, schedule="dynamic", chunksize=1):
            take_task(batch, &plan, memory + threadid() * plan.thread_bytes, task, like)


# Copies the base to the front of the working memory, in whole vectors; returns the bytes that takes.
cdef Py_ssize_t place_base(Batch* batch, floating* base) noexcept nogil:
    cdef Py_ssize_t i
    memcpy(base, batch.base, batch.n_classes * sizeof(floating))
    for i in range(batch.n_classes, padded(batch.n_classes)):
        base[i] = 0
    batch.base = <char*>base
    return base_bytes(batch.n_classes, sizeof(floating))


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
    batch.scale = batch.certain = 1.0
    set_scale(&batch.transform, 1.0, True)
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
    `base` (C,) in the logits' dtype is smoothing/K by weight, None where each row has its own K. `mask` (N or 1, C) is
    uint8. `statistics`: (lse, probability, entropy, predicted, correct), of which the first three are float64.
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
    set_scale(&batch.transform, logit_scale, cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32)
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


def round_to_half(cnp.ndarray numbers, cnp.ndarray halves):
    """Fill `halves` (float16) with contiguous float32 `numbers`, rounded to nearest, ties to even."""
    cdef const float* x = <const float*>cnp.PyArray_DATA(numbers)
    cdef uint16_t* bits = <uint16_t*>cnp.PyArray_DATA(halves)
    cdef Py_ssize_t i, n = cnp.PyArray_SIZE(numbers)
    with nogil:
        for i in range(n):
            bits[i] = half_of_float(x[i])


# The bits of x as float16. Normal numbers: the exponent field is rebiased by 127 - 15, and half a unit of bit 13 (less
# one if the bit is 0: ties go to even) carries into what is kept. Below 2^-14 the unit is 2^-24, that of 0.5f, so
# adding 0.5 rounds.
cdef inline uint16_t half_of_float(float x) noexcept nogil:
    cdef uint32_t bits = bits_of_float(x)
    cdef uint32_t magnitude = bits & <uint32_t>0x7fffffff
    cdef uint32_t normal = (magnitude - <uint32_t>0x38000000 + <uint32_t>0xfff + ((magnitude >> 13) & 1)) >> 13
    cdef uint32_t small = bits_of_float(float_of_bits(magnitude) + <float>0.5) - <uint32_t>0x3f000000
    cdef uint32_t half = small if magnitude < <uint32_t>0x38800000 else normal
    half = <uint32_t>0x7c00 if magnitude >= <uint32_t>0x47800000 else half
    half = <uint32_t>0x7e00 if magnitude > <uint32_t>0x7f800000 else half
    return <uint16_t>(half | ((bits >> 16) & <uint32_t>0x8000))


def is_mass(cnp.ndarray array, int num_threads):
    """Return whether all numbers of a C-contiguous native float32 or float64 array are finite and >= 0."""
    cdef const char* numbers = <const char*>cnp.PyArray_DATA(array)
    cdef Py_ssize_t size = cnp.PyArray_SIZE(array), n_bad
    cdef bint single = cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32
    with nogil:
        if single:
            n_bad = count_bad_mass(<const float*>numbers, size, num_threads)
        else:
            n_bad = count_bad_mass(<const double*>numbers, size, num_threads)
    return n_bad == 0


cdef Py_ssize_t count_bad_mass(const floating* numbers, Py_ssize_t size, int num_threads) noexcept nogil:
    cdef Py_ssize_t task, n_tasks = (size + KEEP_CLASSES - 1) // KEEP_CLASSES, n_bad = 0
    if num_threads == 1 or is_forked_child() or n_tasks <= 1:
        for task in range(n_tasks):
            n_bad += count_bad(numbers + task * KEEP_CLASSES, smaller(KEEP_CLASSES, size - task * KEEP_CLASSES))
    else:
        for task in prange(n_tasks, num_threads=<int>smaller(num_threads, n_tasks), schedule="dynamic", chunksize=1):
            n_bad += count_bad(numbers + task * KEEP_CLASSES, smaller(KEEP_CLASSES, size - task * KEEP_CLASSES))
    return n_bad


cdef Py_ssize_t count_bad(const floating* numbers, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int n_bad = 0
    for i in range(n):
        n_bad += 0 if numbers[i] >= 0 and numbers[i] < <floating>INFINITY else 1
    return n_bad


def log_softmax_rows(cnp.ndarray logits, out, lse, memory, int num_threads):
    """Fill, unless None, `out` (N, C) with log_softmax and `lse` (N,) float64 with logsumexp."""
    cdef Batch batch = batch_of(logits, memory)
    batch.kind = LOG_SOFTMAX
    batch.out = data_of(out)
    batch.out_stride = stride_of(out)
    batch.lse = <double*>data_of(lse)
    run(&batch, cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32, num_threads)
