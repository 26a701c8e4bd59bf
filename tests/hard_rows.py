"""Rows on which careless softmax code loses digits: each generator gives logits (N, C) and class ids (N,)."""

import numpy as np

CLASS_COUNTS = [*range(1, 71), 127, 128, 129, 255, 257, 1000, 1023, 1024, 1025, 2047, 2049, 4095, 4096, 4097, 8193]
LARGE_CLASS_COUNTS = [12345, 40000, 65537, 128256]


def smallest_log(dtype):
    """How far below the target the others may lie before their sum leaves the normal numbers."""
    return 87.0 if dtype == np.float32 else 708.0


def every_target(row):
    """One copy of the row for each class as the target."""
    return np.tile(row, (len(row), 1)), np.arange(len(row))


def confident(dtype, rng):
    """[D, 0, ..., 0] with target 0 for D from 0 to where the loss underflows, and with a wrong target."""
    for classes in (2, 3, 10, 33, 100):
        leads = np.linspace(0, 1.2 * smallest_log(dtype), 400).astype(dtype)
        logits = np.zeros((len(leads), classes), dtype)
        logits[:, 0] = leads
        yield logits, np.zeros(len(leads), int)
        yield logits, np.full(len(leads), classes - 1)
        yield -logits, np.zeros(len(leads), int)
        yield -logits, np.full(len(leads), classes - 1)


