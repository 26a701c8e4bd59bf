"""The compiled entry points: softmax cross-entropy of rows of logits and its gradient, and how a batch is divided.

Compiled once per CPU target (setup.py), float32 and float64 from one text. The kernels know pointers, lengths and
numbers and trust them: class ids are in range or -1 (an ignored row, whose logits are never read); rows are contiguous,
aligned and native. They are small.pxd, medium.pxd and large.pxd by the number of classes, and split.pxd; lanes.pxd
sums, vexp.pxd has the exponential, staged.pxd transforms logits, block.pxd has what all rows share.

With t the row's class and e_j = e^(z_j) * 2^-shift for some integer shift (vexp.pxd):

    others = sum_{j != t} e_j          summed without the target, never by subtracting it
    S      = others + e_t
    loss   = -log1p(-others/S)         where p_t >= 1/2: keeps every digit of a tiny loss
           = log(S) + shift*ln2 - z_t  elsewhere, where it is at least log 2 and nothing cancels
    grad_j = e_j * (scale/S),  grad_t = -(others/S) * scale, never p_t - 1

Options are numbers: with z the scaled logits, -inf where a mask says so, share = smoothing/C and zeta = z_loss

    lse    = loss + z_t                what the row's sum is without the target
    loss  += share * sum(z_t - z_c) + zeta * lse^2
    grad_j = e_j * (1 + 2 zeta lse)(scale/S) - scale * share
    hess_j = p_j ((1 + 2 zeta lse)(1 - p_j) + 2 zeta p_j)

The sum of differences may be negative, but with smoothing <= 1/2 neither part is larger than twice the loss; its own
rounding is 5 u. An error d of S makes lse too large by d and p too small by as much: with zeta <= 1 the gradient's
factor is off by |2 zeta - (1 + 2 zeta lse)| d, at most (1 + 2 zeta |lse|) d, also where lse is near 0. Larger ones are
soft.pyx's, which has the lse's own digits. A softmax is a gradient without a target: any class may set the scale.

Rounding in units of u = 2^-24 (2^-53): e_j 1.2; S 1.2 and 3 for its sum (three levels of additions in the dtype, then
float64, compensated for float64 rows); scale/S 1; the product 1. Together 7.4 u = 4.4e-7 (8.2e-16). Every sum has a
fixed order that depends on the row's length alone, so a row's bits depend on nothing but the row.
"""

from cython.parallel cimport prange, threadid
from cpython.long cimport PyLong_AsLongLongAndOverflow
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cimport numpy as cnp

from fastce._kernels.block cimport (
    BLOCK_ELEMENTS,
    BLOCK_ROWS,
    TASKS_PER_THREAD,
    Batch,
    Scratch,
    add_options,
    finish_rows,
    has_weights,
    is_streamed,
    load_scales,
    pull_target,
    put_losses,
    steepen,
    weights_in,
)
from fastce._kernels.columns cimport column_terms, take_columns, take_softmax_columns
from fastce._kernels.cpu cimport team_for
from fastce._kernels.lanes cimport (
    CHUNK,
    SUM_BLOCK,
    Rounding,
    buffer_elements,
    chunks_of,
    larger,
    next_line,
    round_as_before,
    round_to_nearest,
    smaller,
    stream_fence,
)
from fastce._kernels.large cimport KEEP_BYTES, has_two_buffers, keeps_terms, take_rows
from fastce._kernels.medium cimport take_medium_rows
from fastce._kernels.plain cimport (
    SLAB_ELEMENTS,
    are_few_logits,
    are_ids,
    are_plain_factors,
    are_plain_numbers,
    classes_of,
    copy_ids,
    copy_losses,
    doubles_of,
    elements_below,
    is_denominator,
    is_for_rows,
    is_gradient,
    is_hessian,
    is_plain_factor,
    is_plain_mask,
    is_plain_weight,
    mask_stride_of,
    new_array,
    pairwise_sum,
    plain_axis,
    threads_of,
)
from fastce._kernels.small cimport SMALL_CLASSES, repeat_limits, small_block_rows, take_small_rows
from fastce._kernels.split cimport (
    SPLIT_CLASSES,
    Split,
    begin_split,
    join_split,
    leading_of,
    split_bytes,
    sum_split,
    write_split,
)
from fastce._kernels.staged cimport limit_of, no_options, set_scale
from fastce._kernels.target_losses cimport FOCAL, NO_TARGET_LOSS, POLY, TargetLoss, take_target_losses
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
from fastce._kernels.vexp cimport floating
from fastce._kernels.weights cimport Weights, WeightSum, are_weights, total_weight

cdef extern from "target.h" nogil:
    int OPENMP "FASTCE_OPENMP"
    int omp_get_max_threads "fastce_openmp_limit" ()

cnp.import_array()

MAX_COLUMN_CLASSES = SMALL_CLASSES  # what cross_entropy_columns takes
TARGET_LOSSES = {"focal": FOCAL, "poly": POLY}
MAX_STRIDED_CLASSES = TILE_CLASSES     # what softmax_columns takes

cdef enum:
    # Rows up to this length go through the pipeline of medium.pxd: at 1000 classes it took 0.26 ns a logit and
    # large.pxd 0.32, at 4064 0.28 and 0.29 (float32, 1 thread).
    MEDIUM_CLASSES = 4096
    TASK_ELEMENTS = 16384   # the least that a thread takes at a time
    GIL_ELEMENTS = 4096     # batches below keep the GIL: handing it over and back costs more than 1 us of work


