"""What the machine can run, compiled for the baseline: its instructions, and teams of threads."""

import os
import warnings

cdef extern from *:
    """
    #if defined(__x86_64__)
    #include <cpuid.h>
    /* Not every compiler's __builtin_cpu_supports knows of it; where the system has enabled AVX it may be used. */
    static int fastce_has_f16c(void) {
        unsigned a, b, c, d;
        return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    }
    static int fastce_runs_v3(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi")
            && __builtin_cpu_supports("bmi2") && fastce_has_f16c();
    }
    static int fastce_runs_v4(void) {
        return fastce_runs_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512vl");
    }
    #else
    static int fastce_runs_v3(void) { return 0; }
    static int fastce_runs_v4(void) { return 0; }
    #endif
    """
    bint fastce_runs_v3()
    bint fastce_runs_v4()

cdef extern from "team.h" nogil:
    int OPENMP "FASTCE_OPENMP"
    void read_stack_size "fastce_read_stack_size" ()
    int watch_forks "fastce_watch_forks" ()
    bint is_forked_child "fastce_is_forked_child" ()
    bint in_team "fastce_in_team" ()
    int last_team "fastce_last_team" ()
    void set_team "fastce_set_team" (int n)
    int try_threads "fastce_try_threads" (int n)

watch_forks()
read_stack_size()


def runnable_targets():
    """Return the names of the targets that this processor runs, best first."""
    return [name for name, runs in (("v4", fastce_runs_v4()), ("v3", fastce_runs_v3()), ("baseline", True)) if runs]


# The size of the team that the calling thread may open for n threads' work: n or 1. A forked child stays alone: the
# parent's pool is dead there and would hang it. So does a thread of somebody else's team. Where OpenMP cannot create a
# thread it ends the process; so threads are tried before it must create some, which is when the team grows. (Another
# user of the same OpenMP library who shrinks this thread's team in between is not noticed.)
cdef int team_for(int n) noexcept nogil:
    cdef int refused
    if n <= 1 or not OPENMP or is_forked_child() or in_team():
        return 1
    if n > last_team():
        refused = try_threads(n - 1)
        if refused:
            tell_refused(n, refused)
            return 1
    set_team(n)
    return n


cdef bint told = False


# Once in a process. Under a filter that makes an error of it, the work goes on and the error is printed.
cdef void tell_refused(int n, int refused) noexcept with gil:
    global told
    if not told:
        told = True
        warnings.warn(f"fastce could not start {n} threads ({os.strerror(refused)}); running on 1", RuntimeWarning)
