"""The lines of tables of options and counterparts: what is timed, on which data, over the time of which other line."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from .cases import DTYPES, Case, make_logits, make_targets
from .contenders import Step

IGNORED = 255  # the id of what does not count in segmentation masks
SMALL = 1 << 18  # logits of the batch on which results are verified
PLAIN, PLAIN_ROWS = "plain", "plain, reduction none"


@dataclass(frozen=True)
class Batch:
    """The data of one shape, (*row_shape, classes), each array made when it is first asked for."""

    shape: tuple[int, ...]
    dtype: str
    threads: int

    def small(self):
        """Return a batch of as many classes, but few rows."""
        *row_shape, classes = self.shape
        while prod(row_shape) > 8 and prod(row_shape) * classes > SMALL:
            row_shape = [(n + 1) // 2 for n in row_shape]
        return Batch((*row_shape, classes), self.dtype, self.threads)

    @property
    def row_shape(self):
        return self.shape[:-1]

    @property
    def classes(self):
        return self.shape[-1]

    @property
    def case(self):
        return Case(prod(self.row_shape), self.classes, "the cost of options")

    @cached_property
    def logits(self):
        return make_logits(self.case, self.dtype).reshape(self.shape)

    @cached_property
    def targets(self):
        ids = make_targets(self.case).reshape(self.row_shape)
        return np.where(ids == IGNORED, 0, ids)

    @cached_property
    def out(self):
        return np.zeros_like(self.logits)

    @cached_property
    def partly_ignored(self):
        """Targets of which 10 per cent are to be ignored."""
        return self.ignoring(self.targets)

    def ignoring(self, targets):
        rows = np.random.default_rng(1).permutation(targets.size)
        targets = targets.copy()
        targets.reshape(-1)[rows[: max(1, rows.size // 10)]] = IGNORED
        return targets

    @cached_property
    def class_weight(self):
        return np.random.default_rng(2).uniform(0.5, 2.0, self.classes).astype(self.dtype)

    @cached_property
    def row_numbers(self):
        return np.random.default_rng(3).uniform(0.5, 2.0, self.row_shape).astype(self.dtype)

    @cached_property
    def class_mask(self):
        """A mask (C,) that hides 10 per cent of the classes."""
        mask = np.ones(self.classes, bool)
        mask[np.random.default_rng(4).permutation(self.classes)[: max(1, self.classes // 10)]] = False
        return mask

    @cached_property
    def shown_targets(self):
        """Targets that `class_mask` does not hide."""
        shown = np.flatnonzero(self.class_mask & (np.arange(self.classes) != IGNORED))
        return shown[self.targets % shown.size]

    @cached_property
    def entry_mask(self):
        """A mask (N, C) that hides 10 per cent of every row, but no target."""
        mask = self.numbers("float32") > 0.1
        np.put_along_axis(mask, self.targets[..., None], True, axis=-1)
        return mask

    @cached_property
    def distributions(self):
        distributions = self.numbers(self.dtype)
        distributions /= distributions.sum(axis=-1, keepdims=True)
        return distributions

    @cached_property
    def sparse_targets(self):
        """Two classes a row, as of a MixUp."""
        import fastce

        share = np.random.default_rng(5).random(self.row_shape).astype(self.dtype)
        other = np.roll(self.targets, 1)
        return fastce.SparseTargets(np.stack([self.targets, other], -1), np.stack([share, 1 - share], -1))

    def numbers(self, dtype):
        """Return numbers between 0 and 1 of the batch's shape; beyond a million the same million again."""
        count = min(prod(self.shape), 1_000_003)  # prime, as in make_logits
        return np.resize(np.random.default_rng(6).random(count, dtype), self.shape)

    @cached_property
    def labels(self):
        """Labels 0 and 1, as floats."""
        return (self.numbers("float32")[..., 0] > 0.5).astype(self.dtype)


@dataclass(frozen=True)
class Aim:
    """A bound on a time over another time."""

    factor: float
    at_least: bool = False

    def __str__(self):
        return f"{'≥' if self.at_least else '≤'} {self.factor:g}x"

    def holds(self, ratio):
        return ratio >= self.factor if self.at_least else ratio <= self.factor


@dataclass(frozen=True)
class Line:
    """A line of the table: what is timed, over the time of which other line, and what that ratio should be.

    `prepare(batch, module)` gives its Step, with the functions of fastce or, to judge the results, of its reference.
    What another library computes must agree with the line that it is `like`.
    """

    name: str
    prepare: Callable[[Batch, Any], Step]
    against: str | None = None
    aim: Aim | None = None
    like: str | None = None
    packages: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = DTYPES


def at_most(factor):
    return Aim(factor)


def at_least(factor):
    return Aim(factor, at_least=True)


def ours(
    name, aim=None, *, against=PLAIN, function="cross_entropy_with_grad", load=None, packages=(), dtypes=DTYPES,
    **arguments,
):  # fmt: skip
    """Return the line of a function of fastce's; arguments that can be called are made from the batch.

    Targets and `out` are the batch's if nothing else is given; None leaves them out.
    """

    def prepare(batch, module):
        given = {"targets": batch.targets, "out": batch.out} | {
            name: value(batch) if callable(value) else value for name, value in arguments.items()
        }
        given = {name: value for name, value in given.items() if value is not None}
        targets = (given.pop("targets"),) if "targets" in given else ()
        call = getattr(module, function)
        return Step(lambda logits: call(logits, *targets, **given), load or Step.load)

    return Line(name, prepare, None if against == name else against, aim, packages=packages, dtypes=dtypes)


def half(dtype):
    """Return what turns logits into a half type."""

    def load(logits):
        if dtype == "bfloat16":
            import ml_dtypes  # noqa: F401  (NumPy knows the name from then on)
        return logits.astype(dtype)

    return load


@dataclass(frozen=True)
class Group:
    """Lines that take turns, and the shapes on which they do; those in `unaimed` are shown without a verdict."""

    name: str
    title: str
    lines: tuple[Line, ...]
    shapes: tuple[tuple[int, ...], ...]
    quick_shapes: tuple[tuple[int, ...], ...] = ((8, 10), (4, 3000))
    unaimed: tuple[tuple[int, ...], ...] = ()
