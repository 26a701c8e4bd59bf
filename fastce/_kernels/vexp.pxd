"""exp and log for the row kernels: the algorithms, their error bounds, and where their constants come from.

Coefficients are printed by tools/coefficients.py; the errors named there are those of the polynomials alone:
2^-28.0 for the float32 exp, 2^-57.7 for the float64 exp, 2^-59.4 for the log.
"""

from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "target.h" nogil:
    float multiply_add_float "fastce_multiply_add_float" (float a, float b, float c)
    double multiply_add_double "fastce_multiply_add_double" (double a, double b, double c)
    float one_plus_float "fastce_one_plus_float" (float p, float r, float most, float rest)
    double one_plus_double "fastce_one_plus_double" (double p, double r, double most, double rest)
    uint32_t bits_of_float "fastce_bits_of_float" (float x)
    uint64_t bits_of_double "fastce_bits_of_double" (double x)
    float float_of_bits "fastce_float_of_bits" (uint32_t bits)
    double double_of_bits "fastce_double_of_bits" (uint64_t bits)
    double run_time_value "fastce_run_time_value" (double x)

cdef extern from *:
    double TINY "0x1p-1022"     # the least normal number of float64

ctypedef fused floating:
    float
    double


# What exp_shifted needs of a row: e^(x - offset) * 2^-shift. A literal shift must pass through run_time_value:
# clamping to a literal makes gcc build three operations where one would do.
cdef struct ExpWindow:
    double offset   # subtracted first; not 0 only in rows beyond exp_limit, where the difference is exact
    double shift    # an integer; enters only the exponent of the result
    double low      # where the result becomes exactly 0
    double high     # where it is clamped to about 2^124 (2^1019): the caller sees that in the sum
    double magic    # 1.5 * 2^23 (2^52) + exponent bias - shift


# e^(x - offset) * 2^-shift, for |x - offset| <= exp_limit or x = -inf. The error is at most 0.902 ulp in float32 (all
# numbers, on every target) and below 0.9 in float64 (of 10^7): tests/torture/exponential.py. A larger x never has a
# result smaller by more than one in the last place.
#
#     n = round(x * log2(e)),  r = x - n*ln2,  |r| <= ln2/2,  e^x * 2^-shift = e^r * 2^(n - shift)
#
# x - max is never formed: rounding it would cost |x - max|/2 ulp. ln2 is split so that n * ln2_high is exact. Adding
# `magic` rounds x*log2(e) to n and leaves n - shift + bias in the low bits, which a shift moves into the exponent
# field; at the low clamp that field is 0 and the factor +0.0, so a masked logit (-inf) gives exactly 0. nan passes
# the clamps because a comparison with it is false.
cdef inline floating exp_shifted(
    floating x, floating offset, floating low, floating high, floating magic
) noexcept nogil:
    cdef floating q, n, most, rest, r, p
    x = x - offset
    x = low if low > x else x
    x = high if high < x else x
    if floating is float:
        q = multiply_add_float(x, <float>1.4426950408889634, magic)
        n = q - magic
        most = multiply_add_float(n, <float>-0.693115234375, x)
        rest = n * <float>-3.194618329871446e-05
        r = multiply_add_float(n, <float>-3.194618329871446e-05, most)
        p = multiply_add_float(<float>0.0013745325850322843, r, <float>0.008368946611881256)
        p = multiply_add_float(p, r, <float>0.04166964814066887)
        p = multiply_add_float(p, r, <float>0.166665181517601)
        p = multiply_add_float(p, r, <float>0.49999988079071045)
        p = one_plus_float(p, r, most, rest)
        return p * float_of_bits(bits_of_float(q) << 23)
    else:
        q = multiply_add_double(x, 1.4426950408889634, magic)
        n = q - magic
        most = multiply_add_double(n, -0.6931471805582987, x)
        rest = n * -1.6465949582897082e-12
        r = multiply_add_double(n, -1.6465949582897082e-12, most)
        p = multiply_add_double(2.5020074850572813e-08, r, 2.763090755114223e-07)
        p = multiply_add_double(p, r, 2.755752164644174e-06)
        p = multiply_add_double(p, r, 2.4801491030993337e-05)
        p = multiply_add_double(p, r, 0.00019841269581196487)
        p = multiply_add_double(p, r, 0.0013888888945921057)
        p = multiply_add_double(p, r, 0.008333333333458665)
        p = multiply_add_double(p, r, 0.04166666666651975)
        p = multiply_add_double(p, r, 0.16666666666666471)
        p = multiply_add_double(p, r, 0.5000000000000012)
        p = one_plus_double(p, r, most, rest)
        return p * double_of_bits(bits_of_double(q) << 52)


# The window of a given shift.
cdef inline ExpWindow exp_window(const floating* like, double shift, double offset) noexcept nogil:
    cdef ExpWindow window
    window.offset = offset
    window.shift = shift
    if floating is float:
        window.magic = 12582912.0 + 127 - shift
        window.low = (shift - 127) * 0.6931471805599453
        window.high = (shift + 124) * 0.6931471805599453
    else:
        window.magic = 6755399441055744.0 + 1023 - shift
        window.low = (shift - 1023) * 0.6931471805599453
        window.high = (shift + 1019) * 0.6931471805599453
    return window


# The shift that makes e^pivot about 2^64 (2^512): terms down to 2^-190 (2^-1534) of the pivot's stay normal numbers,
# and logits up to 41 (351) above the pivot are not clamped.
cdef inline double shift_for(const floating* like, double pivot) noexcept nogil:
    cdef double n = round_to_integer(pivot * 1.4426950408889634)
    if floating is float:
        return n - 64
    else:
        return n - 512


