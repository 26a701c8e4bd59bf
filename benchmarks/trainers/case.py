"""What a library's file in this folder gives: NAME, PACKAGES, and `cases(quick, threads)`, which yields these."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FASTCE = "fastce"


@dataclass(frozen=True)
class Case:
    """One task, done in several ways that take turns.

    Every way is a function without arguments whose result, an array or a tuple of them, must agree with that of the
    first one, the library's own loss; FASTCE is among them. All that is to be prepared is prepared beforehand: the
    whole call is timed. `aims` names the least time over fastce's that a way should take.
    """

    task: str
    ways: dict[str, Callable[[], Any]]
    relative: float = 1e-5
    absolute: float = 1e-6
    aims: dict[str, float] = field(default_factory=dict)

    @property
    def built_in(self):
        return next(iter(self.ways))

    def problem(self, way, result, expected):
        """Return what is wrong with a way's result, or None."""
        for number, (got, exact) in enumerate(zip(_arrays(result), _arrays(expected), strict=True)):
            if got.shape != exact.shape:
                return f"{way} gives result {number} the shape {got.shape}, not {exact.shape}"
            allowed = self.absolute + self.relative * np.abs(exact)
            gap = np.abs(got - exact)
            if not (gap <= allowed).all():
                return f"{way} disagrees with {self.built_in} in result {number}, by up to {gap.max():.3g}"
        return None


def _arrays(result):
    return [np.asarray(part, float) for part in (result if isinstance(result, tuple) else (result,))]
