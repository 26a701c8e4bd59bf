"""Short general rows, by the block: the sums of small.pxd by the largest logit, and those of the mass beside them."""

from libc.math cimport INFINITY, fabs
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memcpy, memset

from fastce._kernels.block cimport (
    BLOCK_ELEMENTS,
    BLOCK_ROWS,
    SMALL_LANES,
    Scratch,
    finish_rows,
    lane_sum,
    leaves_dtype,
    stream_piece,
)
from fastce._kernels.general cimport (
    LOG_SOFTMAX,
    Batch,
    Own,
    behind,
    combine,
    correct_piece,
    count_shown,
    entry,
    entry_mass,
    has_base_alone,
    has_dense_mass,
    is_distribution_alone,
    mask_of,
    multiply,
    pull_at_maximum,
    push_of,
    settle_maximum,
    settle_rows,
    shares_by_row,
    stage_mass,
    sum_far_below,
    write_hessian,
    write_log_softmax,
)
from fastce._kernels.lanes cimport SUM_BLOCK, exp_limit, larger, larger_of
from fastce._kernels.small cimport (
    SMALL_CLASSES,
    exp_by_one_shift,
    rows_before_end,
    shift_vectors,
    take_out_ignored,
    take_rows_apart,
)
from fastce._kernels.staged cimport hide, is_identity, padded, stage_logits
from fastce._kernels.vexp cimport floating

cdef extern from "target.h" nogil:
    void sum_row_float "fastce_sum_row_float" (
        const float* e, const float* a, const float* x, Py_ssize_t n, Py_ssize_t t, double top, bint with_spread,
        double* others, double* masses, double* products, double* spreads
    )
    void sum_row_double "fastce_sum_row_double" (
        const double* e, const double* a, const double* x, Py_ssize_t n, Py_ssize_t t, double top, bint with_spread,
        double* others, double* masses, double* products, double* spreads
    )
    float largest_float "fastce_largest_float" (const float* row, Py_ssize_t n, int64_t* place)
    double largest_double "fastce_largest_double" (const double* row, Py_ssize_t n, int64_t* place)
    void sum_products_float "fastce_sum_products_float" (
        const float* a, const float* x, Py_ssize_t n, double top, double* lanes
    )
    void sum_products_double "fastce_sum_products_double" (
        const double* a, const double* x, Py_ssize_t n, double top, double* lanes
    )
    void lower_float "fastce_lower_float" (float* out, const float* z, Py_ssize_t n, float first, float second)
    void lower_double "fastce_lower_double" (double* out, const double* z, Py_ssize_t n, double first, double second)
    void weigh_float "fastce_weigh_float" (
        float* out, const float* terms, const float* mass, Py_ssize_t n, float push, float pull
    )
    void weigh_double "fastce_weigh_double" (
        double* out, const double* terms, const double* mass, Py_ssize_t n, double push, double pull
    )

cdef enum:
    # Rows up to this length are taken here.
    SHORT_CLASSES = SMALL_CLASSES
    BUFFER = BLOCK_ELEMENTS + SUM_BLOCK     # elements of a block, and what is read beyond its last row


# Rows side by side, n_classes or (one row for all) 0 elements apart. Whole vectors may be read from the first `n_whole`
# of them; the others lie at the end of somebody's memory.
cdef struct Side:
    char* rows
    Py_ssize_t stride
    Py_ssize_t n_whole


