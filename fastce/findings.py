"""What is probably wrong with a model, its labels or its call: one small function for each suspicion.

Each takes Evidence and returns a Finding or None. The numbers of all rows are exact; what needs whole rows of logits is
looked at in the sample of rows that the temperature is found on (see :class:`LossReport`).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastce.loss_report import Finding, LossReport, nats, number, percent

__all__ = ["CODES", "find"]

# The largest logit of a row from which on something is odd: float16 ends at 65504, float32 is down to 4 digits after
# the point at 1000.
HUGE = 1000.0
# Rows that a class needs before the lack of predictions of it says anything, and a batch for each of its classes.
FEW_ROWS = 5
# Logits of the sample by which a shift of the labels is looked for; the loss that it would give is that of all of them.
SHIFTED_LOGITS = 1 << 18
# How far from 1 the sums of probabilities may be in every row: as much as bfloat16 makes of it.
SUM_TOLERANCE = 0.01
# How many names a message lists.
NAMES_SHOWN = 5
# Confidence above accuracy by more than this, and by more than chance explains.
OVERCONFIDENCE, STANDARD_ERRORS = 0.02, 3.0


@dataclass
class Evidence:
    """A report without findings, the Tally behind it, and the sample's logits with the class weights."""

    report: LossReport
    tally: Any
    weight: NDArray[np.float64] | None

    @property
    def logits(self):
        return self.tally.sample.logits

    @property
    def support(self):
        return self.tally.support.reshape(-1, 2).sum(axis=1)

    @property
    def n_known(self):
        return int(self.tally.in_bin.sum())

    def names_of(self, classes):
        """Return the names of some classes as text, the first few of them."""
        names = [self.report.per_class[c].name for c in classes[:NAMES_SHOWN]]
        return ", ".join(names) + (f" and {len(classes) - NAMES_SHOWN:,} more" if len(classes) > NAMES_SHOWN else "")

    def loss_if_shifted(self, shift):
        """Return the loss of the sample, were all class ids greater by `shift`, cyclically."""
        problem = self.tally.sample.problem(self.weight, shift=shift)
        losses = np.empty(problem.n_rows)
        problem.fill(losses)
        return float(losses.sum() / problem.total_weight())


def find(report, tally, weight):
    """Return the list of Findings about a report, the most serious first."""
    evidence = Evidence(report, tally, weight)
    found = [finding for suspicion in SUSPICIONS if (finding := suspicion(evidence)) is not None]
    explained = {code for finding in found for code in EXPLAINS.get(finding.code, ())}
    return [finding for finding in found if finding.code not in explained]


def no_prediction(evidence):
    count = evidence.tally.n_unknown
    if count:
        return Finding(
            "nonfinite_logits",
            f"{count:,} of {evidence.tally.n_live:,} rows hold a nan, a +inf or nothing but -inf; their loss is nan, "
            f"and so is the mean (of the rows with a finite loss: {nats(finite_mean(evidence))})",
            "look at the first of worst_rows; lower the learning rate, clip gradients, or look for a log of 0 or a "
            "division by 0 before the logits",
        )  # fmt: skip
    return None


def infinite_loss(evidence):
    count = evidence.tally.n_infinite
    if count:
        return Finding(
            "infinite_loss",
            f"{count:,} of {evidence.tally.n_live:,} rows have a target whose logit is -inf: the loss is inf "
            f"(of the rows with a finite loss: {nats(finite_mean(evidence))})",
            "a mask hides the right class, or a target is wrong: see worst_rows; mask with the target's class left in",
        )  # fmt: skip
    return None


def finite_mean(evidence):
    """Return the mean loss of the rows whose loss is finite."""
    sums = evidence.tally.sums
    divisor = sums["finite divisor"].total()
    return sums["loss"].finite_total() / divisor if divisor else math.nan


def probabilities_as_logits(evidence):
    rows = evidence.logits
    n_classes = evidence.report.n_classes
    if n_classes == 1 or not len(rows) or rows.min() < 0 or rows.max() > 1:
        return None
    if np.abs(rows.sum(axis=1, dtype=np.float64) - 1).max() > SUM_TOLERANCE:
        return None
    floor = math.log1p((n_classes - 1) / math.e)
    return Finding(
        "probabilities_as_logits",
        "the logits are between 0 and 1 and sum to 1 in every row, as probabilities do; softmax is then taken twice, "
        f"and the loss cannot fall below log(1 + (C - 1)/e) = {nats(floor)}",
        "pass what goes into the softmax, or call cross_entropy_from_probs",
    )


def log_probabilities(evidence):
    lse = evidence.tally.lse
    if evidence.report.n_classes == 1 or not evidence.n_known:
        return None
    if max(abs(lse.low), abs(lse.high)) > SUM_TOLERANCE:
        return None
    return Finding(
        "log_probabilities",
        "the logits are log-probabilities: their exponentials sum to 1 in every row; the loss is right, but a "
        "log-softmax was computed that is not needed",
        "pass what goes into the log-softmax; it gives the same loss",
    )


