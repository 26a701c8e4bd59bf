"""Sums that have the same bits for any order and any parts in which the numbers arrive."""

import math

import numpy as np
from numpy.typing import NDArray

# A number is split into digits of base 2**32, digit k worth 2**(32 k). What lies below 2**-992 is dropped.
DIGIT_BITS = 32
LOWEST, HIGHEST = -31, 31
# So many digits add up to less than 2**53, exactly in float64.
NUMBERS_AT_ONCE = 1 << 20


class ExactSums:
    """One sum for each of `n_groups` groups of numbers >= 0.

    The state is an integer for each group, so additions are exact and their order does not matter. `digits` maps k to
    the digits (n_groups,) int64, each in [0, 2**32), which makes them unique. `special` holds what is not finite.
    """

    def __init__(self, n_groups: int):
        self.digits: dict[int, NDArray[np.int64]] = {}
        self.special = np.zeros(n_groups)

    def add(self, values, groups=None):
        """Add values (n,) to their groups (n,); without `groups` the rows of values (n, n_groups)."""
        for start in range(0, len(values), NUMBERS_AT_ONCE):
            part = slice(start, start + NUMBERS_AT_ONCE)
            self._add(values[part], None if groups is None else groups[part])
        self._carry()

    def merge(self, other):
        """Add the sums of another ExactSums with the same groups."""
        self.special += other.special
        for level, digits in other.digits.items():
            self._put(level, digits)
        self._carry()

    def totals(self):
        """Return the sums (n_groups,) within one unit in the last place."""
        totals = np.zeros_like(self.special)
        for level in sorted(self.digits):
            totals += self.digits[level] * 2.0 ** (DIGIT_BITS * level)
        return totals + self.special

    def total(self, groups=...):
        """Return the sum over some groups (an index, by default all), correctly rounded."""
        special = float(self.special[groups].sum())
        return self.finite_total(groups) if special == 0.0 else special

    def finite_total(self, groups=...):
        """Return the sum of the finite numbers over some groups, correctly rounded: inf if float64 cannot hold it."""
        whole = 0
        for level, digits in self.digits.items():
            whole += int(digits[groups].sum()) << DIGIT_BITS * (level - LOWEST)
        try:
            return whole / (1 << DIGIT_BITS * -LOWEST)
        except OverflowError:
            return math.inf

    def _add(self, values, groups):
        finite = np.isfinite(values)
        if not finite.all():
            self.special += self._by_group(np.where(finite, 0.0, values), groups)
            values = np.where(finite, values, 0.0)
        rest = np.array(values, np.float64)
        largest = rest.max(initial=0.0)
        level = (math.frexp(largest)[1] - 1) // DIGIT_BITS
        while level >= LOWEST and rest.any():
            digits = np.trunc(rest * 2.0 ** (-DIGIT_BITS * level))
            self._put(level, self._by_group(digits, groups).astype(np.int64))
            rest -= digits * 2.0 ** (DIGIT_BITS * level)
            level -= 1

    def _by_group(self, numbers, groups):
        if groups is None:
            return numbers.sum(axis=0)
        return np.bincount(groups, numbers, len(self.special))

    def _put(self, level, digits):
        if level in self.digits:
            self.digits[level] = self.digits[level] + digits
        else:
            self.digits[level] = digits

    def _carry(self):
        """Bring all digits below 2**32 again."""
        level = min(self.digits, default=HIGHEST)
        while level < HIGHEST:
            digits = self.digits.get(level)
            if digits is not None and (carry := digits >> DIGIT_BITS).any():
                self.digits[level] = digits & ((1 << DIGIT_BITS) - 1)
                self._put(level + 1, carry)
            level += 1
