"""Cross-entropy of entries, of logits with the gradient or of probabilities: arithmetic, entry points, division.

Compiled once per CPU target (setup.py), float32 and float64 from one text. The kernels know pointers, lengths and
numbers and trust them; whether targets are in [0, 1] is looked up on the way.

An entry has a logit x, the coefficient a = pos_weight * y' of softplus(-x) and b = 1 - y' of softplus(x). With
E = e^-|x| no sum below cancels, but for the two terms of the gradient of a target between 0 and 1:

    loss = (a + b) log1p(E) + h |x|,   h = b if x > 0 else a      as softplus(|x|) = |x| + log1p(E)
    grad = (b - a E) / (1 + E)   if x > 0                         as sigmoid(|x|) = 1 / (1 + E)
         = (b E - a) / (1 + E)   otherwise

Rounding in units of u = 2^-24 (2^-53). Loss: E 1.2, log1p 1.4, a + b 2, its product with E 1, the sum 1; together
6.6 u = 4.0e-7. Gradient: E 1.2, a and b 1, the numerator 1 (2 without fused multiply-add), 1 + E 1, the quotient 1, the
scale and its product 2; together 7.2 u = 4.3e-7. The largest seen among millions: 4.6 and 4.3 u (float64: 7.1 and 5.6).
Weights of entries multiply in float64. Where a pos_weight or the scale is so extreme that float32 might leave its
range, all of it is computed in float64.

Entries of probabilities p have the loss -(y log p + (1 - y) log1p(-p)), all of it in float64: two logarithms within 6
units of 2^-53 (vexp.pxd), of which a target 0 or 1 needs one; together 10, the largest seen 4.8. Whether entries are in
order is looked up on the way too.

Losses are summed in float64, each block in fixed lanes, then the blocks in pairs: neither the number of threads nor the
layout changes a bit.
"""

from cython.parallel cimport prange, threadid
from libc.float cimport DBL_MAX
from libc.math cimport INFINITY, copysign, copysignf, fabs
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

cimport numpy as cnp

from fastce._kernels.cpu cimport team_for
from fastce._kernels.lanes cimport Rounding, larger, next_line, round_as_before, round_to_nearest, smaller
from fastce._kernels.plain cimport (
    SLAB_ELEMENTS,
    are_apart,
    is_denominator,
    is_gradient,
    is_native,
    threads_of,
)
from fastce._kernels.vexp cimport (
    ExpWindow,
    atanh_series,
    bits_of_float,
    double_of_bits,
    exp_shifted,
    exp_window,
    floating,
    multiply_add_double,
    multiply_add_float,
    run_time_value,
    take_logs,
)

cnp.import_array()

cdef enum:
    BLOCK = 512             # entries that are summed by themselves; a block's arrays fit the L1 cache
    ROOM = BLOCK + 88       # of a block's arrays: at a multiple of 4 KB a store holds up the loads of another array
    PIECE = 128             # of a block, where it need not be whole; its arrays lie on the stack
    LANES = 16              # of a block's sum: one 512-bit vector of float32
    TASK_BLOCKS = 32        # the least that a thread takes at a time
    TASKS_PER_THREAD = 8    # so that a thread that starts late or is slow is not waited for
    GIL_ENTRIES = 4096      # batches below keep the GIL: handing it over and back costs more than 1 us of work

# The dtype of logits, losses and gradients, where it is not the one that computes.
ctypedef fused stored:
    float
    double

ctypedef fused signed_integer:
    int8_t
    int16_t
    int32_t
    int64_t


# One number per entry, or one for all.
cdef struct Numbers:
    char* data              # NULL: it is `constant`
    int kind                # NumPy's number of the dtype
    double constant


# One thread's room to work in, a number of each kind for each entry of a block, in the dtype that computes or in
# float64. Not on the stack of OpenMP's threads, which have no more of it than OMP_STACKSIZE says, 16 KB perhaps. Arrays
# in one struct, so that the compiler knows them apart.
cdef struct Room:
    double[ROOM] logits
    double[ROOM] positive
    double[ROOM] negative
    double[ROOM] e
    double[ROOM] loss
    double[ROOM] slopes
    double[ROOM] targets
    double[ROOM] weight
    double[ROOM] factor
    double[ROOM] weighted
    double[8] slack         # so that all of it may begin at a line of the cache


# One call's entries. `losses` and `out` are NULL where they are not wanted.
cdef struct Batch:
    Py_ssize_t n
    char* logits
    Numbers targets
    Numbers pos_weight
    Numbers sample_weight
    Numbers grad_output
    double smoothing
    double scale            # of the gradient
    char* losses
    double* sums            # of the losses of each block
    char* out
    double* weights         # the sums of the sample weights of each block, of probabilities alone
    bint plain              # the targets alone are the coefficients
    bint weighted           # entries differ in sample_weight or grad_output
    Room* rooms             # one for each thread, if there are several


# ---- an entry ------------------------------------------------------------------------------------------------------

