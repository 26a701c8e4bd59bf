"""Reports on a loss: from one batch, or from any number of them, one after the other or on several workers."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce import _checks
from fastce._exact_sums import ExactSums
from fastce._problem import IGNORE_INDEX, pose
from fastce._row_facts import facts_of
from fastce._row_sample import RowSample, best_temperature
from fastce.findings import find
from fastce.loss_report import LOSS_EDGES, CalibrationBin, ClassReport, LossReport, WorstRow
from fastce.targets import SparseTargets

__all__ = ["LossMeter", "report"]

N_BINS = 15
WORST_ROWS = 10
# Of the rows, for `worst_share`.
WORST_PART = 100


def report(
    logits: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: Any = IGNORE_INDEX,
    class_names: Any = None,
    n_bins: int = N_BINS,
) -> LossReport:
    r"""What the cross-entropy of a model says about it: the loss, what to compare it with, and what may be wrong.

    Parameters
    ----------
    logits : array_like of float32, float64, float16 or bfloat16, shape (..., C)
        Unnormalised scores, the class axis last, in any layout.
    targets : array_like of int, array_like of float, or SparseTargets
        Class ids or soft targets, as in :func:`cross_entropy`.
    weight : array_like of float, shape (C,), optional
        Weights of the classes in every loss, finite and >= 0.
    sample_weight : array_like of float, the rows' shape, optional
        Weights of the rows in every mean, finite and >= 0. Rows of weight 0 do not count.
    ignore_index : int, sequence of int or None, default -100
        Class ids whose rows do not count.
    class_names : sequence of C names, optional
        Shown instead of class ids.
    n_bins : int, default 15
        Bins of equal width for the calibration error.

    Returns
    -------
    LossReport
        Numbers as attributes; ``print`` shows them as tables, notebooks too; ``to_dict()`` and ``to_json()``.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in :func:`cross_entropy`; ValueError also for a negative weight of a row, for `class_names` of another
        number and for `n_bins` < 1.

    See Also
    --------
    LossMeter : the same from many batches.

    Notes
    -----
    Reads the logits once, and a part of them again for `top5_accuracy` and `temperature`. Where rows are wrong in what
    they hold (nan, inf) the report says so instead of failing.

    Examples
    --------
    Four rows of three classes, the last one confidently wrong:

    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 4.0], [5.0, 0.0, 0.0]])
    >>> report = fastce.report(logits, [0, 1, 2, 1], class_names=["cat", "dog", "owl"])
    >>> print(f"{report.loss:.4f} of {report.uniform_loss:.4f}, {report.accuracy:.0%} right")
    1.3460 of 1.0986, 75% right
    >>> report.per_class[1]
    ClassReport(name='dog', support=2, predicted=1, loss=2.62..., recall=0.5)
    >>> [finding.code for finding in report.findings]
    ['worse_than_uniform']
    """
    meter = LossMeter(weight=weight, ignore_index=ignore_index, class_names=class_names, n_bins=n_bins)
    return meter.update(logits, targets, sample_weight).compute()


@dataclass
class Range:
    """The smallest and the largest of the numbers seen."""

    low: float = math.inf
    high: float = -math.inf

    def add(self, numbers):
        self.low = min(self.low, float(numbers.min(initial=math.inf)))
        self.high = max(self.high, float(numbers.max(initial=-math.inf)))

    def merge(self, other):
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


class Tally:
    """What a meter has added up. Rows fall into groups by class and whether they are predicted right: 2 c + correct.

    `support` (2 C,) counts rows, `predicted` (C,) predictions, `in_bin` the rows of each bin of confidence. `losses`
    holds the losses of all rows that count, as a list of arrays, `worst` those of WORST_ROWS with their rows.
    """

    def __init__(self, n_classes: int, soft: bool, n_bins: int):
        self.n_classes, self.soft, self.n_bins = n_classes, soft, n_bins
        self.n_rows = self.n_live = self.n_unknown = self.n_infinite = 0
        self.support = np.zeros(2 * n_classes, np.int64)
        self.predicted = np.zeros(n_classes, np.int64)
        self.in_bin = np.zeros(n_bins + 1, np.int64)
        self.losses: list[NDArray[np.float64]] = []
        self.worst: list[WorstRow] = []
        self.entropy, self.lse, self.top_logits = Range(), Range(), Range()
        self.sample = RowSample(n_classes, soft)
        self.sums = {
            "loss": ExactSums(2 * n_classes),
            "divisor": ExactSums(2 * n_classes),
            "finite divisor": ExactSums(1),  # of rows with a finite loss
            "weight": ExactSums(2 * n_classes),
            "mass": ExactSums(n_classes),
            "target entropy": ExactSums(2),  # what is below 0 (masses above 1), negated, beside what is above
            "in top": ExactSums(1),
            "bin weight": ExactSums(2 * (n_bins + 1)),
            "bin confidence": ExactSums(n_bins + 1),
        }

    def add(self, problem):
        facts = facts_of(problem, self.sums["mass"])
        live, known = facts.live, facts.known
        every = bool(live.all())
        rows = slice(None) if every else live
        losses, weights, correct = facts.losses[rows], facts.weights[rows], facts.correct[rows]
        groups = 2 * facts.classes[rows] + correct
        self.sums["loss"].add(losses, groups)
        self.sums["divisor"].add(facts.divisors[rows], groups)
        self.sums["weight"].add(weights, groups)
        finite = facts.divisors[rows][np.isfinite(losses)]
        self.sums["finite divisor"].add(finite, np.zeros(len(finite), np.int64))
        entropies = facts.target_entropies[rows]
        self.sums["target entropy"].add(np.abs(entropies), (entropies < 0).astype(np.int64))
        hits = facts.weights[facts.in_top]
        self.sums["in top"].add(hits, np.zeros(len(hits), np.int64))
        self.support += np.bincount(groups, minlength=len(self.support))

        confidences, weights = facts.confidences[known], facts.weights[known]
        bins = bin_of(confidences, self.n_bins)
        self.sums["bin weight"].add(weights, 2 * bins + facts.correct[known])
        self.sums["bin confidence"].add(weights * confidences, bins)
        self.in_bin += np.bincount(bins, minlength=len(self.in_bin))
        self.predicted += np.bincount(facts.predicted[known], minlength=self.n_classes)
        self.entropy.add(facts.entropy[known])
        self.lse.add(facts.lse[known])
        self.top_logits.add(facts.top_logits[known])

        self.n_unknown += int(np.count_nonzero(np.isnan(losses)))
        self.n_infinite += int(np.count_nonzero(np.isinf(losses)))
        self.losses.append(losses.copy() if every else losses)
        self._take_worst(worst_of(facts, self.n_rows))
        self.sample.add(problem, facts)
        self.n_live += len(losses)
        self.n_rows += len(live)

    def merge(self, other):
        for name, sums in self.sums.items():
            sums.merge(other.sums[name])
        for name in ("entropy", "lse", "top_logits", "sample"):
            getattr(self, name).merge(getattr(other, name))
        self._take_worst([row._replace(row=row.row + self.n_rows) for row in other.worst])
        for name in ("n_rows", "n_live", "n_unknown", "n_infinite", "support", "predicted", "in_bin", "losses"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _take_worst(self, rows):
        self.worst = sorted([*self.worst, *rows], key=lambda row: (-severity(row.loss), row.row))[:WORST_ROWS]


def severity(loss):
    """Return what to sort losses by: nan is the worst."""
    return np.where(np.isnan(loss), math.inf, loss) if np.ndim(loss) else math.inf if math.isnan(loss) else loss


def worst_of(facts, first):
    """Return the WorstRow of the largest losses of a batch whose first row has this number."""
    order = np.where(facts.live, severity(facts.losses), -1.0)
    count = min(WORST_ROWS, len(order))
    least = np.partition(order, len(order) - count)[len(order) - count] if count else 0.0
    above, equal = np.flatnonzero(order > least), np.flatnonzero(order == least)
    chosen = np.concatenate([above, equal[: count - len(above)]])
    return [
        WorstRow(
            first + int(row), float(facts.losses[row]), int(facts.classes[row]), int(facts.predicted[row]),
            float(facts.confidences[row]) if facts.known[row] else math.nan,
        )
        for row in chosen if facts.live[row]
    ]  # fmt: skip


def bin_of(confidences, n_bins):
    """Return the bin of each confidence, in float32 as torchmetrics has it: [k/n, (k+1)/n), and one more for 1."""
    edges = np.linspace(0, 1, n_bins + 1, dtype=np.float32)
    confidences = np.minimum(confidences.astype(np.float32), np.float32(1))
    bins = (confidences * n_bins).astype(np.int64)
    bins -= confidences < edges[bins]  # the product was rounded up
    bins += confidences >= edges[np.minimum(bins + 1, n_bins)]
    return np.minimum(bins, n_bins)


class LossMeter:
    """Adds up batches, from one process or several, and reports on all of them as :func:`report` does on one.

    The report has the same bits however the rows are cut into batches, and however those are spread over meters that
    are merged: sums are exact, rounded once at the end. Only row numbers follow the order of updates and merges (and
    which of several equal rows is shown or sampled). Rows are added up in the dtype of their logits' batch.

    A meter holds 8 bytes for each row that counts (its loss, for `worst_share`), a few hundred for each class, and a
    sample of at most 1,048,576 logits, or of 64 rows, for the temperature. It can be pickled, to send it to another
    process.

    Parameters
    ----------
    weight, ignore_index, class_names, n_bins
        As in :func:`report`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> rng = np.random.default_rng(0)
    >>> logits, targets = rng.normal(0, 2, (1000, 10)), rng.integers(0, 10, 1000)
    >>> here, there = fastce.LossMeter(), fastce.LossMeter()
    >>> for start in range(0, 600, 100):
    ...     here = here.update(logits[start : start + 100], targets[start : start + 100])
    >>> there = there.update(logits[600:], targets[600:])
    >>> here.merge(there).compute() == fastce.report(logits, targets)
    True
    """

    def __init__(
        self,
        *,
        weight: ArrayLike | None = None,
        ignore_index: Any = IGNORE_INDEX,
        class_names: Any = None,
        n_bins: int = N_BINS,
    ):
        self.n_bins = _checks.as_count("n_bins", n_bins)
        self.weight = copy.deepcopy(weight)  # all batches have the same, whatever becomes of the caller's array
        self.ignore_index = kept_ids(ignore_index)  # likewise
        self.class_names = _checks.as_names(class_names)
        self._names: tuple[str, ...] = ()
        self._weight: NDArray[np.float64] | None = None
        self._tally: Tally | None = None

    def update(
        self, logits: ArrayLike, targets: ArrayLike | SparseTargets, sample_weight: ArrayLike | None = None
    ) -> "LossMeter":
        """Add a batch and return the meter; logits (..., C), `targets` and `sample_weight` as in :func:`report`.

        Raises TypeError, ValueError and IndexError as :func:`report` does, before anything is added; ValueError also
        where the batch has other classes or another kind of targets than those before it.
        """
        problem = pose(
            logits, targets, -1, None, weight=self.weight, sample_weight=sample_weight, ignore_index=self.ignore_index
        )
        _checks.check_no_negative_weight(problem.sample_weight)
        n_classes = problem.logits.shape[-1]
        soft = problem.ids is None
        if self._tally is None:
            self._names, self._weight = _checks.as_class_names(self.class_names, n_classes), problem.weight
            self._tally = Tally(n_classes, soft, self.n_bins)
        check_same(self._tally, n_classes, soft)
        with np.errstate(all="ignore"):
            self._tally.add(problem)
        return self

    def merge(self, other: "LossMeter") -> "LossMeter":
        """Add all that another meter has seen, as if its rows came after this one's, and return this one.

        Raises ValueError where the two have other classes, names of classes, ignored ids, class weights, bins or kinds
        of targets, TypeError for anything that is no LossMeter.
        """
        if not isinstance(other, LossMeter):
            raise TypeError(f"other must be a LossMeter, got {type(other).__name__}")
        if other.n_bins != self.n_bins:
            raise ValueError(f"meters must have the same n_bins to be merged, got {self.n_bins} and {other.n_bins}")
        if not np.array_equal(_checks.as_ignored(other.ignore_index), _checks.as_ignored(self.ignore_index)):
            raise ValueError(
                "meters must have the same ignore_index to be merged, "
                f"got {self.ignore_index!r} and {other.ignore_index!r}"
            )
        if None not in (self.class_names, other.class_names) and self.class_names != other.class_names:
            raise ValueError("meters must have the same class_names to be merged, got two different ones")
        if other._tally is None:
            return self
        if self._tally is None:
            return self._start_as(other)
        check_same(self._tally, other._tally.n_classes, other._tally.soft)
        check_same_weight(self._weight, other._weight)
        with np.errstate(all="ignore"):
            self._tally.merge(other._tally if other is not self else copy.deepcopy(other._tally))
        return self

    def _start_as(self, other):
        """Take over what another meter has seen, as this one's own options allow, and return this one."""
        n_classes = other._tally.n_classes
        weight = _checks.as_class_weight(self.weight, n_classes)
        check_same_weight(weight, other._weight)
        names = other._names if self.class_names is None else _checks.as_class_names(self.class_names, n_classes)
        self._names, self._weight, self._tally = names, weight, copy.deepcopy(other._tally)
        return self

    def compute(self) -> LossReport:
        """Return the LossReport on all rows so far; the meter goes on as it is. Without an update: ValueError."""
        if self._tally is None:
            raise ValueError("a LossMeter needs at least one update before compute, got none")
        with np.errstate(all="ignore"):
            return report_on(self._tally, self._names, self._weight)