def equal_rows(evidence):
    entropy, sample = evidence.tally.entropy, evidence.logits
    if evidence.report.n_classes == 1 or len(sample) < 2 or entropy.high - entropy.low > 1e-4:
        return None
    with_prior = sample - sample.max(axis=1, keepdims=True)
    if not np.allclose(with_prior, with_prior[0], rtol=0, atol=1e-3):
        return None
    log_classes = math.log(evidence.report.n_classes)
    if entropy.high > log_classes - 1e-3:
        what = f"all classes get the same probability in every row: the loss is log C = {nats(log_classes)}"
    else:
        what = f"all rows get the same prediction: the loss is {nats(evidence.report.loss)}, whatever the input"
    return Finding(
        "equal_rows", what,
        "the output does not depend on the input: look for layers that start at 0, dead activations, inputs that are "
        "not scaled, or a learning rate of 0",
    )  # fmt: skip


def labels_start_at_1(evidence):
    seen = evidence.support > 0
    if evidence.tally.soft or len(seen) < 3 or evidence.tally.n_live < FEW_ROWS * len(seen):
        return None
    if seen[0] or not seen[1:].all():
        return None
    return Finding(
        "labels_start_at_1",
        f"every class but the first was seen: the labels seem to run from 1 to {len(seen) - 1}",
        f"pass targets - 1, and {len(seen) - 1} classes; class ids start at 0",
    )


def worse_than_uniform(evidence):
    report = evidence.report
    if not report.loss > report.uniform_loss * (1 + 1e-6) + 1e-6:
        return None
    shift = best_shift(evidence)
    if shift is not None:
        shift, loss = shift
        return Finding(
            "labels_shifted",
            f"the loss, {nats(report.loss)}, is above that of equal chances, {nats(report.uniform_loss)}; with "
            f"(targets {shift:+d}) % {report.n_classes} it would be about {nats(loss)}",
            "labels and outputs count the classes from different starts: correct the labels by this shift",
        )
    mapped = best_permutation(evidence)
    if mapped is not None:
        classes, accuracy = mapped
        pairs = [f"{report.per_class[a].name} -> {report.per_class[b].name}" for a, b in classes[:NAMES_SHOWN]]
        return Finding(
            "labels_permuted",
            f"the loss, {nats(report.loss)}, is above that of equal chances, {nats(report.uniform_loss)}; with classes "
            f"renamed ({', '.join(pairs)}{', ...' if len(classes) > NAMES_SHOWN else ''}) accuracy would be "
            f"{percent(accuracy)} instead of {percent(report.accuracy)}",
            "labels and outputs are sorted differently: compare the orders of the class names",
        )
    return Finding(
        "worse_than_uniform",
        f"the loss, {nats(report.loss)}, is above that of equal chances, {nats(report.uniform_loss)}: the "
        "model is confident where it is wrong",
        f"divide the logits by {number(report.temperature)} (loss {nats(report.loss_at_temperature)}); if that does "
        "not help, look for labels that do not belong to their rows",
    )


