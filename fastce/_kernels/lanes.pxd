"""Sums of exponentials in fixed lanes: the order of the additions depends on a row's length alone."""

from libc.math cimport INFINITY, NAN, fabs
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy

from fastce._kernels.vexp cimport ExpWindow, exp_shifted, exp_window, floating, shift_for

cdef extern from "target.h" nogil:
    void prefetch "fastce_prefetch" (const void* address)
    void stream_fence "fastce_stream_fence" ()
    ctypedef struct Rounding "fastce_rounding":
        pass
    void round_to_nearest "fastce_round_to_nearest" (Rounding* rounding)
    void round_as_before "fastce_round_as_before" (const Rounding* rounding)

cdef enum:
    LANES = 16              # of the sums: one 512-bit vector of float32
    SUM_BLOCK = 128         # elements that meet in the dtype before they are added in float64
    CHUNK = 4096            # elements of a long row that are summed by themselves; half an L1 cache
    # How far ahead logits are asked for: the processor's own prefetch stops at each page of 4 KB. (2048, 32000) took
    # 0.32 ns a logit without, 0.20 with 2 KB, 0.22 with 1, 4 or 8 KB (2 threads).
    PREFETCH_BYTES = 2048


cdef inline Py_ssize_t smaller(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a < b else b


cdef inline Py_ssize_t larger(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a > b else b


cdef inline double larger_of(double a, double b) noexcept nogil:
    return a if a > b else b


cdef inline Py_ssize_t chunks_of(Py_ssize_t n_classes) noexcept nogil:
    return (n_classes + CHUNK - 1) // CHUNK


# The first line of the cache (64 bytes) that begins at an address or behind it.
cdef inline char* next_line(char* address) noexcept nogil:
    return address + (64 - <uintptr_t>address % 64) % 64


# The elements of a buffer for a row's exponentials: whole blocks.
cdef inline Py_ssize_t buffer_elements(Py_ssize_t n) noexcept nogil:
    return (n + SUM_BLOCK - 1) // SUM_BLOCK * SUM_BLOCK


# terms[i] = e^(x[i] - offset) * 2^-shift for i < n. What is left after the whole vectors goes through a buffer filled
# up with -inf: no scalar loop, and nothing is read beyond x[n - 1].
cdef inline void exp_terms(const floating* x, floating* terms, Py_ssize_t n, const ExpWindow* window) noexcept nogil:
    cdef floating offset = <floating>window.offset
    cdef floating low = <floating>window.low
    cdef floating high = <floating>window.high
    cdef floating magic = <floating>window.magic
    cdef Py_ssize_t i, whole = n - n % LANES
    cdef floating[LANES] last
    for i in range(whole):
        terms[i] = exp_shifted(x[i], offset, low, high, magic)
    if whole < n:
        for i in range(LANES):
            last[i] = -INFINITY
        memcpy(last, x + whole, (n - whole) * sizeof(floating))
        for i in range(LANES):
            last[i] = exp_shifted(last[i], offset, low, high, magic)
        memcpy(terms + whole, last, (n - whole) * sizeof(floating))


# The terms of a row's last block, rest < SUM_BLOCK elements, filled up with zeros. Its last vector overlaps the one
# before it: the row has at least LANES elements, and `terms` has LANES of slack in front. A term that was set to 0
# there comes back.
cdef inline void exp_last_block(
    const floating* x, floating* terms, Py_ssize_t rest, floating offset, floating low, floating high, floating magic
) noexcept nogil:
    cdef floating nothing = <floating>(0.0 * magic)     # 0, but not to gcc, which makes a slow "rep stos" of it
    cdef Py_ssize_t lane
    for lane in range(SUM_BLOCK):
        terms[lane] = nothing
    for lane in range(rest - rest % LANES):
        terms[lane] = exp_shifted(x[lane], offset, low, high, magic)
    if rest % LANES:
        for lane in range(rest - LANES, rest):
            terms[lane] = exp_shifted(x[lane], offset, low, high, magic)


# LANES float64 sums in the making. float64 rows carry the rounding errors along (two-sum), which costs next to nothing:
# the adders are idle while the multipliers work on exponentials.
cdef struct Sum:
    double[LANES] total
    double[LANES] error


cdef inline void clear(Sum* sums) noexcept nogil:
    cdef Py_ssize_t lane
    for lane in range(LANES):
        sums.total[lane] = 0.0
        sums.error[lane] = 0.0


cdef inline void add_block(const floating* t, Sum* sums) noexcept nogil:
    cdef Py_ssize_t lane
    for lane in range(LANES):
        add_lane(sums, lane, <double>(
            ((t[lane] + t[lane + 16]) + (t[lane + 32] + t[lane + 48]))
            + ((t[lane + 64] + t[lane + 80]) + (t[lane + 96] + t[lane + 112]))
        ), t)


# The same of top - z.
cdef inline void add_block_below(const floating* z, floating top, Sum* sums) noexcept nogil:
    cdef Py_ssize_t lane
    for lane in range(LANES):
        add_lane(sums, lane, <double>(
            (((top - z[lane]) + (top - z[lane + 16])) + ((top - z[lane + 32]) + (top - z[lane + 48])))
            + (((top - z[lane + 64]) + (top - z[lane + 80])) + ((top - z[lane + 96]) + (top - z[lane + 112])))
        ), z)


# The same of a * (top - z), where a = 0 beats an infinite difference.
cdef inline void add_block_products(const floating* a, const floating* z, floating top, Sum* sums) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(LANES):
        add_lane(sums, i, <double>(
            ((product(a[i], top, z[i]) + product(a[i + 16], top, z[i + 16]))
             + (product(a[i + 32], top, z[i + 32]) + product(a[i + 48], top, z[i + 48])))
            + ((product(a[i + 64], top, z[i + 64]) + product(a[i + 80], top, z[i + 80]))
               + (product(a[i + 96], top, z[i + 96]) + product(a[i + 112], top, z[i + 112])))
        ), z)


cdef inline floating product(floating a, floating top, floating z) noexcept nogil:
    return a * (top - z) if a != 0 else 0


cdef inline void add_lane(Sum* sums, Py_ssize_t lane, double block, const floating* like) noexcept nogil:
    cdef double before, after, part
    if floating is float:
        sums.total[lane] += block
    else:
        before = sums.total[lane]
        after = before + block
        part = after - before
        sums.error[lane] += (before - (after - part)) + (block - part)
        sums.total[lane] = after


cdef inline double total_of(Sum* sums) noexcept nogil:
    cdef Py_ssize_t lane
    for lane in range(LANES):
        sums.total[lane] += sums.error[lane]
    for lane in range(8):
        sums.total[lane] += sums.total[lane + 8]
    for lane in range(4):
        sums.total[lane] += sums.total[lane + 4]
    return (sums.total[0] + sums.total[2]) + (sums.total[1] + sums.total[3])


# An infinite sum has no rounding errors to carry.
cdef inline double finite_total_of(Sum* sums) noexcept nogil:
    cdef Py_ssize_t lane
    for lane in range(LANES):
        sums.error[lane] = sums.error[lane] if fabs(sums.total[lane]) < INFINITY else 0.0
    return total_of(sums)


# total[0] + chunk with what the addition rounded off in total[1] (two-sum).
cdef inline void add_chunk(double* total, double chunk) noexcept nogil:
    cdef double after = total[0] + chunk
    cdef double part = after - total[0]
    total[1] += (total[0] - (after - part)) + (chunk - part)
    total[0] = after


cdef inline double sum_of_chunks(const double* chunks, Py_ssize_t n) noexcept nogil:
    cdef double[2] total
    cdef Py_ssize_t i
    total[0] = total[1] = 0.0
    for i in range(n):
        add_chunk(total, chunks[i])
    return total[0] + total[1]


# The largest of a row; nan counts for nothing.
cdef inline double row_maximum(const floating* x, Py_ssize_t n) noexcept nogil:
    cdef floating[4 * LANES] largest
    cdef Py_ssize_t _, i, lane
    for lane in range(4 * LANES):
        largest[lane] = -INFINITY
    for _ in range(n // (4 * LANES)):
        for lane in range(4 * LANES * <Py_ssize_t>sizeof(floating) // 64):
            prefetch(<char*>x + PREFETCH_BYTES + lane * 64)
        for lane in range(4 * LANES):
            largest[lane] = x[lane] if x[lane] > largest[lane] else largest[lane]
        x += 4 * LANES
    for i in range(n % (4 * LANES)):
        largest[i] = x[i] if x[i] > largest[i] else largest[i]
    for lane in range(2 * LANES):
        largest[lane] = largest[lane] if largest[lane] > largest[lane + 2 * LANES] else largest[lane + 2 * LANES]
    for lane in range(LANES):
        largest[lane] = largest[lane] if largest[lane] > largest[lane + LANES] else largest[lane + LANES]
    for lane in range(8):
        largest[lane] = largest[lane] if largest[lane] > largest[lane + 8] else largest[lane + 8]
    for lane in range(4):
        largest[lane] = largest[lane] if largest[lane] > largest[lane + 4] else largest[lane + 4]
    for lane in range(1, 4):
        largest[0] = largest[0] if largest[0] > largest[lane] else largest[lane]
    return largest[0]


# The largest of every lane so far, and in which block it was first. A nan may hide its neighbours: its row is nan then.
cdef inline void note_largest(
    const floating* z, Py_ssize_t block, floating* largest, floating* where
) noexcept nogil:
    cdef floating here = block, most
    cdef Py_ssize_t i
    for i in range(LANES):
        most = more(
            more(more(z[i], z[i + 16]), more(z[i + 32], z[i + 48])),
            more(more(z[i + 64], z[i + 80]), more(z[i + 96], z[i + 112])),
        )
        where[i] = here if most > largest[i] else where[i]
        largest[i] = most if most > largest[i] else largest[i]


# The same of a row's last block, the `rest` < SUM_BLOCK elements from `start` on; it may look at the one before again.
cdef inline void note_last_block(
    const floating* z, Py_ssize_t start, Py_ssize_t rest, floating* largest, floating* where
) noexcept nogil:
    cdef floating[SUM_BLOCK] last
    if start > 0:
        note_largest(z + rest - SUM_BLOCK, start // SUM_BLOCK, largest, where)
    else:
        fill_block(last, z, rest, <floating>-INFINITY)
        note_largest(last, 0, largest, where)


cdef inline floating more(floating a, floating b) noexcept nogil:
    return a if a > b else b


cdef inline void clear_largest(floating* largest, floating* where) noexcept nogil:
    cdef Py_ssize_t lane
    for lane in range(LANES):
        largest[lane] = -INFINITY
        where[lane] = 0


cdef inline floating largest_lane(floating* lanes) noexcept nogil:
    cdef Py_ssize_t lane
    for lane in range(8):
        lanes[lane] = more(lanes[lane], lanes[lane + 8])
    for lane in range(4):
        lanes[lane] = more(lanes[lane], lanes[lane + 4])
    return more(more(lanes[0], lanes[2]), more(lanes[1], lanes[3]))


# The largest of n numbers of which note_largest has seen every block, and where it is first.
cdef inline floating first_largest(
    const floating* z, Py_ssize_t n, const floating* largest, const floating* where, Py_ssize_t* index
) noexcept nogil:
    cdef floating[LANES] fold
    cdef floating[SUM_BLOCK] last
    cdef floating most, block
    cdef Py_ssize_t lane, start
    cdef int place = SUM_BLOCK, here
    for lane in range(LANES):
        fold[lane] = largest[lane]
    most = largest_lane(fold)
    for lane in range(LANES):
        fold[lane] = -where[lane] if largest[lane] == most else <floating>-INFINITY
    block = -largest_lane(fold)
    start = SUM_BLOCK * <Py_ssize_t>block if block < INFINITY else 0
    z += start
    if n - start < SUM_BLOCK:
        fill_block(last, z, n - start, NAN)
        z = last
    for lane in range(SUM_BLOCK):
        here = <int>lane if z[lane] == most else <int>SUM_BLOCK
        place = here if here < place else place
    index[0] = start + place if place < SUM_BLOCK else 0
    return most


# A short block of n numbers, filled up: whole vectors, of which the last overlaps the one before.
cdef inline void fill_block(floating* block, const floating* numbers, Py_ssize_t n, floating rest) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(SUM_BLOCK):
        block[i] = rest
    if n < LANES:
        for i in range(n):
            block[i] = numbers[i]
        return
    for i in range(n - n % LANES):
        block[i] = numbers[i]
    for i in range(n - LANES, n):
        block[i] = numbers[i]


# The largest magnitude that exp_shifted takes without an offset: n * ln2_high stays exact, and beyond it the
# difference to the maximum is exact wherever a term is not 0 (Sterbenz: those lie within a factor 2 of the maximum).
cdef inline double exp_limit(const floating* x) noexcept nogil:
    if floating is float:
        return 1000.0
    else:
        return 4096.0


# The window of a row whose largest logit is `maximum`; an infinite one makes all terms nan.
cdef inline ExpWindow window_below(const floating* like, double maximum) noexcept nogil:
    cdef double offset = 0.0 if fabs(maximum) <= exp_limit(like) else maximum
    if fabs(maximum) == INFINITY:
        return exp_window(like, 0.0, NAN)
    return exp_window(like, shift_for(like, maximum - offset), offset)


# The sum below which no term of a row was clamped at its window's high end.
cdef inline double sum_limit(const floating* x) noexcept nogil:
    if floating is float:
        return 1.5e37    # 2^123.5
    else:
        return 3.9e306   # 2^1018.5


# Whether a row with this maximum certainly leaves the window that its target's logit sets: its largest term is then
# clamped at 2^124 (2^1019), beyond sum_limit.
cdef inline bint exceeds_window(const floating* x, double maximum, double target) noexcept nogil:
    if floating is float:
        return maximum - target > 42.0      # > (124 - 64 + 1/2) * ln 2
    else:
        return maximum - target > 352.0     # > (1019 - 512 + 1/2) * ln 2
