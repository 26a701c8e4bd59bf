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

/* Sums of short rows in 8 float64 lanes, lane l over elements l, l + 8, ..., folded to 4. Rows are read up to the next
   multiple of 16, and what lies beyond their end is left out. Vector types of the target's width, not loops over arrays:
   gcc takes an array of 8 apart into pieces and reloads it whole, which stalls each row by 15 cycles; of wider vectors
   it takes comparisons apart. float32 is widened as it is loaded: to widen it in a register moves its halves about, on
   the one pipe that moves, and comparing the lanes' numbers with the row's length there as well took twice as long. */
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__AVX512DQ__) && defined(__BMI2__)
#define FASTCE_BYTES 64
#elif defined(__x86_64__) && defined(__AVX2__)
#define FASTCE_BYTES 32
#else
#define FASTCE_BYTES 16
#endif
#define FASTCE_LANES (FASTCE_BYTES / 8)
typedef double fastce_lanes __attribute__((vector_size(FASTCE_BYTES)));
typedef int64_t fastce_bits __attribute__((vector_size(FASTCE_BYTES)));
enum { FASTCE_SUMS = 8 / FASTCE_LANES, FASTCE_PARTS = 16 / FASTCE_LANES };

/* Which lanes count: those of the first `rest` elements without element t. */
#if FASTCE_BYTES == 64
typedef __mmask8 fastce_taken;
static inline fastce_taken fastce_take(ptrdiff_t rest, ptrdiff_t t, int part)
{
    unsigned first = _bzhi_u32(0xffff, rest), one = (size_t)t < 16 ? 1u << t : 0;
    return (first & ~one) >> 8 * part;
}

static inline fastce_lanes fastce_widened_float(const float *place)
{
    return (fastce_lanes)_mm512_cvtps_pd(_mm256_loadu_ps(place));
}

static inline fastce_lanes fastce_taken_float(fastce_taken taken, const float *place)
{
    return (fastce_lanes)_mm512_maskz_cvtps_pd(taken, _mm256_loadu_ps(place));
}

static inline fastce_lanes fastce_taken_double(fastce_taken taken, const double *place)
{
    return (fastce_lanes)_mm512_maskz_loadu_pd(taken, place);
}
#else
typedef fastce_bits fastce_taken;
static inline fastce_taken fastce_take(ptrdiff_t rest, ptrdiff_t t, int part)
{
    static const int64_t first[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    static const int64_t one[32] = {[16] = -1};
    fastce_bits is_first, is_one;
    memcpy(&is_first, first + 16 - (rest < 16 ? rest : 16) + part * FASTCE_LANES, sizeof is_first);
    memcpy(&is_one, one + 16 - ((size_t)t < 16 ? t : 16) + part * FASTCE_LANES, sizeof is_one);
    return is_first & ~is_one;
}

static inline fastce_lanes fastce_widened_float(const float *place)
{
#if FASTCE_BYTES == 32
    return (fastce_lanes)_mm256_cvtps_pd(_mm_loadu_ps(place));
#elif defined(__x86_64__)
    return (fastce_lanes)_mm_cvtps_pd(_mm_loadl_pi(_mm_setzero_ps(), (const __m64 *)place));
#else
    return (fastce_lanes){place[0], place[1]};
#endif
}

static inline fastce_lanes fastce_taken_float(fastce_taken taken, const float *place)
{
    return (fastce_lanes)((fastce_bits)fastce_widened_float(place) & taken);
}

static inline fastce_lanes fastce_taken_double(fastce_taken taken, const double *place)
{
    fastce_bits x;
    memcpy(&x, place, sizeof x);
    return (fastce_lanes)(x & taken);
}
#endif

static inline fastce_lanes fastce_where(fastce_taken taken, fastce_lanes x)
{
#if FASTCE_BYTES == 64
    return (fastce_lanes)_mm512_maskz_mov_pd(taken, (__m512d)x);
#else
    return (fastce_lanes)((fastce_bits)x & taken);
#endif
}

static inline fastce_lanes fastce_widened_double(const double *place)
{
    fastce_lanes x;
    memcpy(&x, place, sizeof x);
    return x;
}

/* x where it is to be multiplied by something, else 0, which beats an infinite x. */
static inline fastce_lanes fastce_beside(fastce_lanes factor, fastce_lanes x)
{
    return (fastce_lanes)((fastce_bits)x & (factor != 0));
}

/* folded[l] = lane l + lane l + 4. */
static inline void fastce_fold(const fastce_lanes *sum, double *folded)
{
#if FASTCE_BYTES == 64
    __m256d both = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)sum[0]), _mm512_extractf64x4_pd((__m512d)sum[0], 1));
    memcpy(folded, &both, sizeof both);
