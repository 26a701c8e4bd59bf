/* malloc and its kin, of which the n-th call of an armed thread fails: loaded before the C library (LD_PRELOAD). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

/* In the first block of thread-local memory, so that reading them allocates nothing. */
static __thread long countdown __attribute__((tls_model("initial-exec"))) = -1;
static __thread size_t least __attribute__((tls_model("initial-exec"))) = 0;
static __thread long count __attribute__((tls_model("initial-exec"))) = 0;
static __thread size_t failed __attribute__((tls_model("initial-exec"))) = 0;

/* Have the n-th allocation (from 0) of at least `size` bytes fail in this thread, no other before or after it. */
void failing_malloc_arm(long n, size_t size) { least = size; count = 0; countdown = n; }

/* Let all succeed again; return how many were counted since failing_malloc_arm. */
long failing_malloc_disarm(void) { countdown = -1; return count; }

/* How many bytes the allocation wanted that has failed last. */
size_t failing_malloc_size(void) { return failed; }

static int fails(size_t size)
{
    if (countdown < 0 || size < least)
        return 0;
    if (count++ != countdown)
        return 0;
    failed = size;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size) { return fails(size) ? NULL : __libc_malloc(size); }

void *calloc(size_t n, size_t size)
{
    return fails(n * size) ? NULL : __libc_calloc(n, size);
}

void *realloc(void *old, size_t size) { return fails(size) ? NULL : __libc_realloc(old, size); }

void *memalign(size_t alignment, size_t size) { return fails(size) ? NULL : __libc_memalign(alignment, size); }

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **place, size_t alignment, size_t size)
{
    void *memory = memalign(alignment, size);
    if (memory == NULL)
        return ENOMEM;
    *place = memory;
    return 0;
}
