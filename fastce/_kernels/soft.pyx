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
from cpython.long cimport PyLong_AsLongLongAndOverflow
from libc.math cimport INFINITY, NAN, fabs
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cimport numpy as cnp

from fastce._kernels.block cimport (
    BLOCK_ROWS,
    TASKS_PER_THREAD,
    before_line,
    finish_row,
    is_streamed,
    put_row,
    stream,
    stream_piece,
)
from fastce._kernels.columns cimport column_terms
from fastce._kernels.cpu cimport team_for
from fastce._kernels.general cimport (
    GRADIENT,
    LOG_SOFTMAX,
    Batch,
    Own,
    behind,
    clear_row,
    combine,
    correct_piece,
    count_shown,
    entry,
    entry_mass,
    has_dense_mass,
    is_plain_row,
    is_skipped,
    lying_mass,
    mask_of,
    multiply,
    push_of,
    settle_maximum,
    settle_rows,
    shares_by_row,
    stage_mass,
    sum_far,
    sum_far_below,
    weigh_terms,
    write_hessian,
    write_log_softmax,
)
from fastce._kernels.lanes cimport (
    CHUNK,
    LANES,
    PREFETCH_BYTES,
    SUM_BLOCK,
    Rounding,
    Sum,
    add_block,
    add_block_products,
    add_chunk,
    buffer_elements,
    chunks_of,
    clear,
    clear_largest,
    exp_last_block,
    exp_limit,
    exp_terms,
    fill_block,
    finite_total_of,
    first_largest,
    larger,
    larger_of,
    next_line,
    note_largest,
    note_last_block,
    prefetch,
    round_as_before,
    round_to_nearest,
    row_maximum,
    smaller,
    stream_fence,
    total_of,
    window_below,
)
from fastce._kernels.log_columns cimport take_log_columns
from fastce._kernels.plain cimport (
    DEFAULT_IGNORED,
    GENERAL_SLAB_ELEMENTS,
    MAX_AXES,
    are_few_logits,
    are_ids,
    are_integers,
    are_plain_factors,
    are_plain_numbers,
    begins_like,
    classes_of,
    copy_ids,
    copy_losses,
    doubles_of,
    elements_below,
    is_apart_from,
    is_denominator,
    is_for_rows,
    is_gradient,
    is_hessian,
    is_like,
    is_native,
    is_plain,
    is_plain_factor,
    is_plain_mask,
    is_plain_weight,
    mask_stride_of,
    new_array,
    pairwise_sum,
    plain_axis,
    threads_of,
)
from fastce._kernels.short cimport BUFFER, SHORT_CLASSES, take_short_rows
from fastce._kernels.small cimport small_block_rows
from fastce._kernels.staged cimport hide, is_identity, padded, set_scale, stage_logits
from fastce._kernels.tiles cimport (
    TILE_CLASSES,
    Grid,
    grid_of,
    load_tile,
    plain_grid,
    store_tile,
    tile_bytes,
    tile_pitch,
    tile_rows,
    tiles_of,
)
from fastce._kernels.vexp cimport (
    ExpWindow,
    exp_shifted,
    floating,
)
from fastce._kernels.weights cimport Weights, WeightSum, are_weights, total_weight

cnp.import_array()

MAX_STRIDED_CLASSES = TILE_CLASSES     # what log_softmax_columns takes

cdef enum:
    # Rows up to this length keep their logits, exponentials and mass; longer ones compute them again for the gradient.
    KEEP_CLASSES = 65536
    ROWS_KEPT = 3           # one that leaves, one that is summed, one whose largest logit is looked for
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
    bint keep               # rows are whole and three are kept in turn, else there is room for one chunk


# Where the piece of row r of a block begins that starts with class `start`.
cdef inline Py_ssize_t place_of(const Own* own, const Pieces* pieces, Py_ssize_t r, Py_ssize_t start) noexcept nogil:
    return own.turn[r] % ROWS_KEPT * pieces.width + start if pieces.keep else 0


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


# The same where a product overflows in the dtype.
cdef inline double sum_products_far(const floating* a, const floating* b, Py_ssize_t n) noexcept nogil:
    cdef double[2] total
    cdef Py_ssize_t i
    total[0] = total[1] = 0.0
    for i in range(n):
        add_chunk(total, <double>a[i] * b[i])
    return total[0] + total[1] if total[0] < INFINITY else total[0]


# The sums of a piece of a row.
cdef struct Piece:
    double terms            # without that of `top`
    double at_top
    double mass
    double linear           # a_c * (z_m - z_c)
    double spread           # e_c * (z_m - z_c)


# A row whose gradient (terms * push + mass * pull) or log-softmax ((terms - push) - pull, of its logits) is written
# block by block while the next row is summed: the one is bound by the caches, the other by arithmetic.
cdef struct Leaving:
    char* out               # what is still to be written
    char* terms
    char* mass              # or NULL
    Py_ssize_t left         # elements
    double push
    double pull
    bint is_log
    bint stream             # past the caches, from a 64-byte boundary on