#else
    for (int i = 0; i < 4 / FASTCE_LANES; i++) {
        fastce_lanes both = sum[i] + sum[i + 4 / FASTCE_LANES];
        memcpy(folded + i * FASTCE_LANES, &both, sizeof both);
    }
#endif
}

/* lanes: of a row without element t. both: this, and of top - x where x is not `top`, element t. products: of
   a * (top - x), where a = 0 beats an infinite difference. row: all that a general row needs, without element t, where x
   is `top`: of its terms e, of its mass a and of a * (top - x) unless a is NULL, of e * (top - x) if asked for. columns:
   of n rows that lie side by side, one class `width` elements behind the other; `sums` has room for whole vectors. */
#define FASTCE_SUM(type)                                                                                              \
    static inline void fastce_sum_lanes_##type(const type *row, ptrdiff_t n, ptrdiff_t t, double *lanes)              \
    {                                                                                                                 \
        fastce_lanes sum[FASTCE_SUMS] = {{0}};                                                                        \
        for (ptrdiff_t i = 0; i < n; i += 16)                                                                         \
            for (int part = 0; part < FASTCE_PARTS; part++)                                                           \
                sum[part % FASTCE_SUMS] +=                                                                            \
                    fastce_taken_##type(fastce_take(n - i, t - i, part), row + i + part * FASTCE_LANES);              \
        fastce_fold(sum, lanes);                                                                                      \
    }                                                                                                                 \
    static inline void fastce_sum_both_##type(                                                                        \
        const type *row, const type *x, ptrdiff_t n, ptrdiff_t t, double top, double *lanes, double *below)           \
    {                                                                                                                 \
        fastce_lanes sum[FASTCE_SUMS] = {{0}}, differences[FASTCE_SUMS] = {{0}};                                      \
        for (ptrdiff_t i = 0; i < n; i += 16)                                                                         \
            for (int part = 0; part < FASTCE_PARTS; part++) {                                                         \
                fastce_taken taken = fastce_take(n - i, t - i, part);                                                 \
                ptrdiff_t start = i + part * FASTCE_LANES;                                                            \
                sum[part % FASTCE_SUMS] += fastce_taken_##type(taken, row + start);                                   \
                differences[part % FASTCE_SUMS] += fastce_where(taken, top - fastce_widened_##type(x + start));       \
            }                                                                                                         \
        fastce_fold(sum, lanes);                                                                                      \
        fastce_fold(differences, below);                                                                              \
    }                                                                                                                 \
    static inline void fastce_sum_row_##type(                                                                         \
        const type *e, const type *a, const type *x, ptrdiff_t n, ptrdiff_t t, double top, int with_spread,           \
        double *others, double *masses, double *products, double *spreads)                                            \
    {                                                                                                                 \
        fastce_lanes sum[FASTCE_SUMS] = {{0}}, mass[FASTCE_SUMS] = {{0}};                                             \
        fastce_lanes below[FASTCE_SUMS] = {{0}}, spread[FASTCE_SUMS] = {{0}};                                         \
        for (ptrdiff_t i = 0; i < n; i += 16)                                                                         \
            for (int part = 0; part < FASTCE_PARTS; part++) {                                                         \
                ptrdiff_t start = i + part * FASTCE_LANES;                                                            \
                fastce_taken taken = fastce_take(n - i, t - i, part);                                                 \
                fastce_lanes terms = fastce_taken_##type(taken, e + start);                                           \
                fastce_lanes difference = top - fastce_widened_##type(x + start);                                     \
                sum[part % FASTCE_SUMS] += terms;                                                                     \
                if (with_spread)                                                                                      \
                    spread[part % FASTCE_SUMS] += terms * fastce_beside(terms, difference);                           \
                if (a) {                                                                                              \
                    fastce_lanes factor = fastce_taken_##type(taken, a + start);                                      \
                    mass[part % FASTCE_SUMS] += factor;                                                               \
                    below[part % FASTCE_SUMS] += factor * fastce_beside(factor, difference);                          \
                }                                                                                                     \
            }                                                                                                         \
        fastce_fold(sum, others);                                                                                     \
        if (a) {                                                                                                      \
            fastce_fold(mass, masses);                                                                                \
            fastce_fold(below, products);                                                                             \
        }                                                                                                             \
        if (with_spread)                                                                                              \
            fastce_fold(spread, spreads);                                                                             \
    }                                                                                                                 \
    static inline void fastce_sum_products_##type(                                                                    \
        const type *a, const type *x, ptrdiff_t n, double top, double *lanes)                                         \
    {                                                                                                                 \
        double others[4];                                                                                             \
        fastce_sum_row_##type(a, NULL, x, n, -1, top, 1, others, NULL, NULL, lanes);                                  \
    }                                                                                                                 \
    static inline void fastce_sum_columns_##type(                                                                     \
        const type *tile, ptrdiff_t width, ptrdiff_t n_classes, ptrdiff_t n, double *sums)                            \
    {                                                                                                                 \
        for (ptrdiff_t r = 0; r < n; r += FASTCE_LANES) {                                                             \
            fastce_lanes lane[8] = {{0}}, sum;                                                                        \
            const type *column = tile + r;                                                                            \
            for (ptrdiff_t left = n_classes; left > 0; left -= 8, column += 8 * width)                                \
                for (int l = 0; l < 8; l++)                                                                           \
                    if (l < left)                                                                                     \
                        lane[l] += fastce_widened_##type(column + l * width);                                         \
            sum = ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));          \
            memcpy(sums + r, &sum, sizeof sum);                                                                       \
        }                                                                                                             \
    }