def far_below(dtype, rng):
    """Very many classes, each of which is tiny beside the target: only their sum counts."""
    for classes in (1000, 100_000, 128_256):
        for depth in (16.0, 17.0, 25.0, 60.5, smallest_log(dtype) + np.log(classes) - 3, 95.0):
            logits = np.full((2, classes), -depth, dtype)
            targets = np.array([0, classes // 2 + 1])
            logits[[0, 1], targets] = 0
            yield logits, targets
            yield logits + dtype.type(depth), targets
    # Each further chunk of 4096 classes adds a little less than what would change the last digit of a float64 sum.
    logits = np.full((2, 262_144), -np.log(4096 / (0.95 * 2.0**-53)), dtype)
    targets = np.array([1, 262_143])
    logits[:, 0] = logits[[0, 1], targets] = 0
    yield logits, targets


def one_large_many_small(dtype, rng):
    """One class above very many equal ones, the target among the small."""
    for classes in (50, 1000, 5000, 128_256):
        for height in (5.0, 10.0, 16.6, 17.3, 24.0, 40.0, 80.0, 88.5):
            logits = np.zeros((2, classes), dtype)
            logits[0, classes // 3] = height
            logits[1] = -height
            logits[1, -1] = 0
            yield logits, np.array([classes - 1, 0])


def next_to_the_maximum(dtype, rng):
    """The target is tied with the maximum, or one unit in the last place above or below it."""
    for magnitude in (1.0, 3.7, 59.9, 88.0, 999.0, 1e4, 1e8):
        for classes in (2, 5, 64, 65, 1000):
            row = rng.normal(-5, 3, classes).astype(dtype) - dtype.type(20)
            row += dtype.type(magnitude)
            top = dtype.type(magnitude)
            rows = np.tile(row, (3, 1))
            rows[:, -1] = top
            rows[0, 0] = np.nextafter(top, dtype.type(-np.inf))
            rows[1, 0] = top
            rows[2, 0] = np.nextafter(top, dtype.type(np.inf))
            yield rows, np.zeros(3, int)
            yield rows, np.full(3, classes - 1)
            yield -rows, np.zeros(3, int)


def alternating(dtype, rng):
    """Plus and minus the same number: the range of a row at and beyond that of exp."""
    for height in (1.0, 44.0, 59.99, 60.01, 87.0, 88.0, 88.8, 353.0, 499.9, 999.9, 1000.1, 5e4):
        for classes in (2, 7, 64, 129, 1000, 4097):
            row = np.where(np.arange(classes) % 2, -height, height).astype(dtype)
            yield np.stack([row, row, -row, -row]), np.array([0, 1, 0, 1])


def around_limits(dtype, rng):
    """Ordinary rows with one entry just inside or outside |x| = 60 and |x| = 1000, where kernels change their way."""
    for limit in (60.0, 1000.0):
        inside = np.nextafter(dtype.type(limit), dtype.type(0))
        outside = np.nextafter(dtype.type(limit), dtype.type(np.inf))
        for classes in (2, 10, 33, 100, 1000, 4097):
            for edge in (inside, dtype.type(limit), outside):
                rows = rng.normal(0, 3, (6, classes)).astype(dtype)
                rows[[0, 1], 0] = edge, -edge
                rows[[2, 3], -1] = edge, -edge
                rows[4] += edge
                rows[5] -= edge
                yield rows, rng.integers(0, classes, 6)
                yield rows, np.array([0, 0, classes - 1, classes - 1, 0, 0])


def wide(dtype, rng):
    """Ranges far beyond that of exp, uniform, and magnitudes of every exponent."""
    for classes in (3, 10, 48, 100, 1000, 4100):
        for spread in (100.0, 200.0, 1500.0, 1e5):
            yield rng.uniform(-spread, spread, (8, classes)).astype(dtype), rng.integers(0, classes, 8)
        ramp = np.linspace(-104, 104, classes).astype(dtype)
        yield np.stack([ramp, ramp[::-1]]), np.array([classes - 1, classes // 2])
        powers = np.ldexp(rng.choice([-1.0, 1.0], (8, classes)), rng.integers(-60, 12, (8, classes))).astype(dtype)
        yield powers, rng.integers(0, classes, 8)


def offsets(dtype, rng):
    """A common offset, from where rounding starts to matter to 1e8 and beyond."""
    for offset in (20.0, 300.0, 500.0, 900.0, 990.0, 1e4, 2.0**23, 1e8, 1e15):
        for classes in (2, 10, 100, 1000, 5000):
            step = max(np.spacing(dtype.type(offset)), dtype.type(1 / 64))
            small = (rng.integers(-12, 12, (4, classes)) * step).astype(dtype)
            for sign in (1, -1):
                yield small + dtype.type(sign * offset), rng.integers(0, classes, 4)


def masked(dtype, rng):
    """Minus infinity sprinkled over rows, in blocks, and everywhere but at the target."""
    for classes in (2, 10, 47, 100, 1000, 4100):
        rows = rng.normal(0, 4, (8, classes)).astype(dtype)
        targets = rng.integers(0, classes, 8)
        rows[rng.random(rows.shape) < 0.3] = -np.inf
        rows[1, : classes // 2] = -np.inf
        rows[2, classes // 2 :] = -np.inf
        rows[3] = -np.inf
        rows[4] *= dtype.type(40)
        rows[5] *= dtype.type(1000)
        rows[np.arange(8), targets] = [0.5, -3, 2, 7, -60, 30, 1.5, -70]
        yield rows, targets


def huge(dtype, rng):
    """Numbers near the end of the dtype's range."""
    top = float(np.finfo(dtype).max)
    for classes in (2, 10, 65, 1000):
        for size in (3e38, 1e30, top / 4, top):
            row = rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0], classes) * size
            row[:2] = size, -size
            row = row.astype(dtype)
            yield np.stack([row, row, row[::-1], -row]), np.array([0, 1, classes // 2, 1])


def tiny(dtype, rng):
    """Subnormal logits and zeros of both signs, which all mean the same."""
    step = np.finfo(dtype).smallest_subnormal
    for classes in (2, 10, 100, 1000):
        yield (rng.integers(-3, 4, (4, classes)) * step).astype(dtype), rng.integers(0, classes, 4)
        yield np.where(rng.random((4, classes)) < 0.5, 0.0, -0.0).astype(dtype), rng.integers(0, classes, 4)


def multiples_of_half_ln2(dtype, rng):
    """Around k ln(2)/2, where the argument reduction of exp rounds one way or the other."""
    reach = int(1.05 * smallest_log(dtype) / np.log(2) * 2)
    middles = (np.arange(-reach, reach + 1) * (np.log(2) / 2)).astype(dtype)
    for ulps in range(-3, 4):
        x = middles + ulps * np.spacing(middles)
        logits = np.stack([x, np.zeros_like(x)], axis=1)
        yield logits, np.zeros(len(x), int)
        yield logits, np.ones(len(x), int)


def pairs(dtype, rng):
    """Two classes, very many differences: exp and log1p at work on single numbers."""
    x = rng.uniform(-1.02 * smallest_log(dtype), 1.02 * smallest_log(dtype), 20_000).astype(dtype)
    base = rng.uniform(-500, 500, len(x)).astype(dtype)
    logits = np.stack([x, np.zeros_like(x)], axis=1)
    yield logits, np.zeros(len(x), int)
    yield logits, np.ones(len(x), int)
    yield logits + base[:, None], rng.integers(0, 2, len(x))
    near = np.stack([rng.uniform(-1, 1, len(x)), np.zeros(len(x))], axis=1).astype(dtype)
    yield near, rng.integers(0, 2, len(x))


def ordinary(dtype, rng):
    """Normal logits, of every number of classes that a kernel might treat in its own way."""
    for classes in CLASS_COUNTS:
        yield rng.normal(0, 3, (5, classes)).astype(dtype), rng.integers(0, classes, 5)
    for classes in LARGE_CLASS_COUNTS:
        yield rng.normal(0, 3, (2, classes)).astype(dtype), rng.integers(0, classes, 2)
        yield rng.normal(0, 30, (2, classes)).astype(dtype), rng.integers(0, classes, 2)


def every_lane(dtype, rng):
    """The maximum, which is also the target, in every position of a row; and the target elsewhere."""
    for classes in (7, 16, 65, 131, 259):
        logits, targets = every_target(rng.normal(0, 2, classes).astype(dtype))
        logits[targets, targets] = 30
        yield logits, targets
        yield logits, (targets + 1) % classes
        yield logits + dtype.type(70), targets


GENERATORS = [
    confident,
    far_below,
    one_large_many_small,
    next_to_the_maximum,
    alternating,
    around_limits,
    wide,
    offsets,
    masked,
    huge,
    tiny,
    multiples_of_half_ln2,
    pairs,
    ordinary,
    every_lane,
]