# both * log1p(e) + rest for 0 <= e <= 1, e given as e * up, up = 1/down a power of two; nan stays nan.
# float32: log1p(e) = e * P(e), the error of P alone is 2^-27.3 (tools/coefficients.py).
# float64: 1 + e = 2^k (1 + f) with k = 0 or 1, -0.3 < f < 0.42, log(1 + f) = 2 atanh(s), s = f / (2 + f), with the
# series of vexp.pxd.
cdef inline floating add_log1p(
    floating both, floating e_up, floating up, floating down, floating rest
) noexcept nogil:
    cdef floating e = e_up * down
    cdef floating p, f, s, z, exponent
    if floating is float:
        p = multiply_add_float(<float>-0.0032268476206809282, e, <float>0.01978927105665207)
        p = multiply_add_float(p, e, <float>-0.056879717856645584)
        p = multiply_add_float(p, e, <float>0.10600581020116806)
        p = multiply_add_float(p, e, <float>-0.15307912230491638)
        p = multiply_add_float(p, e, <float>0.1967887133359909)
        p = multiply_add_float(p, e, <float>-0.24955375492572784)
        p = multiply_add_float(p, e, <float>0.3333020508289337)
        p = multiply_add_float(p, e, <float>-0.4999992251396179)
        p = multiply_add_float(p, e, <float>1.0)
        return multiply_add_float(both * down * e_up, p, rest)
    else:
        f = 0.5 * e - 0.5 if e > 0.41421356237309503 else e
        exponent = 0.6931471805599453 if e > 0.41421356237309503 else 0.0
        s = (0.5 * e_up - 0.5 * up if e > 0.41421356237309503 else e_up) / (2.0 + f)
        z = (s * down) * (s * down)
        return multiply_add_double(both * down * s, atanh_series(z), both * exponent + rest)


cdef inline floating multiply_add(floating a, floating b, floating c) noexcept nogil:
    if floating is float:
        return multiply_add_float(a, b, c)
    else:
        return multiply_add_double(a, b, c)


# -|x|
cdef inline floating below_zero(floating x) noexcept nogil:
    if floating is float:
        return copysignf(x, -1.0)
    else:
        return copysign(x, -1.0)


# ---- a block of entries --------------------------------------------------------------------------------------------
# One loop for the exponentials and one for the rest: in one, an entry is a chain of 90 cycles, of which the processor
# does not look far enough ahead to overlap as many as it could (0.67 instead of 0.50 ns an entry).

# e[i] = e^-|x[i]| * 2^-shift. The window's low clamp takes care of any size, infinity included; there is nothing to
# clamp above.
cdef inline void set_exponentials(const floating* x, Py_ssize_t n, floating* e, double shift) noexcept nogil:
    cdef ExpWindow window = exp_window(x, run_time_value(shift), 0.0)
    cdef floating low = <floating>window.low, magic = <floating>window.magic
    cdef Py_ssize_t i
    for i in range(n):
        e[i] = exp_shifted(below_zero(x[i]), <floating>0.0, low, <floating>INFINITY, magic)


# The same without a shift, and whether all y are in [0, 1], which costs nothing beside the arithmetic: as integers,
# the bits of all other numbers are above those of 1 (-0.0 is made 0.0).
cdef inline bint set_exponentials_and_look(
    const floating* x, const floating* y, Py_ssize_t n, floating* e
) noexcept nogil:
    cdef ExpWindow window = exp_window(x, run_time_value(0.0), 0.0)
    cdef floating low = <floating>window.low, magic = <floating>window.magic
    cdef uint32_t bits, largest = 0
    cdef int64_t outside = 0
    cdef Py_ssize_t i
    for i in range(n):
        e[i] = exp_shifted(below_zero(x[i]), <floating>0.0, low, <floating>INFINITY, magic)
        if floating is float:
            bits = bits_of_float(y[i] + <float>0.0)
            largest = bits if bits > largest else largest
        else:
            outside += 0 if y[i] >= 0 and y[i] <= 1 else 1
    return largest <= 0x3f800000 and not outside


# near * x is h |x|. Where it is 0 * infinity it is 0: an infinite logit on its target's side costs nothing. A nan comes
# in through e.
cdef inline floating product_of(floating near, floating x) noexcept nogil:
    return near * (x if near != 0 else <floating>0.0)


# Plain targets: b = 1 - a. `slope` is NULL where no gradient is wanted.
cdef inline void take_plain(
    const floating* x, const floating* a, const floating* e, Py_ssize_t n, floating scale, floating* loss,
    floating* slope,
) noexcept nogil:
    cdef floating one = <floating>1.0
    cdef floating b, near, far
    cdef Py_ssize_t i
    if slope == NULL:
        for i in range(n):
            near = one - a[i] if x[i] > 0 else -a[i]
            loss[i] = add_log1p(one, e[i], one, one, product_of(near, x[i]))
        return
    for i in range(n):
        b = one - a[i]
        near = b if x[i] > 0 else -a[i]
        far = -a[i] if x[i] > 0 else b
        loss[i] = add_log1p(one, e[i], one, one, product_of(near, x[i]))
        slope[i] = multiply_add(far, e[i], near) / (one + e[i]) * scale


# Any coefficients. The exponentials come times 2^32, so that a product with a large coefficient keeps its digits where
# they alone would be below the dtype's normal numbers.
cdef inline void take_general(
    const floating* x, const floating* a, const floating* b, const floating* e, Py_ssize_t n, floating scale,
    floating* loss, floating* slope,
) noexcept nogil:
    cdef floating up = <floating>4294967296.0, down = <floating>2.3283064365386963e-10, one = <floating>1.0
    cdef floating near, far
    cdef Py_ssize_t i
    if slope == NULL:
        for i in range(n):
            near = b[i] if x[i] > 0 else -a[i]
            loss[i] = add_log1p(a[i] + b[i], e[i], up, down, product_of(near, x[i]))
        return
    for i in range(n):
        near = b[i] if x[i] > 0 else -a[i]
        far = -a[i] if x[i] > 0 else b[i]
        loss[i] = add_log1p(a[i] + b[i], e[i], up, down, product_of(near, x[i]))
        slope[i] = multiply_add(far * down, e[i], near) / (one + e[i] * down) * scale


