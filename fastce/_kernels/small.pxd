"""Short rows, by the block: one sweep of exponentials over many rows, whatever their length."""

from libc.math cimport INFINITY, fabs
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memcpy, memset

from fastce._kernels.block cimport (
    BLOCK_ELEMENTS,
    BLOCK_ROWS,
    SMALL_LANES,
    Batch,
    Curve,
    Pending,
    Scratch,
    add_options,
    curve_at_target,
    curve_of,
    curve_exactly,
    finish_rows,
    hide_classes,
    is_normal,
    lane_sum,
    leaves_dtype,
    load_scales,
    lse_of,
    mask_of,
    nothing_pending,
    pull_of,
    put_losses,
    scale_terms,
    shift_of,
    stream_piece,
    terms_of,
)
from fastce._kernels.lanes cimport LANES, SUM_BLOCK, exp_terms, larger, larger_of, smaller, sum_limit
from fastce._kernels.large cimport take_row
from fastce._kernels.staged cimport Options, far_below, hide, no_options, padded, stage_block
from fastce._kernels.vexp cimport ExpWindow, exp_window, floating, run_time_value

cdef extern from "target.h" nogil:
    void sum_lanes_float "fastce_sum_lanes_float" (const float* row, Py_ssize_t n, Py_ssize_t t, double* lanes)
    void sum_lanes_double "fastce_sum_lanes_double" (const double* row, Py_ssize_t n, Py_ssize_t t, double* lanes)
    void sum_both_float "fastce_sum_both_float" (
        const float* row, const float* x, Py_ssize_t n, Py_ssize_t t, double top, double* lanes, double* below
    )
    void sum_both_double "fastce_sum_both_double" (
        const double* row, const double* x, Py_ssize_t n, Py_ssize_t t, double top, double* lanes, double* below
    )
    Py_ssize_t above_float "fastce_above_float" (const float* row, Py_ssize_t n, Py_ssize_t t, float least)
    Py_ssize_t above_double "fastce_above_double" (const double* row, Py_ssize_t n, Py_ssize_t t, double least)
    void curve_float "fastce_curve_float" (
        float* out, const float* terms, Py_ssize_t n, float inverse, float total, float rest, float curved,
        float squared
    )
    void curve_double "fastce_curve_double" (
        double* out, const double* terms, Py_ssize_t n, double inverse, double total, double rest, double curved,
        double squared
    )
    void shift_float "fastce_shift_float" (float* out, const float* terms, Py_ssize_t n, float factor, float shift)
    void shift_double "fastce_shift_double" (
        double* out, const double* terms, Py_ssize_t n, double factor, double shift
    )

cdef enum:
    # Rows up to this length are taken here: 1024 rows of 64, 80, 96 classes took 33, 40, 47 us, and 44, 45, 50 us as
    # medium rows (float32, 1 thread; float64 alike).
    SMALL_CLASSES = 96