def kept_ids(ignore_index):
    """Return ids to ignore as None, an integer or a list of its own, whatever became of what was given; or raise."""
    if ignore_index is None:
        return None
    ids = _checks.as_ignored(ignore_index).tolist()
    return ids[0] if len(ids) == 1 else ids


def check_same_weight(a, b):
    """Raise unless the class weights of two meters, arrays or None, are the same."""
    if not (a is b or (a is not None and b is not None and np.array_equal(a, b))):
        raise ValueError("meters must have the same weight to be merged, got two different ones")


def check_same(tally, n_classes, soft):
    """Raise unless what comes has the classes and the kind of targets of what a Tally holds."""
    if n_classes != tally.n_classes:
        raise ValueError(f"logits must have the classes of earlier batches, {tally.n_classes}, got {n_classes}")
    if soft != tally.soft:
        kinds = ["class ids", "soft targets"]
        raise ValueError(f"targets must be of the kind of earlier batches, {kinds[tally.soft]}, got {kinds[soft]}")


def report_on(tally, names, weight):
    """Return the LossReport on a Tally."""
    sums = tally.sums
    right, wrong = slice(1, None, 2), slice(0, None, 2)
    divisor, rows_weight = sums["divisor"].total(), sums["weight"].total()
    loss = ratio(sums["loss"].total(), divisor)
    mass = sums["mass"].totals()
    shares = mass[mass > 0] / sums["mass"].total()
    prior_loss = ratio(sums["mass"].total(), divisor) * max(0.0, -math.fsum(shares * np.log(shares)))
    target_entropy = ratio(sums["target entropy"].total(0) - sums["target entropy"].total(1), divisor)
    by_class = sums["weight"].totals().reshape(-1, 2)
    optimum = optimum_of(tally, weight)
    numbers = LossReport(
        n_rows=tally.n_rows,
        n_classes=tally.n_classes,
        n_ignored=tally.n_rows - tally.n_live,
        n_nonfinite=tally.n_unknown + tally.n_infinite,
        loss=loss,
        bits=loss / math.log(2),
        perplexity=float(np.exp(loss)),
        uniform_loss=ratio(sums["mass"].total(), divisor) * math.log(tally.n_classes),
        prior_loss=prior_loss,
        majority_accuracy=ratio(float(by_class.sum(axis=1).max()), rows_weight),
        skill=1 - ratio(loss, prior_loss),
        kl=loss - target_entropy,
        accuracy=ratio(sums["weight"].total(right), rows_weight),
        top5_accuracy=ratio(sums["in top"].total(), rows_weight),
        mean_confidence=ratio(sums["bin confidence"].total(), sums["bin weight"].total()),
        calibration_error=calibration_error_of(tally),
        calibration_bins=calibration_bins_of(tally),
        worst_share=worst_share_of(tally),
        loss_correct=ratio(sums["loss"].total(right), sums["divisor"].total(right)),
        loss_wrong=ratio(sums["loss"].total(wrong), sums["divisor"].total(wrong)),
        temperature=optimum.temperature,
        loss_at_temperature=loss * optimum.fraction,
        loss_histogram=loss_histogram_of(tally),
        per_class=classes_of(tally, names),
        worst_rows=list(tally.worst),
        findings=[],
    )
    numbers.findings.extend(find(numbers, tally, weight))
    return numbers


