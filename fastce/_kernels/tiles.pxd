"""Rows whose classes lie a stride apart: how they are turned, tile by tile, into rows that lie contiguous, and back."""

cimport numpy as cnp

from fastce._kernels.lanes cimport LANES, SUM_BLOCK, larger, prefetch, smaller
from fastce._kernels.small cimport SMALL_CLASSES
from fastce._kernels.vexp cimport floating

cdef extern from "passage.h" nogil:
    void turn_float "fastce_turn_float" (const float* x, Py_ssize_t x_step, float* y, Py_ssize_t y_step)
    void turn_double "fastce_turn_double" (const double* x, Py_ssize_t x_step, double* y, Py_ssize_t y_step)

cdef enum:
    SIDE = 4                # of the squares that are turned
    STRIP = 64              # rows of a tile that are turned class by class: four lines of the cache in float32
    CLASSES_AHEAD = 8       # that are asked for: (1024, 1000) took 1.07 ms without, 0.80 with it (float32, 1 thread)
    TILE_ELEMENTS = 65536   # a quarter MB of float32
    TILE_CLASSES = 32768    # of longer rows even those of one line of the cache would take more than 4 MB


# Rows in C order: groups of `inner` rows that lie side by side, element by element. Strides are in bytes.
cdef struct Grid:
    Py_ssize_t inner
    Py_ssize_t group_stride
    Py_ssize_t class_stride


# That of an array (G, C, n) whose last axis is contiguous.
cdef inline Grid grid_of(cnp.ndarray columns) noexcept:
    cdef Grid grid
    grid.inner = cnp.PyArray_DIM(columns, 2)
    grid.group_stride = cnp.PyArray_STRIDE(columns, 0)
    grid.class_stride = cnp.PyArray_STRIDE(columns, 1)
    return grid


# That of a C-contiguous array, `below` elements from one class to the next.
cdef inline Grid plain_grid(Py_ssize_t n_classes, Py_ssize_t below, Py_ssize_t itemsize) noexcept:
    cdef Grid grid
    grid.inner = below
    grid.class_stride = below * itemsize
    grid.group_stride = n_classes * grid.class_stride
    return grid


# How many rows are a tile: whole lines of the cache.
cdef inline Py_ssize_t tile_rows(Py_ssize_t n_classes) noexcept nogil:
    return larger(LANES, TILE_ELEMENTS // n_classes // LANES * LANES)


cdef inline Py_ssize_t tiles_of(Py_ssize_t n_rows, Py_ssize_t n_classes) noexcept nogil:
    return (n_rows + tile_rows(n_classes) - 1) // tile_rows(n_classes)


# Elements from one row of a tile to the next. Short rows are taken where they lie if nothing is between them; long ones
# a multiple of 4 KB apart would get in each other's way.
cdef inline Py_ssize_t tile_pitch(Py_ssize_t n_classes) noexcept nogil:
    return n_classes if n_classes <= SMALL_CLASSES else ((n_classes + LANES - 1) // LANES | 1) * LANES


cdef inline Py_ssize_t tile_bytes(Py_ssize_t n_classes, Py_ssize_t itemsize) noexcept nogil:
    return ((tile_rows(n_classes) * tile_pitch(n_classes) + SUM_BLOCK) * itemsize + 63) // 64 * 64


cdef inline void load_tile(
    const Grid* grid, const char* x, Py_ssize_t first, Py_ssize_t n, Py_ssize_t n_classes, floating* tile
) noexcept nogil:
    cdef Py_ssize_t done = 0, size, start, step = grid.class_stride // <Py_ssize_t>sizeof(floating)
    cdef Py_ssize_t pitch = tile_pitch(n_classes)
    while done < n:
        start = (first + done) % grid.inner
        size = smaller(grid.inner - start, n - done)
        turn(
            <const floating*>(x + (first + done) // grid.inner * grid.group_stride) + start, step, 1,
            tile + done * pitch, 1, pitch, size, n_classes,
        )
        done += size


cdef inline void store_tile(
    const Grid* grid, char* out, Py_ssize_t first, Py_ssize_t n, Py_ssize_t n_classes, const floating* tile
) noexcept nogil:
    cdef Py_ssize_t done = 0, size, start, step = grid.class_stride // <Py_ssize_t>sizeof(floating)
    cdef Py_ssize_t pitch = tile_pitch(n_classes)
    while done < n:
        start = (first + done) % grid.inner
        size = smaller(grid.inner - start, n - done)
        turn(
            tile + done * pitch, 1, pitch, <floating*>(out + (first + done) // grid.inner * grid.group_stride) + start,
            step, 1, size, n_classes,
        )
        done += size


# y = x for n rows. From one class to the next, and from one row to the next, it is so many elements: 1 for the classes
# of one of them and for the rows of the other.
cdef inline void turn(
    const floating* x, Py_ssize_t x_class, Py_ssize_t x_row, floating* y, Py_ssize_t y_class, Py_ssize_t y_row,
    Py_ssize_t n, Py_ssize_t n_classes,
) noexcept nogil:
    cdef Py_ssize_t strip, start, c, i, r, j, size
    for strip in range((n + STRIP - 1) // STRIP):
        start = strip * STRIP
        size = smaller(STRIP, n - start)
        if size < SIDE or n_classes < SIDE:
            for c in range(n_classes):
                for r in range(start, start + size):
                    y[c * y_class + r * y_row] = x[c * x_class + r * x_row]
            continue
        for i in range((n_classes + SIDE - 1) // SIDE):
            c = smaller(i * SIDE, n_classes - SIDE)     # the last ones overlap those before them
            if x_class > 1:
                for j in range(SIDE):
                    ask_ahead(x + (c + CLASSES_AHEAD + j) * x_class + start * x_row, size)
            for j in range((size + SIDE - 1) // SIDE):
                r = start + smaller(j * SIDE, size - SIDE)
                turn_square(
                    x + c * x_class + r * x_row, larger(x_class, x_row), y + c * y_class + r * y_row,
                    larger(y_class, y_row),
                )


# A strip of a class that comes soon: too short for the processor to notice that it is read in order.
cdef inline void ask_ahead(const floating* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(0, n * <Py_ssize_t>sizeof(floating), 64):
        prefetch(<const char*>x + i)


cdef inline void turn_square(
    const floating* x, Py_ssize_t x_step, floating* y, Py_ssize_t y_step
) noexcept nogil:
    if floating is float:
        turn_float(x, x_step, y, y_step)
    else:
        turn_double(x, x_step, y, y_step)