FASTCE_SUM(float)
FASTCE_SUM(double)

/* A hint only: any address will do. */
static inline void fastce_prefetch(const void *address) { __builtin_prefetch(address); }

/* The sum of a row's n elements, in 8 lanes, then 4, of which the last may read elements before it again. The highest
   bit of `outside` is set where an element is not in [0, most]: as integers, the bits of all others are above those of
   `most` or have the sign, and so has -0.0. Elements are asked for so many bytes `ahead`. */
#define FASTCE_LOOK(type, integer)                                                                                    \
    static inline double fastce_look_##type(const type *x, ptrdiff_t n, type most, ptrdiff_t ahead, integer *outside) \
    {                                                                                                                 \
        enum { width = FASTCE_BYTES / sizeof(type), four = FASTCE_LANES < 4 ? FASTCE_LANES : 4 };                     \
        typedef integer bits __attribute__((vector_size(FASTCE_BYTES)));                                              \
        typedef integer few_bits __attribute__((vector_size(four * sizeof(type))));                                   \
        typedef type few __attribute__((vector_size(four * sizeof(type))));                                           \
        typedef double few_sums __attribute__((vector_size(four * 8)));                                               \
        static const integer kept[8] = {0, 0, 0, 0, -1, -1, -1, -1};                                                  \
        fastce_lanes sum[FASTCE_SUMS] = {{0}};                                                                        \
        few_sums fourth[4 / four] = {{0}};                                                                            \
        few_bits beyond_few = {0}, number, mask;                                                                      \
        integer limit, one, beyond = 0;                                                                               \
        double lanes[4], rest = 0;                                                                                    \
        ptrdiff_t i = 0;                                                                                              \
        memcpy(&limit, &most, sizeof limit);                                                                          \
        if (n >= 16) {                                                                                                \
            bits beyond_all = {0}, numbers;                                                                           \
            for (; i + 16 <= n; i += 16) {                                                                            \
                for (int part = 0; part < FASTCE_PARTS; part++)                                                       \
                    sum[part % FASTCE_SUMS] += fastce_widened_##type(x + i + part * FASTCE_LANES);                    \
                for (ptrdiff_t byte = 0; byte < (ptrdiff_t)(16 * sizeof(type)); byte += 64)                           \
                    fastce_prefetch((const char *)(x + i) + ahead + byte);                                            \
                for (int start = 0; start < 16; start += width) {                                                     \
                    memcpy(&numbers, x + i + start, sizeof numbers);                                                  \
                    beyond_all |= (limit - numbers) | numbers;                                                        \
                }                                                                                                     \
            }                                                                                                         \
            fastce_fold(sum, lanes);                                                                                  \
            memcpy(fourth, lanes, sizeof fourth);                                                                     \
            for (int lane = 0; lane < width; lane++)                                                                  \
                beyond |= beyond_all[lane];                                                                           \
        }                                                                                                             \
        for (; i + 4 <= n; i += 4)                                                                                    \
            for (int part = 0; part < 4 / four; part++) {                                                             \
                memcpy(&number, x + i + part * four, sizeof number);                                                  \
                fourth[part] += __builtin_convertvector((few)number, few_sums);                                       \
                beyond_few |= (limit - number) | number;                                                              \
            }                                                                                                         \
        if (i < n && n >= 4) {                                                                                        \
            for (int part = 0; part < 4 / four; part++) {                                                             \
                memcpy(&number, x + n - 4 + part * four, sizeof number);                                              \
                memcpy(&mask, kept + n - i + part * four, sizeof mask);                                               \
                fourth[part] += __builtin_convertvector((few)(number & mask), few_sums);                              \
                beyond_few |= (limit - number) | number;                                                              \
            }                                                                                                         \
        } else {                                                                                                      \
            for (; i < n; i++) {                                                                                      \
                rest += x[i];                                                                                         \
                memcpy(&one, x + i, sizeof one);                                                                      \
                beyond |= (limit - one) | one;                                                                        \
            }                                                                                                         \
        }                                                                                                             \
        for (int lane = 0; lane < four; lane++)                                                                       \
            beyond |= beyond_few[lane];                                                                               \
        *outside = beyond;                                                                                            \
        memcpy(lanes, fourth, sizeof lanes);                                                                          \
        return rest + ((lanes[0] + lanes[2]) + (lanes[1] + lanes[3]));                                                \
    }