# The sum of a block, in an order that depends on its length alone: four by four in the dtype, then in float64.
cdef inline double sum_of(const floating* x, Py_ssize_t n) noexcept nogil:
    cdef double[LANES] lanes
    cdef floating[4 * LANES] rest
    cdef double total
    cdef Py_ssize_t i, lane
    for lane in range(LANES):
        lanes[lane] = 0.0
    for i in range(n // (4 * LANES)):
        add_quarters(x + i * 4 * LANES, lanes)
    if n % (4 * LANES):
        for lane in range(4 * LANES):
            rest[lane] = <floating>0.0
        memcpy(rest, x + (n - n % (4 * LANES)), n % (4 * LANES) * sizeof(floating))
        add_quarters(rest, lanes)
    for lane in range(8):
        lanes[lane] += lanes[lane + 8]
    total = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]))
    if floating is float:
        if not fabs(total) < INFINITY:
            total = 0.0
            for i in range(n):
                total += x[i]
    return total


cdef inline void add_quarters(const floating* x, double* lanes) noexcept nogil:
    cdef Py_ssize_t lane
    for lane in range(LANES):
        lanes[lane] += (x[lane] + x[lane + LANES]) + (x[lane + 2 * LANES] + x[lane + 3 * LANES])


cdef double pairwise_sum(const double* x, Py_ssize_t n) noexcept nogil:
    cdef double total = 0.0
    cdef Py_ssize_t i
    if n > 16:
        return pairwise_sum(x, n // 2) + pairwise_sum(x + n // 2, n - n // 2)
    for i in range(n):
        total += x[i]
    return total


cdef inline Py_ssize_t count_outside(const floating* x, Py_ssize_t n, floating low, floating high) noexcept nogil:
    cdef int32_t count = 0
    cdef Py_ssize_t i
    for i in range(n):
        count += 0 if x[i] >= low and x[i] <= high else 1
    return count


# Integers become floating without an instruction that AVX2 lacks: 1.5 * 2^52 + t, by its bits, minus 1.5 * 2^52. Beyond
# 2^51 that is another number, but never 0 or 1.
cdef inline void load_integers(const signed_integer* t, Py_ssize_t n, floating* into) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        if signed_integer is int64_t:
            into[i] = <floating>(double_of_bits(<uint64_t>t[i] + <uint64_t>0x4338000000000000) - 6755399441055744.0)
        else:
            into[i] = <floating>t[i]


cdef inline void load(const Numbers* numbers, Py_ssize_t first, Py_ssize_t n, floating* into) noexcept nogil:
    cdef Py_ssize_t i
    if numbers.data == NULL:
        for i in range(n):
            into[i] = <floating>numbers.constant
    elif numbers.kind == cnp.NPY_FLOAT64:
        for i in range(n):
            into[i] = <floating>(<double*>numbers.data)[first + i]
    elif numbers.kind == cnp.NPY_FLOAT32:
        for i in range(n):
            into[i] = <floating>(<float*>numbers.data)[first + i]
    elif numbers.kind == cnp.NPY_INT64:
        load_integers(<const int64_t*>numbers.data + first, n, into)
    elif numbers.kind == cnp.NPY_INT32:
        load_integers(<const int32_t*>numbers.data + first, n, into)
    elif numbers.kind == cnp.NPY_INT16:
        load_integers(<const int16_t*>numbers.data + first, n, into)
    else:
        load_integers(<const int8_t*>numbers.data + first, n, into)


cdef inline int kind_of(const floating* like) noexcept nogil:
    if floating is float:
        return cnp.NPY_FLOAT32
    else:
        return cnp.NPY_FLOAT64


# Entries [first, first + n), n <= BLOCK; returns whether all targets are in [0, 1].
cdef bint take_block(
    const Batch* batch, Room* room, Py_ssize_t first, Py_ssize_t n, const floating* like, const stored* like_stored
) noexcept nogil:
    cdef floating* logits = <floating*>room.logits
    cdef floating* positive = <floating*>room.positive
    cdef floating* negative = <floating*>room.negative
    cdef floating* e = <floating*>room.e
    cdef floating* loss = <floating*>room.loss
    cdef const floating* x = <const floating*>batch.logits + first
    cdef const floating* a = positive
    cdef floating* slope = <floating*>room.slopes
    cdef floating scale = <floating>(1.0 if batch.weighted else batch.scale)
    cdef stored* losses = <stored*>batch.losses + first
    cdef stored* out = <stored*>batch.out + first
    cdef Py_ssize_t i
    cdef bint inside
    # In vectors, what is written must lie apart from what is read.
    if sizeof(floating) != sizeof(stored) or batch.out == batch.logits:
        x = logits
        for i in range(n):
            logits[i] = <floating>(<const stored*>batch.logits)[first + i]
    if batch.out == NULL:
        slope = NULL
    elif sizeof(floating) == sizeof(stored) and not batch.weighted:
        slope = <floating*>out
    if batch.plain:
        if batch.targets.data != NULL and batch.targets.kind == kind_of(like):
            a = <const floating*>batch.targets.data + first
        else:
            load(&batch.targets, first, n, positive)
        inside = set_exponentials_and_look(x, a, n, e)
        take_plain(x, a, e, n, scale, loss, slope)
    else:
        inside = set_coefficients(batch, room, first, n, positive, negative)
        set_exponentials(x, n, e, -32.0)
        take_general(x, positive, negative, e, n, scale, loss, slope)

    if batch.weighted:
        finish_weighted(batch, room, first, n, loss, slope, losses, out)
        return inside
    batch.sums[first // BLOCK] = sum_of(loss, n)
    if batch.losses != NULL:
        for i in range(n):
            losses[i] = <stored>loss[i]
    if batch.out != NULL and sizeof(floating) != sizeof(stored):
        for i in range(n):
            out[i] = <stored>slope[i]
    return inside


# a = pos_weight * y' and b = 1 - y', y' = (1-e) y + e/2, each rounded once. Returns whether all y are in [0, 1].
cdef inline bint set_coefficients(
    const Batch* batch, Room* room, Py_ssize_t first, Py_ssize_t n, floating* positive, floating* negative
) noexcept nogil:
    cdef double* y = room.targets
    if batch.targets.data != NULL and batch.targets.kind == cnp.NPY_FLOAT32:
        return set_coefficients_of(<const float*>batch.targets.data + first, batch, room, first, n, positive, negative)
    load(&batch.targets, first, n, y)
    return set_coefficients_of(<const double*>y, batch, room, first, n, positive, negative)


cdef inline bint set_coefficients_of(
    const stored* y, const Batch* batch, Room* room, Py_ssize_t first, Py_ssize_t n, floating* positive,
    floating* negative,
) noexcept nogil:
    cdef double* weight = room.weight
    cdef double kept = 1.0 - batch.smoothing, half = 0.5 * batch.smoothing, every = batch.pos_weight.constant
    cdef Py_ssize_t i
    if batch.pos_weight.data == NULL:
        for i in range(n):
            positive[i] = <floating>(every * multiply_add_double(kept, y[i], half))
            negative[i] = <floating>multiply_add_double(kept, 1.0 - y[i], half)
    else:
        load(&batch.pos_weight, first, n, weight)
        for i in range(n):
            positive[i] = <floating>(weight[i] * multiply_add_double(kept, y[i], half))
            negative[i] = <floating>multiply_add_double(kept, 1.0 - y[i], half)
    return count_outside(y, n, <stored>0.0, <stored>1.0) == 0


# Entries of sample_weight 0 are left out, whatever they hold: their 0 is chosen, not multiplied.
cdef inline void finish_weighted(
    const Batch* batch, Room* room, Py_ssize_t first, Py_ssize_t n, const floating* loss, const floating* slope,
    stored* losses, stored* out,
) noexcept nogil:
    cdef double* weight = room.weight
    cdef double* factor = room.factor
    cdef double* weighted = room.weighted
    cdef double every = batch.grad_output.constant * batch.scale
    cdef Py_ssize_t i
    load(&batch.sample_weight, first, n, weight)
    for i in range(n):
        weighted[i] = 0.0 if weight[i] == 0 else loss[i] * weight[i]
    if batch.sample_weight.data == NULL and batch.sample_weight.constant == 1.0:
        batch.sums[first // BLOCK] = sum_of(loss, n)    # as without grad_output, to the bit
    else:
        batch.sums[first // BLOCK] = sum_of(weighted, n)
    if batch.losses != NULL:
        for i in range(n):
            losses[i] = <stored>weighted[i]
    if batch.out == NULL:
        return
    if batch.grad_output.data == NULL:
        for i in range(n):
            out[i] = <stored>(0.0 if weight[i] == 0 else slope[i] * (weight[i] * every))
    else:
        load(&batch.grad_output, first, n, factor)
        for i in range(n):
            out[i] = <stored>(0.0 if weight[i] == 0 else slope[i] * (weight[i] * (factor[i] * every)))


# ---- a block of probabilities --------------------------------------------------------------------------------------

# The numbers whose logarithms are taken: x = p where the target is 1, else x + rest = 1 - p. From 1/2 on that is exact.
# Below 1 - sqrt(1/2) x is its own mantissa, and x - 1 + rest is -p: the logarithm is that of 1 - p as it is. In between
# the rest counts for nothing: it is 2^-54 at most, the logarithm beyond 0.34.
cdef inline void choose_sides(
    const double* p, const double* y, Py_ssize_t n, double* x, double* rest
) noexcept nogil:
    cdef double below
    cdef Py_ssize_t i
    for i in range(n):
        below = 1.0 - p[i]
        x[i] = p[i] if y[i] == 1 else below
        rest[i] = 0.0 if y[i] == 1 else (1.0 - below) - p[i]


# Entries [first, first + n), n <= BLOCK; returns whether those whose sample weight is not 0 are in order.
cdef bint take_block_of_probabilities(
    const Batch* batch, Room* room, Py_ssize_t first, Py_ssize_t n, const stored* like
) noexcept nogil:
    cdef double* p = room.logits
    cdef double* y = room.targets
    cdef double* weight = room.weight
    cdef double* loss = room.loss
    cdef double* x = room.positive
    cdef double* rest = room.negative
    cdef double* ratios = room.slopes
    cdef const stored* probs = <const stored*>batch.logits + first
    cdef stored* losses = <stored*>batch.losses + first
    cdef int64_t soft = 0
    cdef Py_ssize_t i
    load(&batch.targets, first, n, y)
    for i in range(n):
        p[i] = probs[i]
    if batch.weighted:
        load(&batch.sample_weight, first, n, weight)
        for i in range(n):
            p[i] = p[i] if weight[i] != 0 else 1.0
            y[i] = y[i] if weight[i] != 0 else 1.0
        if count_outside(<const double*>weight, n, -DBL_MAX, DBL_MAX):
            return False
    if count_outside(<const double*>p, n, 0.0, 1.0) or count_outside(<const double*>y, n, 0.0, 1.0):
        return False
    for i in range(n):
        soft += 1 if y[i] * (1.0 - y[i]) != 0 else 0
    choose_sides(p, y, n, x, rest)
    take_logs(<const double*>x, rest, NULL, n, ratios, loss)
    if soft:
        for i in range(n):
            loss[i] = (1.0 - y[i]) * loss[i] if y[i] != 1 else loss[i]
            x[i] = p[i] if y[i] != 0 and y[i] != 1 else 1.0
        take_logs(<const double*>x, NULL, NULL, n, ratios, rest)
        for i in range(n):
            loss[i] = y[i] * rest[i] + loss[i]
    # A negation would make -0 of 0.
    if batch.weighted:
        for i in range(n):
            loss[i] = 0.0 - loss[i] * weight[i] if weight[i] != 0 else 0.0
        batch.weights[first // BLOCK] = sum_of(<const double*>weight, n)
    else:
        for i in range(n):
            loss[i] = 0.0 - loss[i]
    batch.sums[first // BLOCK] = sum_of(<const double*>loss, n)
    if batch.losses != NULL:
        for i in range(n):
            losses[i] = <stored>loss[i]
    return True


# ---- a batch -------------------------------------------------------------------------------------------------------

cdef inline Py_ssize_t blocks_of(Py_ssize_t n) noexcept nogil:
    return (n + BLOCK - 1) // BLOCK


# How many entries a task has: whole blocks, small enough to share the work evenly, large enough to hide that sharing
# costs a microsecond or two.
cdef inline Py_ssize_t task_entries(Py_ssize_t n, int num_threads) noexcept nogil:
    return larger(TASK_BLOCKS, blocks_of(n) // (TASKS_PER_THREAD * num_threads)) * BLOCK


# How many of so many threads have work; one thread never enters OpenMP.
cdef int useful_threads(Py_ssize_t n, int num_threads) noexcept nogil:
    if num_threads == 1:
        return 1
    return <int>smaller(num_threads, (n + task_entries(n, num_threads) - 1) // task_entries(n, num_threads))


# The bytes of a room for each of several threads, and where they begin: at a line of the cache.
cdef Py_ssize_t rooms_bytes(Py_ssize_t n, int num_threads) noexcept nogil:
    cdef int team = useful_threads(n, num_threads)
    return team * sizeof(Room) + 64 if team > 1 else 0


cdef Room* rooms_in(char* memory) noexcept nogil:
    return <Room*>next_line(memory)


# The whole batch; returns how many blocks have targets outside [0, 1].
cdef Py_ssize_t take_batch(
    const Batch* batch, int num_threads, const floating* like, const stored* like_stored
) noexcept nogil:
    cdef Py_ssize_t size = task_entries(batch.n, num_threads)
    cdef Py_ssize_t task, outside = 0
    num_threads = team_for(useful_threads(batch.n, num_threads))
    if num_threads == 1:
        return take_entries_alone(batch, like, like_stored)
    for task in prange((batch.n + size - 1) // size, num_threads=num_threads, schedule="dynamic", chunksize=1):
        outside += take_entries(
            batch, batch.rooms + threadid(), task * size, smaller(size, batch.n - task * size), like, like_stored
        )
    return outside


# All entries on the calling thread, whose stack is that of a program: a small call is over before malloc would be.
cdef Py_ssize_t take_entries_alone(
    const Batch* batch, const floating* like, const stored* like_stored
) noexcept nogil:
    cdef Room room
    return take_entries(batch, rooms_in(<char*>&room), 0, batch.n, like, like_stored)


cdef Py_ssize_t take_entries(
    const Batch* batch, Room* room, Py_ssize_t first, Py_ssize_t n, const floating* like, const stored* like_stored
) noexcept nogil:
    cdef Py_ssize_t i, outside = 0
    cdef Rounding rounding
    round_to_nearest(&rounding)
    for i in range(blocks_of(n)):
        outside += not take_block(batch, room, first + i * BLOCK, smaller(BLOCK, n - i * BLOCK), like, like_stored)
    round_as_before(&rounding)
    return outside


# The whole batch of probabilities; returns how many blocks are not in order.
cdef Py_ssize_t take_probabilities(const Batch* batch, int num_threads, const stored* like) noexcept nogil:
    cdef Py_ssize_t size = task_entries(batch.n, num_threads)
    cdef Py_ssize_t task, bad = 0
    num_threads = team_for(useful_threads(batch.n, num_threads))
    if num_threads == 1:
        return take_probabilities_alone(batch, like)
    for task in prange((batch.n + size - 1) // size, num_threads=num_threads, schedule="dynamic", chunksize=1):
        bad += take_part_of_probabilities(
            batch, batch.rooms + threadid(), task * size, smaller(size, batch.n - task * size), like
        )
    return bad


cdef Py_ssize_t take_probabilities_alone(const Batch* batch, const stored* like) noexcept nogil:
    cdef Room room
    return take_part_of_probabilities(batch, rooms_in(<char*>&room), 0, batch.n, like)


cdef Py_ssize_t take_part_of_probabilities(
    const Batch* batch, Room* room, Py_ssize_t first, Py_ssize_t n, const stored* like
) noexcept nogil:
    cdef Py_ssize_t i, bad = 0
    cdef Rounding rounding
    round_to_nearest(&rounding)
    for i in range(blocks_of(n)):
        bad += not take_block_of_probabilities(batch, room, first + i * BLOCK, smaller(BLOCK, n - i * BLOCK), like)
    round_as_before(&rounding)
    return bad


# In float64 where float32 might leave its range.
cdef Py_ssize_t take_any_batch(Batch* batch, int num_threads, bint single, bint wide) noexcept nogil:
    if not single:
        return take_batch(batch, num_threads, <const double*>NULL, <const double*>NULL)
    if wide:
        return take_batch(batch, num_threads, <const double*>NULL, <const float*>NULL)
    return take_batch(batch, num_threads, <const float*>NULL, <const float*>NULL)


# Whether float32 is too narrow for gradients times `scale`.
cdef inline bint is_extreme(double scale) noexcept nogil:
    return scale != 0 and not 2.168404344971009e-19 <= fabs(scale) <= 1.8446744073709552e19


# ---- entry points --------------------------------------------------------------------------------------------------

def binary_entries(
    cnp.ndarray logits, targets, pos_weight, sample_weight, grad_output, double smoothing, double scale,
    double loss_scale, bint wide, cnp.ndarray losses, cnp.ndarray sums, cnp.ndarray out, int num_threads,
):
    """Fill `sums` (a float64 for each 512 entries) and, unless None, `losses` and `out` with scale * d(loss)/d(logit).

    Returns whether all targets are in [0, 1].

    Arrays are flat, contiguous, aligned and native. `logits`, `losses` and `out` (which may be `logits`) have one
    floating dtype; the others are a number for all entries or an array: `targets` of any integer dtype, bool, float32
    or float64, the weights float32 or float64. `wide` has float32 entries computed in float64, so has a `loss_scale`
    of extreme size, which is `scale` without what the gradient alone is multiplied by: the losses know nothing of that.
    """
    cdef Batch batch
    cdef bint single = cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32
    cdef char* memory
    cdef Py_ssize_t n_bytes, outside
    batch.n = cnp.PyArray_SIZE(logits)
    batch.logits = <char*>cnp.PyArray_DATA(logits)
    batch.targets = numbers_of(targets)
    batch.pos_weight = numbers_of(pos_weight)
    batch.sample_weight = numbers_of(sample_weight)
    batch.grad_output = numbers_of(grad_output)
    batch.smoothing = smoothing
    batch.scale = scale
    batch.losses = NULL if losses is None else <char*>cnp.PyArray_DATA(losses)
    batch.sums = <double*>cnp.PyArray_DATA(sums)
    batch.out = NULL if out is None else <char*>cnp.PyArray_DATA(out)
    batch.plain = pos_weight is None and smoothing == 0 and is_exact(batch.targets.kind, single)
    batch.weighted = sample_weight is not None or grad_output is not None
    n_bytes = rooms_bytes(batch.n, num_threads)
    memory = <char*>malloc(n_bytes)
    if memory == NULL and n_bytes:
        raise MemoryError("fastce could not allocate its working memory")
    batch.rooms = rooms_in(memory)
    wide = wide or is_extreme(loss_scale)
    if is_extreme(scale) and not wide and not batch.weighted:
        batch.weighted = True
        batch.grad_output.constant = scale
        batch.scale = 1.0
    with nogil:
        outside = take_any_batch(&batch, num_threads, single, wide)
    free(memory)
    return outside == 0


def binary_probabilities(
    cnp.ndarray probs, targets, sample_weight, cnp.ndarray losses, cnp.ndarray sums, weights, int num_threads,
):
    """Fill `sums` and, unless None, `losses` as binary_entries does, `weights` with the sums of the sample weights.

    Returns whether all entries are in order: weights finite, and where they are not 0, probabilities and targets in
    [0, 1]. If not, what was filled is not to be used. `weights` goes with `sample_weight`.
    """
    cdef Batch batch
    cdef char* memory
    cdef Py_ssize_t n_bytes
    cdef bint accepted
    batch.n = cnp.PyArray_SIZE(probs)
    batch.logits = <char*>cnp.PyArray_DATA(probs)
    batch.targets = numbers_of(targets)
    batch.sample_weight = numbers_of(sample_weight)
    batch.losses = NULL if losses is None else <char*>cnp.PyArray_DATA(losses)
    batch.sums = <double*>cnp.PyArray_DATA(sums)
    batch.weighted = weights is not None
    batch.weights = <double*>cnp.PyArray_DATA(<cnp.ndarray>weights) if batch.weighted else NULL
    n_bytes = rooms_bytes(batch.n, num_threads)
    memory = <char*>malloc(n_bytes)
    if memory == NULL and n_bytes:
        raise MemoryError("fastce could not allocate its working memory")
    batch.rooms = rooms_in(memory)
    accepted = run_probabilities(&batch, num_threads, cnp.PyArray_TYPE(probs) == cnp.NPY_FLOAT32)
    free(memory)
    return accepted


cdef bint run_probabilities(const Batch* batch, int num_threads, bint single):
    cdef Py_ssize_t bad
    if num_threads == 1 and batch.n < GIL_ENTRIES:
        return take_probabilities_of(batch, 1, single) == 0
    with nogil:
        bad = take_probabilities_of(batch, num_threads, single)
    return bad == 0


cdef Py_ssize_t take_probabilities_of(const Batch* batch, int num_threads, bint single) noexcept nogil:
    if single:
        return take_probabilities(batch, num_threads, <const float*>NULL)
    return take_probabilities(batch, num_threads, <const double*>NULL)


# As plain_binary, entries that are not in order included.
def plain_probabilities(
    probs, targets, sample_weight, str reduction, denominator, num_threads, Py_ssize_t serial_entries, choose_threads
):
    """Return the reduced losses of probabilities and, for targets and weights, plain arrays of their shape, or None."""
    cdef Batch batch
    cdef bint mean = reduction == "mean"
    cdef int threads
    cdef double divisor
    cdef char* memory
    cdef Py_ssize_t n_bytes, n_sums
    if not is_plain(probs) or not is_denominator(denominator, mean):
        return None
    # Runs Python, and with it other threads: before anything is read that they could change.
    threads = threads_of(probs, num_threads, serial_entries, choose_threads)
    if (
        threads == 0
        or not (is_plain(probs) and is_native(probs) and 0 < cnp.PyArray_SIZE(probs) <= SLAB_ELEMENTS)
        or not (is_plain(targets) and is_target_kind(cnp.PyArray_TYPE(targets)))
        or not cnp.PyArray_SAMESHAPE(probs, targets)
        or not (sample_weight is None or (is_plain(sample_weight) and is_native(sample_weight)))
        or not (sample_weight is None or cnp.PyArray_SAMESHAPE(probs, sample_weight))
    ):
        return None
    batch.n = cnp.PyArray_SIZE(probs)
    batch.logits = <char*>cnp.PyArray_DATA(probs)
    batch.targets = numbers_of(targets)
    batch.sample_weight = numbers_of(sample_weight)
    batch.weighted = sample_weight is not None
    n_bytes = rooms_bytes(batch.n, threads)
    n_sums = blocks_of(batch.n)
    memory = <char*>malloc(n_bytes + 2 * n_sums * sizeof(double))
    if memory == NULL:
        raise MemoryError("fastce could not allocate its working memory")
    batch.rooms = rooms_in(memory)
    batch.sums = <double*>(memory + n_bytes)
    batch.weights = batch.sums + n_sums
    try:
        losses = None
        batch.losses = NULL
        if reduction == "none":
            losses = cnp.PyArray_EMPTY(cnp.PyArray_NDIM(probs), cnp.PyArray_DIMS(probs), cnp.PyArray_TYPE(probs), 0)
            batch.losses = <char*>cnp.PyArray_DATA(losses)
        if not run_probabilities(&batch, threads, cnp.PyArray_TYPE(probs) == cnp.NPY_FLOAT32):
            return None
        if losses is not None:
            return losses
        divisor = 1.0
        if mean:
            divisor = pairwise_sum(batch.weights, n_sums) if batch.weighted else batch.n
            divisor = divisor if denominator is None else denominator
        return pairwise_sum(batch.sums, n_sums) / divisor if divisor != 0.0 else None
    finally:
        free(memory)


# The plain case in one call: C-contiguous native logits and targets of one shape, no options, the mean. Whatever is not
# plain, errors included, is left to the general way: the answer is None and nothing that the caller has was written.
def plain_binary(logits, targets, out, bint with_grad, Py_ssize_t serial_entries, choose_threads):
    """Return (mean loss, gradient or None) of a plain call, or None if it is not one."""
    cdef Batch batch
    cdef int num_threads = 1
    cdef int kind
    cdef double total
    cdef char* memory
    cdef Py_ssize_t n_bytes
    cdef bint single, look_first, accepted
    if not is_plain(logits):
        return None
    # Runs Python, and with it other threads: before anything is read that they could change.
    if cnp.PyArray_SIZE(logits) >= serial_entries:
        num_threads = choose_threads()
    if not (is_plain(logits) and is_plain(targets) and cnp.PyArray_SAMESHAPE(logits, targets)):
        return None
    kind = cnp.PyArray_TYPE(logits)
    single = kind == cnp.NPY_FLOAT32
    batch.n = cnp.PyArray_SIZE(logits)
    if (
        not is_native(logits)
        or not is_target_kind(cnp.PyArray_TYPE(targets))
        or batch.n == 0
        or batch.n > SLAB_ELEMENTS
        or (out is not None and not (is_gradient(out, logits) and are_apart(out, targets)))
    ):
        return None
    batch.targets = numbers_of(targets)
    batch.pos_weight = numbers_of(None)
    batch.smoothing = 0.0
    batch.scale = 1.0 / batch.n
    batch.losses = NULL
    batch.plain = is_exact(batch.targets.kind, single)
    batch.weighted = False
    n_bytes = rooms_bytes(batch.n, num_threads)
    memory = <char*>malloc(n_bytes + blocks_of(batch.n) * sizeof(double))
    if memory == NULL:
        raise MemoryError("fastce could not allocate its working memory")
    batch.rooms = rooms_in(memory)
    batch.sums = <double*>(memory + n_bytes)
    look_first = out is not None
    try:
        if with_grad and out is None:
            out = cnp.PyArray_EMPTY(cnp.PyArray_NDIM(logits), cnp.PyArray_DIMS(logits), kind, 0)
        batch.logits = <char*>cnp.PyArray_DATA(logits)
        batch.out = <char*>cnp.PyArray_DATA(out) if with_grad else NULL
        if num_threads == 1 and batch.n < GIL_ENTRIES:
            accepted = take_plain_batch(&batch, 1, single, look_first)
        else:
            with nogil:
                accepted = take_plain_batch(&batch, num_threads, single, look_first)
        if not accepted:
            return None
        total = pairwise_sum(batch.sums, blocks_of(batch.n))
        return total / batch.n, out
    finally:
        free(memory)


# Returns whether all targets are in [0, 1]; if not and `look_first` is true, nothing has been written.
cdef bint take_plain_batch(Batch* batch, int num_threads, bint single, bint look_first) noexcept nogil:
    cdef Py_ssize_t outside
    if look_first and outside_of(&batch.targets, NULL, batch.n, 0.0, 1.0, num_threads):
        return False
    outside = take_any_batch(batch, num_threads, single, False)
    return look_first or outside == 0


# Whether targets of this kind lose nothing when they become logits' dtype.
cdef inline bint is_exact(int target_kind, bint single) noexcept:
    return not (single and target_kind == cnp.NPY_FLOAT64)


cdef inline bint is_target_kind(int kind) noexcept:
    return kind in (cnp.NPY_FLOAT32, cnp.NPY_FLOAT64) or cnp.PyTypeNum_ISINTEGER(kind) or cnp.PyTypeNum_ISBOOL(kind)


cdef inline bint is_plain(array) noexcept:
    return cnp.PyArray_CheckExact(array) and cnp.PyArray_ISCARRAY_RO(array)


# None is 1 for every entry.
cdef Numbers numbers_of(value):
    cdef Numbers numbers
    numbers.data = NULL
    numbers.kind = cnp.NPY_FLOAT64
    numbers.constant = 1.0
    if isinstance(value, cnp.ndarray):
        numbers.data = <char*>cnp.PyArray_DATA(value)
        numbers.kind = loaded_kind(value)
    elif value is not None:
        numbers.constant = value
    return numbers


# The kind that `load` knows: an integer's sign does not matter where all but 0 and 1 is refused.
cdef int loaded_kind(cnp.ndarray array) noexcept:
    cdef int kind = cnp.PyArray_TYPE(array)
    cdef Py_ssize_t itemsize = cnp.PyArray_ITEMSIZE(array)
    if kind == cnp.NPY_FLOAT32 or kind == cnp.NPY_FLOAT64:
        return kind
    if itemsize == 8:
        return cnp.NPY_INT64
    if itemsize == 4:
        return cnp.NPY_INT32
    return cnp.NPY_INT16 if itemsize == 2 else cnp.NPY_INT8


def first_outside(values, sample_weight, Py_ssize_t n, double low, double high, int num_threads):
    """Return the first of `n` entries whose value is not in [low, high] and whose weight is not 0, or -1.

    `values` and `sample_weight` are what binary_entries takes.
    """
    cdef Numbers numbers = numbers_of(values), weights = numbers_of(sample_weight)
    cdef Py_ssize_t first = 0
    with nogil:
        if not outside_of(&numbers, &weights, n, low, high, num_threads):
            first = n
        # The bounds are not idle: another thread may change the entry back before it is found.
        while first < n and not outside_of_block(&numbers, &weights, first, smaller(BLOCK, n - first), low, high):
            first += BLOCK
        while first < n and not outside_of_block(&numbers, &weights, first, 1, low, high):
            first += 1
    return first if first < n else -1


cdef Py_ssize_t outside_of(
    const Numbers* numbers, const Numbers* weights, Py_ssize_t n, double low, double high, int num_threads
) noexcept nogil:
    cdef Py_ssize_t block, outside = 0
    num_threads = team_for(useful_threads(n, num_threads))
    if num_threads == 1:
        for block in range(blocks_of(n)):
            outside += outside_of_block(numbers, weights, block * BLOCK, smaller(BLOCK, n - block * BLOCK), low, high)
        return outside
    for block in prange(blocks_of(n), num_threads=num_threads, schedule="dynamic", chunksize=TASK_BLOCKS):
        outside += outside_of_block(numbers, weights, block * BLOCK, smaller(BLOCK, n - block * BLOCK), low, high)
    return outside


cdef Py_ssize_t outside_of_block(
    const Numbers* numbers, const Numbers* weights, Py_ssize_t first, Py_ssize_t n, double low, double high
) noexcept nogil:
    cdef Py_ssize_t piece, outside = 0
    if numbers.kind == cnp.NPY_FLOAT32 and numbers.data != NULL and high == 1:
        if not count_outside(<const float*>numbers.data + first, n, <float>low, <float>high):
            return 0
    for piece in range((n + PIECE - 1) // PIECE):
        outside += outside_of_piece(
            numbers, weights, first + piece * PIECE, smaller(PIECE, n - piece * PIECE), low, high
        )
    return outside


cdef inline Py_ssize_t outside_of_piece(
    const Numbers* numbers, const Numbers* weights, Py_ssize_t first, Py_ssize_t n, double low, double high
) noexcept nogil:
    cdef double[PIECE] values, weight
    cdef Py_ssize_t i, outside
    load(numbers, first, n, values)
    outside = count_outside(values, n, low, high)
    if outside and weights != NULL:
        load(weights, first, n, weight)
        outside = 0
        for i in range(n):
            outside += 0 if weight[i] == 0 or values[i] >= low and values[i] <= high else 1
    return outside


def sum_in_blocks(values, cnp.ndarray sums, int num_threads):
    """Fill `sums` with the sums of each 512 entries of `values`, a flat float32 or float64 array."""
    cdef Numbers numbers = numbers_of(values)
    cdef Py_ssize_t n = cnp.PyArray_SIZE(values)
    cdef double* into = <double*>cnp.PyArray_DATA(sums)
    cdef Py_ssize_t block
    num_threads = team_for(useful_threads(n, num_threads))
    with nogil:
        if num_threads == 1:
            for block in range(blocks_of(n)):
                into[block] = sum_of_block(&numbers, block * BLOCK, smaller(BLOCK, n - block * BLOCK))
        else:
            for block in prange(blocks_of(n), num_threads=num_threads, schedule="dynamic", chunksize=TASK_BLOCKS):
                into[block] = sum_of_block(&numbers, block * BLOCK, smaller(BLOCK, n - block * BLOCK))


cdef double sum_of_block(const Numbers* numbers, Py_ssize_t first, Py_ssize_t n) noexcept nogil:
    cdef double[BLOCK] values
    load(numbers, first, n, values)
    return sum_of(values, n)


def sum_of_blocks(cnp.ndarray sums):
    """Return the sum of the blocks' sums, in pairs."""
    return pairwise_sum(<double*>cnp.PyArray_DATA(sums), cnp.PyArray_SIZE(sums))
