"""The compiled entry points for what passes through buffers: blocks of rows of any layout and storage type, and back.

Compiled once per CPU target (setup.py). float16 and bfloat16 become float32, exactly, and are rounded to nearest, ties
to even, on their way back, whatever the host's rounding mode; a nan stays one.
"""

from cython.parallel cimport prange
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cimport numpy as cnp

from fastce._kernels.cpu cimport team_for
from fastce._kernels.lanes cimport Rounding, larger, round_as_before, round_to_nearest, smaller
from fastce._kernels.plain cimport MAX_AXES
from fastce._kernels.tiles cimport STRIP, turn
from fastce._kernels.vexp cimport floating

cdef extern from "passage.h" nogil:
    void widen_half "fastce_widen_half" (const uint16_t* halves, float* numbers, Py_ssize_t n)
    void widen_bfloat "fastce_widen_bfloat" (const uint16_t* halves, float* numbers, Py_ssize_t n)
    void narrow_half "fastce_narrow_half" (const float* numbers, uint16_t* halves, Py_ssize_t n)
    void narrow_bfloat "fastce_narrow_bfloat" (const float* numbers, uint16_t* halves, Py_ssize_t n)

cnp.import_array()

cdef enum:
    GIL_ELEMENTS = 4096     # blocks below keep the GIL
    TASK_ELEMENTS = 16384   # the least that a thread takes at a time
    FEW_CLASSES = 16        # of half types that are turned at a time: 4 KB in float32
    GATHERED = 256          # numbers
    # Rows a multiple of 4 KB apart share the places of the nearest cache, which has room for 8: (1024, 64) took 1.17 ns
    # a number 64 rows at a time.
    PAGE = 4096
    CACHE_WAYS = 8
    # How numbers are stored.
    SAME = 0                # as they are computed with
    HALF = 1
    BFLOAT = 2


# A block of rows in two places: an array of any strides, and a buffer, row after row. Rows are numbered in C order:
# `outer` axes, and `n` rows `stride` bytes apart along an inner one.
cdef struct Block:
    char* array
    char* buffer
    int storage
    Py_ssize_t itemsize                 # in the array
    Py_ssize_t width                    # the same in the buffer
    Py_ssize_t n_classes
    Py_ssize_t class_stride
    int n_outer
    Py_ssize_t[MAX_AXES] length
    Py_ssize_t[MAX_AXES] outer_stride   # bytes of the array
    Py_ssize_t[MAX_AXES] outer_place    # bytes of the buffer
    Py_ssize_t n
    Py_ssize_t stride
    Py_ssize_t place
    bint is_turned                      # the rows are neighbours, not the classes
    bint is_store


def load(cnp.ndarray array, cnp.ndarray buffer, bint is_bfloat, int num_threads):
    """Fill the `buffer` (N, C) with the rows of a native aligned array, class axis last, in C order.

    Both are of one type or float16, bfloat16 (as uint16) and float32. What else there is is left to NumPy: the answer
    is False and nothing has been written.
    """
    return carry(array, buffer, is_bfloat, False, num_threads)


def store(cnp.ndarray buffer, cnp.ndarray array, bint is_bfloat, int num_threads):
    """Fill an array with the rows in the `buffer`, rounded; else as in `load`."""
    return carry(array, buffer, is_bfloat, True, num_threads)


cdef bint carry(cnp.ndarray array, cnp.ndarray buffer, bint is_bfloat, bint is_store, int num_threads):
    cdef Block block
    cdef Py_ssize_t size = cnp.PyArray_SIZE(array)
    if not (cnp.PyArray_ISALIGNED(array) and cnp.PyArray_ISNOTSWAPPED(array)):
        return False
    if cnp.PyArray_TYPE(array) == cnp.PyArray_TYPE(buffer):
        block.storage = SAME
    elif cnp.PyArray_TYPE(buffer) != cnp.NPY_FLOAT32:
        return False
    elif cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT16:
        block.storage = HALF
    elif is_bfloat and cnp.PyArray_TYPE(array) == cnp.NPY_UINT16:
        block.storage = BFLOAT
    else:
        return False
    block.array = <char*>cnp.PyArray_DATA(array)
    block.buffer = <char*>cnp.PyArray_DATA(buffer)
    block.itemsize = cnp.PyArray_ITEMSIZE(array)
    block.width = cnp.PyArray_ITEMSIZE(buffer)
    block.is_store = is_store
    measure(&block, array)
    if size < GIL_ELEMENTS:
        carry_block(&block, 1)
    else:
        with nogil:
            carry_block(&block, num_threads)
    return True


