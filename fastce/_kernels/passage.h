/* Between the arrays of callers and rows of numbers: transposition, in the target's vectors. */
#ifndef FASTCE_PASSAGE_H
#define FASTCE_PASSAGE_H

#include <stddef.h>
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

#endif
