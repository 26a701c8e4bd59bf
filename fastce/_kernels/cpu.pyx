"""What the processor (and the operating system's saved registers) can run; compiled for the baseline."""

cdef extern from *:
    """
    #if defined(__x86_64__)
    static int fastce_runs_v3(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi")
            && __builtin_cpu_supports("bmi2");
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


def runnable_targets():
    """Return the names of the targets that this processor runs, best first."""
    return [name for name, runs in (("v4", fastce_runs_v4()), ("v3", fastce_runs_v3()), ("baseline", True)) if runs]
