/* What the kernels need of the compiler and Cython cannot say: fused multiply-add, bit casts, restrict, fork, CPU. */
#ifndef FASTCE_TARGET_H
#define FASTCE_TARGET_H

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "fastce must not be built with -ffast-math or -Ofast: they break nan and infinity and change the host process"
#endif

#include <stdint.h>
#include <string.h>
#include <pthread.h>
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

static inline uint32_t fastce_bits_of_float(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline uint64_t fastce_bits_of_double(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }
static inline float fastce_float_of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline double fastce_double_of_bits(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }

static inline int fastce_openmp_limit(void)
{
#if FASTCE_OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/* A forked child must not use the parent's thread pool: its threads do not exist there. */
static volatile int fastce_forked = 0;
static void fastce_note_fork(void) { fastce_forked = 1; }
static inline int fastce_watch_forks(void) { return pthread_atfork(NULL, NULL, fastce_note_fork); }
static inline int fastce_is_forked_child(void) { return fastce_forked; }

#endif
