"""Short general rows, a tile at a time: class by class, so that a vector holds one class of many rows."""

from libc.math cimport INFINITY, NAN, fabs
from libc.stdint cimport uint8_t
from libc.string cimport memset

from fastce._kernels.block cimport BLOCK_ROWS, Scratch, finish_rows, is_normal, miss_of
from fastce._kernels.columns cimport COLUMN_LANES, sum_columns
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
    sum_far_below,
)
from fastce._kernels.lanes cimport exp_limit, larger_of, product, window_below
from fastce._kernels.staged cimport is_identity, stage_logits
from fastce._kernels.vexp cimport (
    ExpWindow,
    bits_of_double,
    double_of_bits,
    exp_shifted,
    floating,
    multiply_add_double,
    multiply_add_float,
)

cdef enum:
    # Rows up to this length are turned into tiles, as those of small.pxd go by blocks: at 10 classes a row with z_loss
    # took 19 ns as a tile and 90 ns by itself (float32, 1 thread).
    TILE_CLASSES = 96


# One block's tiles of logits, exponentials, mass and of the factors of a cap: class c of row r at [c * BLOCK_ROWS + r].
cdef struct Tiles:
    char* z
    char* terms
    double* lanes           # for sum_columns
    char* mass
    char* chain
    char* spare


# Elements of working memory for the tiles of rows of this length.
cdef inline Py_ssize_t tile_elements(Py_ssize_t n_classes) noexcept nogil:
    return BLOCK_ROWS * (5 * n_classes + 4 * COLUMN_LANES)


