/* What decides whether a team of threads may be opened: forks, other teams, and threads that cannot be created. */
#ifndef FASTCE_TEAM_H
#define FASTCE_TEAM_H

#include <ctype.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if FASTCE_OPENMP
#include <omp.h>
#endif

/* A forked child must not use the parent's thread pool: its threads do not exist there. */
static volatile int fastce_forked = 0;
static void fastce_note_fork(void) { fastce_forked = 1; }
static inline int fastce_watch_forks(void) { return pthread_atfork(NULL, NULL, fastce_note_fork); }
static inline int fastce_is_forked_child(void) { return fastce_forked; }

/* Whether the calling thread works in a team of another OpenMP region, which has the processors already. */
static inline int fastce_in_team(void)
{
#if FASTCE_OPENMP
    return omp_get_active_level() > 0;
#else
    return 0;
#endif
}

/* The size of the calling thread's last team. OpenMP keeps its threads; a smaller team ends those it does not need. */
static __thread int fastce_team_size = 1;
static inline int fastce_last_team(void) { return fastce_team_size; }
static inline void fastce_set_team(int n) { fastce_team_size = n; }

/* The size of the stacks of OpenMP's threads as its library reads it, in kilobytes unless a unit follows; 0 is the
   system's own. Read once: the library does not look again either. */
static size_t fastce_stack_bytes = 0;
static inline void fastce_read_stack_size(void)
{
    const char *text = getenv("OMP_STACKSIZE");
    char *unit;
    int shift = 10;
    if (!text)
        text = getenv("GOMP_STACKSIZE");
    if (!text)
        return;
    fastce_stack_bytes = strtoul(text, &unit, 10);
    while (isspace((unsigned char)*unit))
        unit++;
    switch (tolower((unsigned char)*unit)) {
    case 'b': shift = 0; break;
    case 'm': shift = 20; break;
    case 'g': shift = 30; break;
    }
    fastce_stack_bytes = fastce_stack_bytes > SIZE_MAX >> shift ? SIZE_MAX : fastce_stack_bytes << shift;
}

typedef struct { pthread_t thread; pthread_mutex_t *gate; long id; } fastce_try;

static void *fastce_wait_for_gate(void *argument)
{
    fastce_try *own = argument;
#if defined(__linux__)
    own->id = syscall(SYS_gettid);
#endif
    pthread_mutex_lock(own->gate);
    pthread_mutex_unlock(own->gate);
    return NULL;
}

/* Waits for a thread's end, and for the system to count it no longer: a moment later. */
static inline void fastce_see_off(fastce_try *other)
{
    pthread_join(other->thread, NULL);
#if defined(__linux__)
    for (int i = 0; i < 1000 && syscall(SYS_tgkill, getpid(), other->id, 0) == 0; i++)
        sched_yield();
#endif
}

/* Creates n threads that live at the same time, with stacks like OpenMP's, and ends them; returns 0, or why one could
   not be created. */
static int fastce_try_threads(int n)
{
    enum { most = 256 };
    fastce_try tries[most];
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_attr_t attributes;
    int started = 0, refused = pthread_attr_init(&attributes);
    if (refused)
        return refused;
    if (fastce_stack_bytes)
        pthread_attr_setstacksize(&attributes, fastce_stack_bytes); /* too small a size is ignored, as OpenMP does */
    pthread_mutex_lock(&gate);
    while (started < n && started < most && !refused) {
        tries[started].gate = &gate;
        refused = pthread_create(&tries[started].thread, &attributes, fastce_wait_for_gate, &tries[started]);
        started += !refused;
    }
    pthread_mutex_unlock(&gate);
    pthread_attr_destroy(&attributes);
    while (started > 0)
        fastce_see_off(&tries[--started]);
    return refused;
}

#endif
