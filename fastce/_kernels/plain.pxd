"""The short ways of calls: which arrays are used as they lie, on how many threads, and how losses are reduced."""

from cpython.long cimport PyLong_AsLongLongAndOverflow
from libc.math cimport INFINITY
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cimport numpy as cnp

cdef extern from "target.h" nogil:
    void compiler_fence "fastce_compiler_fence" ()

ctypedef fused narrow:
    int8_t
    uint8_t
    int16_t
    uint16_t
    int32_t
    uint32_t

cdef enum:
    MAX_THREADS = 256
    MAX_AXES = 64           # of an array of NumPy's
    DEFAULT_IGNORED = -100  # of ignore_index; with soft targets no other is meant
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


# Whether this is a plain array of float32 or float64 with any number of axes, of which the last are the classes.
cdef inline bint is_logits(array) noexcept:
    return (
        cnp.PyArray_CheckExact(array)
        and cnp.PyArray_NDIM(array) > 0
        and cnp.PyArray_ISCARRAY_RO(array)
        and is_native(array)
    )


# What `is_logits` says, of one and the same array as the others here.
cdef inline Py_ssize_t classes_of(logits) noexcept:
    return cnp.PyArray_DIM(logits, cnp.PyArray_NDIM(logits) - 1)


# Whether this is a plain array of the shape and the dtype of logits.
cdef inline bint is_like(array, logits) noexcept:
    return (
        is_plain(array, cnp.PyArray_NDIM(logits))
        and cnp.PyArray_TYPE(array) == cnp.PyArray_TYPE(logits)
        and cnp.PyArray_SAMESHAPE(array, logits)
    )


# Whether this is a plain array of the shape that `logits` have without their classes.
cdef inline bint are_rows(array, logits) noexcept:
    return is_plain(array, cnp.PyArray_NDIM(logits) - 1) and begins_like(array, logits, cnp.PyArray_NDIM(array))


# Whether two arrays have the first axes in common. Not by memcmp: an array without axes has no memory for them.
cdef inline bint begins_like(array, logits, int n_axes) noexcept:
    cdef int i
    for i in range(n_axes):
        if cnp.PyArray_DIM(array, i) != cnp.PyArray_DIM(logits, i):
            return False
    return True


cdef inline bint are_apart(out, other) noexcept:
    cdef char* a = <char*>cnp.PyArray_DATA(out)
    cdef char* b = <char*>cnp.PyArray_DATA(other)
    return a + cnp.PyArray_NBYTES(out) <= b or b + cnp.PyArray_NBYTES(other) <= a


# Whether `out` is a plain writeable array like `logits`, of one and the same memory or apart from it.
cdef inline bint is_gradient(out, logits) noexcept:
    return (
        is_plain(logits, cnp.PyArray_NDIM(logits))
        and is_like(out, logits)
        and cnp.PyArray_ISWRITEABLE(out)
        and (cnp.PyArray_DATA(out) == cnp.PyArray_DATA(logits) or are_apart(out, logits))
    )


# Whether a batch has rows and classes, and at most a slab of them.
cdef inline bint is_one_slab(Py_ssize_t n_rows, Py_ssize_t n_classes, Py_ssize_t elements) noexcept:
    return n_rows > 0 and 0 < n_classes <= elements and n_rows <= elements // (n_classes + ROW_ELEMENTS)