cdef inline double round_to_integer(double x) noexcept nogil:
    return (x + 6755399441055744.0) - 6755399441055744.0


# The logarithm of a positive normal x as k*ln2 + log(m), sqrt(1/2) <= m < sqrt(2): log_mantissa and log_exponent.
#
#     f = m - 1 (exact),  s = f / (2 + f),  log(m) = 2 atanh(s) = f - (f^2/2 - s * (f^2/2 + s^2 * R(s^2)))
#
# in the arrangement of fdlibm, whose error is below 0.85 ulp because f carries the value and the rest is a correction.
# 0x3fe6a09e667f3bcd is sqrt(1/2): subtracting it makes the exponent field count from there.
cdef inline double log_mantissa(double x) noexcept nogil:
    cdef double f = mantissa_less_one(x)
    cdef double s = f / (2.0 + f)
    cdef double z = s * s
    cdef double half = 0.5 * f * f
    cdef double p = multiply_add_double(0.14799487338447104, z, 0.1531368752092411)
    p = multiply_add_double(p, z, 0.1818357906686337)
    p = multiply_add_double(p, z, 0.22222198273544116)
    p = multiply_add_double(p, z, 0.28571428745551214)
    p = multiply_add_double(p, z, 0.3999999999939863)
    p = multiply_add_double(p, z, 0.6666666666666737)
    return f - (half - s * (half + z * p))


cdef inline double mantissa_less_one(double x) noexcept nogil:
    cdef uint64_t bits = bits_of_double(x) + (<uint64_t>0x3ff0000000000000 - <uint64_t>0x3fe6a09e667f3bcd)
    return double_of_bits((bits & <uint64_t>0x000fffffffffffff) + <uint64_t>0x3fe6a09e667f3bcd) - 1.0


# 2 atanh(s) / s for z = s^2 by the same series, whose terms meet sooner: where many logarithms are taken.
cdef inline double atanh_series(double z) noexcept nogil:
    cdef double p = multiply_add_double(0.14799487338447104, z, 0.1531368752092411)
    p = multiply_add_double(p, z, 0.1818357906686337)
    p = multiply_add_double(p, z * z, multiply_add_double(0.22222198273544116, z, 0.28571428745551214))
    p = multiply_add_double(p, z * z, multiply_add_double(0.3999999999939863, z, 0.6666666666666737))
    return multiply_add_double(z, p, 2.0)


# k as a double without an integer conversion, which AVX2 lacks: 2^52 + biased exponent, by its bits, minus 2^52 + bias.
cdef inline double log_exponent(double x) noexcept nogil:
    cdef uint64_t bits = bits_of_double(x) + (<uint64_t>0x3ff0000000000000 - <uint64_t>0x3fe6a09e667f3bcd)
    return double_of_bits((bits >> 52) | <uint64_t>0x4330000000000000) - (4503599627370496.0 + 1023.0)


# log(x + rest) of a normal x > 0 is log_by_ratio(ratio_of(x, rest), log_exponent(x)); rest is what x was rounded by, or
# 0. Within 6 * 2^-53: f, 2 + f, s and z are rounded once each, the series and its product with s too. Where k is not 0
# the result is at least ln2/2, beside which that is less; the constant is off by 2^-55 of it, and product and sum are
# rounded.
cdef inline double ratio_of(double x, double rest) noexcept nogil:
    cdef double f = mantissa_less_one(x) + rest
    return f / (2.0 + f)


cdef inline double log_by_ratio(double s, double k) noexcept nogil:
    return multiply_add_double(k, 0.6931471805599453, s * atanh_series(s * s))


# log x of 0 and of denormal x.
cdef inline double log_of_tiny(double x) noexcept nogil:
    cdef double up = x * 18014398509481984.0    # 2^54
    return log_by_ratio(ratio_of(up, 0.0), log_exponent(up) - 54.0) if x > 0 else -INFINITY


# logs[i] = log(x[i] + rest[i]) * factor[i] of any x >= 0, 0 where a factor is; rests are 0 and factors 1 if they are
# NULL. In two loops: in one, an entry is a chain of 90 cycles, of which the processor does not look far enough ahead.
# Tiny x are rare and mended afterwards: choices in a loop make gcc take logarithms on either side of them, and load
# what may be NULL under a mask, which takes 100 cycles there.
cdef inline void take_logs(
    const floating* x, const double* rest, const floating* factor, Py_ssize_t n, double* ratios, double* logs
) noexcept nogil:
    cdef int64_t n_tiny = 0
    cdef Py_ssize_t i
    if rest == NULL:
        for i in range(n):
            ratios[i] = ratio_of(x[i], 0.0)
            logs[i] = log_exponent(x[i])
            n_tiny += 1 if x[i] < TINY else 0
    else:
        for i in range(n):
            ratios[i] = ratio_of(x[i], rest[i])
            logs[i] = log_exponent(x[i])
            n_tiny += 1 if x[i] < TINY else 0
    if factor == NULL:
        for i in range(n):
            logs[i] = log_by_ratio(ratios[i], logs[i])
    else:
        for i in range(n):
            logs[i] = log_by_ratio(ratios[i], logs[i]) * factor[i]
    if n_tiny:
        for i in range(n):
            if x[i] < TINY:
                logs[i] = log_of_tiny(x[i])
                if factor != NULL:
                    logs[i] = logs[i] * factor[i] if factor[i] != 0 else 0.0