# The axes of an array: those of the rows joined where they can be, one of them the inner one.
cdef void measure(Block* block, cnp.ndarray array) noexcept:
    cdef int i, inner = -1, n_axes = cnp.PyArray_NDIM(array)
    cdef Py_ssize_t length, stride, place
    block.n_classes = cnp.PyArray_DIM(array, n_axes - 1)
    block.class_stride = cnp.PyArray_STRIDE(array, n_axes - 1) if block.n_classes > 1 else block.itemsize
    block.n_outer = 0
    place = block.n_classes * block.width
    for i in range(n_axes - 2, -1, -1):
        length = cnp.PyArray_DIM(array, i)
        stride = cnp.PyArray_STRIDE(array, i)
        if length == 1:
            continue
        if block.n_outer and stride == block.outer_stride[block.n_outer - 1] * block.length[block.n_outer - 1]:
            block.length[block.n_outer - 1] *= length
        else:
            block.length[block.n_outer] = length
            block.outer_stride[block.n_outer] = stride
            block.outer_place[block.n_outer] = place
            block.n_outer += 1
        place *= length
    block.is_turned = False
    block.n = 1
    block.stride = block.place = 0
    if block.n_outer:
        inner = 0
        for i in range(block.n_outer):
            if block.outer_stride[i] == block.itemsize and block.class_stride >= block.itemsize * block.length[i]:
                inner = i
                block.is_turned = True
        block.n = block.length[inner]
        block.stride = block.outer_stride[inner]
        block.place = block.outer_place[inner]
        block.n_outer -= 1
        block.length[inner] = block.length[block.n_outer]
        block.outer_stride[inner] = block.outer_stride[block.n_outer]
        block.outer_place[inner] = block.outer_place[block.n_outer]