# Rows [first, first + n), n <= BLOCK_ROWS.
cdef inline void take_tile(
    const Batch* batch, Own* own, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t size = BLOCK_ROWS * batch.n_classes * sizeof(floating)
    cdef Tiles tiles
    tiles.z = behind(own)
    tiles.mass = tiles.z + size
    tiles.chain = tiles.mass + size
    tiles.spare = tiles.chain + size
    tiles.terms = tiles.spare + size
    tiles.lanes = <double*>(tiles.terms + size)
    load_tile(batch, own, &tiles, first, n, like)
    find_maxima(own, <const floating*>tiles.z, batch.n_classes, n)
    exp_tile(batch, own, <const floating*>tiles.z, <floating*>tiles.terms, first, n)
    if has_dense_mass(batch):
        add_dense_mass(batch, own, &tiles, first, n, like)
    add_entries(batch, own, &tiles, first, n, like)
    drop_maxima(own, <floating*>tiles.terms, n)
    if batch.entropy != NULL:
        multiply_below(own, <floating*>tiles.terms, <floating*>tiles.z, <floating*>tiles.spare, batch.n_classes, n)
        sum_columns(<floating*>tiles.spare, batch.n_classes, n, tiles.lanes, own.spread)
    sum_columns(<floating*>tiles.terms, batch.n_classes, n, tiles.lanes, own.rows.others)
    finish_rows(&own.rows, n)
    settle(batch, own, first, n)
    if batch.out != NULL or batch.hess != NULL:
        write_tile(batch, own, &tiles, first, n, like)


# ---- sums ----------------------------------------------------------------------------------------------------------

# Rows that are not looked at are left as zeros.
cdef inline void load_tile(
    const Batch* batch, Own* own, const Tiles* tiles, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef floating[TILE_CLASSES] row
    cdef floating[TILE_CLASSES] factors
    cdef floating* z = <floating*>tiles.z
    cdef floating* chain = <floating*>tiles.chain
    cdef const uint8_t* mask
    cdef const floating* x
    cdef Py_ssize_t r, c
    for r in range(n):
        own.argmax[r] = -1 if is_skipped(batch, first + r) else 0
        if own.argmax[r] < 0:
            for c in range(batch.n_classes):
                z[c * BLOCK_ROWS + r] = 0
            continue
        x = <const floating*>(batch.logits + (first + r) * batch.logits_stride)
        mask = mask_of(batch, first + r)
        if not is_identity(&batch.transform):
            stage_logits(x, batch.n_classes, mask, &batch.transform, row, factors)
            x = row
            if batch.transform.cap != 0.0:
                for c in range(batch.n_classes):
                    chain[c * BLOCK_ROWS + r] = factors[c]
        for c in range(batch.n_classes):
            z[c * BLOCK_ROWS + r] = x[c]
        if batch.smoothing != 0.0 and batch.base == NULL:
            own.n_shown[r] = 0
            for c in range(batch.n_classes):
                own.n_shown[r] += mask[c] != 0


# The largest logit of each row and where it is first, and the window that it sets.
cdef inline void find_maxima(Own* own, const floating* z, Py_ssize_t n_classes, Py_ssize_t n) noexcept nogil:
    cdef floating[BLOCK_ROWS] maximum
    cdef floating[BLOCK_ROWS] where
    cdef const floating* column
    cdef floating place
    cdef Py_ssize_t c, r
    for r in range(n):
        maximum[r] = -INFINITY
        where[r] = 0
    for c in range(n_classes):
        column = z + c * BLOCK_ROWS
        place = c
        for r in range(n):
            where[r] = place if column[r] > maximum[r] else where[r]
            maximum[r] = column[r] if column[r] > maximum[r] else maximum[r]
    for r in range(n):
        own.maximum[r] = maximum[r]
        own.argmax[r] = own.argmax[r] if own.argmax[r] < 0 else <Py_ssize_t>where[r]


# The exponentials of each row by its own window: an infinite maximum makes all of them nan.
cdef inline void exp_tile(
    const Batch* batch, Own* own, const floating* z, floating* terms, Py_ssize_t first, Py_ssize_t n
) noexcept nogil:
    cdef floating[BLOCK_ROWS] offset
    cdef floating[BLOCK_ROWS] low
    cdef floating[BLOCK_ROWS] high
    cdef floating[BLOCK_ROWS] magic
    cdef const floating* column
    cdef floating* terms_of_class
    cdef Py_ssize_t c, r
    cdef ExpWindow window
    for r in range(n):
        window = window_below(z, own.maximum[r])
        own.rows.shift[r] = window.shift
        own.rows.z_target[r] = own.maximum[r] - window.offset
        offset[r] = <floating>window.offset
        low[r] = <floating>window.low
        high[r] = <floating>window.high
        magic[r] = <floating>window.magic
    if batch.lse != NULL and batch.kind != GRADIENT:
        note_infinite_rows(own, z, batch.n_classes, n)
    for c in range(batch.n_classes):
        column = z + c * BLOCK_ROWS
        terms_of_class = terms + c * BLOCK_ROWS
        for r in range(n):
            terms_of_class[r] = exp_shifted(column[r], offset[r], low[r], high[r], magic[r])


cdef inline void note_infinite_rows(Own* own, const floating* z, Py_ssize_t n_classes, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t c, r
    for r in range(n):
        own.infinite[r] = own.maximum[r]
        for c in range(n_classes):
            if z[c * BLOCK_ROWS + r] != z[c * BLOCK_ROWS + r]:
                own.infinite[r] = NAN


# e_m is kept apart and left out of the sum.
cdef inline void drop_maxima(Own* own, floating* terms, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t r, place
    for r in range(n):
        if own.argmax[r] >= 0:
            place = own.argmax[r] * BLOCK_ROWS + r
            own.rows.at_target[r] = terms[place]
            terms[place] = 0
        else:
            own.rows.at_target[r] = 1.0
            own.rows.z_target[r] = 0.0
            own.maximum[r] = 0.0


# products = tile * (z_m - z).
cdef inline void multiply_below(
    const Own* own, const floating* tile, const floating* z, floating* products, Py_ssize_t n_classes, Py_ssize_t n
) noexcept nogil:
    cdef floating[BLOCK_ROWS] maximum
    cdef Py_ssize_t c, r, i
    for r in range(n):
        maximum[r] = <floating>own.maximum[r]
    for c in range(n_classes):
        i = c * BLOCK_ROWS
        for r in range(n):
            products[i + r] = product(tile[i + r], maximum[r], z[i + r])


cdef inline void add_dense_mass(
    const Batch* batch, Own* own, const Tiles* tiles, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef floating* mass = <floating*>tiles.mass
    cdef floating* terms = <floating*>tiles.terms
    cdef floating* spare = <floating*>tiles.spare
    cdef Py_ssize_t c, r, top
    load_mass(batch, own, mass, first, n, like)
    multiply_below(own, mass, <floating*>tiles.z, spare, batch.n_classes, n)
    sum_columns(spare, batch.n_classes, n, tiles.lanes, own.linear)
    for r in range(n):
        if fabs(own.maximum[r]) > exp_limit(like) or not own.linear[r] < INFINITY:
            own.linear[r] = sum_far_below(
                mass + r, <floating*>tiles.z + r, own.maximum[r], batch.n_classes, BLOCK_ROWS
            )
    if batch.probability != NULL:
        for c in range(batch.n_classes):
            for r in range(n):
                spare[c * BLOCK_ROWS + r] = mass[c * BLOCK_ROWS + r] * terms[c * BLOCK_ROWS + r]
        sum_columns(spare, batch.n_classes, n, tiles.lanes, own.hit)
        for r in range(n):
            own.largest_mass[r] = 0.0
            for c in range(batch.n_classes):
                own.largest_mass[r] = larger_of(own.largest_mass[r], mass[c * BLOCK_ROWS + r])
    for r in range(n):
        top = own.argmax[r] if own.argmax[r] > 0 else 0
        own.mass_at_maximum[r] = mass[top * BLOCK_ROWS + r]
    # The mass elsewhere is added up without the largest logit's, so that a row of one mass stays exact.
    for r in range(n):
        top = own.argmax[r] if own.argmax[r] > 0 else 0
        mass[top * BLOCK_ROWS + r] = 0
    sum_columns(mass, batch.n_classes, n, tiles.lanes, own.mass)
    for r in range(n):
        top = own.argmax[r] if own.argmax[r] > 0 else 0
        mass[top * BLOCK_ROWS + r] = <floating>own.mass_at_maximum[r]


# The tile of dense mass; whatever in rows that are not looked at.
cdef inline void load_mass(
    const Batch* batch, Own* own, floating* mass, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef const floating* base = <const floating*>batch.base
    cdef const floating* q
    cdef const uint8_t* mask
    cdef floating[TILE_CLASSES] kept
    cdef double uniform, weight
    cdef Py_ssize_t c, r
    if has_base_alone(batch):
        for c in range(batch.n_classes):
            for r in range(n):
                mass[c * BLOCK_ROWS + r] = base[c]
        return
    for c in range(batch.n_classes):
        kept[c] = 0 if base == NULL else base[c]
    for r in range(n):
        q = <const floating*>(batch.distribution + (first + r) * batch.distribution_stride)
        mask = mask_of(batch, first + r)
        if own.argmax[r] < 0:
            for c in range(batch.n_classes):
                mass[c * BLOCK_ROWS + r] = 0
            continue
        if batch.smoothing != 0.0 and base == NULL:
            uniform = batch.smoothing / own.n_shown[r]
            for c in range(batch.n_classes):
                weight = 1.0 if batch.weight == NULL else batch.weight[c]
                kept[c] = <floating>(uniform * weight) if mask[c] else 0
        if batch.distribution == NULL:
            for c in range(batch.n_classes):
                mass[c * BLOCK_ROWS + r] = kept[c]
        elif batch.weight == NULL and batch.smoothing == 0.0:
            for c in range(batch.n_classes):
                mass[c * BLOCK_ROWS + r] = q[c]
        else:
            for c in range(batch.n_classes):
                weight = batch.certain if batch.weight == NULL else batch.certain * batch.weight[c]
                mass[c * BLOCK_ROWS + r] = <floating>(q[c] * weight) + kept[c]


# What is not dense: class ids and sparse targets.
cdef inline void add_entries(
    const Batch* batch, Own* own, const Tiles* tiles, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef const floating* z = <const floating*>tiles.z
    cdef const floating* terms = <const floating*>tiles.terms
    cdef Py_ssize_t r, i, index
    cdef double a
    if not has_dense_mass(batch):
        for r in range(n):
            own.mass[r] = own.mass_at_maximum[r] = own.linear[r] = own.hit[r] = own.largest_mass[r] = 0.0
    for r in range(n):
        if own.argmax[r] < 0:
            continue
        for i in range(batch.n_entries):
            a = entry(batch, first + r, i, &index)
            if a == 0.0:
                continue
            if index == own.argmax[r]:
                own.mass_at_maximum[r] += a
            else:
                own.mass[r] += a
                own.linear[r] += a * (own.maximum[r] - z[index * BLOCK_ROWS + r])
            if batch.probability != NULL:
                own.hit[r] += a * terms[index * BLOCK_ROWS + r]
                own.largest_mass[r] = larger_of(own.largest_mass[r], entry_mass(batch, first + r, index))


# ---- gradient, Hessian, activation -----------------------------------------------------------------------------------

cdef inline void write_tile(
    const Batch* batch, Own* own, const Tiles* tiles, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef floating* results = <floating*>tiles.spare
    if batch.kind == LOG_SOFTMAX:
        write_log_softmax(batch, own, <floating*>tiles.z, results, n)
        store_tile(batch, own, results, batch.out, batch.out_stride, first, n)
        return
    if batch.hess != NULL:
        curve_tile(batch, own, <floating*>tiles.terms, results, n)
        store_tile(batch, own, results, batch.hess, batch.hess_stride, first, n)
    if batch.out != NULL:
        combine_tile(batch, own, tiles, results, n)
        correct_tile(batch, own, tiles, results, first, n)
        store_tile(batch, own, results, batch.out, batch.out_stride, first, n)


# (terms * (scale/S) - mass) * factor, in the dtype where all factors of a row are normal numbers of it, else float64.
cdef inline void combine_tile(
    const Batch* batch, Own* own, const Tiles* tiles, floating* results, Py_ssize_t n
) noexcept nogil:
    cdef Scratch* rows = &own.rows
    cdef const floating* terms = <const floating*>tiles.terms
    cdef const floating* mass = <const floating*>tiles.mass
    cdef bint dense = has_dense_mass(batch)
    cdef floating[BLOCK_ROWS] push
    cdef floating[BLOCK_ROWS] pull
    cdef double power, rest, kept
    cdef Py_ssize_t c, r, i, n_special = 0
    for r in range(n):
        push[r] = <floating>(rows.scale[r] * rows.inverse[r] * own.factor[r])
        pull[r] = <floating>(-own.factor[r])
        n_special += 0 if is_plain_row(own, r, results, dense) else 1
    for c in range(batch.n_classes):
        i = c * BLOCK_ROWS
        if not dense:
            for r in range(n):
                results[i + r] = terms[i + r] * push[r]
        else:
            for r in range(n):
                if floating is float:
                    results[i + r] = multiply_add_float(terms[i + r], push[r], mass[i + r] * pull[r])
                else:
                    results[i + r] = multiply_add_double(terms[i + r], push[r], mass[i + r] * pull[r])
    if n_special:
        for r in range(n):
            if not is_plain_row(own, r, results, dense):
                power = double_of_bits(bits_of_double(rows.inverse[r]) & <unsigned long long>0x7ff0000000000000)
                rest = rows.scale[r] * (rows.inverse[r] / power)
                for c in range(batch.n_classes):
                    i = c * BLOCK_ROWS + r
                    kept = mass[i] if dense else 0.0
                    results[i] = <floating>(((terms[i] * power) * rest - kept) * own.factor[r])


cdef inline bint is_plain_row(const Own* own, Py_ssize_t r, const floating* like, bint dense) noexcept nogil:
    if dense and not is_normal(like, own.factor[r], 1.0):
        return False
    return is_normal(like, own.rows.scale[r] * own.factor[r], own.rows.inverse[r])


# The entries' own gradient, that at the largest logit, and the derivative of a cap.
cdef inline void correct_tile(
    const Batch* batch, Own* own, const Tiles* tiles, floating* results, Py_ssize_t first, Py_ssize_t n
) noexcept nogil:
    cdef const floating* chain = <const floating*>tiles.chain
    cdef Py_ssize_t c, r, i, index
    cdef double a
    for r in range(n):
        if own.argmax[r] < 0:
            continue
        for i in range(batch.n_entries):
            a = entry(batch, first + r, i, &index)
            if a != 0.0:
                index = index * BLOCK_ROWS + r
                results[index] = <floating>(results[index] - a * own.factor[r])
        results[own.argmax[r] * BLOCK_ROWS + r] = <floating>pull_at_maximum(own, r)
    if batch.transform.cap != 0.0:
        for c in range(batch.n_classes):
            for r in range(n):
                results[c * BLOCK_ROWS + r] = results[c * BLOCK_ROWS + r] * chain[c * BLOCK_ROWS + r]


# p * ((A + 2 z_loss lse)(1 - p) + 2 z_loss p) by the row's factor; at the largest logit 1 - p is others/S.
cdef inline void curve_tile(
    const Batch* batch, Own* own, const floating* terms, floating* results, Py_ssize_t n
) noexcept nogil:
    cdef Scratch* rows = &own.rows
    cdef double[BLOCK_ROWS] curve
    cdef double[BLOCK_ROWS] square
    cdef double p
    cdef Py_ssize_t c, r, i
    for r in range(n):
        curve[r] = rows.scale[r] * own.factor[r] * batch.transform.scale
        square[r] = 2.0 * batch.z_loss * own.factor[r] * batch.transform.scale
    for c in range(batch.n_classes):
        i = c * BLOCK_ROWS
        for r in range(n):
            p = terms[i + r] * rows.inverse[r]
            results[i + r] = <floating>(p * (curve[r] * (1.0 - p) + square[r] * p))
    for r in range(n):
        if own.argmax[r] >= 0:
            p = rows.at_target[r] * rows.inverse[r]
            results[own.argmax[r] * BLOCK_ROWS + r] = <floating>(
                p * (curve[r] * miss_of(rows.others[r], rows.at_target[r]) + square[r] * p)
            )


cdef inline void write_log_softmax(
    const Batch* batch, Own* own, const floating* z, floating* results, Py_ssize_t n
) noexcept nogil:
    cdef floating[BLOCK_ROWS] maximum
    cdef floating[BLOCK_ROWS] least
    cdef Py_ssize_t c, r, i
    for r in range(n):
        maximum[r] = <floating>own.maximum[r]
        least[r] = <floating>own.rows.loss[r]
    for c in range(batch.n_classes):
        i = c * BLOCK_ROWS
        for r in range(n):
            results[i + r] = (z[i + r] - maximum[r]) - least[r]


# Back to rows; zeros for rows that are not looked at and for classes that do not exist.
cdef inline void store_tile(
    const Batch* batch, const Own* own, const floating* results, char* out, Py_ssize_t stride, Py_ssize_t first,
    Py_ssize_t n,
) noexcept nogil:
    cdef const uint8_t* mask
    cdef floating* row
    cdef Py_ssize_t c, r
    for r in range(n):
        row = <floating*>(out + (first + r) * stride)
        mask = mask_of(batch, first + r)
        if own.argmax[r] < 0:
            memset(row, 0, batch.n_classes * sizeof(floating))
        elif mask == NULL:
            for c in range(batch.n_classes):
                row[c] = results[c * BLOCK_ROWS + r]
        else:
            for c in range(batch.n_classes):
                row[c] = results[c * BLOCK_ROWS + r] if mask[c] else 0