# The terms of a piece and all its sums, block by block while they are in the nearest cache. `mass` may be NULL, and so
# may `after`: as large a piece of the next row, whose largest logit is looked for on the way. What is prefetched of
# `mass` is the next row's, `mass_stride` bytes ahead: this row's arrived in the same way.
cdef inline void sum_pieces(
    const floating* z, const floating* mass, floating* terms, Py_ssize_t n, Py_ssize_t top, const ExpWindow* window,
    floating maximum, bint with_spread, const floating* after, floating* largest, floating* where,
    Py_ssize_t mass_stride, Leaving* leaving, Piece* piece,
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
    if mass != NULL:
        clear(&masses)
        clear(&linear)
    if with_spread:
        clear(&spread)
    for block in range((n + SUM_BLOCK - 1) // SUM_BLOCK):
        start = block * SUM_BLOCK
        rest = n - start
        x = z + start
        if after != NULL:
            for i in range(SUM_BLOCK * <Py_ssize_t>sizeof(floating) // 64):
                prefetch(<char*>(after + start) + PREFETCH_BYTES + i * 64)
        if mass != NULL:
            a = mass + start
            for i in range(SUM_BLOCK * <Py_ssize_t>sizeof(floating) // 64):
                prefetch(<char*>a + mass_stride + i * 64)
        if rest >= SUM_BLOCK:
            for lane in range(SUM_BLOCK):
                terms[start + lane] = exp_shifted(x[lane], offset, low, high, magic)
            if after != NULL:
                note_largest(after + start, block, largest, where)
        else:
            exp_last_block(x, terms + start, rest, offset, low, high, magic)
            if after != NULL:
                note_last_block(after + start, start, rest, largest, where)
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
        if leaving.left >= SUM_BLOCK:
            write_leaving(z, SUM_BLOCK, leaving)
    if 0 <= top < n:
        terms[top] = 0      # the last block may have overlapped it
    piece.terms = total_of(&sums)
    piece.mass = piece.linear = piece.spread = 0.0
    if mass != NULL:
        piece.mass = total_of(&masses)
        piece.linear = finite_total_of(&linear)
    if with_spread:
        piece.spread = finite_total_of(&spread)


# The next n <= SUM_BLOCK elements of a row that leaves; streamed ones pass through a buffer.
cdef inline void write_leaving(const floating* like, Py_ssize_t n, Leaving* leaving) noexcept nogil:
    cdef floating[SUM_BLOCK] buffer
    cdef floating* out = <floating*>leaving.out
    cdef floating* place = out
    cdef const floating* terms = <const floating*>leaving.terms
    cdef const floating* mass = <const floating*>leaving.mass
    cdef floating push = <floating>leaving.push
    cdef floating pull = <floating>leaving.pull
    cdef Py_ssize_t lines
    if leaving.stream:
        place = buffer
    if leaving.is_log:
        write_log_softmax(place, terms, n, push, pull)
    else:
        weigh_terms(place, terms, mass, n, push, pull)
    if mass != NULL:
        leaving.mass += n * sizeof(floating)
    if leaving.stream:
        lines = n - n % (64 // <Py_ssize_t>sizeof(floating))
        stream(out, buffer, lines, 1, -0.0)
        memcpy(out + lines, buffer + lines, (n - lines) * sizeof(floating))
    leaving.out += n * sizeof(floating)
    leaving.terms += n * sizeof(floating)
    leaving.left -= n


cdef inline void end_leaving(const floating* like, Leaving* leaving) noexcept nogil:
    while leaving.left > 0:
        write_leaving(like, smaller(leaving.left, SUM_BLOCK), leaving)


# ---- one row, first time -------------------------------------------------------------------------------------------

# The logits of a chunk: where they lie, or transformed into a piece of their own if `fresh`, else where they were put.
cdef inline const floating* stage(
    const Batch* batch, const Own* own, const Pieces* pieces, Py_ssize_t row, Py_ssize_t r, Py_ssize_t start,
    Py_ssize_t n, bint fresh, const floating* like,
) noexcept nogil:
    cdef const uint8_t* mask = mask_of(batch, row)
    cdef const floating* x = <const floating*>(batch.logits + row * batch.logits_stride) + start
    cdef Py_ssize_t place = place_of(own, pieces, r, start)
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
    cdef floating[LANES] largest
    cdef floating[LANES] where
    cdef const floating* z
    cdef Py_ssize_t chunk, start, n, block, rest
    clear_maximum(own, r)
    for chunk in range(chunks_of(batch.n_classes)):
        start = chunk * CHUNK
        n = smaller(CHUNK, batch.n_classes - start)
        z = stage(batch, own, pieces, row, r, start, n, True, like)
        clear_largest(largest, where)
        for block in range((n + SUM_BLOCK - 1) // SUM_BLOCK):
            rest = n - block * SUM_BLOCK
            if rest >= SUM_BLOCK:
                note_largest(z + block * SUM_BLOCK, block, largest, where)
            else:
                note_last_block(z + block * SUM_BLOCK, block * SUM_BLOCK, rest, largest, where)
        raise_maximum(own, r, start, z, n, largest, where)
    settle_window(batch, own, row, r, like)


cdef inline void clear_maximum(Own* own, Py_ssize_t r) noexcept nogil:
    own.maximum[r] = -INFINITY
    own.argmax[r] = 0


# The row's maximum after one more piece, n classes from `start` on.
cdef inline void raise_maximum(
    Own* own, Py_ssize_t r, Py_ssize_t start, const floating* z, Py_ssize_t n, const floating* largest,
    const floating* where,
) noexcept nogil:
    cdef Py_ssize_t index
    cdef floating most = first_largest(z, n, largest, where, &index)
    if most > own.maximum[r]:
        own.maximum[r] = most
        own.argmax[r] = start + index


# What follows from a row's largest logit.
cdef inline void settle_window(
    const Batch* batch, Own* own, Py_ssize_t row, Py_ssize_t r, const floating* like
) noexcept nogil:
    own.window[r] = window_below(like, own.maximum[r])
    settle_maximum(batch, own, r, <const floating*>(batch.logits + row * batch.logits_stride))
    if shares_by_row(batch):
        count_shown(batch, own, row, r)


# All sums of row r of a block: exponentials and mass, by its largest logit, which is known. Sums over chunks carry
# their rounding errors along. On the way that of row `next` (if it is not -1) becomes known, and another row leaves.
cdef inline void measure_row(
    const Batch* batch, Own* own, const Pieces* pieces, Py_ssize_t first, Py_ssize_t r, Py_ssize_t next,
    Leaving* leaving, const floating* like,
) noexcept nogil:
    cdef Py_ssize_t row = first + r, chunk, start, n, i, index, place, top
    cdef double a, hit, at_maximum = 0.0
    cdef Piece piece
    cdef double[2] total
    cdef double[2] mass
    cdef double[2] linear
    cdef double[2] spread
    cdef floating[LANES] largest
    cdef floating[LANES] where
    cdef const floating* z
    cdef const floating* after = NULL
    cdef const floating* dense
    cdef floating* terms
    cdef bint again = not pieces.keep     # chunks have overwritten each other
    total[0] = total[1] = mass[0] = mass[1] = linear[0] = linear[1] = spread[0] = spread[1] = 0.0
    if next >= 0:
        clear_maximum(own, next)
    own.mass_at_maximum[r] = own.hit[r] = own.largest_mass[r] = 0.0
    for chunk in range(chunks_of(batch.n_classes)):
        start = chunk * CHUNK
        n = smaller(CHUNK, batch.n_classes - start)
        place = place_of(own, pieces, r, start)
        terms = <floating*>pieces.terms + place
        z = stage(batch, own, pieces, row, r, start, n, again, like)
        if next >= 0:
            after = stage(batch, own, pieces, first + next, next, start, n, True, like)
            clear_largest(largest, where)
        top = own.argmax[r] - start
        dense = NULL
        if has_dense_mass(batch):
            dense = stage_mass(batch, row, start, n, own.n_shown[r], <floating*>pieces.mass + place, like)
        sum_pieces(
            z, dense, terms, n, top, &own.window[r], <floating>own.maximum[r], batch.entropy != NULL, after, largest,
            where, batch.distribution_stride, leaving, &piece,
        )
        if next >= 0:
            raise_maximum(own, next, start, after, n, largest, where)
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
                piece.linear = sum_far_below(dense, z, own.maximum[r], n)
            add_chunk(linear, piece.linear)
            if batch.probability != NULL:
                hit = sum_products(dense, terms, n)
                own.hit[r] += hit if hit < INFINITY else sum_products_far(dense, terms, n)
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
    if next >= 0:
        settle_window(batch, own, first + next, next, like)
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

# Rows [first, first + n) one by one; where rows are kept, the next row's largest logit is found and the row before is
# written while a row is summed.
cdef inline void take_block(
    const Batch* batch, Own* own, const Pieces* pieces, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t r, next, before = -1, n_live = 0
    cdef Leaving leaving
    leaving.left = 0
    for r in range(n):
        own.argmax[r] = 0
        own.turn[r] = n_live
        if is_skipped(batch, first + r):
            own.argmax[r] = -1
            own.maximum[r] = 0.0
            put_row(&own.rows, r, 0.0, 1.0, 0.0, 0.0, 0.0)
            finish_row(&own.rows, r)
            settle_rows(batch, own, first, r, r + 1)
            clear_row(batch, first + r, like)
        else:
            n_live += 1
    r = next_row(own, -1, n)
    if r < n:
        find_maximum(batch, own, pieces, first + r, r, like)
    while r < n:
        next = next_row(own, r, n)
        measure_row(batch, own, pieces, first, r, next if pieces.keep and next < n else -1, &leaving, like)
        end_leaving(like, &leaving)
        if before >= 0:
            correct_row(batch, own, first, before, like)
        finish_row(&own.rows, r)
        settle_rows(batch, own, first, r, r + 1)
        before = -1
        if may_leave(batch, own, pieces, r, like):
            begin_leaving(batch, own, pieces, first, r, &leaving, like)
            before = r
        elif batch.out != NULL or batch.hess != NULL:
            write_row(batch, own, pieces, first + r, r, like)
        if next < n and not pieces.keep:
            find_maximum(batch, own, pieces, first + next, next, like)
        r = next
    end_leaving(like, &leaving)
    if before >= 0:
        correct_row(batch, own, first, before, like)


# The next row of a block that is looked at, n if there is none.
cdef inline Py_ssize_t next_row(const Own* own, Py_ssize_t r, Py_ssize_t n) noexcept nogil:
    r += 1
    while r < n and own.argmax[r] < 0:
        r += 1
    return r


# Whether row r can be written while the next one is summed: nothing but its gradient, by factors that are normal
# numbers, or its log-softmax.
cdef inline bint may_leave(
    const Batch* batch, const Own* own, const Pieces* pieces, Py_ssize_t r, const floating* like
) noexcept nogil:
    if batch.out == NULL or batch.hess != NULL or not pieces.keep:
        return False
    if batch.kind == LOG_SOFTMAX:
        return True
    return (
        batch.transform.cap == 0.0
        and batch.transform.mask == NULL
        and is_plain_row(own, r, like, has_dense_mass(batch))
    )


# Row r begins to leave; what lies before the first 64-byte boundary of a streamed one is written at once.
cdef inline void begin_leaving(
    const Batch* batch, Own* own, const Pieces* pieces, Py_ssize_t first, Py_ssize_t r, Leaving* leaving,
    const floating* like,
) noexcept nogil:
    cdef Py_ssize_t place = place_of(own, pieces, r, 0), row = first + r
    cdef floating* out = <floating*>(batch.out + row * batch.out_stride)
    leaving.out = <char*>out
    leaving.left = batch.n_classes
    leaving.mass = NULL
    leaving.is_log = batch.kind == LOG_SOFTMAX
    leaving.stream = False
    if leaving.is_log:
        leaving.terms = <char*>stage(batch, own, pieces, row, r, 0, batch.n_classes, False, like)
        leaving.push = own.maximum[r]
        leaving.pull = own.rows.loss[r]
    else:
        leaving.terms = <char*>(<floating*>pieces.terms + place)
        leaving.push = push_of(own, r)
        leaving.pull = -own.factor[r]
        if has_dense_mass(batch):
            leaving.mass = <char*>kept_mass(batch, own, pieces, row, r, 0, like)
    if batch.stream:
        write_leaving(like, before_line(out, batch.n_classes), leaving)
        leaving.stream = True


# The dense mass of the classes from `start` on, of a row that was summed.
cdef inline const floating* kept_mass(
    const Batch* batch, const Own* own, const Pieces* pieces, Py_ssize_t row, Py_ssize_t r, Py_ssize_t start,
    const floating* like,
) noexcept nogil:
    cdef const floating* lying = lying_mass(batch, row, start, like)
    return <const floating*>pieces.mass + place_of(own, pieces, r, start) if lying == NULL else lying


# What is left to do once row r's gradient has left: the entries, and the largest logit.
cdef inline void correct_row(
    const Batch* batch, const Own* own, Py_ssize_t first, Py_ssize_t r, const floating* like
) noexcept nogil:
    if batch.kind == GRADIENT:
        correct_piece(
            batch, own, first + r, r, 0, <floating*>(batch.out + (first + r) * batch.out_stride), batch.n_classes
        )


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
    cdef bint again = not pieces.keep     # chunks have overwritten each other
    cdef const floating* mass
    for chunk in range(chunks_of(batch.n_classes)):
        start = chunk * CHUNK
        n = smaller(CHUNK, batch.n_classes - start)
        place = place_of(own, pieces, r, start)
        terms = <floating*>pieces.terms + place
        mass = NULL
        top = own.argmax[r] - start
        z = stage(batch, own, pieces, row, r, start, n, again, like)
        if again and batch.kind == GRADIENT:
            exp_terms(z, terms, n, &own.window[r])
            if 0 <= top < n:
                terms[top] = 0
        if batch.kind == GRADIENT and has_dense_mass(batch):
            if again:
                mass = stage_mass(batch, row, start, n, own.n_shown[r], <floating*>pieces.mass + place, like)
            else:
                mass = kept_mass(batch, own, pieces, row, r, start, like)
        results = terms if batch.stream else out + start
        if batch.kind == LOG_SOFTMAX:
            write_log_softmax(results, z, n, <floating>own.maximum[r], <floating>own.rows.loss[r])
            if batch.stream:
                stream_piece(out + start, results, n)
            continue
        # The Hessian first: the gradient may be written over logits, never over terms.
        if batch.hess != NULL:
            write_hessian(batch, own, r, terms, hess + start, n, top)
            if mask_of(batch, row) != NULL:
                hide(mask_of(batch, row) + start, hess + start, n)
        if batch.out != NULL:
            combine(own, r, results, terms, mass, n)
            correct_piece(batch, own, row, r, start, results, n)
            if batch.transform.cap != 0.0:
                multiply(results, <const floating*>pieces.chain + place, n)
            if mask_of(batch, row) != NULL:
                hide(mask_of(batch, row) + start, results, n)
            if batch.stream:
                stream_piece(out + start, results, n)


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
    plan.block_rows = BLOCK_ROWS
    # Rows whose pieces lie a multiple of 4 KB apart would get in each other's way.
    plan.width = buffer_elements(n_classes) + 2 * LANES
    plan.piece = ROWS_KEPT * plan.width if n_classes <= KEEP_CLASSES else CHUNK
    if n_classes <= SHORT_CLASSES:
        plan.block_rows = small_block_rows(n_classes)
        plan.piece = BUFFER
    plan.task_rows = larger(n_rows // (TASKS_PER_THREAD * num_threads), TASK_ELEMENTS // n_classes)
    if plan.task_rows > plan.block_rows:
        plan.task_rows -= plan.task_rows % plan.block_rows
    plan.task_rows = larger(plan.task_rows, plan.block_rows if n_classes <= SHORT_CLASSES else 1)
    plan.n_tasks = (n_rows + plan.task_rows - 1) // plan.task_rows
    plan.num_threads = <int>larger(1, smaller(num_threads, plan.n_tasks))
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
    cdef Rounding rounding
    round_to_nearest(&rounding)
    pieces.z = behind(own)
    pieces.terms = pieces.z + n_bytes
    pieces.mass = pieces.terms + n_bytes
    pieces.chain = pieces.mass + n_bytes
    pieces.width = plan.width
    pieces.keep = batch.n_classes <= KEEP_CLASSES
    while first < end:
        if batch.n_classes <= SHORT_CLASSES:
            take_short_rows(batch, own, first, smaller(plan.block_rows, end - first), like)
        else:
            take_block(batch, own, &pieces, first, smaller(plan.block_rows, end - first), like)
        first += plan.block_rows
    if batch.stream:
        stream_fence()
    round_as_before(&rounding)


cdef void take_batch(Batch* batch, int num_threads, const floating* like) noexcept nogil:
    cdef Plan plan = plan_batch(batch.n_rows, batch.n_classes, sizeof(floating), num_threads)
    cdef char* memory = next_line(batch.memory)
    cdef Py_ssize_t task
    cdef int team = team_for(plan.num_threads)
    cdef Py_ssize_t n_bytes = larger(batch.out_bytes, batch.n_rows * batch.n_classes * sizeof(floating))
    batch.stream = is_streamed(n_bytes, batch.out, batch.logits)
    if batch.smoothing != 0.0 and batch.transform.mask_stride == 0:
        fill_base(batch, <floating*>memory)
        memory += base_bytes(batch.n_classes, sizeof(floating))
    if team == 1:
        for task in range(plan.n_tasks):
            take_task(batch, &plan, memory, task, like)
    else:
        for task in prange(plan.n_tasks, num_threads=team, schedule="dynamic", chunksize=1):
            take_task(batch, &plan, memory + threadid() * plan.thread_bytes, task, like)


# The mass that smoothing gives to each class, by its weight, where all rows share it: smoothing/K for the K classes
# that exist. In whole vectors.
cdef void fill_base(Batch* batch, floating* base) noexcept nogil:
    cdef const uint8_t* mask = batch.transform.mask
    cdef Py_ssize_t i, n_shown = batch.n_classes
    cdef double uniform, share
    cdef Rounding rounding
    round_to_nearest(&rounding)
    if mask != NULL:
        n_shown = 0
        for i in range(batch.n_classes):
            n_shown += mask[i] != 0
    uniform = batch.smoothing / larger(1, n_shown)
    for i in range(padded(batch.n_classes)):
        base[i] = 0
    for i in range(batch.n_classes):
        share = uniform if mask == NULL or mask[i] != 0 else 0.0
        base[i] = <floating>(share if batch.weight == NULL else share * batch.weight[i])
    batch.base = <char*>base
    round_as_before(&rounding)


cdef inline Py_ssize_t base_bytes(Py_ssize_t n_classes, Py_ssize_t itemsize) noexcept nogil:
    return (padded(n_classes) * itemsize + 63) // 64 * 64


# ---- the batch, its classes strided ---------------------------------------------------------------------------------

# The log-softmax of rows whose classes are strided. Short ones are taken as they lie, in blocks of neighbours; longer
# ones tile by tile: turned, taken as any other rows are, and turned back.
cdef void take_strided(
    Batch* batch, const Grid* grid, const Grid* out_grid, int num_threads, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n_bytes = strided_thread_bytes(batch.n_classes, sizeof(floating))
    cdef Py_ssize_t part, n_parts = tiles_of(batch.n_rows, batch.n_classes)
    cdef int team
    if batch.n_classes <= SHORT_CLASSES:
        n_parts = blocks_of(grid) * (batch.n_rows // grid.inner)
    batch.stream = is_streamed(batch.n_rows * batch.n_classes * sizeof(floating), batch.out, batch.logits)
    team = team_for(<int>smaller(num_threads, n_parts))
    if team == 1:
        for part in range(n_parts):
            take_strided_part(batch, grid, out_grid, batch.memory, part, like)
    else:
        for part in prange(n_parts, num_threads=team, schedule="dynamic", chunksize=1):
            take_strided_part(batch, grid, out_grid, batch.memory + threadid() * n_bytes, part, like)


cdef void take_strided_part(
    const Batch* batch, const Grid* grid, const Grid* out_grid, char* memory, Py_ssize_t part, const floating* like
) noexcept nogil:
    cdef Py_ssize_t blocks = blocks_of(grid)
    if batch.n_classes <= SHORT_CLASSES:
        take_columns(
            batch, grid, out_grid, <Own*>next_line(memory), part // blocks, part % blocks * BLOCK_ROWS, like
        )
    else:
        take_tile(batch, grid, out_grid, next_line(memory), part * tile_rows(batch.n_classes), like)


cdef void take_columns(
    const Batch* batch, const Grid* grid, const Grid* out_grid, Own* own, Py_ssize_t group, Py_ssize_t start,
    const floating* like,
) noexcept nogil:
    cdef Py_ssize_t offset = start * <Py_ssize_t>sizeof(floating)
    cdef char* out = NULL if batch.out == NULL else batch.out + group * out_grid.group_stride + offset
    cdef Rounding rounding
    round_to_nearest(&rounding)
    take_log_columns(
        batch, own, group * grid.inner + start, smaller(BLOCK_ROWS, grid.inner - start),
        batch.logits + group * grid.group_stride + offset, grid.class_stride, out, out_grid.class_stride, like,
    )
    if batch.stream:
        stream_fence()
    round_as_before(&rounding)


cdef void take_tile(
    const Batch* batch, const Grid* grid, const Grid* out_grid, char* tile, Py_ssize_t first, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n = smaller(tile_rows(batch.n_classes), batch.n_rows - first), task
    cdef Plan plan = plan_batch(n, batch.n_classes, sizeof(floating), 1)
    cdef Batch own = batch[0]
    own.n_rows = n
    own.logits = tile
    own.out = NULL if batch.out == NULL else tile
    own.logits_stride = own.out_stride = tile_pitch(batch.n_classes) * sizeof(floating)
    own.lse = NULL if batch.lse == NULL else batch.lse + first
    own.stream = False
    load_tile(grid, batch.logits, first, n, batch.n_classes, <floating*>tile)
    for task in range(plan.n_tasks):
        take_task(&own, &plan, tile + tile_bytes(batch.n_classes, sizeof(floating)), task, like)
    if batch.out != NULL:
        store_tile(out_grid, batch.out, first, n, batch.n_classes, <const floating*>tile)


cdef inline Py_ssize_t blocks_of(const Grid* grid) noexcept nogil:
    return (grid.inner + BLOCK_ROWS - 1) // BLOCK_ROWS


cdef Py_ssize_t strided_thread_bytes(Py_ssize_t n_classes, Py_ssize_t itemsize) noexcept nogil:
    if n_classes <= SHORT_CLASSES:
        return sizeof(Own) + 64 + (column_terms(n_classes) * itemsize + 63) // 64 * 64 + 64
    return tile_bytes(n_classes, itemsize) + plan_batch(tile_rows(n_classes), n_classes, itemsize, 1).thread_bytes + 64


cdef Py_ssize_t strided_memory(
    Py_ssize_t n_rows, Py_ssize_t n_classes, Py_ssize_t itemsize, int num_threads
) noexcept nogil:
    cdef Py_ssize_t most = n_rows if n_classes <= SHORT_CLASSES else tiles_of(n_rows, n_classes)
    return smaller(num_threads, most) * strided_thread_bytes(n_classes, itemsize)


# ---- entry points --------------------------------------------------------------------------------------------------

def memory_needed(Py_ssize_t n_rows, Py_ssize_t n_classes, Py_ssize_t itemsize, int num_threads):
    """Return the bytes of working memory for calls of at most `n_rows` rows."""
    return memory_for(n_rows, n_classes, itemsize, num_threads)


cdef Py_ssize_t memory_for(Py_ssize_t n_rows, Py_ssize_t n_classes, Py_ssize_t itemsize, int num_threads) noexcept:
    cdef Plan plan = plan_batch(larger(1, n_rows), n_classes, itemsize, num_threads)
    cdef Py_ssize_t most = larger(1, smaller(num_threads, n_rows))
    return most * plan.thread_bytes + base_bytes(n_classes, itemsize) + 64


cdef inline char* data_of(array) noexcept:
    return NULL if array is None else <char*>cnp.PyArray_DATA(<cnp.ndarray>array)


cdef inline Py_ssize_t stride_of(array) noexcept:
    return 0 if array is None else cnp.PyArray_STRIDE(<cnp.ndarray>array, 0)


cdef Batch empty_batch() noexcept:
    cdef Batch batch
    memset(&batch, 0, sizeof(batch))
    batch.scale = batch.certain = 1.0
    set_scale(&batch.transform, 1.0, True)
    return batch


# A batch of logits that lie without gaps; their last axis are the classes.
cdef Batch batch_like(logits):
    cdef Batch batch = empty_batch()
    batch.n_classes = classes_of(logits)
    batch.n_rows = cnp.PyArray_SIZE(logits) // batch.n_classes
    batch.logits = data_of(logits)
    batch.logits_stride = batch.n_classes * cnp.PyArray_ITEMSIZE(logits)
    return batch


cdef Batch batch_of(cnp.ndarray logits, char* memory):
    cdef Batch batch = empty_batch()
    batch.n_rows = cnp.PyArray_DIM(logits, 0)
    batch.n_classes = cnp.PyArray_DIM(logits, 1)
    batch.logits = <char*>cnp.PyArray_DATA(logits)
    batch.logits_stride = cnp.PyArray_STRIDE(logits, 0)
    batch.memory = memory
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
    weight=None, sample_weight=None, double smoothing=0.0, double logit_scale=1.0, double cap=0.0, mask=None,
    double z_loss=0.0, double scale=1.0, scales=None, out=None, Py_ssize_t out_bytes=0, hess=None, statistics=None,
):
    """Fill `losses` (N,) float64 and, unless None, `out` and `hess` (N, C) in the logits' dtype.

    Rows of `logits`, `distribution`, `out` and `hess` (N, C) are contiguous, native and of one dtype; `indices` (N, m)
    int64 with `values` (N, m) float64 or None (all 1); a negative first index, or `sample_weight` 0, leaves a row out.
    `mask` (N or 1, C) is uint8. `out_bytes` is the size of what `out` is a part of. `statistics`: (lse, probability,
    entropy, predicted, correct), of which the first three are float64.
    """
    cdef Batch batch = batch_of(logits, data_of(memory))
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
    set_scale(&batch.transform, logit_scale, cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32)
    batch.transform.cap = cap
    batch.transform.mask = <uint8_t*>data_of(mask)
    batch.transform.mask_stride = 0 if mask is None or len(mask) == 1 else stride_of(mask)
    batch.z_loss = z_loss
    batch.scale = scale
    batch.scales = <double*>data_of(scales)
    batch.out = data_of(out)
    batch.out_stride = stride_of(out)
    batch.out_bytes = out_bytes
    batch.hess = data_of(hess)
    batch.hess_stride = stride_of(hess)
    if statistics is not None:
        batch.lse = <double*>data_of(statistics[0])
        batch.probability = <double*>data_of(statistics[1])
        batch.entropy = <double*>data_of(statistics[2])
        batch.predicted = <int64_t*>data_of(statistics[3])
        batch.correct = <uint8_t*>data_of(statistics[4])
    run(&batch, cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32, num_threads)


# Plain cases in one call, as in rows.pyx, of what general rows take: class ids with options that are not for the
# kernels there, distributions like the logits, or sparse targets. Whatever is not plain, errors included, is left to
# the general way: the answer is None and nothing has been written.
def plain_general(
    logits, targets, indices, values, out, bint with_grad, hess, bint with_hess, weight, sample_weight, ignore_index,
    label_smoothing, logit_scale, softcap, z_loss, class_mask, str reduction, denominator, num_threads, grad_output,
    Py_ssize_t serial_elements, choose_threads,
):
    """Return (reduced losses, gradient or None) and, `with_hess`, the Hessian, or None if the call is not plain.

    `indices` and `values` are those of sparse targets; then `targets` is not looked at.
    """
    cdef Batch batch
    cdef int kind, threads
    cdef bint mean = reduction == "mean"
    cdef double divisor
    cdef Py_ssize_t n, n_bytes
    cdef double* numbers
    if indices is None and not cnp.PyArray_CheckExact(targets):
        return None
    threads = threads_of(logits, num_threads, serial_elements, choose_threads)
    if (
        threads == 0
        or not are_few_logits(logits, GENERAL_SLAB_ELEMENTS)
        or (out is not None and not is_gradient(out, logits))
        or (hess is not None and not is_hessian(hess, out, logits))
        or not (
            are_entries(indices, values, logits, out, hess) if indices is not None
            else are_ids(targets, logits) or (is_like(targets, logits) and is_apart_from(targets, out, hess))
        )
        or (weight is not None and not is_plain_weight(weight, logits, out, hess))
        or (sample_weight is not None and not are_plain_factors(sample_weight, logits, out, hess))
        or not are_plain_numbers(label_smoothing, logit_scale, z_loss)
        or not (softcap is None or (type(softcap) is float and 0.0 < <double>softcap < INFINITY))
        or (class_mask is not None and not is_plain_mask(class_mask, logits, out, hess))
        or not is_plain_factor(grad_output, logits, reduction == "none", out, hess)
        or not is_denominator(denominator, mean)
    ):
        return None
    if indices is None and are_ids(targets, logits):
        if type(ignore_index) is not int or is_for_rows(
            label_smoothing, z_loss, weight is not None, class_mask is not None, softcap is not None
        ):
            return None
    elif not (type(ignore_index) is int and ignore_index == DEFAULT_IGNORED):
        return None
    kind = cnp.PyArray_TYPE(logits)
    batch = batch_like(logits)
    n = batch.n_rows
    batch.smoothing = label_smoothing
    batch.certain = 1.0 - batch.smoothing
    set_scale(&batch.transform, logit_scale, kind == cnp.NPY_FLOAT32)
    batch.transform.cap = 0.0 if softcap is None else softcap
    batch.z_loss = z_loss
    if class_mask is not None:
        batch.transform.mask = <uint8_t*>data_of(class_mask)
        batch.transform.mask_stride = mask_stride_of(class_mask, logits)
    batch.n_entries = 0
    if indices is not None:
        batch.n_entries = cnp.PyArray_DIM(indices, cnp.PyArray_NDIM(indices) - 1)
    elif are_ids(targets, logits):
        batch.n_entries = 1
    # While masses are checked other threads run, and may give the logits another shape.
    if with_grad and out is None:
        out = new_array(logits, cnp.PyArray_NDIM(logits))
    if with_hess and hess is None:
        hess = new_array(logits, cnp.PyArray_NDIM(logits))
    losses = new_array(logits, cnp.PyArray_NDIM(logits) - 1) if reduction == "none" else None
    n_bytes = memory_for(n, batch.n_classes, cnp.PyArray_ITEMSIZE(logits), threads)
    numbers = <double*>malloc(((3 + 2 * batch.n_entries) * n + batch.n_classes) * sizeof(double) + n_bytes)
    if numbers == NULL:
        raise MemoryError("fastce could not allocate its working memory")
    batch.losses = numbers
    batch.sample_weight = doubles_of(sample_weight, numbers + n)
    batch.scales = doubles_of(grad_output if cnp.PyArray_Check(grad_output) else None, numbers + 2 * n)
    batch.weight = doubles_of(weight, numbers + 3 * n)
    numbers += 3 * n + batch.n_classes
    batch.memory = <char*>(numbers + 2 * batch.n_entries * n)
    try:
        if weight is not None and not are_weights(batch.weight, batch.n_classes, 0.0):
            return None
        if batch.n_entries == 0 and indices is None:
            batch.distribution = data_of(targets)
            batch.distribution_stride = batch.logits_stride
            if not is_mass_of(&batch, kind == cnp.NPY_FLOAT32, threads):
                return None
        elif not take_entries(
            &batch, targets if indices is None else indices, values, <int64_t*>numbers, numbers + batch.n_entries * n,
            ignore_index,
        ):
            return None
        if not take_divisor(&batch, indices is None and batch.n_entries == 1, &divisor):
            return None
        if denominator is not None:
            divisor = denominator
        if mean and divisor == 0.0:
            return None
        batch.scale = grad_output if type(grad_output) is float else 1.0
        if mean:
            batch.scale = batch.scale / divisor
        batch.out = data_of(out) if with_grad else NULL
        batch.hess = data_of(hess) if with_hess else NULL
        batch.out_stride = batch.hess_stride = batch.logits_stride
        run(&batch, kind == cnp.NPY_FLOAT32, threads)
        if losses is None:
            losses = pairwise_sum(batch.losses, n) / (divisor if mean else 1.0)
        else:
            copy_losses(losses, batch.losses, n)
        return (losses, out, hess) if with_hess else (losses, out)
    finally:
        free(batch.losses)


# Whether `indices` and `values` are those of sparse targets, plain arrays with as many entries for every row, at least
# one.
cdef inline bint are_entries(indices, values, logits, out, hess) noexcept:
    cdef int n_axes = cnp.PyArray_NDIM(logits)
    return (
        is_plain(indices, n_axes)
        and is_plain(values, n_axes)
        and are_integers(indices)
        and is_native(values)
        and cnp.PyArray_SAMESHAPE(indices, values)
        and begins_like(indices, logits, n_axes - 1)
        and cnp.PyArray_SIZE(indices) > 0
        and is_apart_from(indices, out, hess)
        and is_apart_from(values, out, hess)
    )


# Takes class ids (`values` is None) or the entries of sparse targets; returns whether they are in order.
cdef bint take_entries(Batch* batch, ids, values, int64_t* indices, double* masses, ignore_index) except -1:
    cdef Py_ssize_t n = batch.n_rows * batch.n_entries
    cdef int overflow = 0
    cdef int64_t ignored = PyLong_AsLongLongAndOverflow(ignore_index, &overflow)
    batch.indices = indices
    if values is None:
        return not overflow and copy_ids(ids, indices, n, batch.n_classes, ignored) >= 0
    batch.values = doubles_of(values, masses)
    # Nothing is ignored: -1 is out of range as well.
    return copy_ids(ids, indices, n, batch.n_classes, -1) == n and are_weights(batch.values, n, 0.0)


# What a mean divides by, as of Problem.total_weight; returns whether the sample weights are finite.
cdef bint take_divisor(const Batch* batch, bint are_classes, double* divisor) noexcept nogil:
    cdef Weights weights
    cdef WeightSum summed
    cdef Py_ssize_t r, n_live = batch.n_rows
    weights.ids = batch.indices if are_classes else NULL
    weights.of_classes = batch.weight if are_classes else NULL
    weights.of_samples = batch.sample_weight
    if are_classes:
        for r in range(batch.n_rows):
            n_live -= batch.indices[r] < 0
    divisor[0] = n_live
    if weights.of_classes == NULL and weights.of_samples == NULL:
        return True
    summed = total_weight(&weights, batch.n_rows, NULL, n_live == batch.n_rows)
    divisor[0] = summed.total
    return summed.are_finite


cdef inline bint is_float(value, double neutral) noexcept:
    return type(value) is float and <double>value == neutral


# Whether the distributions of a batch, which lie without gaps, are finite and >= 0; small ones are looked through
# without letting go of the interpreter.
cdef bint is_mass_of(const Batch* batch, bint single, int num_threads):
    cdef Py_ssize_t size = batch.n_rows * batch.n_classes
    if size < GIL_ELEMENTS:
        return is_mass_at(batch.distribution, size, single, 1)
    with nogil:
        return is_mass_at(batch.distribution, size, single, num_threads)


cdef bint is_mass_at(const char* numbers, Py_ssize_t size, bint single, int num_threads) noexcept nogil:
    if single:
        return count_bad_mass(<const float*>numbers, size, num_threads) == 0
    return count_bad_mass(<const double*>numbers, size, num_threads) == 0


def is_mass(cnp.ndarray array, int num_threads):
    """Return whether all numbers of a C-contiguous native float32 or float64 array are finite and >= 0."""
    cdef const char* numbers = <const char*>cnp.PyArray_DATA(array)
    cdef Py_ssize_t size = cnp.PyArray_SIZE(array)
    cdef bint single = cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32, is_fit
    with nogil:
        is_fit = is_mass_at(numbers, size, single, num_threads)
    return is_fit


cdef Py_ssize_t count_bad_mass(const floating* numbers, Py_ssize_t size, int num_threads) noexcept nogil:
    cdef Py_ssize_t task, n_tasks = (size + KEEP_CLASSES - 1) // KEEP_CLASSES, n_bad = 0
    num_threads = team_for(<int>smaller(num_threads, n_tasks))
    if num_threads == 1:
        for task in range(n_tasks):
            n_bad += count_bad(numbers + task * KEEP_CLASSES, smaller(KEEP_CLASSES, size - task * KEEP_CLASSES))
    else:
        for task in prange(n_tasks, num_threads=num_threads, schedule="dynamic", chunksize=1):
            n_bad += count_bad(numbers + task * KEEP_CLASSES, smaller(KEEP_CLASSES, size - task * KEEP_CLASSES))
    return n_bad


cdef Py_ssize_t count_bad(const floating* numbers, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int n_bad = 0
    for i in range(n):
        n_bad += 0 if numbers[i] >= 0 and numbers[i] < <floating>INFINITY else 1
    return n_bad


def newton_terms(cnp.ndarray slopes, weights, double factor, cnp.ndarray grad, cnp.ndarray hess, int num_threads):
    """Fill float32 `grad` with w g and `hess` with factor w |g| (1 - |g|), given slopes g (K, n), class by class.

    All arrays are contiguous and native; `weights` w is float64 (n,), or None for 1. A slope of cross-entropy is p, or
    p - 1 at the target: |g| (1 - |g|) is p (1 - p) for both.
    """
    cdef const double* w = <const double*>data_of(weights)
    cdef float* grads = <float*>cnp.PyArray_DATA(grad)
    cdef float* curves = <float*>cnp.PyArray_DATA(hess)
    cdef Py_ssize_t n_classes = cnp.PyArray_DIM(slopes, 0), n = cnp.PyArray_DIM(slopes, 1)
    cdef const char* g = <const char*>cnp.PyArray_DATA(slopes)
    cdef bint single = cnp.PyArray_TYPE(slopes) == cnp.NPY_FLOAT32
    with nogil:
        if single:
            fill_newton_terms(<const float*>g, w, factor, grads, curves, n_classes, n, num_threads)
        else:
            fill_newton_terms(<const double*>g, w, factor, grads, curves, n_classes, n, num_threads)


cdef void fill_newton_terms(
    const floating* slopes, const double* weights, double factor, float* grad, float* hess, Py_ssize_t n_classes,
    Py_ssize_t n, int num_threads,
) noexcept nogil:
    cdef Py_ssize_t task, n_pieces = (n + KEEP_CLASSES - 1) // KEEP_CLASSES, n_tasks = n_classes * n_pieces
    num_threads = team_for(<int>smaller(num_threads, n_tasks))
    if num_threads == 1:
        for task in range(n_tasks):
            fill_newton_piece(slopes, weights, factor, grad, hess, task // n_pieces, task % n_pieces, n)
    else:
        for task in prange(n_tasks, num_threads=num_threads, schedule="dynamic", chunksize=1):
            fill_newton_piece(slopes, weights, factor, grad, hess, task // n_pieces, task % n_pieces, n)


cdef void fill_newton_piece(
    const floating* slopes, const double* weights, double factor, float* grad, float* hess, Py_ssize_t c,
    Py_ssize_t piece, Py_ssize_t n,
) noexcept nogil:
    cdef Py_ssize_t i, first = piece * KEEP_CLASSES, length = smaller(KEEP_CLASSES, n - first)
    cdef double slope, size
    slopes += c * n + first
    grad += c * n + first
    hess += c * n + first
    if weights == NULL:
        for i in range(length):
            slope = slopes[i]
            size = fabs(slope)
            grad[i] = <float>slope
            hess[i] = <float>(factor * size * (1.0 - size))
    else:
        weights += first
        for i in range(length):
            slope = slopes[i]
            size = fabs(slope)
            grad[i] = <float>(slope * weights[i])
            hess[i] = <float>(factor * size * (1.0 - size) * weights[i])


def log_softmax_rows(cnp.ndarray logits, out, lse, Py_ssize_t out_bytes, memory, int num_threads):
    """Fill, unless None, `out` (N, C) with log_softmax and `lse` (N,) float64 with logsumexp.

    `out_bytes` is the size of what `out` is a part of.
    """
    cdef Batch batch = batch_of(logits, data_of(memory))
    batch.kind = LOG_SOFTMAX
    batch.out = data_of(out)
    batch.out_stride = stride_of(out)
    batch.out_bytes = out_bytes
    batch.lse = <double*>data_of(lse)
    run(&batch, cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32, num_threads)


def plain_log_softmax(logits, axis, out, num_threads, Py_ssize_t serial_elements, choose_threads):
    """Return `out` or a new array, filled with log_softmax along an axis, or None if the call is not plain."""
    cdef Batch batch
    cdef int threads = threads_of(logits, num_threads, serial_elements, choose_threads)
    cdef Py_ssize_t class_axis = plain_axis(logits, axis, out, GENERAL_SLAB_ELEMENTS)
    if threads == 0 or class_axis < 0 or not fits_tiles(logits, class_axis):
        return None
    batch = activation_of(logits, class_axis)
    if out is None:
        out = cnp.PyArray_EMPTY(cnp.PyArray_NDIM(logits), cnp.PyArray_DIMS(logits), cnp.PyArray_TYPE(logits), 0)
    batch.out = data_of(out)
    run_plain(&batch, elements_below(logits, class_axis), cnp.PyArray_ITEMSIZE(logits), threads)
    return out


def plain_logsumexp(logits, axis, keepdims, num_threads, Py_ssize_t serial_elements, choose_threads):
    """Return a new array of logsumexp along an axis, or None if the call is not plain."""
    cdef Batch batch
    cdef cnp.npy_intp[MAX_AXES] shape
    cdef int threads = threads_of(logits, num_threads, serial_elements, choose_threads), i, n_axes = 0
    cdef Py_ssize_t class_axis = plain_axis(logits, axis, None, GENERAL_SLAB_ELEMENTS)
    if threads == 0 or class_axis < 0 or not fits_tiles(logits, class_axis) or type(keepdims) is not bool:
        return None
    batch = activation_of(logits, class_axis)
    for i in range(cnp.PyArray_NDIM(logits)):
        if i != class_axis or keepdims:
            shape[n_axes] = 1 if i == class_axis else cnp.PyArray_DIM(logits, i)
            n_axes += 1
    result = cnp.PyArray_EMPTY(n_axes, shape, cnp.PyArray_TYPE(logits), 0)
    batch.lse = <double*>malloc(batch.n_rows * sizeof(double))
    if batch.lse == NULL:
        raise MemoryError("fastce could not allocate its working memory")
    try:
        run_plain(&batch, elements_below(logits, class_axis), cnp.PyArray_ITEMSIZE(logits), threads)
        copy_losses(result, batch.lse, batch.n_rows)
    finally:
        free(batch.lse)
    return result


# Tiles have room for so many classes; rows that lie contiguous need none.
cdef inline bint fits_tiles(logits, Py_ssize_t axis) noexcept:
    return elements_below(logits, axis) == 1 or cnp.PyArray_DIM(logits, <int>axis) <= TILE_CLASSES


cdef Batch activation_of(cnp.ndarray logits, Py_ssize_t axis) noexcept:
    cdef Batch batch = empty_batch()
    batch.kind = LOG_SOFTMAX
    batch.n_classes = cnp.PyArray_DIM(logits, <int>axis)
    batch.n_rows = cnp.PyArray_SIZE(logits) // batch.n_classes
    batch.logits = data_of(logits)
    batch.logits_stride = batch.out_stride = batch.n_classes * cnp.PyArray_ITEMSIZE(logits)
    return batch


# Log-softmax and log-sum-exp of C-contiguous logits whose classes are `below` elements apart.
cdef int run_plain(Batch* batch, Py_ssize_t below, Py_ssize_t itemsize, int num_threads) except -1:
    cdef Grid grid = plain_grid(batch.n_classes, below, itemsize)
    cdef Py_ssize_t n_bytes
    if below > 1:
        n_bytes = strided_memory(batch.n_rows, batch.n_classes, itemsize, num_threads)
    else:
        n_bytes = memory_for(batch.n_rows, batch.n_classes, itemsize, num_threads)
    batch.memory = <char*>malloc(n_bytes)
    if batch.memory == NULL:
        raise MemoryError("fastce could not allocate its working memory")
    if below > 1:
        run_strided(batch, &grid, &grid, itemsize == sizeof(float), num_threads)
    else:
        run(batch, itemsize == sizeof(float), num_threads)
    free(batch.memory)
    return 0


def strided_memory_needed(Py_ssize_t n_rows, Py_ssize_t n_classes, Py_ssize_t itemsize, int num_threads):
    """Return the bytes of working memory for log_softmax_columns of at most `n_rows` rows."""
    return strided_memory(n_rows, n_classes, itemsize, num_threads)


def log_softmax_columns(cnp.ndarray logits, out, lse, memory, int num_threads):
    """Do what log_softmax_rows does, for `logits` and `out` (G, C, n) of at most MAX_STRIDED_CLASSES classes.

    The last axis is contiguous; rows are numbered along the first and the last axis.
    """
    cdef Batch batch = empty_batch()
    cdef Grid grid = grid_of(logits), out_grid = grid_of(logits if out is None else out)
    batch.kind = LOG_SOFTMAX
    batch.n_classes = cnp.PyArray_DIM(logits, 1)
    batch.n_rows = cnp.PyArray_DIM(logits, 0) * grid.inner
    batch.logits = data_of(logits)
    batch.out = data_of(out)
    batch.lse = <double*>data_of(lse)
    batch.memory = data_of(memory)
    run_strided(&batch, &grid, &out_grid, cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32, num_threads)


cdef void run_strided(Batch* batch, const Grid* grid, const Grid* out_grid, bint single, int num_threads):
    if batch.n_rows * batch.n_classes < GIL_ELEMENTS:
        take_strided_of(batch, grid, out_grid, single, 1)
    else:
        with nogil:
            take_strided_of(batch, grid, out_grid, single, num_threads)


cdef void take_strided_of(
    Batch* batch, const Grid* grid, const Grid* out_grid, bint single, int num_threads
) noexcept nogil:
    if single:
        take_strided(batch, grid, out_grid, num_threads, <const float*>NULL)
    else:
        take_strided(batch, grid, out_grid, num_threads, <const double*>NULL)


def plain_statistics(
    logits, targets, ignore_index, logit_scale, num_threads, Py_ssize_t serial_elements, choose_threads
):
    """Return (loss, lse, predicted, correct, probability, entropy) of each row, or None if the call is not plain."""
    cdef Batch batch
    cdef int overflow = 0, kind, threads, n_axes
    cdef Py_ssize_t n, n_bytes
    cdef int64_t ignored
    cdef double* numbers
    cdef cnp.npy_intp* shape
    if not cnp.PyArray_CheckExact(targets) or type(ignore_index) is not int or not is_float(logit_scale, 1.0):
        return None
    ignored = PyLong_AsLongLongAndOverflow(ignore_index, &overflow)
    threads = threads_of(logits, num_threads, serial_elements, choose_threads)
    if (
        threads == 0
        or overflow
        or not are_few_logits(logits, GENERAL_SLAB_ELEMENTS)
        or not are_ids(targets, logits)
    ):
        return None
    kind = cnp.PyArray_TYPE(logits)
    batch = batch_like(logits)
    n = batch.n_rows
    n_axes = cnp.PyArray_NDIM(targets)
    shape = cnp.PyArray_DIMS(targets)
    loss, lse = new_array(logits, n_axes), new_array(logits, n_axes)
    probability, entropy = new_array(logits, n_axes), new_array(logits, n_axes)
    predicted = cnp.PyArray_EMPTY(n_axes, shape, cnp.NPY_INT64, 0)
    correct = cnp.PyArray_EMPTY(n_axes, shape, cnp.NPY_BOOL, 0)
    n_bytes = memory_for(n, batch.n_classes, cnp.PyArray_ITEMSIZE(logits), threads)
    numbers = <double*>malloc(5 * n * sizeof(double) + n_bytes)
    if numbers == NULL:
        raise MemoryError("fastce could not allocate its working memory")
    batch.losses, batch.lse, batch.probability, batch.entropy = numbers, numbers + n, numbers + 2 * n, numbers + 3 * n
    batch.indices = <int64_t*>(numbers + 4 * n)
    batch.n_entries = 1
    batch.memory = <char*>(numbers + 5 * n)
    batch.predicted = <int64_t*>data_of(predicted)
    batch.correct = <uint8_t*>data_of(correct)
    try:
        if copy_ids(targets, batch.indices, n, batch.n_classes, ignored) < 0:
            return None
        run(&batch, kind == cnp.NPY_FLOAT32, threads)
        copy_losses(loss, batch.losses, n)
        copy_losses(lse, batch.lse, n)
        copy_losses(probability, batch.probability, n)
        copy_losses(entropy, batch.entropy, n)
    finally:
        free(numbers)
    return loss, lse, predicted, correct, probability, entropy
