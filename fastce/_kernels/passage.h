/* Between the arrays of callers and rows of numbers: transposition and half types, in the target's vectors. */
#ifndef FASTCE_PASSAGE_H
#define FASTCE_PASSAGE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* y = x transposed, 4 x 4 numbers, of which four lie side by side and the next four so many elements further on. gcc
   makes no vectors of the plain loops. */
static inline void fastce_turn_float(const float *x, ptrdiff_t x_step, float *y, ptrdiff_t y_step)
{
#if defined(__x86_64__)
    __m128 a = _mm_loadu_ps(x), b = _mm_loadu_ps(x + x_step);
    __m128 c = _mm_loadu_ps(x + 2 * x_step), d = _mm_loadu_ps(x + 3 * x_step);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(y, a);
    _mm_storeu_ps(y + y_step, b);
    _mm_storeu_ps(y + 2 * y_step, c);
    _mm_storeu_ps(y + 3 * y_step, d);
#else
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            y[j * y_step + i] = x[i * x_step + j];
#endif
}

static inline void fastce_turn_double(const double *x, ptrdiff_t x_step, double *y, ptrdiff_t y_step)
{
#if defined(__x86_64__)
    for (int i = 0; i < 4; i += 2)
        for (int j = 0; j < 4; j += 2) {
            __m128d a = _mm_loadu_pd(x + i * x_step + j), b = _mm_loadu_pd(x + (i + 1) * x_step + j);
            _mm_storeu_pd(y + j * y_step + i, _mm_unpacklo_pd(a, b));
            _mm_storeu_pd(y + (j + 1) * y_step + i, _mm_unpackhi_pd(a, b));
        }
#else
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            y[j * y_step + i] = x[i * x_step + j];
#endif
}

/* float16 and float32. Every float16 is a float32; what is between two float16 is rounded to nearest, ties to even. */
#if defined(__F16C__)
/* The target has the instructions, in groups of 8. */
static inline void fastce_widen_eight(const uint16_t *halves, float *numbers)
{
    _mm256_storeu_ps(numbers, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)halves)));
}

static inline void fastce_narrow_eight(const float *numbers, uint16_t *halves)
{
    __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(numbers), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128((__m128i *)halves, eight);
}
#else
/* By integers, with shifts, sums and choices that SSE2 has. Magnitudes are below 2^31: signed comparisons do.
   Widened, the exponent field is rebiased by 127 - 15 = 112, once more for infinities and nan. Below 2^-14 the bits are
   those of 2^-14 + x in units of its last place, and the difference is exact. */
static inline float fastce_float_of_half(uint16_t half)
{
    int32_t magnitude = (half & 0x7fff) << 13;
    int32_t normal = magnitude + (112 << 23) + (magnitude >= 0x7c00 << 13 ? 112 << 23 : 0);
    int32_t raised = magnitude + (113 << 23), bits;
    float small;
    memcpy(&small, &raised, 4);
    small -= 0x1p-14f;
    memcpy(&bits, &small, 4);
    bits = (magnitude < 1 << 23 ? bits : normal) | (int32_t)((uint32_t)(half & 0x8000) << 16);
    memcpy(&small, &bits, 4);
    return small;
}

/* Narrowed, half a unit of bit 13 (less one if that bit is 0: ties go to even) carries into what is kept. Below 2^-14 the
   unit is 2^-24, that of 0.5f, so adding 0.5 rounds. */
static inline uint16_t fastce_half_of_float(float x)
{
    int32_t bits, magnitude, normal, small;
    float sum;
    memcpy(&bits, &x, 4);
    magnitude = bits & 0x7fffffff;
    normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    memcpy(&sum, &magnitude, 4);
    sum += 0.5f;
    memcpy(&small, &sum, 4);
    small -= 0x3f000000;
    small = magnitude < 0x38800000 ? small : normal;
    small = magnitude >= 0x47800000 ? 0x7c00 : small;
    small = magnitude > 0x7f800000 ? 0x7e00 : small;
    return (uint16_t)(small | ((bits >> 16) & 0x8000));
}

static inline void fastce_widen_eight(const uint16_t *halves, float *numbers)
{
    for (int i = 0; i < 8; i++)
        numbers[i] = fastce_float_of_half(halves[i]);
}

static inline void fastce_narrow_eight(const float *numbers, uint16_t *halves)
{
    for (int i = 0; i < 8; i++)
        halves[i] = fastce_half_of_float(numbers[i]);
}
#endif

static inline void fastce_widen_half(const uint16_t *halves, float *numbers, ptrdiff_t n)
{
    uint16_t last[8] = {0};
    float widened[8];
    ptrdiff_t whole = n - n % 8;
    for (ptrdiff_t i = 0; i < whole; i += 8)
        fastce_widen_eight(halves + i, numbers + i);
    if (whole < n) {
        memcpy(last, halves + whole, (size_t)(n - whole) * sizeof *last);
        fastce_widen_eight(last, widened);
        memcpy(numbers + whole, widened, (size_t)(n - whole) * sizeof *widened);
    }
}

static inline void fastce_narrow_half(const float *numbers, uint16_t *halves, ptrdiff_t n)
{
    float last[8] = {0};
    uint16_t narrowed[8];
    ptrdiff_t whole = n - n % 8;
    for (ptrdiff_t i = 0; i < whole; i += 8)
        fastce_narrow_eight(numbers + i, halves + i);
    if (whole < n) {
        memcpy(last, numbers + whole, (size_t)(n - whole) * sizeof *last);
        fastce_narrow_eight(last, narrowed);
        memcpy(halves + whole, narrowed, (size_t)(n - whole) * sizeof *narrowed);
    }
}

/* bfloat16 is the upper half of a float32. Half a unit of bit 16 (less one if that bit is 0) carries into what is kept;
   a nan only loses digits, but for the one that says that it is quiet. */
static inline void fastce_widen_bfloat(const uint16_t *halves, float *numbers, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)halves[i] << 16;
        memcpy(numbers + i, &bits, 4);
    }
}

static inline void fastce_narrow_bfloat(const float *numbers, uint16_t *halves, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, numbers + i, 4);
        uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
        halves[i] = (uint16_t)(((int32_t)(bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded) >> 16);
    }
}

#endif
