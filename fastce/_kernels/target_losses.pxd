"""Losses f(p_t) of the target's probability alone, from cross-entropies, whose gradient theirs is but for a factor.

Since dp_t/dz_c = p_t ([c = t] - p_c), the gradient of f is (p_c - [c = t]) times -p_t f'(p_t). With L = -log p_t:

    focal   f = (1 - p_t)^gamma L,        factor = (1 - p_t)^gamma (1 + gamma p_t L / (1 - p_t))
    poly    f = L + epsilon (1 - p_t),    factor = 1 + epsilon p_t

1 - p_t is -expm1(-L), so both are exact for confident rows.
"""

from libc.math cimport INFINITY, exp, expm1, pow

from fastce._kernels.lanes cimport smaller
from fastce._kernels.weights cimport Weights, weights_of

cdef enum TargetLoss:
    NO_TARGET_LOSS
    FOCAL
    POLY


# The losses of n rows and the factors of their gradients, from cross-entropies that have no weights. The losses are
# weighted, where a weight of 0 makes an infinite one 0; the factors are not.
cdef inline void take_target_losses(
    TargetLoss kind, double parameter, const Weights* weights, const double* cross_entropies, Py_ssize_t n,
    double* losses, double* factors,
) noexcept nogil:
    cdef double[256] place
    cdef const double* numbers
    cdef double loss
    cdef Py_ssize_t start, size, r
    for r in range(n):
        if kind == FOCAL:
            losses[r] = focal(cross_entropies[r], parameter, &factors[r])
        else:
            losses[r] = poly(cross_entropies[r], parameter, &factors[r])
    if weights.of_classes == NULL and weights.of_samples == NULL:
        return
    for start in range(0, n, 256):
        size = smaller(256, n - start)
        numbers = weights_of(weights, start, size, place)
        for r in range(size):
            loss = 0.0 if numbers[r] == 0.0 and losses[start + r] == INFINITY else losses[start + r]
            losses[start + r] = numbers[r] * loss + 0.0     # never -0.0


cdef inline double focal(double cross_entropy, double gamma, double* factor) noexcept nogil:
    cdef double probability = exp(-cross_entropy), miss = -expm1(-cross_entropy)
    cdef double focused = pow(miss, gamma), ratio = 0.0
    if miss == 0.0:
        ratio = 1.0     # the limit of p L / (1 - p) at p = 1; at p = 0 it is 0
    elif probability != 0.0:
        ratio = probability * cross_entropy / miss
    factor[0] = focused * (1.0 + gamma * ratio)
    return focused * cross_entropy


cdef inline double poly(double cross_entropy, double epsilon, double* factor) noexcept nogil:
    factor[0] = 1.0 + epsilon * exp(-cross_entropy)
    return cross_entropy - epsilon * expm1(-cross_entropy)
