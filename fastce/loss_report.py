"""What is known about a loss, as plain data and as tables in text and HTML."""

import dataclasses
import html
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["CalibrationBin", "ClassReport", "Finding", "LossReport", "WorstRow"]

# How many classes a table shows.
CLASSES_SHOWN = 10
# Characters in a line of text.
WIDTH = 110


class ClassReport(NamedTuple):
    """One class: rows that have it as the target, predictions of it, mean loss in nats, share of its rows found."""

    name: str
    support: int
    predicted: int
    loss: float
    recall: float


class WorstRow(NamedTuple):
    """A row with a large loss: its number in C order, loss in nats, target, prediction (-1: none), its probability."""

    row: int
    loss: float
    target: int
    predicted: int
    confidence: float


class CalibrationBin(NamedTuple):
    """Rows whose confidence is in [low, high): how many, their mean confidence and accuracy (nan without rows)."""

    low: float
    high: float
    n_rows: int
    confidence: float
    accuracy: float


class Finding(NamedTuple):
    """Something that is probably wrong: a code for programs, what was found, what to do about it."""

    code: str
    message: str
    fix: str


class Line(NamedTuple):
    """A line of a table: what, how much, and what that means."""

    label: str
    value: str
    note: str = ""


class Section(NamedTuple):
    """A part of a report as a reader sees it: a title and its lines, or a table with heads."""

    title: str
    heads: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]