FASTCE_LOOK(float, uint32_t)
FASTCE_LOOK(double, uint64_t)

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
#if FASTCE_BYTES == 64
#define FASTCE_OP(operation, suffix) _mm512_##operation##_##suffix
#elif FASTCE_BYTES == 32
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
#define FASTCE_ADD(a, b, suffix) FASTCE_OP(add, suffix)(a, b)
#ifdef __FP_FAST_FMA
#define FASTCE_MULTIPLY_ADD(a, b, c, suffix) FASTCE_OP(fmadd, suffix)(a, b, c)
#else
#define FASTCE_MULTIPLY_ADD(a, b, c, suffix) FASTCE_OP(add, suffix)(FASTCE_OP(mul, suffix)(a, b), c)
#endif
/* Of two numbers the second, if one is nan. */
#define FASTCE_LARGER(a, b, suffix) FASTCE_OP(max, suffix)(a, b)
#define FASTCE_FIRST(place, n, suffix) fastce_first_##suffix(place, n)
#define FASTCE_LARGEST_LANE(x, suffix) fastce_largest_lane_##suffix(x)
/* Bit l: whether lanes l are equal. */
#if FASTCE_BYTES == 64
#define FASTCE_EQUAL(a, b, suffix) FASTCE_OP(cmp, suffix##_mask)(a, b, _CMP_EQ_OQ)
#elif FASTCE_BYTES == 32
#define FASTCE_EQUAL(a, b, suffix) FASTCE_OP(movemask, suffix)(FASTCE_OP(cmp, suffix)(a, b, _CMP_EQ_OQ))
#else
#define FASTCE_EQUAL(a, b, suffix) FASTCE_OP(movemask, suffix)(FASTCE_OP(cmpeq, suffix)(a, b))
#endif
/* A vector of which the first n elements are loaded, -inf the others. By bits, not as the smaller of two: valgrind then
   sees that what was loaded beyond them does not matter. */
