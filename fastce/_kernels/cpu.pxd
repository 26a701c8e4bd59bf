"""The door by which kernels ask for a team of threads."""

cdef int team_for(int n) noexcept nogil