# ---- the batch -----------------------------------------------------------------------------------------------------

# How a batch is divided. The scratch of thread i lies at memory + i * thread_bytes.
cdef struct Plan:
    int num_threads
    Py_ssize_t block_rows
    Py_ssize_t task_rows
    Py_ssize_t n_tasks
    Py_ssize_t thread_bytes
    char* memory
    bint split              # columns instead of rows


# Tasks are small enough to share the work evenly, and large enough to hide that sharing costs a microsecond or two.
cdef Plan plan_batch(const Batch* batch, int num_threads, const floating* like) noexcept nogil:
    cdef Plan plan
    cdef Py_ssize_t n_rows = batch.n_rows, n_classes = batch.n_classes
    plan.block_rows = BLOCK_ROWS
    if n_classes <= SMALL_CLASSES:
        plan.block_rows = small_block_rows(n_classes)
    plan.task_rows = larger(n_rows // (TASKS_PER_THREAD * num_threads), TASK_ELEMENTS // n_classes)
    if plan.task_rows > plan.block_rows:
        plan.task_rows -= plan.task_rows % plan.block_rows
    plan.task_rows = larger(plan.task_rows, plan.block_rows if n_classes <= SMALL_CLASSES else 1)
    plan.n_tasks = (n_rows + plan.task_rows - 1) // plan.task_rows
    # A split batch is one block; with more rows than that there is work for every thread without splitting.
    plan.split = (
        num_threads > 1
        and n_classes >= SPLIT_CLASSES
        and n_rows < TASKS_PER_THREAD * num_threads
        and n_rows <= BLOCK_ROWS
    )
    plan.num_threads = <int>smaller(num_threads, n_rows * chunks_of(n_classes) if plan.split else plan.n_tasks)
    plan.thread_bytes = sizeof(Scratch) + (terms_needed(batch, like) + SUM_BLOCK) * sizeof(floating)
    plan.thread_bytes += (64 - plan.thread_bytes % 64) % 64
    plan.memory = next_line(batch.memory)
    return plan


cdef Py_ssize_t terms_needed(const Batch* batch, const floating* like) noexcept nogil:
    if batch.n_classes <= SMALL_CLASSES:
        return BLOCK_ELEMENTS
    if batch.n_classes <= MEDIUM_CLASSES:
        return 3 * buffer_elements(batch.n_classes)
    if not batch.with_grad:
        return CHUNK
    if has_two_buffers(like, batch.n_classes):
        return larger(CHUNK, 2 * buffer_elements(batch.n_classes))
    if keeps_terms(like, batch.n_classes):
        return buffer_elements(batch.n_classes)
    return CHUNK


# How much working memory a batch of at most so many rows may need. All of it is had before anything is written.
cdef Py_ssize_t memory_for(const Batch* batch, int num_threads, const floating* like) noexcept nogil:
    cdef Plan plan = plan_batch(batch, num_threads, like)
    cdef bint may_split = batch.n_classes >= SPLIT_CLASSES and num_threads > 1
    cdef Py_ssize_t n_parts = batch.n_rows * (chunks_of(batch.n_classes) if may_split else 1)
    cdef Py_ssize_t n_threads = larger(1, smaller(num_threads, n_parts))
    cdef Py_ssize_t n_bytes = n_threads * plan.thread_bytes + 64 + limits_bytes(batch, like)
    if may_split:
        n_bytes += split_bytes(batch, smaller(batch.n_rows, BLOCK_ROWS)) + n_threads * KEEP_BYTES
    return n_bytes


# The whole batch. One thread never enters OpenMP.
cdef void take_batch(Batch* batch, int num_threads, const floating* like) noexcept nogil:
    cdef Py_ssize_t n_rows = batch.n_rows
    cdef Plan plan
    cdef Py_ssize_t task
    if n_rows == 0:
        return
    batch.stream = is_streamed(n_rows * batch.n_classes * sizeof(floating), batch.out, batch.logits)
    plan = plan_batch(batch, num_threads, like)
    if plan.num_threads > 1 and team_for(plan.num_threads) == 1:
        plan = plan_batch(batch, 1, like)
    place_limits(batch, <floating*>plan.memory)
    plan.memory += limits_bytes(batch, like)
    if plan.split:
        split_rows(batch, &plan, like)
    elif plan.num_threads == 1:
        take_task(batch, <Scratch*>plan.memory, 0, n_rows, plan.block_rows, like)
    else:
        for task in prange(plan.n_tasks, num_threads=plan.num_threads, schedule="dynamic", chunksize=1):
            take_task(
                batch, <Scratch*>(plan.memory + threadid() * plan.thread_bytes), task * plan.task_rows,
                smaller(plan.task_rows, n_rows - task * plan.task_rows), plan.block_rows, like,
            )


# A mask for all rows becomes numbers in the dtype of the logits.
cdef void place_limits(Batch* batch, floating* limits) noexcept nogil:
    cdef const uint8_t* mask = batch.options.transform.mask
    cdef Py_ssize_t i
    if limits_bytes(batch, limits):
        for i in range(batch.n_classes):
            limits[i] = limit_of(mask[i], limits)
        batch.options.limits = <char*>limits


cdef inline Py_ssize_t limits_bytes(const Batch* batch, const floating* like) noexcept nogil:
    if batch.options.transform.mask == NULL or batch.options.transform.mask_stride != 0:
        return 0
    return (batch.n_classes * sizeof(floating) + 63) // 64 * 64


# Rows [first, first + n) in blocks; every thread calls this with its own rows.
cdef void take_task(
    const Batch* batch, Scratch* rows, Py_ssize_t first, Py_ssize_t n, Py_ssize_t block_rows, const floating* like
) noexcept nogil:
    cdef Py_ssize_t i, start, size
    cdef Rounding rounding
    round_to_nearest(&rounding)
    if batch.n_classes <= SMALL_CLASSES:
        repeat_limits(batch, rows, like)
    for i in range((n + block_rows - 1) // block_rows):
        start = i * block_rows
        size = smaller(block_rows, n - start)
        if batch.n_classes <= SMALL_CLASSES:
            take_small_rows(batch, rows, first + start, size, like)
        elif batch.n_classes <= MEDIUM_CLASSES:
            take_medium_rows(batch, rows, first + start, size, like)
        else:
            take_rows(batch, rows, first + start, size, like)
    if batch.stream:
        stream_fence()
    round_as_before(&rounding)


# Short rows whose classes are strided, in blocks of BLOCK_ROWS neighbours.
cdef void take_grid(
    Batch* batch, const Grid* grid, const Grid* out_grid, int num_threads, const floating* like
) noexcept nogil:
    cdef char* memory = next_line(batch.memory)
    cdef Py_ssize_t n_bytes = column_bytes(batch.n_classes, sizeof(floating))
    cdef Py_ssize_t blocks = (grid.inner + BLOCK_ROWS - 1) // BLOCK_ROWS
    cdef Py_ssize_t block, n_blocks = blocks * (batch.n_rows // grid.inner)
    batch.stream = is_streamed(batch.n_rows * batch.n_classes * sizeof(floating), batch.out, batch.logits)
    num_threads = team_for(<int>smaller(num_threads, n_blocks))
    if num_threads <= 1:
        for block in range(n_blocks):
            take_grid_block(
                batch, grid, out_grid, <Scratch*>memory, block // blocks, block % blocks * BLOCK_ROWS, like
            )
    else:
        for block in prange(n_blocks, num_threads=num_threads, schedule="dynamic", chunksize=4):
            take_grid_block(
                batch, grid, out_grid, <Scratch*>(memory + threadid() * n_bytes), block // blocks,
                block % blocks * BLOCK_ROWS, like,
            )


cdef void take_grid_block(
    const Batch* batch, const Grid* grid, const Grid* out_grid, Scratch* rows, Py_ssize_t group, Py_ssize_t start,
    const floating* like,
) noexcept nogil:
    cdef Py_ssize_t offset = start * <Py_ssize_t>sizeof(floating), n = smaller(BLOCK_ROWS, grid.inner - start)
    cdef const char* logits = batch.logits + group * grid.group_stride + offset
    cdef char* out = NULL if batch.out == NULL else batch.out + group * out_grid.group_stride + offset
    cdef Rounding rounding
    round_to_nearest(&rounding)
    if batch.is_softmax:
        take_softmax_columns(batch, rows, n, logits, grid.class_stride, out, out_grid.class_stride, like)
    else:
        take_columns(
            batch, rows, group * grid.inner + start, n, logits, grid.class_stride, out, out_grid.class_stride, like
        )
    if batch.stream:
        stream_fence()
    round_as_before(&rounding)


# The softmax of rows whose classes are strided, tile by tile: turned, taken as any other rows are, and turned back.
cdef void take_tiles(
    Batch* batch, const Grid* grid, const Grid* out_grid, int num_threads, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n_rows = tile_rows(batch.n_classes), n_tiles = tiles_of(batch.n_rows, batch.n_classes), tile
    cdef Py_ssize_t n_bytes = tile_thread_bytes(batch.n_classes, sizeof(floating) == sizeof(float))
    num_threads = team_for(<int>smaller(num_threads, n_tiles))
    if num_threads <= 1:
        for tile in range(n_tiles):
            take_tile(batch, grid, out_grid, batch.memory, tile * n_rows, like)
    else:
        for tile in prange(n_tiles, num_threads=num_threads, schedule="dynamic", chunksize=1):
            take_tile(batch, grid, out_grid, batch.memory + threadid() * n_bytes, tile * n_rows, like)


cdef void take_tile(
    const Batch* batch, const Grid* grid, const Grid* out_grid, char* memory, Py_ssize_t first, const floating* like
) noexcept nogil:
    cdef Batch own = batch[0]
    cdef Plan plan
    own.n_rows = smaller(tile_rows(batch.n_classes), batch.n_rows - first)
    own.logits = own.out = next_line(memory)
    own.logits_stride = own.out_stride = tile_pitch(batch.n_classes) * sizeof(floating)
    own.losses = <double*>(own.logits + tile_bytes(batch.n_classes, sizeof(floating)))
    own.ids = <int64_t*>(own.losses + tile_rows(batch.n_classes))
    own.memory = <char*>(own.ids + tile_rows(batch.n_classes))
    memset(own.ids, 0, own.n_rows * sizeof(int64_t))
    load_tile(grid, batch.logits, first, own.n_rows, batch.n_classes, <floating*>own.logits)
    plan = plan_batch(&own, 1, like)
    take_task(&own, <Scratch*>plan.memory, 0, own.n_rows, plan.block_rows, like)
    store_tile(out_grid, batch.out, first, own.n_rows, batch.n_classes, <const floating*>own.out)


cdef Py_ssize_t tile_thread_bytes(Py_ssize_t n_classes, bint single) noexcept nogil:
    cdef Batch batch = empty_batch()
    batch.n_rows = tile_rows(n_classes)
    batch.n_classes = n_classes
    batch.with_grad = True
    return (
        64 + tile_bytes(n_classes, sizeof(float) if single else sizeof(double)) + memory_of(&batch, 1, single)
        + batch.n_rows * <Py_ssize_t>(sizeof(double) + sizeof(int64_t))
    )


# Few rows, many classes. The same numbers as take_rows, to the bit: chunks of the same size are summed in the same
# order. First all chunk sums; then, once S is known, all gradients, from exponentials that were kept or are computed a
# second time; last the rows that do not fit their windows, whole.
cdef void split_rows(Batch* batch, const Plan* plan, const floating* like) noexcept nogil:
    cdef Py_ssize_t r, task, n_tasks
    cdef Scratch* rows = <Scratch*>plan.memory
    cdef Split split
    cdef Rounding rounding
    round_to_nearest(&rounding)
    begin_split(batch, &split, plan.memory + plan.num_threads * plan.thread_bytes, plan.num_threads, like)
    n_tasks = batch.n_rows * split.n_chunks
    for task in prange(n_tasks, num_threads=plan.num_threads, schedule="static"):
        sum_split(batch, &split, <Scratch*>(plan.memory + threadid() * plan.thread_bytes), task, like)
    load_scales(batch, rows, 0, batch.n_rows)
    join_split(batch, &split, rows, like)
    finish_rows(rows, batch.n_rows)
    for r in range(batch.n_rows):
        if batch.ids[r] >= 0:
            steepen(batch, rows, r)
    add_options(batch, rows, batch.n_rows)
    put_losses(batch, rows, 0, batch.n_rows)
    if batch.out != NULL:
        for task in prange(n_tasks, num_threads=plan.num_threads, schedule="static"):
            write_split(batch, &split, <Scratch*>(plan.memory + threadid() * plan.thread_bytes), rows, task, like)
        for r in range(batch.n_rows):
            if not split.rows[r].whole:
                pull_target(batch, rows, 0, r, leading_of(&split, r), like)
    for r in range(batch.n_rows):
        if split.rows[r].whole:
            take_rows(batch, rows, r, 1, like)
    stream_fence()
    round_as_before(&rounding)


# ---- entry points --------------------------------------------------------------------------------------------------

cdef inline Batch empty_batch() noexcept nogil:
    cdef Batch batch
    memset(&batch, 0, sizeof(batch))
    batch.options = no_options()
    return batch


def memory_needed(
    Py_ssize_t n_rows, Py_ssize_t n_classes, bint single, bint with_grad, int num_threads, cnp.ndarray common_mask=None
):
    """Return the bytes of working memory for calls of at most `n_rows` rows; `single` says float32."""
    cdef Batch batch = empty_batch()
    batch.n_rows = n_rows
    batch.n_classes = n_classes
    batch.with_grad = with_grad
    if common_mask is not None:
        set_mask(&batch, <uint8_t*>cnp.PyArray_DATA(common_mask), 0)
    return memory_of(&batch, num_threads, single)


def cross_entropy_rows(
    cnp.ndarray logits, cnp.ndarray ids, cnp.ndarray losses, double scale, cnp.ndarray scales, cnp.ndarray out,
    cnp.ndarray memory, int num_threads, cnp.ndarray weight=None, cnp.ndarray sample_weight=None, cnp.ndarray hess=None,
    double logit_scale=1.0, double smoothing=0.0, double z_loss=0.0, cnp.ndarray mask=None,
    cnp.ndarray common_mask=None,
):
    """Fill `losses` (N,) float64 and, unless None, `out` (N, C) with d(sum of scale * loss)/d(logits).

    `logits` (N, C) has contiguous rows; `ids` (N,) int64 are in range or negative (ignored); `scales` (N,) float64
    multiplies each row's gradient, or None for `scale` throughout; `weight` (C,) of the classes, `sample_weight` (N,)
    float64, or None, multiply losses and gradients; `hess`, which goes with `out`, gets the diagonal of the second
    derivatives; `out` may be `logits`; `memory` has as many bytes as memory_needed says. `smoothing` (at most
    1/2) and `z_loss` (at most 1) do not go with `weight`, nor `mask` (N, C) or `common_mask` (C,), as bytes, with
    `smoothing`.
    """
    cdef Batch batch = empty_batch()
    fill_batch(&batch, logits, ids, losses, scale, scales, out, memory, weight, sample_weight)
    batch.logits_stride = cnp.PyArray_STRIDE(logits, 0)
    batch.out_stride = 0 if out is None else cnp.PyArray_STRIDE(out, 0)
    batch.hess = NULL if hess is None else <char*>cnp.PyArray_DATA(hess)
    batch.hess_stride = 0 if hess is None else cnp.PyArray_STRIDE(hess, 0)
    batch.n_classes = cnp.PyArray_DIM(logits, 1)
    set_options(&batch, logit_scale, smoothing, z_loss, cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32)
    if mask is not None:
        set_mask(&batch, <uint8_t*>cnp.PyArray_DATA(mask), cnp.PyArray_STRIDE(mask, 0))
    elif common_mask is not None:
        set_mask(&batch, <uint8_t*>cnp.PyArray_DATA(common_mask), 0)
    take_any_batch(&batch, num_threads, cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32)


cdef void set_options(Batch* batch, double logit_scale, double smoothing, double z_loss, bint single) noexcept nogil:
    batch.options.is_staged = logit_scale != 1.0
    set_scale(&batch.options.transform, logit_scale, single)
    batch.options.smoothing = smoothing
    batch.options.share = smoothing / batch.n_classes
    batch.options.z_loss = z_loss
    batch.options.is_scaled = (
        logit_scale != 1.0 and smoothing == 0.0 and (batch.options.transform.is_single or not single)
    )
    batch.options.none = logit_scale == 1.0 and smoothing == z_loss == 0.0


cdef void set_mask(Batch* batch, uint8_t* mask, Py_ssize_t stride) noexcept nogil:
    batch.options.transform.mask = mask
    batch.options.transform.mask_stride = stride
    batch.options.is_staged = True
    batch.options.is_scaled = batch.options.none = False


def softmax_rows(
    cnp.ndarray logits, cnp.ndarray ids, cnp.ndarray losses, cnp.ndarray out, cnp.ndarray memory, int num_threads
):
    """Fill `out` (N, C) with the softmax of `logits`; `losses` and `memory` are room to work in, all `ids` 0."""
    cdef Batch batch = empty_batch()
    fill_batch(&batch, logits, ids, losses, 1.0, None, out, memory, None, None)
    batch.is_softmax = True
    batch.logits_stride = cnp.PyArray_STRIDE(logits, 0)
    batch.out_stride = cnp.PyArray_STRIDE(out, 0)
    batch.n_classes = cnp.PyArray_DIM(logits, 1)
    take_any_batch(&batch, num_threads, cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32)


def plain_softmax(logits, axis, out, num_threads, Py_ssize_t serial_elements, choose_threads):
    """Return `out` or a new array, filled with the softmax along an axis, or None if the call is not plain."""
    cdef Batch batch = empty_batch()
    cdef Grid grid
    cdef int threads = threads_of(logits, num_threads, serial_elements, choose_threads)
    cdef Py_ssize_t n_bytes, class_axis = plain_axis(logits, axis, out, SLAB_ELEMENTS), below
    cdef bint single
    cdef char* memory
    if threads == 0 or class_axis < 0:
        return None
    below = elements_below(logits, class_axis)
    single = cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32
    batch.n_classes = cnp.PyArray_DIM(logits, <int>class_axis)
    batch.n_rows = cnp.PyArray_SIZE(logits) // batch.n_classes
    if below > 1 and batch.n_classes > TILE_CLASSES:
        return None
    batch.logits_stride = batch.out_stride = batch.n_classes * cnp.PyArray_ITEMSIZE(logits)
    batch.logits = <char*>cnp.PyArray_DATA(logits)
    batch.with_grad = batch.is_softmax = True
    batch.scale = 1.0
    if below > 1:
        n_bytes = strided_memory(batch.n_rows, batch.n_classes, single, threads)
    else:
        n_bytes = memory_of(&batch, threads, single) + 2 * batch.n_rows * sizeof(double)
    if out is None:
        out = cnp.PyArray_EMPTY(cnp.PyArray_NDIM(logits), cnp.PyArray_DIMS(logits), cnp.PyArray_TYPE(logits), 0)
    batch.out = <char*>cnp.PyArray_DATA(out)
    memory = <char*>malloc(n_bytes)
    if memory == NULL:
        raise MemoryError("fastce could not allocate its working memory")
    if below > 1:
        batch.memory = memory
        grid = plain_grid(batch.n_classes, below, cnp.PyArray_ITEMSIZE(logits))
        take_any_strided(&batch, &grid, &grid, threads, single)
    else:
        batch.losses = <double*>memory
        batch.ids = <int64_t*>(batch.losses + batch.n_rows)
        batch.memory = <char*>(batch.ids + batch.n_rows)
        memset(batch.ids, 0, batch.n_rows * sizeof(int64_t))
        take_any_batch(&batch, threads, single)
    free(memory)
    return out


def strided_memory_needed(Py_ssize_t n_rows, Py_ssize_t n_classes, bint single, int num_threads):
    """Return the bytes of working memory for softmax_columns of at most `n_rows` rows."""
    return strided_memory(n_rows, n_classes, single, num_threads)


def softmax_columns(cnp.ndarray logits, cnp.ndarray out, cnp.ndarray memory, int num_threads):
    """Do what softmax_rows does, for `logits` and `out` (G, C, n) of at most MAX_STRIDED_CLASSES classes.

    The last axis is contiguous.
    """
    cdef Batch batch = empty_batch()
    cdef Grid grid = grid_of(logits), out_grid = grid_of(out)
    batch.n_classes = cnp.PyArray_DIM(logits, 1)
    batch.n_rows = cnp.PyArray_DIM(logits, 0) * grid.inner
    batch.logits = <char*>cnp.PyArray_DATA(logits)
    batch.out = <char*>cnp.PyArray_DATA(out)
    batch.with_grad = batch.is_softmax = True
    batch.scale = 1.0
    batch.memory = <char*>cnp.PyArray_DATA(memory)
    take_any_strided(&batch, &grid, &out_grid, num_threads, cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32)


# The working memory for the softmax of rows whose classes are strided.
cdef Py_ssize_t strided_memory(
    Py_ssize_t n_rows, Py_ssize_t n_classes, bint single, int num_threads
) noexcept nogil:
    if n_classes <= SMALL_CLASSES:
        return smaller(num_threads, n_rows) * column_bytes(n_classes, sizeof(float) if single else sizeof(double)) + 64
    return smaller(num_threads, tiles_of(n_rows, n_classes)) * tile_thread_bytes(n_classes, single)


cdef void take_any_strided(Batch* batch, const Grid* grid, const Grid* out_grid, int num_threads, bint single):
    if num_threads == 1 and batch.n_rows * batch.n_classes < GIL_ELEMENTS:
        take_strided_of(batch, grid, out_grid, 1, single)
    else:
        with nogil:
            take_strided_of(batch, grid, out_grid, num_threads, single)


cdef void take_strided_of(
    Batch* batch, const Grid* grid, const Grid* out_grid, int num_threads, bint single
) noexcept nogil:
    if single:
        take_strided(batch, grid, out_grid, num_threads, <const float*>NULL)
    else:
        take_strided(batch, grid, out_grid, num_threads, <const double*>NULL)


cdef void take_strided(
    Batch* batch, const Grid* grid, const Grid* out_grid, int num_threads, const floating* like
) noexcept nogil:
    if batch.n_classes <= SMALL_CLASSES:
        take_grid(batch, grid, out_grid, num_threads, like)
    else:
        take_tiles(batch, grid, out_grid, num_threads, like)


def column_memory_needed(Py_ssize_t n_classes, Py_ssize_t itemsize, int num_threads):
    """Return the bytes of working memory for cross_entropy_columns."""
    return num_threads * column_bytes(n_classes, itemsize) + 64


cdef Py_ssize_t column_bytes(Py_ssize_t n_classes, Py_ssize_t itemsize) noexcept nogil:
    return sizeof(Scratch) + (column_terms(n_classes) * itemsize + 63) // 64 * 64


def cross_entropy_columns(
    cnp.ndarray logits, cnp.ndarray ids, cnp.ndarray losses, double scale, cnp.ndarray scales, cnp.ndarray out,
    cnp.ndarray memory, int num_threads, cnp.ndarray weight=None, cnp.ndarray sample_weight=None,
):
    """Do what cross_entropy_rows does, for `logits` and `out` (G, C, n) of at most SMALL_CLASSES classes.

    The last axis is contiguous; rows are numbered along the first and the last axis.
    """
    cdef Batch batch = empty_batch()
    cdef Grid grid = grid_of(logits), out_grid = grid_of(logits if out is None else out)
    fill_batch(&batch, logits, ids, losses, scale, scales, out, memory, weight, sample_weight)
    batch.n_classes = cnp.PyArray_DIM(logits, 1)
    with nogil:
        if cnp.PyArray_TYPE(logits) == cnp.NPY_FLOAT32:
            take_grid(&batch, &grid, &out_grid, num_threads, <const float*>NULL)
        else:
            take_grid(&batch, &grid, &out_grid, num_threads, <const double*>NULL)


cdef void fill_batch(
    Batch* batch, cnp.ndarray logits, cnp.ndarray ids, cnp.ndarray losses, double scale, cnp.ndarray scales,
    cnp.ndarray out, cnp.ndarray memory, cnp.ndarray weight, cnp.ndarray sample_weight,
):
    batch.logits = <char*>cnp.PyArray_DATA(logits)
    batch.with_grad = out is not None
    batch.out = NULL if out is None else <char*>cnp.PyArray_DATA(out)
    batch.ids = <int64_t*>cnp.PyArray_DATA(ids)
    batch.scales = NULL if scales is None else <double*>cnp.PyArray_DATA(scales)
    batch.scale = scale
    batch.weight = NULL if weight is None else <double*>cnp.PyArray_DATA(weight)
    batch.sample_weight = NULL if sample_weight is None else <double*>cnp.PyArray_DATA(sample_weight)
    batch.losses = <double*>cnp.PyArray_DATA(losses)
    batch.n_rows = cnp.PyArray_DIM(ids, 0)
    batch.memory = <char*>cnp.PyArray_DATA(memory)


# The plain case in one call: C-contiguous native logits with the classes last, ids of any integer dtype, options that
# are numbers or plain arrays. Whatever is not plain, errors included, is left to the general way: the answer is None
# and nothing has been written.
def plain_cross_entropy(
    logits, targets, out, bint with_grad, hess, bint with_hess, weight, sample_weight, ignore_index, label_smoothing,
    logit_scale, softcap, z_loss, class_mask, str reduction, denominator, num_threads, grad_output,
    Py_ssize_t serial_elements, choose_threads, TargetLoss kind_of_loss=NO_TARGET_LOSS, double parameter=0.0,
):
    """Return (reduced losses, gradient or None) and, `with_hess`, the Hessian, or None if the call is not plain.

    `serial_elements` is the size from which on `choose_threads` is called, unless `num_threads` are given. A
    `kind_of_loss` (FOCAL, POLY) with its `parameter` takes the place of cross-entropy; it goes without options.
    """
    cdef Batch batch = empty_batch()
    cdef Weights weights
    cdef Py_ssize_t n_rows, n_classes, n_live, n_bytes
    cdef int64_t ignored
    cdef int threads, overflow = 0
    cdef int kind
    cdef bint mean = reduction == "mean"
    cdef double divisor
    cdef char* memory
    cdef double* row_weights
    cdef double* results
    cdef WeightSum summed
    if not cnp.PyArray_CheckExact(targets) or type(ignore_index) is not int:
        return None
    threads = threads_of(logits, num_threads, serial_elements, choose_threads)
    ignored = PyLong_AsLongLongAndOverflow(ignore_index, &overflow)
    if (
        threads == 0
        or overflow
        or not are_few_logits(logits, SLAB_ELEMENTS)
        or not are_ids(targets, logits)
        or (out is not None and not is_gradient(out, logits))
        or (hess is not None and not is_hessian(hess, out, logits))
        or (weight is not None and not is_plain_weight(weight, logits, out, hess))
        or (sample_weight is not None and not are_plain_factors(sample_weight, logits, out, hess))
        or not are_plain_numbers(label_smoothing, logit_scale, z_loss)
        or not is_for_rows(label_smoothing, z_loss, weight is not None, class_mask is not None, softcap is not None)
        or (class_mask is not None and not is_plain_mask(class_mask, logits, out, hess))
        or not is_plain_factor(grad_output, logits, reduction == "none", out, hess)
        or not is_denominator(denominator, mean)
    ):
        return None
    kind = cnp.PyArray_TYPE(logits)
    n_classes = classes_of(logits)
    n_rows = cnp.PyArray_SIZE(logits) // n_classes
    batch.n_rows = n_rows
    batch.n_classes = n_classes
    batch.with_grad = with_grad
    set_options(&batch, logit_scale, label_smoothing, z_loss, kind == cnp.NPY_FLOAT32)
    if class_mask is not None:
        set_mask(&batch, <uint8_t*>cnp.PyArray_DATA(class_mask), mask_stride_of(class_mask, logits))
    if with_grad and out is None:
        out = new_array(logits, cnp.PyArray_NDIM(logits))
    if with_hess and hess is None:
        hess = new_array(logits, cnp.PyArray_NDIM(logits))
    losses = new_array(logits, cnp.PyArray_NDIM(logits) - 1) if reduction == "none" else None
    n_bytes = memory_of(&batch, threads, kind == cnp.NPY_FLOAT32)
    n_bytes += 2 * n_rows * sizeof(double) if kind_of_loss != NO_TARGET_LOSS else 0
    memory = <char*>malloc((5 * n_rows + n_classes) * sizeof(double) + n_bytes)
    if memory == NULL:
        raise MemoryError("fastce could not allocate its working memory")
    batch.losses = <double*>memory
    batch.ids = <int64_t*>(batch.losses + n_rows)
    batch.sample_weight = doubles_of(sample_weight, batch.losses + 2 * n_rows)
    batch.scales = doubles_of(grad_output if cnp.PyArray_Check(grad_output) else None, batch.losses + 3 * n_rows)
    row_weights = batch.losses + 4 * n_rows
    batch.weight = doubles_of(weight, batch.losses + 5 * n_rows)
    results = batch.losses + 5 * n_rows + n_classes
    batch.memory = <char*>(results + (2 * n_rows if kind_of_loss != NO_TARGET_LOSS else 0))
    try:
        n_live = copy_ids(<cnp.ndarray>targets, batch.ids, n_rows, n_classes, ignored)
        if n_live < 0:
            return None
        divisor = n_live
        if has_weights(&batch):
            if weight is not None and not are_weights(batch.weight, n_classes, 0.0):
                return None
            weights = weights_in(&batch)
            summed = total_weight(&weights, n_rows, NULL if weight is None else row_weights, n_live == n_rows)
            if not summed.are_finite:
                return None
            divisor = summed.total
        if denominator is not None:
            divisor = denominator
        if mean and divisor == 0.0:
            return None
        if sample_weight is not None and summed.n_weightless:
            skip_weightless(&batch)
        if weight is not None:
            batch.weight = NULL
            batch.sample_weight = row_weights
        batch.scale = grad_output if type(grad_output) is float else 1.0
        if mean:
            batch.scale = batch.scale / divisor
        batch.logits = <char*>cnp.PyArray_DATA(logits)
        batch.out = <char*>cnp.PyArray_DATA(out) if with_grad else NULL
        batch.logits_stride = n_classes * cnp.PyArray_ITEMSIZE(logits)
        batch.hess = <char*>cnp.PyArray_DATA(hess) if with_hess else NULL
        batch.out_stride = batch.hess_stride = batch.logits_stride
        if kind_of_loss == NO_TARGET_LOSS:
            take_any_batch(&batch, threads, kind == cnp.NPY_FLOAT32)
            results = batch.losses
        else:
            take_twice(&batch, kind_of_loss, parameter, results, results + n_rows, threads, kind == cnp.NPY_FLOAT32)
        if losses is None:
            losses = pairwise_sum(results, n_rows) / (divisor if mean else 1.0)
        else:
            copy_losses(losses, results, n_rows)
        return (losses, out, hess) if with_hess else (losses, out)
    finally:
        free(memory)


# Losses of the target's probability: a first pass for the cross-entropies that they are made of, and a second one for
# the gradient, each row's by its own factor.
cdef void take_twice(
    Batch* batch, TargetLoss kind, double parameter, double* losses, double* factors, int num_threads, bint single
):
    cdef Batch unweighted = batch[0]
    cdef Weights weights = weights_in(batch)
    cdef Py_ssize_t r
    unweighted.weight = unweighted.sample_weight = NULL
    unweighted.with_grad = False
    unweighted.out = NULL
    take_any_batch(&unweighted, num_threads, single)
    with nogil:
        take_target_losses(kind, parameter, &weights, batch.losses, batch.n_rows, losses, factors)
        for r in range(batch.n_rows):
            factors[r] *= batch.scale if batch.scales == NULL else batch.scales[r]
    if batch.with_grad:
        batch.scales = factors
        take_any_batch(batch, num_threads, single)


def target_losses(
    TargetLoss kind, double parameter, cnp.ndarray cross_entropies, cnp.ndarray losses, cnp.ndarray factors,
    cnp.ndarray ids=None, cnp.ndarray weight=None, cnp.ndarray sample_weight=None,
):
    """Fill `losses` and `factors` (N,) by the rows' `cross_entropies`, all float64, as take_target_losses does."""
    cdef Weights weights = weights_at(ids, weight, sample_weight)
    cdef Py_ssize_t n = cnp.PyArray_DIM(cross_entropies, 0)
    with nogil:
        take_target_losses(
            kind, parameter, &weights, <double*>cnp.PyArray_DATA(cross_entropies), n,
            <double*>cnp.PyArray_DATA(losses), <double*>cnp.PyArray_DATA(factors),
        )


# Rows of sample weight 0 are skipped like ignored ones.
cdef void skip_weightless(Batch* batch) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(batch.n_rows):
        batch.ids[i] = -1 if batch.sample_weight[i] == 0.0 else batch.ids[i]


def takes(double smoothing, double z_loss, bint weighted, bint masked, bint capped):
    """Return whether cross_entropy_rows takes class ids with these options."""
    return is_for_rows(smoothing, z_loss, weighted, masked, capped)


def is_plain_gradient(out, logits):
    """Return whether `out` is a plain writeable array like `logits`, of one and the same memory or apart from it."""
    return is_gradient(out, logits)


cdef void take_any_batch(Batch* batch, int num_threads, bint single):
    if num_threads == 1 and batch.n_rows * batch.n_classes < GIL_ELEMENTS:
        take_batch_of(batch, 1, single)
    else:
        with nogil:
            take_batch_of(batch, num_threads, single)


cdef void take_batch_of(Batch* batch, int num_threads, bint single) noexcept nogil:
    if single:
        take_batch(batch, num_threads, <const float*>NULL)
    else:
        take_batch(batch, num_threads, <const double*>NULL)


cdef Py_ssize_t memory_of(const Batch* batch, int num_threads, bint single) noexcept nogil:
    if single:
        return memory_for(batch, num_threads, <const float*>NULL)
    return memory_for(batch, num_threads, <const double*>NULL)


def encode_ids(cnp.ndarray ids, Py_ssize_t n_classes, cnp.ndarray ignored):
    """Return (lowest row whose id is neither ignored nor in [0, n_classes) or -1, number of live rows).

    If there is no such row, ignored ids in `ids` (N,) int64 are replaced by -1, which is what the kernels skip.
    """
    cdef int64_t* t = <int64_t*>cnp.PyArray_DATA(ids)
    cdef int64_t* skip = <int64_t*>cnp.PyArray_DATA(ignored)
    cdef Py_ssize_t n = cnp.PyArray_DIM(ids, 0), n_skip = cnp.PyArray_DIM(ignored, 0)
    cdef Py_ssize_t i, j, hits, n_bad = 0, n_ignored = 0, first_bad = -1
    with nogil:
        for i in range(n):
            n_bad += <uint64_t>t[i] >= <uint64_t>n_classes
        for j in range(n_skip):
            hits = 0
            for i in range(n):
                hits += t[i] == skip[j]
            n_ignored += hits
            if <uint64_t>skip[j] >= <uint64_t>n_classes:
                n_bad -= hits
        if n_bad:
            first_bad = 0
            while not is_bad(t[first_bad], n_classes, skip, n_skip):
                first_bad += 1
        elif n_ignored:
            for j in range(n_skip):
                for i in range(n):
                    t[i] = -1 if t[i] == skip[j] else t[i]
    return first_bad, n - n_ignored


cdef bint is_bad(int64_t t, Py_ssize_t n_classes, const int64_t* skip, Py_ssize_t n_skip) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(n_skip):
        if t == skip[j]:
            return False
    return <uint64_t>t >= <uint64_t>n_classes


def sum_weights(cnp.ndarray ids, cnp.ndarray weight, cnp.ndarray sample_weight):
    """Return the sum of weight[id] * sample_weight over the rows that are not ignored.

    None counts as 1, for `ids` as rows that all count; one of `weight` and `sample_weight` is given.
    """
    cdef Weights weights = weights_at(ids, weight, sample_weight)
    cdef Py_ssize_t n = cnp.PyArray_DIM(sample_weight if ids is None else ids, 0)
    return total_weight(&weights, n, NULL, ids is None).total


cdef Weights weights_at(cnp.ndarray ids, cnp.ndarray weight, cnp.ndarray sample_weight):
    cdef Weights weights
    weights.ids = NULL if ids is None else <int64_t*>cnp.PyArray_DATA(ids)
    weights.of_classes = NULL if weight is None else <double*>cnp.PyArray_DATA(weight)
    weights.of_samples = NULL if sample_weight is None else <double*>cnp.PyArray_DATA(sample_weight)
    return weights


def sum_losses(cnp.ndarray losses):
    """Return the sum of `losses` (N,) float64: pairwise over fixed blocks, so its bits depend on the values alone."""
    return pairwise_sum(<double*>cnp.PyArray_DATA(losses), cnp.PyArray_DIM(losses, 0))


def has_openmp():
    """Return whether this module was built with OpenMP."""
    return OPENMP != 0


def openmp_limit():
    """Return the number of threads that OpenMP would use for the calling thread, 1 without it."""
    return omp_get_max_threads()