def ratio(part, whole):
    """Return part / whole, nan where the whole is 0."""
    return float(part / whole) if whole else math.nan


def optimum_of(tally, weight):
    tally.sample.settle()
    return best_temperature(tally.sample, weight)


def calibration_error_of(tally):
    weight = tally.sums["bin weight"].totals().reshape(-1, 2)
    gaps = np.abs(weight[:, 1] - tally.sums["bin confidence"].totals())
    return ratio(math.fsum(gaps), tally.sums["bin weight"].total())


def calibration_bins_of(tally):
    n_bins, weight = tally.n_bins, tally.sums["bin weight"].totals().reshape(-1, 2)
    confidence = tally.sums["bin confidence"].totals()
    return [
        CalibrationBin(
            k / n_bins, min(1.0, (k + 1) / n_bins), int(tally.in_bin[k]), ratio(confidence[k], weight[k].sum()),
            ratio(weight[k, 1], weight[k].sum()),
        )
        for k in range(n_bins + 1)
    ]  # fmt: skip


def worst_share_of(tally):
    whole = tally.sums["loss"].total()
    if not tally.n_live or not math.isfinite(whole):
        return math.nan
    losses = np.concatenate(tally.losses)
    tally.losses = [losses]
    count = -(-len(losses) // WORST_PART)
    return ratio(math.fsum(np.partition(losses, len(losses) - count)[len(losses) - count :]), whole)


def loss_histogram_of(tally):
    n_bins, low, high = len(LOSS_EDGES) - 1, math.log10(LOSS_EDGES[0]), math.log10(LOSS_EDGES[-1])
    counts = np.zeros(n_bins, np.int64)
    for losses in tally.losses:
        places = (np.log10(losses[~np.isnan(losses)]) - low) * (n_bins / (high - low))
        counts += np.bincount(np.clip(places, 0, n_bins - 1).astype(np.int64), minlength=n_bins)
    return counts.tolist()


def classes_of(tally, names):
    sums = tally.sums
    losses, divisors = (sums[name].totals().reshape(-1, 2).sum(axis=1) for name in ("loss", "divisor"))
    weights = sums["weight"].totals().reshape(-1, 2)
    support, recalls = tally.support.reshape(-1, 2).sum(axis=1), weights[:, 1] / weights.sum(axis=1)
    columns = [array.tolist() for array in (support, tally.predicted, losses / divisors, recalls)]
    return [ClassReport(*row) for row in zip(names, *columns, strict=True)]
