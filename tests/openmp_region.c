/* Calls a function from within a parallel region, as another library that uses OpenMP might call Python. */
#include <omp.h>

/* Every thread of the region calls work(its number); `levels` regions may be active, one within the other. */
void in_region(int threads, int levels, void (*work)(int))
{
    int before = omp_get_max_active_levels();
    omp_set_max_active_levels(levels);
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num());
    omp_set_max_active_levels(before);
}