@dataclass(frozen=True, repr=False)
class LossReport:
    r"""What a loss means: made by :func:`report` and :meth:`LossMeter.compute`.

    Losses are in nats; shares, accuracies and probabilities are in [0, 1]. What does not exist is nan (the mean loss of
    wrong rows where all are right). A row counts unless it is ignored or has sample weight 0; means over rows are
    weighted by `sample_weight`, those of losses by the class weights too, as in :func:`cross_entropy`.

    Attributes
    ----------
    n_rows, n_classes : int
        All rows, ignored ones too; classes.
    n_ignored : int
        Rows that do not count.
    n_nonfinite : int
        Rows that count and have a loss of nan (a nan, a +inf or nothing but -inf among the logits) or inf (the target's
        logit is -inf). The former have no prediction: they are wrong, and no part of confidence and calibration.
    loss, bits, perplexity : float
        The mean loss L of :func:`cross_entropy` (within its error bound: the rows are those of
        :func:`cross_entropy_stats`); :math:`L / \log 2`; :math:`e^L`, the number of equally likely classes that are as
        hard to predict.
    uniform_loss : float
        The loss of equal chances, :math:`\log C` (times the mean mass of soft targets): expected at initialisation,
        when logits are about 0.
    prior_loss : float
        The loss of always predicting the class frequencies of these targets, their entropy: the best that can be had
        without looking at the input, and the loss expected at initialisation with :func:`init_bias`.
    majority_accuracy : float
        The accuracy of always predicting the most frequent class.
    skill : float
        :math:`1 - L / L_{prior}`: 1 is perfect, 0 no better than the class frequencies; scikit-learn's
        ``d2_log_loss_score``.
    kl : float
        The part of the loss that a model can remove, :math:`H(q, p) - H(q)`, with the targets' entropy H(q) taken off:
        that is 0 for class ids.
    accuracy, top5_accuracy : float
        Share of rows whose target is the first of the predicted classes, among the first five (the lower class first
        where logits are equal). For soft targets the target is the class with the largest mass.
    mean_confidence : float
        Mean probability of the predicted class.
    calibration_error : float
        Mean distance between confidence and accuracy over `calibration_bins`, weighted by their rows: the expected
        calibration error of the top label [1]_, as torchmetrics computes it.
    calibration_bins : list of CalibrationBin
        `n_bins` of equal width, and a last one for a confidence that is 1 in float32.
    worst_share : float
        Share of the sum of all losses that comes from the 1 % of rows with the largest (rounded up).
    loss_correct, loss_wrong : float
        Mean loss of the rows that are predicted right, and of the others.
    temperature, loss_at_temperature : float
        The temperature T in [0.01, 100] that minimises the loss of logits / T [2]_, and about the loss there: T above 1
        means overconfident. Found on a sample: all rows if they hold at most 1,048,576 logits and are at most 65,536,
        else as many (64 at least) with the smallest hashes; the loss is that of all rows times the fraction by which
        that of the sample falls.
    loss_histogram : list of int
        Rows by their loss, in 40 bins that are equal on a logarithmic scale from 1e-6 to 100 nats; what lies outside is
        counted in the first or the last. `LOSS_EDGES` are the borders.
    per_class : list of ClassReport
        For every class: name, support (rows), predicted (rows), loss, recall.
    worst_rows : list of WorstRow
        The ten rows with the largest losses, weighted, the largest first.
    findings : list of Finding
        What is probably wrong, the most serious first: (code, message, fix).

    References
    ----------
    .. [1] M. P. Naeini, G. F. Cooper, M. Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning",
       AAAI (2015).
    .. [2] C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural networks", ICML (2017).

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> report = fastce.report(np.array([[2.0, 0.0], [0.0, 1.0]]), [0, 0])
    >>> report
    LossReport(n_rows=2, n_classes=2, loss=0.7201, accuracy=0.5, findings=1)
    >>> [(row.row, round(row.loss, 4)) for row in report.worst_rows]
    [(1, 1.3133), (0, 0.1269)]
    >>> sorted(report.to_dict()) == sorted(vars(report))
    True
    """

    n_rows: int
    n_classes: int
    n_ignored: int
    n_nonfinite: int
    loss: float
    bits: float
    perplexity: float
    uniform_loss: float
    prior_loss: float
    majority_accuracy: float
    skill: float
    kl: float
    accuracy: float
    top5_accuracy: float
    mean_confidence: float
    calibration_error: float
    calibration_bins: list[CalibrationBin]
    worst_share: float
    loss_correct: float
    loss_wrong: float
    temperature: float
    loss_at_temperature: float
    loss_histogram: list[int]
    per_class: list[ClassReport]
    worst_rows: list[WorstRow]
    findings: list[Finding]

    def __eq__(self, other: object) -> bool:
        """Whether two reports say the same; what does not exist is the same in both, though nan is not nan."""
        if not isinstance(other, LossReport):
            return NotImplemented
        names = [field.name for field in dataclasses.fields(self)]
        return all(_is_same(getattr(self, name), getattr(other, name)) for name in names)

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes as plain numbers, strings, lists and dicts; what does not exist is nan."""
        return {field.name: _as_plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def to_json(self, **options: Any) -> str:
        """Return `to_dict()` as JSON, which knows neither nan nor inf: both are null. `options` go to json.dumps."""
        return json.dumps(_without_nan(self.to_dict()), allow_nan=False, **options)

    def sections(self) -> list[Section]:
        """Return the report as a reader sees it, for any kind of page."""
        return [self._loss(), self._predictions(), *self._classes(), *self._worst()]

    def plot(self) -> Any:
        """Return a matplotlib Figure of four pictures: calibration, confidence, losses of the rows and of the classes.

        Needs matplotlib: ``pip install 'fastce[plot]'``, else ImportError. Save it with ``.savefig("report.png")``.
        """
        from fastce._plots import figure_of

        return figure_of(self)

    def summary(self) -> str:
        """Return one line on what the report is about."""
        parts = [f"{self.n_rows:,} rows", f"{self.n_classes:,} classes"]
        if self.n_ignored:
            parts.append(f"{self.n_ignored:,} ignored")
        if self.n_nonfinite:
            parts.append(f"{self.n_nonfinite:,} with a loss that is not finite")
        return ", ".join(parts)

    def _loss(self):
        in_other_units = f"nats; {number(self.bits)} bits, perplexity {number(self.perplexity)}"
        lines = [
            Line("cross-entropy", nats(self.loss), in_other_units),
            Line("of equal chances", nats(self.uniform_loss), f"log {self.n_classes}; expected before training"),
            Line("of class frequencies", nats(self.prior_loss), "the best without input; expected with init_bias"),
            Line("skill", percent(self.skill), "0 % knows the class frequencies, 100 % is perfect"),
        ]
        if self.kl != self.loss and not math.isnan(self.kl):
            lines.insert(1, Line("divergence", nats(self.kl), "the part above the entropy of the targets"))
        return Section("Loss", (), lines)

    def _predictions(self):
        majority = f"the most frequent class alone: {percent(self.majority_accuracy)}"
        lines = [Line("accuracy", percent(self.accuracy), majority)]
        if self.n_classes > 5:
            lines.append(Line("top-5 accuracy", percent(self.top5_accuracy)))
        lines += [
            Line("mean confidence", percent(self.mean_confidence)),
            Line("calibration error", percent(self.calibration_error), "mean distance of confidence and accuracy"),
            Line("loss when right", nats(self.loss_correct)),
            Line("loss when wrong", nats(self.loss_wrong)),
            Line("worst 1 % of rows", percent(self.worst_share), "of the whole loss"),
            Line("best temperature", number(self.temperature), f"the loss there: {nats(self.loss_at_temperature)}"),
        ]
        return Section("Predictions", (), lines)

    def _classes(self):
        seen = [c for c in self.per_class if c.support]
        if not seen:
            return
        shown = sorted(seen, key=lambda c: -c.loss if c.loss == c.loss else -math.inf)[:CLASSES_SHOWN]
        lines = [(c.name, f"{c.support:,}", f"{c.predicted:,}", nats(c.loss), percent(c.recall)) for c in shown]
        title = "Classes" if len(shown) == self.n_classes else f"Classes, the {len(shown)} with the largest loss"
        yield Section(title, ("class", "rows", "predicted", "loss", "recall"), lines)

    def _worst(self):
        if not self.worst_rows:
            return
        name = [c.name for c in self.per_class]
        lines = [
            (
                str(r.row), name[r.target], name[r.predicted] if r.predicted >= 0 else "none", percent(r.confidence),
                nats(r.loss),
            )
            for r in self.worst_rows
        ]
        yield Section("Rows with the largest loss", ("row", "target", "predicted", "confidence", "loss"), lines)

    def __repr__(self) -> str:
        numbers = f"loss={number(self.loss)}, accuracy={number(self.accuracy)}, findings={len(self.findings)}"
        return f"LossReport(n_rows={self.n_rows}, n_classes={self.n_classes}, {numbers})"

    def __str__(self) -> str:
        parts = [self.summary()]
        for finding in self.findings:
            lines = [f"! {finding.code}: {finding.message}", f"  {finding.fix}"]
            parts.append("\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines))
        parts += [_as_text(section) for section in self.sections()]
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        text = html.escape
        parts = [f"<p>{text(self.summary())}</p>"]
        for finding in self.findings:
            parts.append(
                f"<p><strong>{text(finding.code)}</strong>: {text(finding.message)}<br>{text(finding.fix)}</p>"
            )
        parts += [_as_html(section) for section in self.sections()]
        return "<div>" + "\n".join(parts) + "</div>"


# Borders of `loss_histogram`, in nats.
LOSS_EDGES = tuple(10.0 ** (k / 5) for k in range(-30, 11))


def number(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:,.4g}" if abs(value) < 1e7 else f"{value:.3e}"


def nats(value: float) -> str:
    """Return a loss with four decimals, or four digits where those would hide it or make it long."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e7 else f"{value:.3e}"


