"""Print the polynomial coefficients of the kernels: near-minimax fits in 60 digits, rounded one at a time.

    python tools/coefficients.py

exp:  e^r = 1 + r + r^2 * Q(r)            for |r| <= ln2/2, relative error minimised
log:  log((1+s)/(1-s)) = 2s + s^3 * R(s^2)  for |s| <= (sqrt2-1)/(sqrt2+1), relative error minimised
log of a ratio: the same                   for |s| <= 1/5, where (1+s)/(1-s) is between 2/3 and 3/2
tanh: tanh(y) = y + y^3 * T(y^2)           for |y| <= 0.3, relative error minimised
log1p: log1p(e) = e * P(e)                 for 0 <= e <= 1, relative error minimised

A least-squares fit at Chebyshev nodes comes within a few per cent of the minimax error. Rounding a coefficient shifts
the best choice of the others, so they are rounded in order of influence and the rest is fitted anew each time.
"""

import struct

import mpmath as mp

mp.mp.dps = 60
NODES = 60


def fit(target, weight, low, high, powers):
    """Return the coefficients of x**powers that minimise the weighted squares of target - sum at Chebyshev nodes."""
    nodes = [(low + high) / 2 + (high - low) / 2 * mp.cos(mp.pi * (i + 0.5) / NODES) for i in range(NODES)]
    system = mp.matrix(NODES, len(powers))
    values = mp.matrix(NODES, 1)
    for i, x in enumerate(nodes):
        values[i] = weight(x) * target(x)
        for j, power in enumerate(powers):
            system[i, j] = weight(x) * x**power
    solution, _ = mp.qr_solve(system, values)
    return list(solution)


def rounded_fit(target, weight, low, high, degree, round_value):
    """Return coefficients that are floating-point numbers, and the largest weighted error of their polynomial."""
    coefficients = []
    for done in range(degree + 1):

        def remainder(x, known=tuple(coefficients)):
            return target(x) - mp.polyval(known[::-1] or [0], x)

        best = fit(remainder, weight, low, high, range(done, degree + 1))
        coefficients.append(round_value(best[0]))
    grid = [low + (high - low) * i / 4000 for i in range(4001)]
    error = max(abs(weight(x) * (target(x) - mp.polyval(coefficients[::-1], x))) for x in grid)
    return coefficients, error


def exp_quotient(r):
    """(e^r - 1 - r) / r^2 by its series, which does not cancel."""
    return mp.fsum(r**k / mp.factorial(k + 2) for k in range(40))


def log_quotient(z):
    """(2 atanh(s) - 2s) / s^3 with s^2 = z."""
    return mp.fsum(2 * z**k / (2 * k + 3) for k in range(60))


def tanh_quotient(z):
    """(tanh(y) - y) / y^3 with y^2 = z."""
    y = mp.sqrt(z)
    return (mp.tanh(y) - y) / y**3


def float32(value):
    return mp.mpf(struct.unpack("f", struct.pack("f", float(value)))[0])


def float64(value):
    return mp.mpf(float(value))


def leading_bits(value, bits):
    """Return the leading `bits` bits of `value`, so that a product with a small integer is exact."""
    scale = mp.mpf(2) ** (bits - 1 - mp.floor(mp.log(value, 2)))
    return mp.floor(value * scale) / scale


def show(name, coefficients, first, error):
    print(f"{name}: error 2^{mp.nstr(mp.log(error, 2), 5)}")
    for i, value in enumerate(coefficients, first):
        print(f"    c{i} = {float(value)!r}  {float(value).hex()}")


def main():
    """Print every table."""
    half = mp.log(2) / 2 * mp.mpf("1.0001")
    for name, round_value, degree, bits in (("exp float32", float32, 4, 13), ("exp float64", float64, 9, 38)):
        coefficients, error = rounded_fit(
            exp_quotient, lambda r: r**2 / mp.exp(r), -half, half, degree, round_value
        )
        show(name, coefficients, 2, error)
        high = leading_bits(mp.log(2), bits)
        low = round_value(mp.log(2) - high)
        print(f"    ln2 = {float(high)!r} + {float(low)!r}   {float(high).hex()} + {float(low).hex()}")
    for name, largest in (("log", (mp.sqrt(2) - 1) / (mp.sqrt(2) + 1)), ("log of a ratio", mp.mpf(1) / 5)):
        squares = largest**2 * mp.mpf("1.001")
        coefficients, error = rounded_fit(log_quotient, lambda z: z / 2, mp.mpf(0), squares, 6, float64)
        show(name, coefficients, 0, error)
    coefficients, error = rounded_fit(tanh_quotient, lambda z: z, mp.mpf("1e-9"), mp.mpf("0.0901"), 7, float64)
    show("tanh", coefficients, 0, error)
    coefficients, error = rounded_fit(
        lambda e: mp.log1p(e) / e, lambda e: e / mp.log1p(e), mp.mpf("1e-12"), mp.mpf(1), 9, float32
    )
    show("log1p float32", coefficients, 0, error)


if __name__ == "__main__":
    main()
