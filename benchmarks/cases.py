"""The shapes that are timed, each with the reason it is here, and the data that fills them."""

from dataclasses import dataclass

import numpy as np

DTYPES = ("float32", "float64")

# What a step does: the loss alone, or the loss and its gradient in a new array, in a given one, in the logits.
LOSS, FRESH, OUT, IN_PLACE = MODES = ("loss", "fresh", "out", "in place")


@dataclass(frozen=True)
class Case:
    """One batch: `rows` x `classes` logits, normal with standard deviation `spread`."""

    rows: int
    classes: int
    reason: str
    spread: float = 3.0

    @property
    def name(self):
        wide = "" if self.spread == Case.spread else f"~{self.spread:g}"
        return f"{self.rows}x{self.classes}{wide}"


CASES = (
    Case(1, 2, "the smallest question there is: nothing but the cost of a call"),
    Case(8, 10, "a handful of digits: still mostly the cost of a call"),
    Case(32, 10, "the mini-batch of every tutorial"),
    Case(1024, 10, "a large batch of digits or CIFAR-10"),
    Case(65536, 10, "a whole small data set at once, out of the inner caches"),
    Case(4096, 3, "few classes: rows far shorter than a vector"),
    Case(1024, 100, "CIFAR-100: between the small and the medium rows"),
    Case(1024, 1000, "ImageNet; in cache, so arithmetic decides"),
    Case(1024, 1000, "logits so wide that shortcuts for tame ones do not apply", spread=60.0),
    Case(256, 32000, "a language model's small batch, about the size of the last cache"),
    Case(2048, 32000, "a language model's batch, far out of cache"),
    Case(512, 128256, "the vocabulary of the Llama 3 family"),
    Case(1, 128256, "one token of it: a single row to share between threads"),
)

QUICK_CASES = (
    Case(8, 10, "smoke: a small row"),
    Case(4, 3000, "smoke: a long row"),
)


def find(name):
    """Return the case of that name, or a new one of that shape: "64x100"."""
    for case in CASES + QUICK_CASES:
        if case.name == name:
            return case
    try:
        shape, _, spread = name.partition("~")
        rows, classes = map(int, shape.split("x"))
        case = Case(rows, classes, "asked for on the command line", float(spread or Case.spread))
    except ValueError:
        case = None
    if case is None or min(case.rows, case.classes, case.spread) <= 0:
        raise ValueError(f"a shape is written ROWSxCLASSES, as in 1024x10; got {name!r}")
    return case


def make_logits(case, dtype):
    """Return logits (rows, classes); beyond a million numbers the same million again, to fill a gigabyte quickly."""
    size = case.rows * case.classes
    rng = np.random.default_rng(size)
    # A prime length, so that no two rows of a usual number of classes are the same.
    block = (case.spread * rng.standard_normal(min(size, 1_000_003))).astype(dtype)
    logits = np.empty(size, dtype)
    for start in range(0, size, block.size):
        part = logits[start : start + block.size]
        part[:] = block[: part.size]
    return logits.reshape(case.rows, case.classes)


def make_targets(case):
    """Return class ids (rows,), uniform over the classes."""
    return np.random.default_rng(case.rows).integers(case.classes, size=case.rows)