# In tasks of whole strips of neighbouring rows.
cdef void carry_block(const Block* block, int num_threads) noexcept nogil:
    cdef Py_ssize_t n_rows = larger(STRIP, TASK_ELEMENTS // block.n_classes // STRIP * STRIP)
    cdef Py_ssize_t pieces = (block.n + n_rows - 1) // n_rows, n_tasks = pieces, task
    cdef int i
    for i in range(block.n_outer):
        n_tasks *= block.length[i]
    num_threads = team_for(num_threads if n_tasks > 1 else 1)   # of the kernels' size: OpenMP keeps its threads
    if num_threads == 1:
        for task in range(n_tasks):
            carry_task(block, task // pieces, task % pieces * n_rows, n_rows)
    else:
        for task in prange(n_tasks, num_threads=num_threads, schedule="dynamic", chunksize=1):
            carry_task(block, task // pieces, task % pieces * n_rows, n_rows)


cdef void carry_task(const Block* block, Py_ssize_t outer, Py_ssize_t first, Py_ssize_t n_rows) noexcept nogil:
    cdef Py_ssize_t n = smaller(n_rows, block.n - first), r
    cdef char* array = block.array + first * block.stride
    cdef char* buffer = block.buffer + first * block.place
    cdef Rounding rounding
    cdef int i
    for i in range(block.n_outer):
        array += outer % block.length[i] * block.outer_stride[i]
        buffer += outer % block.length[i] * block.outer_place[i]
        outer //= block.length[i]
    round_to_nearest(&rounding)
    if block.is_turned and block.width == sizeof(float):
        turn_rows(block, array, buffer, n, <const float*>NULL)
    elif block.is_turned and block.width == sizeof(double):
        turn_rows(block, array, buffer, n, <const double*>NULL)
    elif lie_in_a_row(block):
        carry_row(block, array, buffer, n * block.n_classes)
    else:
        for r in range(n):
            carry_row(block, array + r * block.stride, buffer + r * block.place, block.n_classes)
    round_as_before(&rounding)


# Whether the rows of a task follow each other without gaps in both places.
cdef inline bint lie_in_a_row(const Block* block) noexcept nogil:
    return (
        block.class_stride == block.itemsize
        and block.stride == block.n_classes * block.itemsize
        and block.place == block.n_classes * block.width
    )


# n rows that are neighbours in the array, class by class; those of half types by way of a few classes in float32.
cdef inline void turn_rows(
    const Block* block, char* array, char* buffer, Py_ssize_t n, const floating* like
) noexcept nogil:
    cdef Py_ssize_t n_classes = block.n_classes, step = block.class_stride // block.itemsize
    cdef Py_ssize_t pitch = block.place // <Py_ssize_t>sizeof(floating), part, start, size
    cdef Py_ssize_t together = n if block.place % PAGE else CACHE_WAYS
    if block.storage != SAME:
        turn_halves(block, array, <float*>buffer, n)
        return
    for part in range((n + together - 1) // together):
        start = part * together
        size = smaller(together, n - start)
        if block.is_store:
            turn(
                <const floating*>buffer + start * pitch, 1, pitch, <floating*>array + start, step, 1, size, n_classes
            )
        else:
            turn(
                <const floating*>array + start, step, 1, <floating*>buffer + start * pitch, 1, pitch, size, n_classes
            )


cdef inline void turn_halves(const Block* block, char* array, float* rows, Py_ssize_t n) noexcept nogil:
    cdef float[STRIP * FEW_CLASSES] columns
    cdef Py_ssize_t pitch = block.place // <Py_ssize_t>sizeof(float)
    cdef Py_ssize_t strip, few, start, first, size, n_few, c
    for strip in range((n + STRIP - 1) // STRIP):
        start = strip * STRIP
        size = smaller(STRIP, n - start)
        for few in range((block.n_classes + FEW_CLASSES - 1) // FEW_CLASSES):
            first = few * FEW_CLASSES
            n_few = smaller(FEW_CLASSES, block.n_classes - first)
            if block.is_store:
                turn(rows + start * pitch + first, 1, pitch, columns, STRIP, 1, size, n_few)
            for c in range(n_few):
                carry_numbers(
                    block, array + (first + c) * block.class_stride + start * block.itemsize,
                    <char*>(columns + c * STRIP), size,
                )
            if not block.is_store:
                turn(columns, STRIP, 1, rows + start * pitch + first, 1, pitch, size, n_few)


# n numbers, a class apart in the array: side by side there too, or gathered a few at a time.
cdef inline void carry_row(const Block* block, char* array, char* buffer, Py_ssize_t n) noexcept nogil:
    cdef char[8 * GATHERED] gathered
    cdef Py_ssize_t start, size, part
    if block.class_stride == block.itemsize:
        carry_numbers(block, array, buffer, n)
        return
    if block.storage == SAME:
        if block.is_store:
            spread(buffer, block.width, array, block.class_stride, block, n)
        else:
            spread(array, block.class_stride, buffer, block.width, block, n)
        return
    for part in range((n + GATHERED - 1) // GATHERED):
        start = part * GATHERED
        size = smaller(GATHERED, n - start)
        if block.is_store:
            carry_numbers(block, gathered, buffer + start * block.width, size)
            spread(gathered, block.itemsize, array + start * block.class_stride, block.class_stride, block, size)
        else:
            spread(array + start * block.class_stride, block.class_stride, gathered, block.itemsize, block, size)
            carry_numbers(block, gathered, buffer + start * block.width, size)


# n numbers, so many bytes apart in one place and in the other.
cdef inline void spread(
    const char* x, Py_ssize_t x_step, char* y, Py_ssize_t y_step, const Block* block, Py_ssize_t n
) noexcept nogil:
    cdef Py_ssize_t i
    if block.itemsize == 2:
        for i in range(n):
            (<uint16_t*>(y + i * y_step))[0] = (<const uint16_t*>(x + i * x_step))[0]
    elif block.itemsize == 4:
        for i in range(n):
            (<uint32_t*>(y + i * y_step))[0] = (<const uint32_t*>(x + i * x_step))[0]
    elif block.itemsize == 8:
        for i in range(n):
            (<uint64_t*>(y + i * y_step))[0] = (<const uint64_t*>(x + i * x_step))[0]
    else:
        for i in range(n):
            y[i * y_step] = x[i * x_step]


# n numbers that lie side by side in both places.
cdef inline void carry_numbers(const Block* block, char* array, char* buffer, Py_ssize_t n) noexcept nogil:
    if block.storage == SAME:
        if block.is_store:
            memcpy(array, buffer, n * block.itemsize)
        else:
            memcpy(buffer, array, n * block.itemsize)
    elif block.storage == HALF:
        if block.is_store:
            narrow_half(<const float*>buffer, <uint16_t*>array, n)
        else:
            widen_half(<const uint16_t*>array, <float*>buffer, n)
    elif block.is_store:
        narrow_bfloat(<const float*>buffer, <uint16_t*>array, n)
    else:
        widen_bfloat(<const uint16_t*>array, <float*>buffer, n)
