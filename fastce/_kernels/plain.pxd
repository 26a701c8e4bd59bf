"""The short ways of calls: which arrays are used as they lie, on how many threads, and how losses are reduced."""

from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memcpy

cimport numpy as cnp

cdef extern from "target.h" nogil:
    void compiler_fence "fastce_compiler_fence" ()

cdef enum:
    MAX_THREADS = 256
    # Larger batches are walked in slabs, between which Ctrl-C is noticed (_engine.py, where these stand too).
    SLAB_ELEMENTS = 1 << 24
    GENERAL_SLAB_ELEMENTS = 1 << 22
    ROW_ELEMENTS = 32


cdef inline bint is_plain(array, int n_axes) noexcept:
    return (
        cnp.PyArray_CheckExact(array)
        and cnp.PyArray_NDIM(array) == n_axes
        and cnp.PyArray_ISCARRAY_RO(array)
    )


cdef inline bint is_native(array) noexcept:
    return cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32 or cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64


cdef inline bint are_apart(out, other) noexcept:
    cdef char* a = <char*>cnp.PyArray_DATA(out)
    cdef char* b = <char*>cnp.PyArray_DATA(other)
    return a + cnp.PyArray_NBYTES(out) <= b or b + cnp.PyArray_NBYTES(other) <= a


# Whether `out` is a plain writeable array like `logits`, of one and the same memory or apart from it.
cdef inline bint is_gradient(out, logits) noexcept:
    return (
        is_plain(out, cnp.PyArray_NDIM(logits))
        and is_plain(logits, cnp.PyArray_NDIM(logits))
        and cnp.PyArray_ISWRITEABLE(out)
        and cnp.PyArray_TYPE(out) == cnp.PyArray_TYPE(logits)
        and cnp.PyArray_SAMESHAPE(out, logits)
        and (cnp.PyArray_DATA(out) == cnp.PyArray_DATA(logits) or are_apart(out, logits))
    )


# Whether a batch has rows and classes, and at most a slab of them.
cdef inline bint is_one_slab(Py_ssize_t n_rows, Py_ssize_t n_classes, Py_ssize_t elements) noexcept:
    return n_rows > 0 and 0 < n_classes <= elements and n_rows <= elements // (n_classes + ROW_ELEMENTS)


# Whether these are logits and, unless it is None, an array for what each of them becomes.
cdef inline bint is_plain_activation(logits, out, Py_ssize_t elements) noexcept:
    return (
        cnp.PyArray_CheckExact(logits)
        and cnp.PyArray_NDIM(logits) > 0
        and is_plain(logits, cnp.PyArray_NDIM(logits))
        and is_native(logits)
        and cnp.PyArray_SIZE(logits) > 0
        and is_one_slab(
            cnp.PyArray_SIZE(logits) // cnp.PyArray_DIM(logits, cnp.PyArray_NDIM(logits) - 1),
            cnp.PyArray_DIM(logits, cnp.PyArray_NDIM(logits) - 1),
            elements,
        )
        and (out is None or is_gradient(out, logits))
    )


cdef inline bint is_denominator(denominator, bint mean) noexcept:
    return denominator is None or (mean and type(denominator) is float and 0.0 < <double>denominator < INFINITY)


# How many threads a call takes, 0 if that is not plain. It may run Python, and with it other threads: this comes before
# anything is looked at that they could change.
cdef inline int threads_of(logits, num_threads, Py_ssize_t serial_elements, choose_threads) except -1:
    if num_threads is None:
        if not cnp.PyArray_Check(logits) or cnp.PyArray_SIZE(logits) < serial_elements:
            return 1
        return choose_threads()
    return num_threads if type(num_threads) is int and 0 < num_threads <= MAX_THREADS else 0


cdef inline bint are_ids(targets, Py_ssize_t n) noexcept:
    return (
        is_plain(targets, 1)
        and (cnp.PyArray_TYPE(targets) == cnp.NPY_INT64 or cnp.PyArray_TYPE(targets) == cnp.NPY_INT32)
        and cnp.PyArray_DIM(targets, 0) == n
    )


# Copies ids with the ignored one as -1; returns how many are live, or -1 if one is out of range. It is the copy that is
# checked: another thread may write to the targets all the while.
cdef inline Py_ssize_t copy_ids(
    cnp.ndarray targets, int64_t* ids, Py_ssize_t n, Py_ssize_t n_classes, int64_t ignored
) noexcept nogil:
    cdef const int32_t* narrow = <const int32_t*>cnp.PyArray_DATA(targets)
    cdef Py_ssize_t i, n_ignored = 0, n_outside = 0
    if cnp.PyArray_TYPE(targets) == cnp.NPY_INT64:
        memcpy(ids, cnp.PyArray_DATA(targets), n * sizeof(int64_t))
    else:
        for i in range(n):
            ids[i] = narrow[i]
    compiler_fence()
    for i in range(n):
        n_outside += 1 if <uint64_t>ids[i] >= <uint64_t>n_classes and ids[i] != ignored else 0
        n_ignored += 1 if ids[i] == ignored else 0
        ids[i] = -1 if ids[i] == ignored else ids[i]
    return n - n_ignored if n_outside == 0 else -1


cdef inline void copy_losses(cnp.ndarray place, const double* losses, Py_ssize_t n) noexcept:
    cdef float* narrow
    cdef Py_ssize_t i
    if cnp.PyArray_TYPE(place) == cnp.NPY_FLOAT64:
        memcpy(cnp.PyArray_DATA(place), losses, n * sizeof(double))
    else:
        narrow = <float*>cnp.PyArray_DATA(place)
        for i in range(n):
            narrow[i] = <float>losses[i]


# Pairwise over fixed blocks, so that the bits depend on the values alone.
cdef inline double pairwise_sum(const double* x, Py_ssize_t n) noexcept nogil:
    cdef double[8] lanes
    cdef Py_ssize_t i, lane, half
    if n > 256:
        half = n // 512 * 256 if n >= 512 else 256
        return pairwise_sum(x, half) + pairwise_sum(x + half, n - half)
    for lane in range(8):
        lanes[lane] = 0.0
    for i in range(0, n - 7, 8):
        for lane in range(8):
            lanes[lane] += x[i + lane]
    for i in range(n - n % 8, n):
        lanes[i % 8] += x[i]
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))
