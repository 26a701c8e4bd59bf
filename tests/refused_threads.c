/* Takes pthread_create's place (LD_PRELOAD) and refuses new threads when it is told to, as a system does that has none
   left. Linked against nothing of fastce. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>

typedef int create_function(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

/* How many more may be created; a negative number means any. */
static int allowed = -1;

void allow_threads(int n) { __atomic_store_n(&allowed, n, __ATOMIC_SEQ_CST); }

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    create_function *create = (create_function *)dlsym(RTLD_NEXT, "pthread_create");
    int left = __atomic_load_n(&allowed, __ATOMIC_SEQ_CST);
    if (left == 0)
        return EAGAIN;
    if (left > 0)
        __atomic_sub_fetch(&allowed, 1, __ATOMIC_SEQ_CST);
    return create(thread, attributes, start, argument);
}