# Whether these are logits of at most a slab.
cdef inline bint are_few_logits(logits, Py_ssize_t elements) noexcept:
    return (
        is_logits(logits)
        and cnp.PyArray_SIZE(logits) > 0
        and is_one_slab(cnp.PyArray_SIZE(logits) // classes_of(logits), classes_of(logits), elements)
    )


# The class axis, counted from the first one, of logits that are plain along it, or -1. They have at most a slab of
# elements; `out` is None or an array for what each of them becomes.
cdef inline Py_ssize_t plain_axis(logits, axis, out, Py_ssize_t elements) noexcept:
    cdef int overflow = 0
    cdef Py_ssize_t index, n_axes, n_classes
    if type(axis) is not int or not is_logits(logits) or cnp.PyArray_SIZE(logits) == 0:
        return -1
    n_axes = cnp.PyArray_NDIM(logits)
    index = PyLong_AsLongLongAndOverflow(axis, &overflow)
    if overflow or not -n_axes <= index < n_axes:
        return -1
    index += n_axes if index < 0 else 0
    n_classes = cnp.PyArray_DIM(logits, <int>index)
    if not is_one_slab(cnp.PyArray_SIZE(logits) // n_classes, n_classes, elements):
        return -1
    return index if out is None or is_gradient(out, logits) else -1


# How many elements lie from one class to the next along an axis of C-contiguous logits; 1 where there is but one class.
# By the lengths: the stride of an axis of length 1 may be anything.
cdef inline Py_ssize_t elements_below(cnp.ndarray logits, Py_ssize_t axis) noexcept:
    cdef Py_ssize_t i, below = 1
    if cnp.PyArray_DIM(logits, <int>axis) == 1:
        return 1
    for i in range(axis + 1, cnp.PyArray_NDIM(logits)):
        below *= cnp.PyArray_DIM(logits, <int>i)
    return below


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


# Whether these are integers that copy_ids takes, any that int64 holds.
cdef inline bint are_integers(array) noexcept:
    cdef int kind = cnp.PyArray_TYPE(array)
    return (
        kind == cnp.NPY_INT64 or kind == cnp.NPY_INT32 or kind == cnp.NPY_UINT8 or kind == cnp.NPY_INT8
        or kind == cnp.NPY_INT16 or kind == cnp.NPY_UINT16 or kind == cnp.NPY_UINT32
    )


cdef inline bint are_ids(targets, logits) noexcept:
    return are_rows(targets, logits) and are_integers(targets)


cdef inline bint is_apart_from(array, out, hess) noexcept:
    return (out is None or are_apart(out, array)) and (hess is None or are_apart(hess, array))


# Whether a Hessian's buffer is plain: apart from the logits and from that of the gradient.
cdef inline bint is_hessian(hess, out, logits) noexcept:
    return is_gradient(hess, logits) and are_apart(hess, logits) and (out is None or are_apart(hess, out))


# Whether `weight` is a plain array of one number for each class, apart from `out` and `hess`.
cdef inline bint is_plain_weight(weight, logits, out, hess) noexcept:
    return (
        is_plain(weight, 1)
        and cnp.PyArray_DIM(weight, 0) == classes_of(logits)
        and is_native(weight)
        and is_apart_from(weight, out, hess)
    )


# Whether `factors` is a plain array of one number for each row, apart from `out` and `hess`.
cdef inline bint are_plain_factors(factors, logits, out, hess) noexcept:
    return are_rows(factors, logits) and is_native(factors) and is_apart_from(factors, out, hess)


# Whether `grad_output` is a plain factor: None, a float or, for rows one by one, an array of theirs.
cdef inline bint is_plain_factor(grad_output, logits, bint by_rows, out, hess) noexcept:
    if grad_output is None or type(grad_output) is float:
        return True
    # A factor without axes is a number to the checks.
    return by_rows and cnp.PyArray_NDIM(logits) > 1 and are_plain_factors(grad_output, logits, out, hess)


# Whether `mask` is a plain bool array for all rows or for each, apart from `out` and `hess`, that leaves every row any
# class.
cdef inline bint is_plain_mask(mask, logits, out, hess) noexcept:
    cdef Py_ssize_t n_classes = classes_of(logits)
    if not cnp.PyArray_CheckExact(mask) or cnp.PyArray_TYPE(mask) != cnp.NPY_BOOL:
        return False
    if not (is_plain(mask, 1) and cnp.PyArray_DIM(mask, 0) == n_classes):
        if not (is_plain(mask, cnp.PyArray_NDIM(logits)) and cnp.PyArray_SAMESHAPE(mask, logits)):
            return False
    return is_apart_from(mask, out, hess) and shows_any(
        <const uint8_t*>cnp.PyArray_DATA(mask), cnp.PyArray_SIZE(mask) // n_classes, n_classes
    )


cdef inline bint shows_any(const uint8_t* mask, Py_ssize_t n_rows, Py_ssize_t n_classes) noexcept:
    cdef Py_ssize_t _, c
    for _ in range(n_rows):
        c = 0
        while c < n_classes and mask[c] == 0:
            c += 1
        if c == n_classes:
            return False
        mask += n_classes
    return True


# The bytes from one row's mask to the next, 0 where all rows have one.
cdef inline Py_ssize_t mask_stride_of(mask, logits) noexcept:
    return classes_of(logits) if cnp.PyArray_NDIM(mask) > 1 else 0


# Whether the options that are numbers are floats in their ranges.
cdef inline bint are_plain_numbers(label_smoothing, logit_scale, z_loss) noexcept:
    return (
        type(label_smoothing) is float
        and type(logit_scale) is float
        and type(z_loss) is float
        and 0.0 <= <double>label_smoothing <= 1.0
        and 0.0 < <double>logit_scale < INFINITY
        and 0.0 <= <double>z_loss < INFINITY
    )


# Whether class ids with these options are for the kernels of rows.pyx. Smoothing goes up to 1/2: beyond it the two
# parts of the loss may cancel. z_loss goes up to 1: then it adds no more to the gradient's error than that has anyway.
cdef inline bint is_for_rows(double smoothing, double z_loss, bint weighted, bint masked, bint capped) noexcept:
    if capped or smoothing > 0.5 or z_loss > 1.0 or (masked and smoothing != 0.0):
        return False
    return not weighted or smoothing == z_loss == 0.0


# An array of the dtype of `logits` and of the shape of their first axes.
cdef inline object new_array(logits, int n_axes):
    return cnp.PyArray_EMPTY(n_axes, cnp.PyArray_DIMS(logits), cnp.PyArray_TYPE(logits), 0)


# The numbers of a plain array, where they lie or, if they are float32, as float64 in `place`.
cdef inline double* doubles_of(array, double* place) noexcept:
    cdef const float* narrow
    cdef Py_ssize_t i
    if array is None:
        return NULL
    if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64:
        return <double*>cnp.PyArray_DATA(array)
    narrow = <const float*>cnp.PyArray_DATA(array)
    for i in range(cnp.PyArray_SIZE(array)):
        place[i] = narrow[i]
    return place


cdef inline void widen(const narrow* numbers, int64_t* ids, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        ids[i] = numbers[i]


# Copies ids with the ignored one as -1; returns how many are live, or -1 if one is out of range. It is the copy that is
# checked: another thread may write to the targets all the while.
cdef inline Py_ssize_t copy_ids(
    cnp.ndarray targets, int64_t* ids, Py_ssize_t n, Py_ssize_t n_classes, int64_t ignored
) noexcept nogil:
    cdef const char* numbers = <const char*>cnp.PyArray_DATA(targets)
    cdef int kind = cnp.PyArray_TYPE(targets)
    cdef Py_ssize_t i, n_ignored = 0, n_outside = 0
    if kind == cnp.NPY_INT64:
        memcpy(ids, numbers, n * sizeof(int64_t))
    elif kind == cnp.NPY_INT32:
        widen(<const int32_t*>numbers, ids, n)
    elif kind == cnp.NPY_UINT8:
        widen(<const uint8_t*>numbers, ids, n)
    elif kind == cnp.NPY_INT8:
        widen(<const int8_t*>numbers, ids, n)
    elif kind == cnp.NPY_INT16:
        widen(<const int16_t*>numbers, ids, n)
    elif kind == cnp.NPY_UINT16:
        widen(<const uint16_t*>numbers, ids, n)
    else:
        widen(<const uint32_t*>numbers, ids, n)
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
