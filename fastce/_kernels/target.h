/* What the kernels need of the compiler and Cython cannot say: fused multiply-add, bit casts, vectors, rounding modes and
   streaming stores. */
#ifndef FASTCE_TARGET_H
#define FASTCE_TARGET_H

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "fastce must not be built with -ffast-math or -Ofast: they break nan and infinity and change the host process"
#endif

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <fenv.h>
#if FASTCE_OPENMP
#include <omp.h>
#endif

/* a*b + c, rounded once where the target has the instruction. Written out, not left to -ffp-contract, so that every
   target with the instruction gives the same bits. */
static inline float fastce_multiply_add_float(float a, float b, float c)
{
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline double fastce_multiply_add_double(double a, double b, double c)
{
#ifdef __FP_FAST_FMA
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

/* 1 + r + p*r^2, the end of the exponential's polynomial, for the reduced argument r = most + rest. Where products
   and sums are rounded apart, only those small beside `most` are: r itself is not added, nor a product as large as r. */
static inline float fastce_one_plus_float(float p, float r, float most, float rest)
{
#ifdef __FP_FAST_FMAF
    (void)most, (void)rest;
    return __builtin_fmaf(__builtin_fmaf(p, r, 1.0f), r, 1.0f);
#else
    return 1.0f + (most + (rest + r * r * p));
#endif
}

static inline double fastce_one_plus_double(double p, double r, double most, double rest)
{
#ifdef __FP_FAST_FMA
    (void)most, (void)rest;
    return __builtin_fma(__builtin_fma(p, r, 1.0), r, 1.0);
#else
    return 1.0 + (most + (rest + r * r * p));
#endif
}

static inline uint32_t fastce_bits_of_float(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline uint64_t fastce_bits_of_double(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }
static inline float fastce_float_of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline double fastce_double_of_bits(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }

/* x, but unknown to the compiler. */
static inline double fastce_run_time_value(double x)
{
    volatile double value = x;
    return value;
}

/* What was written before is what is read after: the compiler may not go back to where it came from. */
static inline void fastce_compiler_fence(void) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

/* The kernels count on rounding to nearest: the exponential finds its integer by it, two-sums what they lose. A host may
   have set another mode, and OpenMP's threads keep the one they were born in. So every task asks, by two sums that are 1
   in no other mode, and where need be computes in a mode of its own and leaves the thread's as it was. */
typedef struct { int is_set; fenv_t host; } fastce_rounding;

static inline void fastce_round_to_nearest(fastce_rounding *rounding)
{
    double tiny = fastce_run_time_value(0x1p-60);
    rounding->is_set = 1.0 + tiny != 1.0 || 1.0 - tiny != 1.0;
    if (rounding->is_set) {
        fegetenv(&rounding->host);
        fesetround(FE_TONEAREST);
    }
}

static inline void fastce_round_as_before(const fastce_rounding *rounding)
{
    if (rounding->is_set)
        fesetenv(&rounding->host);
}

static inline int fastce_openmp_limit(void)
{
#if FASTCE_OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/* The sum of a short row without its element t, in 8 float64 lanes, lane l over elements l, l + 8, ..., folded to 4; the
   row is read up to the next multiple of 16 and what lies beyond n is left out. Vector types of the target's width, not
   a loop over an array: gcc takes an array of 8 apart into pieces and reloads it whole, which stalls each row by 15
   cycles. */
#if defined(__AVX512F__)
#define FASTCE_BYTES 64
#elif defined(__AVX__)
#define FASTCE_BYTES 32
#else
#define FASTCE_BYTES 16
#endif
#define FASTCE_LANES (FASTCE_BYTES / 8)
typedef double fastce_double_lanes __attribute__((vector_size(FASTCE_BYTES)));
typedef int64_t fastce_double_index __attribute__((vector_size(FASTCE_BYTES)));
typedef float fastce_float_lanes __attribute__((vector_size(FASTCE_BYTES)));
typedef int32_t fastce_float_index __attribute__((vector_size(FASTCE_BYTES)));
typedef float fastce_half_lanes __attribute__((vector_size(FASTCE_BYTES / 2)));

static inline void fastce_add_float(fastce_float_lanes terms, fastce_double_lanes *sum, int part)
{
    union { fastce_float_lanes whole; fastce_half_lanes half[2]; } split = {terms};
    sum[2 * part % (8 / FASTCE_LANES)] += __builtin_convertvector(split.half[0], fastce_double_lanes);
    sum[(2 * part + 1) % (8 / FASTCE_LANES)] += __builtin_convertvector(split.half[1], fastce_double_lanes);
}

static inline void fastce_add_double(fastce_double_lanes terms, fastce_double_lanes *sum, int part)
{
    sum[part % (8 / FASTCE_LANES)] += terms;
}

/* folded[l] = lane l + lane l + 4. */
static inline void fastce_fold(const fastce_double_lanes *sum, double *folded)
{
#if FASTCE_LANES == 8
    typedef double half_lanes __attribute__((vector_size(32)));
    union { fastce_double_lanes whole; half_lanes half[2]; } split = {sum[0]};
    half_lanes both = split.half[0] + split.half[1];
    memcpy(folded, &both, sizeof both);
#else
    for (int i = 0; i < 4 / FASTCE_LANES; i++) {
        fastce_double_lanes both = sum[i] + sum[i + 4 / FASTCE_LANES];
        memcpy(folded + i * FASTCE_LANES, &both, sizeof both);
    }
#endif
}

#define FASTCE_SUM_LANES(type, integer)                                                                               \
    static inline void fastce_sum_lanes_##type(const type *row, ptrdiff_t n, ptrdiff_t t, double *lanes)              \
    {                                                                                                                 \
        enum { step = FASTCE_BYTES / sizeof(type) };                                                                  \
        fastce_double_lanes sum[8 / FASTCE_LANES] = {{0}};                                                            \
        fastce_##type##_index index;                                                                                  \
        for (int l = 0; l < step; l++)                                                                                \
            index[l] = l;                                                                                             \
        for (ptrdiff_t i = 0; i < n; i += 16)                                                                         \
            for (int part = 0; part < 16 / step; part++) {                                                            \
                ptrdiff_t start = i + part * step;                                                                    \
                fastce_##type##_lanes terms;                                                                          \
                fastce_##type##_index taken = (index != (integer)(t - start)) & (index < (integer)(n - start));       \
                memcpy(&terms, row + start, sizeof terms);                                                            \
                terms = (fastce_##type##_lanes)((fastce_##type##_index)terms & taken);                                \
                fastce_add_##type(terms, sum, part);                                                                  \
            }                                                                                                         \
        fastce_fold(sum, lanes);                                                                                      \
    }
FASTCE_SUM_LANES(float, int32_t)
FASTCE_SUM_LANES(double, int64_t)

/* The sum of top - x over a row, 16 elements at a time of which two meet in the dtype, then in 8 float64 lanes that are
   folded to 4; the row is read up to the next multiple of 16. */
#define FASTCE_SUM_BELOW(type, integer)                                                                               \
    static inline void fastce_sum_below_##type(const type *row, ptrdiff_t n, type top, double *folded)                \
    {                                                                                                                 \
        typedef type octet __attribute__((vector_size(8 * sizeof(type))));                                            \
        typedef integer octet_index __attribute__((vector_size(8 * sizeof(type))));                                   \
        typedef double double_octet __attribute__((vector_size(64)));                                                 \
        typedef double double_quad __attribute__((vector_size(32)));                                                  \
        const octet_index index = {0, 1, 2, 3, 4, 5, 6, 7};                                                           \
        union { double_octet whole; double_quad half[2]; } sum = {{0}};                                               \
        octet x, y;                                                                                                   \
        ptrdiff_t i = 0;                                                                                              \
        for (; i + 16 <= n; i += 16) {                                                                                \
            memcpy(&x, row + i, sizeof x);                                                                            \
            memcpy(&y, row + i + 8, sizeof y);                                                                        \
            sum.whole += __builtin_convertvector((top - x) + (top - y), double_octet);                                \
        }                                                                                                             \
        if (i < n) {                                                                                                  \
            memcpy(&x, row + i, sizeof x);                                                                            \
            memcpy(&y, row + i + 8, sizeof y);                                                                        \
            x = (octet)((octet_index)(top - x) & (index < (integer)(n - i)));                                         \
            y = (octet)((octet_index)(top - y) & (index < (integer)(n - i - 8)));                                     \
            sum.whole += __builtin_convertvector(x + y, double_octet);                                                \
        }                                                                                                             \
        sum.half[0] += sum.half[1];                                                                                   \
        memcpy(folded, &sum.half[0], 32);                                                                             \
    }
FASTCE_SUM_BELOW(float, int32_t)
FASTCE_SUM_BELOW(double, int64_t)

/* The sum of a * (top - x) over a row in the same way, where a = 0 beats an infinite difference. */
#define FASTCE_SUM_PRODUCTS(type, integer)                                                                            \
    static inline void fastce_sum_products_##type(const type *a, const type *x, ptrdiff_t n, type top, double *folded) \
    {                                                                                                                 \
        typedef type octet __attribute__((vector_size(8 * sizeof(type))));                                            \
        typedef integer octet_index __attribute__((vector_size(8 * sizeof(type))));                                   \
        typedef double double_octet __attribute__((vector_size(64)));                                                 \
        typedef double double_quad __attribute__((vector_size(32)));                                                  \
        const octet_index index = {0, 1, 2, 3, 4, 5, 6, 7};                                                           \
        union { double_octet whole; double_quad half[2]; } sum = {{0}};                                               \
        for (ptrdiff_t i = 0; i < n; i += 16) {                                                                       \
            octet product[2];                                                                                         \
            for (int part = 0; part < 2; part++) {                                                                    \
                ptrdiff_t start = i + 8 * part;                                                                       \
                octet factor, z;                                                                                      \
                memcpy(&factor, a + start, sizeof factor);                                                            \
                memcpy(&z, x + start, sizeof z);                                                                      \
                octet_index taken = (factor != 0) & (index < (integer)(n - start));                                   \
                product[part] = (octet)((octet_index)(factor * (top - z)) & taken);                                   \
            }                                                                                                         \
            sum.whole += __builtin_convertvector(product[0] + product[1], double_octet);                              \
        }                                                                                                             \
        sum.half[0] += sum.half[1];                                                                                   \
        memcpy(folded, &sum.half[0], 32);                                                                             \
    }
FASTCE_SUM_PRODUCTS(float, int32_t)
FASTCE_SUM_PRODUCTS(double, int64_t)

/* The largest element of a row, and where it is first, 8 lanes at a time; the row is read up to the next multiple of 8.
   A nan is passed over. */
#define FASTCE_LARGER(better, numbers, other, places, other_places, index_type)                                       \
    numbers = (__typeof__(numbers))(((index_type)other & better) | ((index_type)numbers & ~better));                  \
    places = (other_places & better) | (places & ~better);
/* Its lanes against those in another order; written out, for gcc and clang name a shuffle differently. */
#define FASTCE_LARGER_OF(a, b, c, d)                                                                                  \
    x.half[0] = (quad){top.half[0][a], top.half[0][b], top.half[0][c], top.half[0][d]};                               \
    here.half[0] = (quad_index){at.half[0][a], at.half[0][b], at.half[0][c], at.half[0][d]};                          \
    better = (x.half[0] > top.half[0]) | ((x.half[0] == top.half[0]) & (here.half[0] < at.half[0]));                  \
    FASTCE_LARGER(better, top.half[0], x.half[0], at.half[0], here.half[0], quad_index)
#define FASTCE_LARGEST(type, integer)                                                                                 \
    static inline type fastce_largest_##type(const type *row, ptrdiff_t n, ptrdiff_t *place)                          \
    {                                                                                                                 \
        typedef type octet __attribute__((vector_size(8 * sizeof(type))));                                            \
        typedef integer octet_index __attribute__((vector_size(8 * sizeof(type))));                                   \
        typedef type quad __attribute__((vector_size(4 * sizeof(type))));                                             \
        typedef integer quad_index __attribute__((vector_size(4 * sizeof(type))));                                    \
        const octet_index index = {0, 1, 2, 3, 4, 5, 6, 7};                                                           \
        union { octet whole; quad half[2]; } top, x;                                                                  \
        union { octet_index whole; quad_index half[2]; } at = {index}, here;                                          \
        octet_index more;                                                                                             \
        quad_index better;                                                                                            \
        top.whole = (octet){0} - (type)INFINITY;                                                                      \
        for (ptrdiff_t i = 0; i < n; i += 8) {                                                                        \
            memcpy(&x.whole, row + i, sizeof x.whole);                                                                \
            here.whole = index + (integer)i;                                                                          \
            more = (x.whole > top.whole) & (here.whole < (integer)n);                                                 \
            FASTCE_LARGER(more, top.whole, x.whole, at.whole, here.whole, octet_index)                                \
        }                                                                                                             \
        better = (top.half[1] > top.half[0]) | ((top.half[1] == top.half[0]) & (at.half[1] < at.half[0]));            \
        FASTCE_LARGER(better, top.half[0], top.half[1], at.half[0], at.half[1], quad_index)                           \
        FASTCE_LARGER_OF(2, 3, 0, 1)                                                                                  \
        FASTCE_LARGER_OF(1, 0, 3, 2)                                                                                  \
        *place = at.half[0][0];                                                                                       \
        return top.half[0][0];                                                                                        \
    }
FASTCE_LARGEST(float, int32_t)
FASTCE_LARGEST(double, int64_t)

/* Where the one element above `least` is that is not element t, or n; the row is read up to the next multiple of 8. */
#define FASTCE_ABOVE(type, integer)                                                                                   \
    static inline ptrdiff_t fastce_above_##type(const type *row, ptrdiff_t n, ptrdiff_t t, type least)                \
    {                                                                                                                 \
        typedef type octet __attribute__((vector_size(8 * sizeof(type))));                                            \
        typedef integer octet_index __attribute__((vector_size(8 * sizeof(type))));                                   \
        typedef integer quad_index __attribute__((vector_size(4 * sizeof(type))));                                    \
        const octet_index number = {1, 2, 3, 4, 5, 6, 7, 8};                                                          \
        union { octet_index whole; quad_index half[2]; } at = {{0}};                                                  \
        octet x;                                                                                                      \
        for (ptrdiff_t i = 0; i < n; i += 8) {                                                                        \
            memcpy(&x, row + i, sizeof x);                                                                            \
            octet_index taken = (number <= (integer)(n - i)) & (number != (integer)(t + 1 - i));                      \
            at.whole |= (number + (integer)i) & (x > least) & taken;                                                  \
        }                                                                                                             \
        at.half[0] |= at.half[1];                                                                                     \
        integer place = (at.half[0][0] | at.half[0][1]) | (at.half[0][2] | at.half[0][3]);                            \
        return place ? place - 1 : n;                                                                                 \
    }
FASTCE_ABOVE(float, int32_t)
FASTCE_ABOVE(double, int64_t)

/* Rows of whole vectors, by the target's own operations. gcc unrolls a plain loop over one vector of 16 and, by what
   stands around it, packs it again, packs it in uneven pieces or leaves 16 products apart: a third more time for rows of
   10 classes, twice as much where the pieces are then read as one vector. On x86-64 no plain loop says "past the caches"
   either. Elsewhere a vector is one number. */
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__AVX512F__)
#define FASTCE_OP(operation, suffix) _mm512_##operation##_##suffix
#elif defined(__AVX2__)
#define FASTCE_OP(operation, suffix) _mm256_##operation##_##suffix
#else
#define FASTCE_OP(operation, suffix) _mm_##operation##_##suffix
#endif
#define FASTCE_STEP(type) (FASTCE_BYTES / (ptrdiff_t)sizeof(type))
#define FASTCE_LOAD(place, suffix) FASTCE_OP(loadu, suffix)(place)
#define FASTCE_STORE(place, x, suffix) FASTCE_OP(storeu, suffix)(place, x)
#define FASTCE_STREAM(place, x, suffix) FASTCE_OP(stream, suffix)(place, x)
#define FASTCE_ALL(x, suffix) FASTCE_OP(set1, suffix)(x)
#define FASTCE_MULTIPLY(a, b, suffix) FASTCE_OP(mul, suffix)(a, b)
#define FASTCE_SUBTRACT(a, b, suffix) FASTCE_OP(sub, suffix)(a, b)
#ifdef __FP_FAST_FMA
#define FASTCE_MULTIPLY_ADD(a, b, c, suffix) FASTCE_OP(fmadd, suffix)(a, b, c)
#else
#define FASTCE_MULTIPLY_ADD(a, b, c, suffix) FASTCE_OP(add, suffix)(FASTCE_OP(mul, suffix)(a, b), c)
#endif
static inline void fastce_stream_fence(void) { _mm_sfence(); }
#else
#define FASTCE_STEP(type) 1
#define FASTCE_LOAD(place, suffix) (*(place))
#define FASTCE_STORE(place, x, suffix) (*(place) = (x))
#define FASTCE_STREAM FASTCE_STORE
#define FASTCE_ALL(x, suffix) (x)
#define FASTCE_MULTIPLY(a, b, suffix) ((a) * (b))
#define FASTCE_SUBTRACT(a, b, suffix) ((a) - (b))
#define fastce_multiply_add_ps fastce_multiply_add_float
#define fastce_multiply_add_pd fastce_multiply_add_double
#define FASTCE_MULTIPLY_ADD(a, b, c, suffix) fastce_multiply_add_##suffix(a, b, c)
static inline void fastce_stream_fence(void) {}
#endif

/* shift: out = terms * factor + shift. stream: the same past the caches, out at a 64-byte boundary and n whole lines: a
   gradient that does not fit the caches is not read into them first (8 instead of 12 bytes of memory traffic per float32
   element), nor are the logits thrown out for it. weigh: out = terms * push + mass * pull. curve: with p = terms *
   inverse, out = p * (p * bend + curved). lower: out = (z - first) - second. n is a multiple of 16. */
#define FASTCE_VECTORS(type, suffix)                                                                                  \
    static inline void fastce_shift_##type(type *out, const type *terms, ptrdiff_t n, type factor, type shift)        \
    {                                                                                                                 \
        for (ptrdiff_t i = 0; i < n; i += FASTCE_STEP(type))                                                          \
            FASTCE_STORE(out + i, FASTCE_MULTIPLY_ADD(FASTCE_LOAD(terms + i, suffix), FASTCE_ALL(factor, suffix),     \
                                                      FASTCE_ALL(shift, suffix), suffix), suffix);                    \
    }                                                                                                                 \
    static inline void fastce_stream_##type(type *out, const type *terms, ptrdiff_t n, type factor, type shift)       \
    {                                                                                                                 \
        for (ptrdiff_t i = 0; i < n; i += FASTCE_STEP(type))                                                          \
            FASTCE_STREAM(out + i, FASTCE_MULTIPLY_ADD(FASTCE_LOAD(terms + i, suffix), FASTCE_ALL(factor, suffix),    \
                                                       FASTCE_ALL(shift, suffix), suffix), suffix);                   \
    }                                                                                                                 \
    static inline void fastce_weigh_##type(                                                                           \
        type *out, const type *terms, const type *mass, ptrdiff_t n, type push, type pull)                            \
    {                                                                                                                 \
        for (ptrdiff_t i = 0; i < n; i += FASTCE_STEP(type)) {                                                        \
            __typeof__(FASTCE_ALL(push, suffix)) pulled =                                                             \
                FASTCE_MULTIPLY(FASTCE_LOAD(mass + i, suffix), FASTCE_ALL(pull, suffix), suffix);                     \
            FASTCE_STORE(out + i, FASTCE_MULTIPLY_ADD(FASTCE_LOAD(terms + i, suffix), FASTCE_ALL(push, suffix),       \
                                                      pulled, suffix), suffix);                                       \
        }                                                                                                             \
    }                                                                                                                 \
    static inline void fastce_curve_##type(                                                                           \
        type *out, const type *terms, ptrdiff_t n, type inverse, type curved, type bend)                              \
    {                                                                                                                 \
        for (ptrdiff_t i = 0; i < n; i += FASTCE_STEP(type)) {                                                        \
            __typeof__(FASTCE_ALL(inverse, suffix)) p =                                                               \
                FASTCE_MULTIPLY(FASTCE_LOAD(terms + i, suffix), FASTCE_ALL(inverse, suffix), suffix);                 \
            FASTCE_STORE(out + i, FASTCE_MULTIPLY(p, FASTCE_MULTIPLY_ADD(p, FASTCE_ALL(bend, suffix),                 \
                                                                         FASTCE_ALL(curved, suffix), suffix), suffix), \
                         suffix);                                                                                     \
        }                                                                                                             \
    }                                                                                                                 \
    static inline void fastce_lower_##type(type *out, const type *z, ptrdiff_t n, type first, type second)            \
    {                                                                                                                 \
        for (ptrdiff_t i = 0; i < n; i += FASTCE_STEP(type))                                                          \
            FASTCE_STORE(out + i, FASTCE_SUBTRACT(FASTCE_SUBTRACT(FASTCE_LOAD(z + i, suffix),                         \
                                                                  FASTCE_ALL(first, suffix), suffix),                 \
                                                  FASTCE_ALL(second, suffix), suffix), suffix);                       \
    }
FASTCE_VECTORS(float, ps)
FASTCE_VECTORS(double, pd)

/* A hint only: any address will do. */
static inline void fastce_prefetch(const void *address) { __builtin_prefetch(address); }

#endif