# Rows [first, first + n), n <= small_block_rows.
cdef inline void take_short_rows(
    const Batch* batch, Own* own, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Scratch* rows = &own.rows
    cdef Py_ssize_t r
    cdef floating* terms = <floating*>behind(own)
    cdef floating* chain = terms + 2 * BUFFER
    cdef floating* out
    cdef floating* place
    cdef bint streamed
    cdef Side z = gather_logits(batch, own, chain, first, n)
    cdef Side mass
    find_largest(batch, own, &z, n, like)
    exp_by_one_shift(<const floating*>z.rows, terms, batch.n_classes, n, rows)
    for r in range(n):
        own.mass[r] = own.mass_at_maximum[r] = own.linear[r] = own.hit[r] = own.largest_mass[r] = 0.0
    if not has_dense_mass(batch):
        sum_rows(batch, own, &z, NULL, terms, n, batch.entropy != NULL)
    else:
        mass = gather_mass(batch, own, terms + BUFFER, first, n, like)
        sum_rows(batch, own, &z, &mass, terms, n, batch.entropy != NULL)
        mend_sums(batch, own, &z, &mass, terms, n)
    if batch.n_entries == 1 and batch.values == NULL:
        add_ids(batch, own, &z, terms, first, n)
    elif batch.n_entries > 0:
        for r in range(n):
            if own.argmax[r] >= 0:
                add_entries(batch, own, &z, terms, first + r, r)
    finish_rows(rows, n)
    settle_rows(batch, own, first, 0, n)
    if batch.kind == LOG_SOFTMAX:
        if batch.out != NULL:
            write_short_log_softmax(batch, own, &z, first, n, like)
        return
    if batch.hess != NULL:
        write_short_hessians(batch, own, terms, first, n)
    if batch.out != NULL:
        out = <floating*>(batch.out + first * batch.out_stride)
        streamed = batch.stream and batch.out_stride == batch.n_classes * <Py_ssize_t>sizeof(floating)
        place = <floating*>rows.gathered if streamed else out    # as in write_small_rows
        write_short_gradients(batch, own, &mass, terms, place, streamed, n)
        finish_gradients(batch, own, chain, place, first, n)
        if streamed:
            stream_piece(out, place, n * batch.n_classes)


# ---- the block's logits and mass -------------------------------------------------------------------------------------

# The transformed logits: where they lie, or copied. Rows that are not looked at have no largest logit, -1. A
# log-softmax that is written over its logits needs a copy, for it is written in whole vectors.
cdef inline Side gather_logits(
    const Batch* batch, Own* own, floating* chain, Py_ssize_t first, Py_ssize_t n
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes, row_bytes = n_classes * sizeof(floating), r
    cdef floating* copies = <floating*>own.rows.gathered
    cdef const floating* x
    cdef const uint8_t* mask
    cdef Side z
    z.stride = n_classes
    for r in range(n):
        own.argmax[r] = 0
    if batch.n_entries > 0:
        for r in range(n):
            own.argmax[r] = -1 if batch.indices[(first + r) * batch.n_entries] < 0 else 0
    if batch.sample_weight != NULL:
        for r in range(n):
            own.argmax[r] = -1 if batch.sample_weight[first + r] == 0.0 else own.argmax[r]
    if shares_by_row(batch):
        for r in range(n):
            count_shown(batch, own, first + r, r)
    if (
        is_identity(&batch.transform)
        and batch.logits_stride == row_bytes
        and not (batch.kind == LOG_SOFTMAX and batch.out == batch.logits)
    ):
        z.rows = batch.logits + first * row_bytes
        z.n_whole = rows_before_end(n_classes, n)
        return z
    for r in range(n):
        x = <const floating*>(batch.logits + (first + r) * batch.logits_stride)
        mask = mask_of(batch, first + r)
        if own.argmax[r] < 0:
            memset(copies + r * n_classes, 0, row_bytes)
        else:
            stage_logits(x, n_classes, mask, &batch.transform, copies + r * n_classes, chain + r * n_classes)
    z.rows = <char*>copies
    z.n_whole = n
    return z


# The dense mass: where it lies, or weighted and smoothed; that of rows that are not looked at is never read.
cdef inline Side gather_mass(
    const Batch* batch, Own* own, floating* copies, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes, row_bytes = n_classes * sizeof(floating), r
    cdef const floating* row
    cdef Side mass
    mass.rows = <char*>copies
    mass.stride = n_classes
    mass.n_whole = n
    if has_base_alone(batch):
        mass.rows = batch.base
        mass.stride = 0
    elif is_distribution_alone(batch) and batch.distribution_stride == row_bytes:
        mass.rows = batch.distribution + first * row_bytes
        mass.n_whole = rows_before_end(n_classes, n)
    else:
        for r in range(n):
            if own.argmax[r] >= 0:
                row = stage_mass(batch, first + r, 0, n_classes, own.n_shown[r], copies + r * n_classes, like)
                if row != copies + r * n_classes:
                    memcpy(copies + r * n_classes, row, row_bytes)
    return mass


# Row r, whole vectors of it: `last` is room for one that lies at the end.
cdef inline const floating* whole_row(
    const Side* side, Py_ssize_t r, Py_ssize_t n_classes, floating* last
) noexcept nogil:
    cdef const floating* row = <const floating*>side.rows + r * side.stride
    if r < side.n_whole:
        return row
    memcpy(last, row, n_classes * sizeof(floating))
    return last


# ---- sums ------------------------------------------------------------------------------------------------------------

# The largest logit of each row and where it is first.
cdef inline void find_largest(
    const Batch* batch, Own* own, const Side* z, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef floating[SHORT_CLASSES] last
    cdef const floating* row
    cdef Py_ssize_t r, n_infinite = 0
    for r in range(n):
        own.maximum[r] = 0.0
        if own.argmax[r] >= 0:
            row = whole_row(z, r, batch.n_classes, last)
            if floating is float:
                own.maximum[r] = largest_float(row, batch.n_classes, &own.argmax[r])
            else:
                own.maximum[r] = largest_double(row, batch.n_classes, &own.argmax[r])
    for r in range(n):
        n_infinite += 1 if fabs(own.maximum[r]) == INFINITY else 0
    if n_infinite:
        for r in range(n):
            settle_maximum(batch, own, r, <const floating*>z.rows + r * z.stride)


# The sums of each row by its largest logit: of the exponentials and the dense mass elsewhere, so that a row of one
# class or one mass stays exact, and of both by the distance from it.
cdef inline void sum_rows(
    const Batch* batch, Own* own, const Side* z, const Side* mass, floating* terms, Py_ssize_t n, bint with_spread
) noexcept nogil:
    cdef Scratch* rows = &own.rows
    if with_spread:
        sum_each_row(batch, own, z, mass, terms, n, True)
    else:
        sum_each_row(batch, own, z, mass, terms, n, False)
    fold_lanes(own, rows.partial, rows.others, n)
    take_out_ignored(terms, batch.n_classes, own.argmax, n, rows)
    if take_rows_apart(<const floating*>z.rows, terms, batch.n_classes, own.argmax, n, rows) and with_spread:
        sum_spread_again(batch, own, z, terms, n)
    if mass != NULL:
        fold_lanes(own, own.mass_lanes, own.mass, n)
        fold_lanes(own, own.linear_lanes, own.linear, n)
    if with_spread:
        fold_lanes(own, own.spread_lanes, own.spread, n)


cdef inline void sum_each_row(
    const Batch* batch, Own* own, const Side* z, const Side* mass, const floating* terms, Py_ssize_t n,
    bint with_spread,
) noexcept nogil:
    cdef floating[SHORT_CLASSES] last
    cdef floating[SHORT_CLASSES] last_mass
    cdef Py_ssize_t n_classes = batch.n_classes, r, i, top
    cdef const floating* row
    cdef const floating* a = NULL
    for r in range(n):
        i = r * SMALL_LANES
        top = own.argmax[r]
        if top < 0:
            own.rows.at_target[r] = own.rows.z_target[r] = 0.0
        else:
            row = whole_row(z, r, n_classes, last)
            own.rows.at_target[r] = terms[top]
            own.rows.z_target[r] = own.maximum[r]
            if mass != NULL:
                a = whole_row(mass, r, n_classes, last_mass)
                own.mass_at_maximum[r] = a[top]
            if floating is float:
                sum_row_float(
                    terms, a, row, n_classes, top, own.maximum[r], with_spread, own.rows.partial + i,
                    own.mass_lanes + i, own.linear_lanes + i, own.spread_lanes + i,
                )
            else:
                sum_row_double(
                    terms, a, row, n_classes, top, own.maximum[r], with_spread, own.rows.partial + i,
                    own.mass_lanes + i, own.linear_lanes + i, own.spread_lanes + i,
                )
        terms += n_classes


# Rows that were taken by themselves have other terms now.
cdef inline void sum_spread_again(
    const Batch* batch, Own* own, const Side* z, const floating* terms, Py_ssize_t n
) noexcept nogil:
    cdef floating[SHORT_CLASSES] last
    cdef const floating* row
    cdef Py_ssize_t r
    for r in range(n):
        if own.argmax[r] >= 0:
            row = whole_row(z, r, batch.n_classes, last)
            if floating is float:
                sum_products_float(terms, row, batch.n_classes, own.maximum[r], own.spread_lanes + r * SMALL_LANES)
            else:
                sum_products_double(terms, row, batch.n_classes, own.maximum[r], own.spread_lanes + r * SMALL_LANES)
        terms += batch.n_classes


# Sums by the distance that the dtype cannot hold, and what statistics want of the dense mass.
cdef inline void mend_sums(
    const Batch* batch, Own* own, const Side* z, const Side* mass, const floating* terms, Py_ssize_t n
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes, r, n_far = 0
    for r in range(n):
        n_far += 1 if fabs(own.maximum[r]) > exp_limit(terms) else 0
        n_far += 0 if own.linear[r] < INFINITY else 1
    if n_far:
        for r in range(n):
            if own.argmax[r] >= 0 and (fabs(own.maximum[r]) > exp_limit(terms) or not own.linear[r] < INFINITY):
                own.linear[r] = sum_far_below(
                    <const floating*>mass.rows + r * mass.stride, <const floating*>z.rows + r * z.stride,
                    own.maximum[r], n_classes,
                )
    if batch.probability != NULL:
        for r in range(n):
            if own.argmax[r] >= 0:
                sum_hit(own, r, <const floating*>mass.rows + r * mass.stride, terms + r * n_classes, n_classes)


# The exponentials by the row's dense mass a.
cdef inline void sum_hit(
    Own* own, Py_ssize_t r, const floating* a, const floating* terms, Py_ssize_t n_classes
) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(n_classes):
        own.hit[r] += a[c] * (own.rows.at_target[r] if c == own.argmax[r] else <double>terms[c])
        own.largest_mass[r] = larger_of(own.largest_mass[r], a[c])


# The lanes of many rows at once; rows that are not looked at have 0.
cdef inline void fold_lanes(const Own* own, const double* p, double* sums, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t r
    for r in range(n):
        sums[r] = lane_sum(p, r)
    for r in range(n):
        sums[r] = 0.0 if own.argmax[r] < 0 else sums[r]


# Class ids. No branches: whether the target is the largest logit is foretold wrongly in every row that the model does.
cdef inline void add_ids(
    const Batch* batch, Own* own, const Side* z, const floating* terms, Py_ssize_t first, Py_ssize_t n
) noexcept nogil:
    cdef const int64_t* ids = batch.indices + first
    cdef const floating* x = <const floating*>z.rows
    cdef Py_ssize_t r, t
    cdef double a = batch.certain, e, below
    cdef bint is_largest
    for r in range(n):
        t = larger(ids[r], 0)
        if batch.weight != NULL:
            a = batch.certain * batch.weight[t]
        is_largest = t == own.argmax[r]
        below = own.maximum[r] - x[t]
        below = 0.0 if is_largest or a == 0.0 else below
        e = terms[t]
        e = own.rows.at_target[r] if is_largest else e
        own.mass_at_maximum[r] += a if is_largest else 0.0
        own.mass[r] += 0.0 if is_largest else a
        own.linear[r] += a * below
        own.hit[r] += a * e
        own.largest_mass[r] = larger_of(own.largest_mass[r], a)
        x += z.stride
        terms += batch.n_classes


# Sparse targets.
cdef inline void add_entries(
    const Batch* batch, Own* own, const Side* z, const floating* terms, Py_ssize_t row, Py_ssize_t r
) noexcept nogil:
    cdef const floating* x = <const floating*>z.rows + r * z.stride
    cdef Py_ssize_t i, index
    cdef double a, e
    for i in range(batch.n_entries):
        a = entry(batch, row, i, &index)
        if a == 0.0:
            continue
        e = terms[r * batch.n_classes + index]
        if index == own.argmax[r]:
            own.mass_at_maximum[r] += a
            e = own.rows.at_target[r]
        else:
            own.mass[r] += a
            own.linear[r] += a * (own.maximum[r] - x[index])
        if batch.probability != NULL:
            own.hit[r] += a * e
            own.largest_mass[r] = larger_of(own.largest_mass[r], entry_mass(batch, row, index))


# ---- results ---------------------------------------------------------------------------------------------------------

# A row is written in whole vectors that run over into the next one, which is written after it, and its mass is read as
# far; the last rows, where that would leave the block (in a buffer it does not), are written exactly, and so is a block
# with a factor that is no normal number.
cdef inline void write_short_gradients(
    const Batch* batch, Own* own, const Side* mass, const floating* terms, floating* place, bint streamed, Py_ssize_t n
) noexcept nogil:
    cdef Scratch* rows = &own.rows
    cdef Py_ssize_t n_classes = batch.n_classes, r, n_special = 0, n_padded = padded(n_classes)
    cdef Py_ssize_t n_over = rows_before_end(n_classes, n)
    cdef floating[BLOCK_ROWS] push
    cdef floating[BLOCK_ROWS] pull
    cdef floating[BLOCK_ROWS] at_maximum
    cdef bint dense = has_dense_mass(batch)
    cdef floating[SHORT_CLASSES] last
    cdef const floating* row_mass = NULL
    cdef floating* out
    for r in range(n):
        push[r] = <floating>push_of(own, r)
        pull[r] = <floating>(-own.factor[r])
        at_maximum[r] = <floating>pull_at_maximum(own, r)
    for r in range(n):
        n_special += leaves_dtype(terms, push_of(own, r), rows.scale[r] * own.factor[r])
    if dense:
        for r in range(n):
            n_special += leaves_dtype(terms, own.factor[r], own.factor[r])
    if streamed:
        n_over = n
    if n_special or batch.out_stride != n_classes * <Py_ssize_t>sizeof(floating):
        n_over = 0
    for r in range(n):
        out = <floating*>(<char*>place + r * batch.out_stride)
        if own.argmax[r] < 0:
            memset(out, 0, n_classes * sizeof(floating))
        else:
            if dense:
                row_mass = whole_row(mass, r, n_classes, last)
            if r >= n_over:
                combine(own, r, out, terms, row_mass, n_classes)
            elif not dense:
                shift_vectors(out, terms, n_padded, push[r], <floating>-0.0)    # which changes no bit of a product
            elif floating is float:
                weigh_float(out, terms, row_mass, n_padded, push[r], pull[r])
            else:
                weigh_double(out, terms, row_mass, n_padded, push[r], pull[r])
            out[own.argmax[r]] = at_maximum[r]
        terms += n_classes


# What options still do to the gradients: entries, a cap, a mask.
cdef inline void finish_gradients(
    const Batch* batch, const Own* own, const floating* chain, floating* place, Py_ssize_t first, Py_ssize_t n
) noexcept nogil:
    cdef floating* out
    cdef Py_ssize_t r
    if batch.n_entries == 0 and batch.transform.cap == 0.0 and batch.transform.mask == NULL:
        return
    for r in range(n):
        if own.argmax[r] < 0:
            continue
        out = <floating*>(<char*>place + r * batch.out_stride)
        correct_piece(batch, own, first + r, r, 0, out, batch.n_classes)
        if batch.transform.cap != 0.0:
            multiply(out, chain + r * batch.n_classes, batch.n_classes)
        if mask_of(batch, first + r) != NULL:
            hide(mask_of(batch, first + r), out, batch.n_classes)


cdef inline void write_short_hessians(
    const Batch* batch, Own* own, const floating* terms, Py_ssize_t first, Py_ssize_t n
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes, r
    cdef floating* hess
    for r in range(n):
        hess = <floating*>(batch.hess + (first + r) * batch.hess_stride)
        if own.argmax[r] < 0:
            memset(hess, 0, n_classes * sizeof(floating))
            continue
        write_hessian(batch, own, r, terms + r * n_classes, hess, n_classes, own.argmax[r])
        if mask_of(batch, first + r) != NULL:
            hide(mask_of(batch, first + r), hess, n_classes)


# In whole vectors, as gradients are.
cdef inline void write_short_log_softmax(
    const Batch* batch, const Own* own, const Side* side, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes, r, n_over = 0
    cdef const floating* z
    cdef floating* out
    cdef floating maximum, least
    if batch.out_stride == n_classes * <Py_ssize_t>sizeof(floating):
        n_over = rows_before_end(n_classes, n)
    for r in range(n):
        z = <const floating*>side.rows + r * side.stride
        out = <floating*>(batch.out + (first + r) * batch.out_stride)
        maximum = <floating>own.maximum[r]
        least = <floating>own.rows.loss[r]
        if r >= n_over:
            write_log_softmax(out, z, n_classes, maximum, least)
        elif floating is float:
            lower_float(out, z, padded(n_classes), maximum, least)
        else:
            lower_double(out, z, padded(n_classes), maximum, least)