def percent(value: float) -> str:
    """Return a share in per cent."""
    return "nan" if math.isnan(value) else f"{100 * value:.1f} %"


def _as_plain(value):
    if isinstance(value, list):
        return [_as_plain(part) for part in value]
    return value._asdict() if hasattr(value, "_asdict") else value


def _is_same(a, b):
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return a == b or (a != a and b != b)


def _without_nan(value):
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_text(section):
    """Return a section with its columns aligned, numbers to the right."""
    lines = [section.heads, *section.lines] if section.heads else section.lines
    lines = [[" ".join(cell.split()) for cell in line] for line in lines]  # a name may hold the end of a line
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [section.title]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        if not section.heads:  # the last column is a note
            cells[-1] = line[-1]
        texts.append("  " + "  ".join(cells).rstrip())
    return "\n".join(texts)


def _as_html(section):
    def row(cells, tag):
        sides = ["left"] + ["right"] * (len(cells) - 1)
        if not section.heads:
            sides[-1] = "left"
        cells = [
            f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        ]
        return "<tr>" + "".join(cells) + "</tr>"

    heads = f"<thead>{row(section.heads, 'th')}</thead>" if section.heads else ""
    lines = "\n".join(row(line, "td") for line in section.lines)
    return f"<h4>{html.escape(section.title)}</h4>\n<table>{heads}<tbody>\n{lines}\n</tbody></table>"