def best_shift(evidence):
    """Return (shift, loss) of the cyclic shift of the ids that explains the rows, or None.

    It brings the loss clearly below equal chances, or of a model that is too sure makes most rows right.
    """
    n_classes, sample = evidence.report.n_classes, evidence.tally.sample
    if evidence.tally.soft or n_classes < 3 or len(sample.classes) < FEW_ROWS:
        return None
    # The mean logit k classes after the target is what a shift by k would gain; weights of classes may reorder a few.
    rows = slice(max(SHIFTED_LOGITS // n_classes, FEW_ROWS))
    columns = (sample.classes[rows, None] + np.arange(n_classes)) % n_classes
    gains = np.take_along_axis(sample.logits[rows], columns, axis=1).mean(axis=0, dtype=np.float64)
    shift = int(np.argmax(np.where(np.isfinite(gains), gains, -np.inf)))
    loss = evidence.loss_if_shifted(shift)
    accuracy = float(np.mean(sample.logits.argmax(axis=1) == (sample.classes + shift) % n_classes))
    clear = loss < 0.8 * evidence.report.uniform_loss or explains_most(evidence, accuracy)
    if shift == 0 or not clear or not loss < evidence.report.loss:
        return None
    return (shift if shift <= n_classes // 2 else shift - n_classes), loss


def best_permutation(evidence):
    """Return ([(class, prediction) ...], accuracy) of a one-to-one renaming that explains most rows, or None."""
    sample = evidence.tally.sample
    n_classes = evidence.report.n_classes
    if evidence.tally.soft or len(sample.classes) < FEW_ROWS * n_classes:
        return None
    pairs = np.bincount(n_classes * sample.classes + sample.logits.argmax(axis=1), minlength=n_classes**2)
    counts = pairs.reshape(n_classes, n_classes)
    seen = np.flatnonzero(counts.any(axis=1))
    to = counts[seen].argmax(axis=1)
    accuracy = counts[seen, to].sum() / counts.sum()
    if len(set(to)) < len(to) or len(seen) < 2 or not explains_most(evidence, accuracy):
        return None
    return [(int(a), int(b)) for a, b in zip(seen, to, strict=True) if a != b], float(accuracy)


def explains_most(evidence, accuracy):
    """Return whether other labels, which give the sample this accuracy, are right for most rows, and not by chance."""
    enough = len(evidence.tally.sample.classes) >= FEW_ROWS * evidence.report.n_classes
    return enough and accuracy >= max(0.5, evidence.report.accuracy + 0.25)


def one_class_predicted(evidence):
    predicted = np.flatnonzero(evidence.tally.predicted)
    if len(predicted) != 1 or evidence.n_known < 2 * FEW_ROWS or np.count_nonzero(evidence.support) < 2:
        return None
    return Finding(
        "one_class_predicted",
        f"all {evidence.n_known:,} predictions are class {evidence.names_of(predicted)}; accuracy is "
        f"{percent(evidence.report.accuracy)}",
        "classes may be too unequal (pass weight), or the bias of this class has grown too large; compare prior_loss",
    )


def class_never_predicted(evidence):
    predicted, support = evidence.tally.predicted, evidence.support
    missed = np.flatnonzero((predicted == 0) & (support >= FEW_ROWS))
    if not len(missed) or np.count_nonzero(predicted) < 2:
        return None
    return Finding(
        "class_never_predicted",
        f"never predicted, though it was seen: {evidence.names_of(missed)}",
        "rare classes need more rows, a class weight or a lower decision threshold",
    )


def class_never_seen(evidence):
    support = evidence.support
    # Soft targets may hold a class that is never the most likely one.
    unseen = np.flatnonzero((support == 0) & (evidence.tally.sums["mass"].totals() == 0))
    if not len(unseen) or evidence.tally.n_live < FEW_ROWS * len(support):
        return None
    return Finding(
        "class_never_seen",
        f"no row has this target: {evidence.names_of(unseen)}",
        "is n_classes right, and are these rows a fair sample? The model can only learn that such classes are rare",
    )


def huge_logits(evidence):
    top = evidence.tally.top_logits
    largest = max(abs(top.low), abs(top.high))
    if not evidence.n_known or largest < HUGE:
        return None
    return Finding(
        "huge_logits",
        f"the largest logit of a row reaches {number(top.high if abs(top.high) == largest else top.low)}: in float32 "
        f"numbers of this size are {number(float(np.spacing(np.float32(largest))))} apart",
        "normalise what goes into the last layer, add z_loss or weight decay, or subtract each row's maximum",
    )


def overconfident(evidence):
    report, n = evidence.report, evidence.n_known
    gap = report.mean_confidence - report.accuracy
    if not n or not report.temperature > 1 or not gap > OVERCONFIDENCE:
        return None
    accuracy = report.accuracy
    if gap < STANDARD_ERRORS * math.sqrt(max(accuracy * (1 - accuracy), 0.25 / n) / n):
        return None
    return Finding(
        "overconfident",
        f"mean confidence is {percent(report.mean_confidence)}, accuracy {percent(accuracy)}",
        f"divide the logits by {number(report.temperature)}: the loss falls from {nats(report.loss)} to about "
        f"{nats(report.loss_at_temperature)}; find this temperature on rows that were neither trained nor tested on",
    )


SUSPICIONS = (
    no_prediction, infinite_loss, probabilities_as_logits, labels_start_at_1, worse_than_uniform, equal_rows,
    one_class_predicted, huge_logits, class_never_predicted, class_never_seen, overconfident, log_probabilities,
)  # fmt: skip
# What follows from a finding is not said again.
EXPLAINS = {
    "nonfinite_logits": {"overconfident"},  # rows without a prediction lower the accuracy alone
    "infinite_loss": {"worse_than_uniform", "overconfident"},
    "equal_rows": {"one_class_predicted"},
    "labels_shifted": {"overconfident"},
    "labels_permuted": {"overconfident"},
    "worse_than_uniform": {"overconfident"},
}
CODES = (
    "nonfinite_logits", "infinite_loss", "probabilities_as_logits", "labels_start_at_1", "labels_shifted",
    "labels_permuted", "worse_than_uniform", "equal_rows", "one_class_predicted", "huge_logits",
    "class_never_predicted", "class_never_seen", "overconfident", "log_probabilities",
)  # fmt: skip