#define FASTCE_EIGHT(x) x, x, x, x, x, x, x, x
#define FASTCE_FIRST_OF(type, integer, suffix)                                                                        \
    static const integer fastce_within_##type[32] = {FASTCE_EIGHT(-1), FASTCE_EIGHT(-1)};                             \
    static const type fastce_beyond_##type[32] = {FASTCE_EIGHT(0), FASTCE_EIGHT(0), FASTCE_EIGHT(-INFINITY),          \
                                                  FASTCE_EIGHT(-INFINITY)};                                           \
    static inline __typeof__(FASTCE_ALL((type)0, suffix)) fastce_first_##suffix(const type *place, ptrdiff_t n)       \
    {                                                                                                                 \
        ptrdiff_t start = n < 16 ? 16 - n : 0;                                                                        \
        const type *bits = (const type *)(fastce_within_##type + start);                                              \
        __typeof__(FASTCE_ALL((type)0, suffix)) within = FASTCE_LOAD(bits, suffix);                                   \
        within = FASTCE_OP(and, suffix)(within, FASTCE_LOAD(place, suffix));                                          \
        return FASTCE_OP(or, suffix)(within, FASTCE_LOAD(fastce_beyond_##type + start, suffix));                      \
    }
FASTCE_FIRST_OF(float, int32_t, ps)
FASTCE_FIRST_OF(double, int64_t, pd)

#if FASTCE_BYTES == 64
static inline float fastce_largest_lane_ps(__m512 x) { return _mm512_reduce_max_ps(x); }
static inline double fastce_largest_lane_pd(__m512d x) { return _mm512_reduce_max_pd(x); }
#else
static inline float fastce_largest_of_quad(__m128 x)
{
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline double fastce_largest_of_pair(__m128d x)
{
    return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
}
#if FASTCE_BYTES == 32
static inline float fastce_largest_lane_ps(__m256 x)
{
    return fastce_largest_of_quad(_mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
static inline double fastce_largest_lane_pd(__m256d x)
{
    return fastce_largest_of_pair(_mm_max_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1)));
}
#else
static inline float fastce_largest_lane_ps(__m128 x) { return fastce_largest_of_quad(x); }
static inline double fastce_largest_lane_pd(__m128d x) { return fastce_largest_of_pair(x); }
#endif
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
#define FASTCE_ADD(a, b, suffix) ((a) + (b))
#define FASTCE_LARGER(a, b, suffix) ((a) > (b) ? (a) : (b))
#define FASTCE_FIRST(place, n, suffix) (*(place))
#define FASTCE_LARGEST_LANE(x, suffix) (x)
#define FASTCE_EQUAL(a, b, suffix) ((a) == (b))
#define fastce_multiply_add_ps fastce_multiply_add_float
#define fastce_multiply_add_pd fastce_multiply_add_double
#define FASTCE_MULTIPLY_ADD(a, b, c, suffix) fastce_multiply_add_##suffix(a, b, c)
static inline void fastce_stream_fence(void) {}
#endif

/* shift: out = terms * factor + shift. stream: the same past the caches, out at a 64-byte boundary and n whole lines: a
   gradient that does not fit the caches is not read into them first (8 instead of 12 bytes of memory traffic per float32
   element), nor are the logits thrown out for it. weigh: out = terms * push + mass * pull. curve: with p = terms *
   inverse and miss = ((total - terms) + rest) * inverse, out = p * (curved * miss + squared * p). lower: out = (z -
   first) - second. n is a multiple of 16. */
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
        type *out, const type *terms, ptrdiff_t n, type inverse, type total, type rest, type curved, type squared)    \
    {                                                                                                                 \
        for (ptrdiff_t i = 0; i < n; i += FASTCE_STEP(type)) {                                                        \
            __typeof__(FASTCE_ALL(inverse, suffix)) e = FASTCE_LOAD(terms + i, suffix), p, miss;                      \
            p = FASTCE_MULTIPLY(e, FASTCE_ALL(inverse, suffix), suffix);                                              \
            miss = FASTCE_SUBTRACT(FASTCE_ALL(total, suffix), e, suffix);                                             \
            miss = FASTCE_MULTIPLY(FASTCE_ADD(miss, FASTCE_ALL(rest, suffix), suffix), FASTCE_ALL(inverse, suffix),   \
                                   suffix);                                                                           \
            miss = FASTCE_MULTIPLY_ADD(miss, FASTCE_ALL(curved, suffix),                                              \
                                       FASTCE_MULTIPLY(p, FASTCE_ALL(squared, suffix), suffix), suffix);              \
            FASTCE_STORE(out + i, FASTCE_MULTIPLY(p, miss, suffix), suffix);                                          \
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

/* most: the largest element of a row; a nan is passed over. largest: this, and where it is first. The row is read up to
   the next multiple of 16; what lies beyond its end counts for nothing. */
#define FASTCE_LARGEST(type, suffix)                                                                                  \
    static inline type fastce_most_##type(const type *row, ptrdiff_t n)                                               \
    {                                                                                                                 \
        __typeof__(FASTCE_ALL((type)0, suffix)) top = FASTCE_ALL(-(type)INFINITY, suffix);                            \
        for (ptrdiff_t i = 0; i < n; i += FASTCE_STEP(type))                                                          \
            top = FASTCE_LARGER(FASTCE_FIRST(row + i, n - i, suffix), top, suffix);                                   \
        return FASTCE_LARGEST_LANE(top, suffix);                                                                      \
    }                                                                                                                 \
    static inline type fastce_largest_##type(const type *row, ptrdiff_t n, int64_t *place)                            \
    {                                                                                                                 \
        const ptrdiff_t step = FASTCE_STEP(type);                                                                     \
        type most = fastce_most_##type(row, n);                                                                       \
        ptrdiff_t first = n;                                                                                          \
        for (ptrdiff_t i = (n - 1) / step * step; i >= 0; i -= step) {                                                \
            unsigned equal = FASTCE_EQUAL(FASTCE_LOAD(row + i, suffix), FASTCE_ALL(most, suffix), suffix);            \
            equal &= n - i < step ? (1u << (n - i)) - 1 : ~0u;                                                        \
            first = equal ? i + __builtin_ctz(equal) : first;                                                         \
        }                                                                                                             \
        *place = first < n ? first : 0;                                                                               \
        return most;                                                                                                  \
    }
FASTCE_LARGEST(float, ps)
FASTCE_LARGEST(double, pd)

#endif