# Rows [first, first + n).
cdef inline void take_small_rows(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes
    cdef floating* terms = <floating*>terms_of(rows)
    cdef const floating* x = gather_rows(batch, rows, first, n, like)
    cdef int64_t* ids = batch.ids + first
    cdef Py_ssize_t r, n_ignored
    exp_by_one_shift(x, terms, n_classes, n, rows)
    n_ignored = sum_small_rows(x, terms, n_classes, ids, n, batch.options.share != 0.0, rows)
    take_rows_apart(x, terms, n_classes, ids, n, rows)
    load_scales(batch, rows, first, n)
    if n_ignored:
        for r in range(n):      # an ignored row's gradient is 0 whatever its factor, nan included
            rows.scale[r] = 0.0 if ids[r] < 0 else rows.scale[r]
    if batch.options.share != 0.0:
        fold_below(&batch.options, x, n_classes, ids, n, rows)
    finish_rows(rows, n)
    if batch.options.z_loss != 0.0:
        for r in range(n):
            rows.lse[r] = lse_of(rows, r)
        for r in range(n):
            rows.lse[r] = 0.0 if ids[r] < 0 else rows.lse[r]
            rows.steep[r] = 2.0 * batch.options.z_loss * rows.lse[r]
    add_options(batch, rows, n)
    put_losses(batch, rows, first, n)
    if batch.out != NULL:
        write_small_rows(batch, rows, first, n, terms)
    if batch.hess != NULL:
        curve_small_rows(batch, rows, first, n, terms)


# One sweep of exponentials over n rows that lie side by side, with one shift for all (2^50: exact for rows whose sum
# lies between 2^-20 and 2^73).
cdef inline void exp_by_one_shift(
    const floating* x, floating* terms, Py_ssize_t n_classes, Py_ssize_t n, Scratch* rows
) noexcept nogil:
    cdef ExpWindow window = exp_window(x, run_time_value(small_shift(x)), 0.0)
    cdef Py_ssize_t r
    exp_terms(x, terms, n * n_classes, &window)
    for r in range(n):
        rows.shift[r] = window.shift
        rows.offset[r] = 0.0


# A row whose sum shows that the shift did not fit is taken by itself. Returns how many there are.
cdef inline Py_ssize_t take_rows_apart(
    const floating* x, floating* terms, Py_ssize_t n_classes, const int64_t* ids, Py_ssize_t n, Scratch* rows
) noexcept nogil:
    cdef Py_ssize_t r, n_outside = 0
    cdef double total
    for r in range(n):
        total = rows.others[r] + rows.at_target[r]
        n_outside += 0 if small_sum_low(x) <= total < sum_limit(x) else 1
    if n_outside:
        for r in range(n):
            total = rows.others[r] + rows.at_target[r]
            if not small_sum_low(x) <= total < sum_limit(x):
                take_small_row(x + r * n_classes, terms + r * n_classes, n_classes, ids[r], rows, r)
                rows.largest_part[r] = rows.others[r]
    return n_outside


# The logits of a block, row after row: where they lie, or copied and transformed.
cdef inline const floating* gather_rows(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes, row_bytes = n_classes * sizeof(floating), r
    cdef const floating* x = <const floating*>(batch.logits + first * batch.logits_stride)
    cdef floating* gathered = <floating*>rows.gathered
    cdef const uint8_t* mask = mask_of(batch, first)
    cdef const Options* options = &batch.options
    cdef Options repeated = batch.options
    if batch.logits_stride == row_bytes and not batch.options.is_staged:
        return x
    if batch.logits_stride != row_bytes:
        for r in range(n):
            memcpy(gathered + r * n_classes, batch.logits + (first + r) * batch.logits_stride, row_bytes)
        x = gathered
    if options.limits != NULL:
        repeated.limits = <char*>rows.limits
        options = &repeated
    elif mask != NULL and batch.options.transform.mask_stride != n_classes:
        for r in range(n):
            memcpy(rows.masks + r * n_classes, mask_of(batch, first + r), n_classes)
        mask = rows.masks
    stage_block(options, x, mask, 0, n * n_classes, gathered)
    return gathered


# How many of them are a block.
cdef inline Py_ssize_t small_block_rows(Py_ssize_t n_classes) noexcept nogil:
    return smaller(BLOCK_ROWS, BLOCK_ELEMENTS // n_classes)


# The limits of a mask for all rows, once for every row of a block.
cdef inline void repeat_limits(const Batch* batch, Scratch* rows, const floating* like) noexcept nogil:
    cdef floating* limits = <floating*>rows.limits
    cdef Py_ssize_t i
    if batch.options.limits != NULL:
        for i in range(small_block_rows(batch.n_classes)):
            memcpy(limits + i * batch.n_classes, batch.options.limits, batch.n_classes * sizeof(floating))


# One small row by itself, filled up with -inf to the least length that take_row knows.
cdef inline void take_small_row(
    const floating* x, floating* terms, Py_ssize_t n_classes, Py_ssize_t t, Scratch* rows, Py_ssize_t r
) noexcept nogil:
    cdef floating[SMALL_CLASSES] logits
    cdef floating[LANES + SUM_BLOCK] alone
    cdef Py_ssize_t j, n
    cdef bint wide = False
    cdef ExpWindow window
    cdef Options options = no_options()
    cdef Pending nothing = nothing_pending()
    for j in range(SMALL_CLASSES):
        logits[j] = -INFINITY
    memcpy(logits, x, n_classes * sizeof(floating))
    n = larger(n_classes, LANES)
    take_row(&options, logits, NULL, alone + LANES, n, t, True, rows, r, &window, &nothing, &wide)
    memcpy(terms, alone + LANES, n_classes * sizeof(floating))


# others[r], e_t and z_t of each row; returns how many are ignored. The sums in float64, lanes over the row, then a tree
# over the lanes of many rows. Loads run up to 15 elements past a row's end, into the next row or the slack behind the
# block.
cdef inline Py_ssize_t sum_small_rows(
    const floating* x, floating* terms, Py_ssize_t n_classes, const int64_t* ids, Py_ssize_t n, bint with_below,
    Scratch* rows,
) noexcept nogil:
    cdef floating[SMALL_CLASSES] last
    cdef double* p = rows.partial
    cdef const floating* row = terms
    cdef const floating* z = x
    cdef Py_ssize_t r, i, t, n_ignored = 0, n_over = rows_before_end(n_classes, n)
    for r in range(n):
        t = larger(ids[r], 0)
        rows.at_target[r] = row[t]
        rows.z_target[r] = z[t]
        if not with_below:
            sum_lanes(row, n_classes, t, p + r * SMALL_LANES)
        elif r < n_over:
            sum_both(row, z, n_classes, t, p + r * SMALL_LANES, rows.below + r * SMALL_LANES)
        else:       # nothing is read beyond the logits
            memcpy(last, z, n_classes * sizeof(floating))
            sum_both(row, <const floating*>last, n_classes, t, p + r * SMALL_LANES, rows.below + r * SMALL_LANES)
        row += n_classes
        z += n_classes
    for r in range(n):
        i = r * SMALL_LANES
        rows.others[r] = lane_sum(p, r)
        rows.largest_part[r] = larger_of(larger_of(p[i], p[i + 1]), larger_of(p[i + 2], p[i + 3]))
    for r in range(n):
        n_ignored += 1 if ids[r] < 0 else 0
    if n_ignored:
        take_out_ignored(terms, n_classes, ids, n, rows)
    return n_ignored


# Ignored rows get the sums of a row without losses. No branch: in a loop over the rows it would be foretold wrongly, 15
# cycles, for nearly every one of them.
cdef inline void take_out_ignored(
    floating* terms, Py_ssize_t n_classes, const int64_t* ids, Py_ssize_t n, Scratch* rows
) noexcept nogil:
    cdef Py_ssize_t r, n_special = 0
    cdef double total
    for r in range(n):
        total = rows.others[r] + rows.at_target[r]
        n_special += 1 if ids[r] < 0 and not total < INFINITY else 0
    if n_special:
        for r in range(n):
            if ids[r] < 0:      # the factor of its gradient will be 0, which makes 0 of finite numbers only
                memset(terms + r * n_classes, 0, n_classes * sizeof(floating))
    for r in range(n):
        rows.others[r] = 0.0 if ids[r] < 0 else rows.others[r]
        rows.largest_part[r] = 0.0 if ids[r] < 0 else rows.largest_part[r]
        rows.z_target[r] = 0.0 if ids[r] < 0 else rows.z_target[r]
        rows.at_target[r] = small_sum_low(terms) if ids[r] < 0 else rows.at_target[r]


cdef inline void sum_lanes(const floating* row, Py_ssize_t n, Py_ssize_t t, double* lanes) noexcept nogil:
    if floating is float:
        sum_lanes_float(row, n, t, lanes)
    else:
        sum_lanes_double(row, n, t, lanes)


cdef inline void sum_both(
    const floating* row, const floating* x, Py_ssize_t n, Py_ssize_t t, double* lanes, double* below
) noexcept nogil:
    if floating is float:
        sum_both_float(row, x, n, t, x[t], lanes, below)
    else:
        sum_both_double(row, x, n, t, x[t], lanes, below)


# Smoothing's part of the losses, share * sum(z_t - z_c), from its lanes.
cdef inline void fold_below(
    const Options* options, const floating* z, Py_ssize_t n_classes, const int64_t* ids, Py_ssize_t n, Scratch* rows
) noexcept nogil:
    cdef Py_ssize_t r, n_far = 0
    cdef Options staged = no_options()
    for r in range(n):
        rows.linear[r] = options.share * lane_sum(rows.below, r)
    for r in range(n):
        rows.linear[r] = 0.0 if ids[r] < 0 else rows.linear[r]
        n_far += 0 if fabs(rows.linear[r]) < INFINITY else 1
    if n_far:
        staged.share = options.share
        for r in range(n):
            if not fabs(rows.linear[r]) < INFINITY:
                rows.linear[r] = far_below(&staged, z + r * n_classes, n_classes, ids[r])


# How many of n rows end before the block, when each is taken in whole vectors.
cdef inline Py_ssize_t rows_before_end(Py_ssize_t n_classes, Py_ssize_t n) noexcept nogil:
    return larger(0, n - (padded(n_classes) + n_classes - 1) // n_classes)


# The gradients of a block of small rows. A row is written in whole vectors that run over into the next row, which is
# written after it; the last rows, where that would leave the block, and rows apart are written exactly. Streamed blocks
# are finished in a buffer, where nothing lies behind them, so that each line leaves once.
cdef inline void write_small_rows(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n, const floating* terms
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes, out_stride = batch.out_stride
    cdef int64_t* ids = batch.ids + first
    cdef floating* out = <floating*>(batch.out + first * out_stride)
    cdef Py_ssize_t r, n_special = 0, n_padded = padded(n_classes)
    cdef Py_ssize_t n_over = rows_before_end(n_classes, n)
    cdef floating[BLOCK_ROWS] factor
    cdef floating[BLOCK_ROWS] pull
    cdef floating[BLOCK_ROWS] shift
    cdef double both, share = batch.options.share
    cdef bint apart = out_stride != n_classes * <Py_ssize_t>sizeof(floating)
    cdef bint streamed = batch.stream and not apart
    cdef floating* place = <floating*>rows.gathered if streamed else out
    cdef floating* row = place
    for r in range(n):
        both = rows.scale[r] * (1.0 + rows.steep[r]) * rows.inverse[r]
        factor[r] = <floating>both
        n_special += leaves_dtype(out, both, rows.scale[r])
        shift[r] = <floating>shift_of(rows, r, share)
        pull[r] = <floating>pull_of(batch, rows, r, rows.miss[r])
    if share != 0.0:
        for r in range(n):
            n_special += leaves_dtype(out, rows.scale[r] * share, rows.scale[r])
    if streamed:
        n_over = n
    if n_special or apart:
        n_over = 0
    for r in range(n_over):
        shift_vectors(row, terms, n_padded, factor[r], shift[r])
        row[ids[r] if ids[r] > 0 else 0] = pull[r]     # 0.0 for an ignored row, at element 0
        terms += n_classes
        row += n_classes
    for r in range(n_over, n):
        row = <floating*>(<char*>place + r * out_stride)
        if ids[r] < 0:
            memset(row, 0, n_classes * sizeof(floating))
        else:
            scale_terms(row, terms, n_classes, rows, r, share)
            row[ids[r]] = pull[r]
        terms += n_classes
    if batch.options.transform.mask != NULL:
        for r in range(n):
            row = <floating*>(<char*>place + r * out_stride)
            if ids[r] >= 0:
                hide_classes(mask_of(batch, first + r), row, n_classes, rows, r, ids[r])
    if streamed:
        stream_piece(out, place, n * n_classes)


cdef inline void shift_vectors(
    floating* out, const floating* terms, Py_ssize_t n, floating factor, floating shift
) noexcept nogil:
    if floating is float:
        shift_float(out, terms, n, factor, shift)
    else:
        shift_double(out, terms, n, factor, shift)


cdef inline void curve_vectors(
    floating* out, const floating* terms, Py_ssize_t n, floating inverse, floating total, floating rest,
    floating curved, floating squared,
) noexcept nogil:
    if floating is float:
        curve_float(out, terms, n, inverse, total, rest, curved, squared)
    else:
        curve_double(out, terms, n, inverse, total, rest, curved, squared)


# Their Hessians, in the same way: p (curved (1 - p) + squared p), where 1 - p is (S - e)/S with S in two numbers of the
# dtype: the difference from the first is exact where it could cancel.
cdef inline void curve_small_rows(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n, floating* terms
) noexcept nogil:
    cdef Py_ssize_t n_classes = batch.n_classes, n_padded = padded(n_classes)
    cdef Py_ssize_t n_over = rows_before_end(n_classes, n)
    cdef int64_t* ids = batch.ids + first
    cdef floating[BLOCK_ROWS] at_target
    cdef floating[BLOCK_ROWS] inverse
    cdef floating[BLOCK_ROWS] total
    cdef floating[BLOCK_ROWS] rest
    cdef floating[BLOCK_ROWS] curved
    cdef floating[BLOCK_ROWS] squared
    cdef floating[SMALL_CLASSES] last
    cdef floating* hess = <floating*>(batch.hess + first * batch.hess_stride)
    cdef const floating* row_terms = terms
    cdef double whole
    cdef Py_ssize_t r, n_special = 0
    cdef Curve curve
    for r in range(n):
        curve = curve_of(batch, rows, r)
        whole = rows.others[r] + rows.at_target[r]
        at_target[r] = <floating>curve_at_target(&curve, rows, r, rows.miss[r])
        inverse[r] = <floating>curve.inverse
        total[r] = <floating>whole
        rest[r] = <floating>(whole - total[r])
        curved[r] = <floating>curve.curved
        squared[r] = <floating>curve.squared
    for r in range(n):      # 1/S is a normal number in every small row
        curve = curve_of(batch, rows, r)
        n_special += leaves_dtype(terms, curve.curved, curve.curved)
    if batch.options.z_loss != 0.0:
        for r in range(n):
            curve = curve_of(batch, rows, r)
            n_special += leaves_dtype(terms, curve.squared, curve.squared)
    if n_special or batch.hess_stride != n_classes * <Py_ssize_t>sizeof(floating):
        n_over = 0
    for r in range(n_over):
        curve_vectors(hess, row_terms, n_padded, inverse[r], total[r], rest[r], curved[r], squared[r])
        hess[ids[r] if ids[r] > 0 else 0] = at_target[r]       # 0.0 for an ignored row, as all of it
        row_terms += n_classes
        hess += n_classes
    for r in range(n_over, n):
        hess = <floating*>(batch.hess + (first + r) * batch.hess_stride)
        if ids[r] < 0:
            memset(hess, 0, n_classes * sizeof(floating))
        else:
            curve = curve_of(batch, rows, r)
            if not (is_normal(hess, curve.curved, 1.0) and is_normal(hess, curve.squared, 1.0)):
                curve_exactly(hess, row_terms, n_classes, &curve)
            else:
                curve_vectors(last, row_terms, n_padded, inverse[r], total[r], rest[r], curved[r], squared[r])
                memcpy(hess, last, n_classes * sizeof(floating))
            hess[ids[r]] = at_target[r]
        row_terms += n_classes
    if batch.options.transform.mask != NULL:
        for r in range(n):
            if ids[r] >= 0:
                hide(mask_of(batch, first + r), <floating*>(batch.hess + (first + r) * batch.hess_stride), n_classes)
    curve_small_leaders(batch, rows, first, n, terms)


# The probability from which on 1 - p of a class other than the target is summed without it: float32 has all of it
# from S unless 21 bits cancel (S is off by 2^-49).
cdef inline double leading(const floating* like) noexcept nogil:
    if floating is float:
        return 1.0 - 2.0**-21
    else:
        return 0.75


# What curve_leader does for longer rows, from the terms. First a list of the rows that may have a leader: the branch
# would be foretold wrongly.
cdef inline void curve_small_leaders(
    const Batch* batch, const Scratch* rows, Py_ssize_t first, Py_ssize_t n, floating* terms
) noexcept nogil:
    cdef uint8_t[BLOCK_ROWS] may_lead
    cdef Py_ssize_t r, i, n_leading = 0
    cdef Curve curve
    for r in range(n):
        n_leading += 1 if rows.largest_part[r] * rows.inverse[r] > leading(terms) else 0
    if n_leading == 0:
        return
    n_leading = 0
    for r in range(n):
        may_lead[n_leading] = <uint8_t>r
        n_leading += 1 if rows.largest_part[r] * rows.inverse[r] > leading(terms) else 0
    for i in range(n_leading):
        r = may_lead[i]
        curve = curve_of(batch, rows, r)
        curve_small_leader(
            <floating*>(batch.hess + (first + r) * batch.hess_stride), terms + r * batch.n_classes, batch.n_classes,
            batch.ids[first + r], rows, r, &curve,
        )


# 1 - p of the leader is what the others have, summed without it.
cdef inline void curve_small_leader(
    floating* hess, floating* terms, Py_ssize_t n_classes, Py_ssize_t t, const Scratch* rows, Py_ssize_t r,
    const Curve* curve,
) noexcept nogil:
    cdef double[SMALL_LANES] lanes
    cdef double p, rest, total = rows.others[r] + rows.at_target[r]
    cdef Py_ssize_t leader = above(terms, n_classes, t, <floating>(leading(terms) * total))
    if leader == n_classes:
        return
    terms[t] = 0        # it is e_t, or 0 where the row was taken by itself
    sum_lanes(terms, n_classes, leader, lanes)
    rest = lane_sum(lanes, 0) + rows.at_target[r]
    p = terms[leader] * curve.inverse
    hess[leader] = <floating>(p * (curve.curved * (rest * curve.inverse) + curve.squared * p))


cdef inline Py_ssize_t above(const floating* row, Py_ssize_t n, Py_ssize_t t, floating least) noexcept nogil:
    if floating is float:
        return above_float(row, n, t, least)
    else:
        return above_double(row, n, t, least)


cdef inline double small_shift(const floating* like) noexcept nogil:
    if floating is float:
        return -50.0
    else:
        return -500.0


cdef inline double small_sum_low(const floating* like) noexcept nogil:
    if floating is float:
        return 1073741824.0      # 2^30: what was flushed is below 2^-127 * 96 / 2^30 of the row's sum
    else:
        return 4.0e138           # 2^460
