"""A sample of rows that does not depend on how the rows arrive, and the best temperature of its logits."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastce._problem import Problem
from fastce._row_facts import logits_of, soft_targets_of

# A sample holds about so many logits (4 MB of float32), but no fewer and no more rows than these.
LOGITS, FEWEST, MOST = 1 << 20, 64, 1 << 16
# Temperatures are looked for between 1/100 and 100.
LARGEST_LOG_TEMPERATURE = math.log(100.0)


def sample_size(n_classes):
    """Return how many rows a sample holds at most."""
    return min(max(LOGITS // n_classes, FEWEST), MOST)


class RowSample:
    """The rows whose keys, hashes of what was computed about them, are the smallest: the same in any order.

    Arrays over the rows chosen: `keys`, `logits` (k, C), `classes`, `weights`, and `distributions` (k, C) or None; rows
    that were added since the last `settle` wait in `parts`.
    """

    def __init__(self, n_classes: int, soft: bool):
        self.size = sample_size(n_classes)
        self.keys = np.empty(0, np.uint64)
        self.logits: NDArray[Any] = np.empty((0, n_classes), np.float32)
        self.classes = np.empty(0, np.int64)
        self.weights = np.empty(0)
        self.distributions = np.empty((0, n_classes)) if soft else None
        self.parts: list[tuple] = []

    def add(self, problem, facts):
        """Let the rows of a batch in whose loss is finite and whose key is among the smallest."""
        rows = np.flatnonzero(facts.known & np.isfinite(facts.losses) & (facts.divisors > 0))
        keys = keys_of(facts, rows)
        if len(self.keys) == self.size:
            rows, keys = rows[keys < self.keys[-1]], keys[keys < self.keys[-1]]
        if len(rows) > self.size:
            smallest = places_of_smallest(keys, self.size)
            rows, keys = rows[smallest], keys[smallest]
        if len(rows):
            distributions = None if self.distributions is None else soft_targets_of(problem, rows)
            part = keys, logits_of(problem, rows), facts.classes[rows], facts.weights[rows], distributions
            self.parts.append(part)
        if sum(len(part[0]) for part in self.parts) > self.size // 4:
            self.settle()

    def merge(self, other):
        """Let the rows of another sample in."""
        self.parts.append((other.keys, other.logits, other.classes, other.weights, other.distributions))
        self.parts += other.parts
        self.settle()

    def settle(self):
        """Take the rows that wait, and keep those with the smallest keys, the earlier ones where they are equal."""
        if not self.parts:
            return
        new_keys, logits, classes, weights, distributions = zip(*self.parts, strict=True)
        keys = np.concatenate([self.keys, *new_keys])
        order = places_of_smallest(keys, self.size)
        self.keys = keys[order]
        self.logits = np.concatenate([self.logits, *logits])[order]
        self.classes = np.concatenate([self.classes, *classes])[order]
        self.weights = np.concatenate([self.weights, *weights])[order]
        if self.distributions is not None:
            self.distributions = np.concatenate([self.distributions, *distributions])[order]
        self.parts = []

    def mass(self, weight):
        """Return each row's weight times the weighted mass of its target (k,)."""
        if self.distributions is not None:
            return self.weights * (self.distributions * (1.0 if weight is None else weight)).sum(axis=1)
        return self.weights if weight is None else self.weights * weight[self.classes]

    def problem(self, weight, temperature=1.0, shift=0):
        """Return the Problem of the sample at a temperature, or with all class ids moved by `shift`, cyclically."""
        n_classes = self.logits.shape[1]
        ids = (self.classes + shift) % n_classes if self.distributions is None else None
        return Problem(
            self.logits, 1, None, weight=weight, sample_weight=self.weights, ids=ids, n_live=len(self.classes),
            distribution=self.distributions, logit_scale=1.0 / temperature,
        )  # fmt: skip


def places_of_smallest(keys, count):
    """Return the places of the `count` smallest keys in their order, the first ones where keys are equal."""
    places = np.arange(len(keys))
    if count < len(keys):
        places = np.flatnonzero(keys <= np.partition(keys, count)[count])
    return places[np.argsort(keys[places], kind="stable")][:count]


def keys_of(facts, rows):
    """Return a hash (uint64) of what was computed about each of the rows."""
    keys = facts.classes[rows].astype(np.uint64)
    for numbers in (facts.losses, facts.lse, facts.entropy):
        keys ^= numbers[rows].view(np.uint64)
        # Multiply and fold twice (the finaliser of SplitMix64): each bit of the input reaches all of the key.
        keys ^= keys >> np.uint64(30)
        keys *= np.uint64(0xBF58476D1CE4E5B9)
        keys ^= keys >> np.uint64(27)
        keys *= np.uint64(0x94D049BB133111EB)
        keys ^= keys >> np.uint64(31)
    return keys


@dataclass(frozen=True)
class Optimum:
    """The temperature that minimises the loss, and that loss as a fraction of the loss at temperature 1."""

    temperature: float
    fraction: float


def best_temperature(sample, weight):
    r"""Return the Optimum over temperatures T of the mean loss of a sample's logits divided by T.

    With s = 1/T, the loss of a row whose target has the weighted mass A is :math:`A \log \sum_k e^{s z_k} - s \sum_c
    a_c z_c`, and s times its derivative is the loss minus A times the entropy of the prediction: at the optimum
    the model is on average as uncertain as it is wrong. The loss is convex in s, so that the difference has one zero.
    """
    if len(sample.keys) == 0:
        return Optimum(math.nan, math.nan)
    mass = sample.mass(weight)
    losses, lse, probability, entropy = np.empty((4, len(mass)))
    predicted, correct = np.empty(len(mass), np.int64), np.empty(len(mass), bool)

    def loss_and_slope(log_temperature):
        problem = sample.problem(weight, math.exp(log_temperature))
        problem.fill(losses, statistics=(lse, probability, entropy, predicted, correct))
        loss = float(losses.sum())
        return loss, float((mass * entropy).sum()) - loss

    loss, slope = loss_and_slope(0.0)
    # What the computing dtype cannot tell from 0: all temperatures are equal then.
    if not abs(slope) > 16 * np.finfo(sample.logits.dtype).eps * loss:
        return Optimum(1.0, 1.0) if math.isfinite(slope) else Optimum(math.nan, math.nan)
    log_temperature = zero_of(lambda x: loss_and_slope(x)[1], slope, LARGEST_LOG_TEMPERATURE)
    return Optimum(math.exp(log_temperature), loss_and_slope(log_temperature)[0] / loss)


def zero_of(function, value_at_0, bound):
    """Return where a function that changes from negative to positive is 0, within [-bound, bound], else the nearer end.

    A bracket is grown from 0 and narrowed by the Illinois method: secants, with the value at an end that stays halved.
    """
    a, value_a, b, value_b = 0.0, value_at_0, 0.0, value_at_0
    while (value_a > 0) == (value_b > 0):
        if abs(b) == bound or value_b == 0 or math.isnan(value_b):
            return b
        a, value_a = b, value_b
        b = max(-bound, min(bound, 3 * b)) if b else math.copysign(0.25, -value_at_0)
        value_b = function(b)
    for _ in range(60):
        middle = (a * value_b - b * value_a) / (value_b - value_a)
        value = function(middle)
        if value == 0 or abs(b - a) < 1e-6 or abs(middle - b) < 1e-6:
            return middle
        if (value > 0) == (value_b > 0):
            value_a /= 2
        else:
            a, value_a = b, value_b
        b, value_b = middle, value
    return b
