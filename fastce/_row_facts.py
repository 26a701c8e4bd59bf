"""What one batch says row by row: the numbers that a report adds up."""

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from fastce import _engine

# Logits that are taken together: few enough for small working arrays, enough for threads not to wait for one another.
LOGITS_AT_ONCE = 1 << 24
# Elements of the float64 copies that are made of soft targets and logits, a block at a time.
BLOCK_ELEMENTS = 1 << 18
# So many classes are compared first to find a target's rank, then as many again as before: most rows end early.
FIRST_CLASSES = 64
TOP = 5


@dataclass
class RowFacts:
    """Arrays over the rows (n,) of a batch; what is said about rows that are not `live` means nothing.

    `losses` and `target_entropies` are weighted by class and row, `divisors` are the rows' parts of the mean's
    denominator; `weights` are those of the rows. `classes` are the target classes, for soft targets the first with the
    largest mass. `known` rows have a prediction, the others a nan, a +inf or nothing but -inf.
    """

    live: NDArray[np.bool_]
    known: NDArray[np.bool_]
    classes: NDArray[np.int64]
    weights: NDArray[np.float64]
    divisors: NDArray[np.float64]
    target_entropies: NDArray[np.float64]
    losses: NDArray[np.float64]
    lse: NDArray[np.float64]
    entropy: NDArray[np.float64]
    predicted: NDArray[np.int64]
    correct: NDArray[np.bool_]
    top_logits: NDArray[np.float64]
    confidences: NDArray[np.float64]
    in_top: NDArray[np.bool_]


def facts_of(problem, mass):
    """Return the RowFacts of a Problem with the class axis last, and add its targets' weighted mass to `mass` (C,)."""
    facts = [_facts_of_block(block, mass) for block in blocks_of(problem)] or [_facts_of_block(problem, mass)]
    return RowFacts(*(np.concatenate([getattr(part, field.name) for part in facts]) for field in fields(RowFacts)))


def blocks_of(problem):
    """Yield the Problem in blocks of rows, none for no rows."""
    n_classes = problem.logits.shape[-1]
    for index, first, stop in _engine.row_blocks(problem.row_shape, max(1, LOGITS_AT_ONCE // n_classes)):
        parts = {"logits": problem.logits[index]}
        if problem.distribution is not None:
            parts["distribution"] = problem.distribution[index]
        for name in ("ids", "sample_weight", "indices", "values"):
            if getattr(problem, name) is not None:
                parts[name] = getattr(problem, name)[first:stop]
        n_live = np.count_nonzero(parts["ids"] >= 0) if "ids" in parts else 0
        yield replace(problem, axis=parts["logits"].ndim - 1, n_live=n_live, **parts)


def _facts_of_block(problem, mass):
    n_rows = problem.n_rows
    live = problem.live()
    live = np.ones(n_rows, bool) if live is None else live.reshape(-1)
    weights = np.ones(n_rows) if problem.sample_weight is None else problem.sample_weight
    if problem.ids is not None:
        classes, target_entropies = problem.ids, np.zeros(n_rows)
        divisors = weights if problem.weight is None else weights * problem.weight[np.maximum(classes, 0)]
        mass.add(divisors[live], classes[live])
    else:
        classes, target_entropies = _read_soft_targets(problem, live, weights, mass)
        divisors = weights

    losses, lse, probability, entropy = np.empty((4, n_rows))
    predicted, correct = np.empty(n_rows, np.int64), np.empty(n_rows, bool)
    problem.fill(losses, statistics=(lse, probability, entropy, predicted, correct))
    known = live & (predicted >= 0)
    top_logits = logits_at(problem, np.maximum(predicted, 0))
    return RowFacts(
        live, known, classes, weights, divisors, target_entropies, losses, lse, entropy, predicted, correct,
        top_logits, np.exp(top_logits - lse), _in_top(problem, classes, known, correct),
    )  # fmt: skip


def logits_at(problem, classes):
    """Return one logit of each row, that of its class (n,), as float64 (n,)."""
    indices = classes.reshape(*problem.row_shape, 1)
    return np.take_along_axis(problem.logits, indices, axis=-1).astype(np.float64).reshape(-1)


def logits_of(problem, rows, classes=slice(None)):
    """Return a copy (len(rows), m) of some rows and classes of the logits, in the dtype that computes for theirs."""
    if not problem.row_shape:
        chosen = problem.logits[None, classes][rows]
    else:
        chosen = problem.logits[(*np.unravel_index(rows, problem.row_shape), classes)]
    return np.ascontiguousarray(chosen, problem.loss_dtype)


def soft_targets_of(problem, rows):
    """Return the soft targets of some rows as float64 (len(rows), C)."""
    n_classes = problem.logits.shape[-1]
    if problem.indices is None:
        return problem.distribution.reshape(-1, n_classes)[rows].astype(np.float64)
    places = problem.indices[rows] + n_classes * np.arange(len(rows))[:, None]
    masses = np.bincount(places.reshape(-1), problem.values[rows].reshape(-1), len(rows) * n_classes)
    return masses.reshape(len(rows), n_classes).astype(np.float64, copy=False)  # of no values, integers come back


def _read_soft_targets(problem, live, weights, mass):
    """Return (class with the largest mass, weighted entropy) of each row's target, and add the masses to `mass`."""
    n_rows, n_classes = problem.n_rows, problem.logits.shape[-1]
    classes, entropies = np.full(n_rows, -1), np.zeros(n_rows)
    step = max(1, BLOCK_ELEMENTS // n_classes)
    for start in range(0, n_rows, step):
        rows = start + np.flatnonzero(live[start : start + step])
        q = soft_targets_of(problem, rows)
        classes[rows] = q.argmax(axis=1)
        terms = np.where(q > 0, -q * np.log(np.where(q > 0, q, 1.0)), 0.0)
        q *= weights[rows, None]
        if problem.weight is not None:
            terms *= problem.weight
            q *= problem.weight
        entropies[rows] = terms.sum(axis=1) * weights[rows]
        mass.add(q)
    return classes, entropies


def _in_top(problem, classes, known, correct):
    """Return whether fewer than five classes come before the target: larger logits, and equal ones of lower classes."""
    n_classes = problem.logits.shape[-1]
    in_top = known.copy()
    if n_classes <= TOP:
        return in_top
    targets = logits_at(problem, np.maximum(classes, 0)).astype(problem.loss_dtype)
    # Most rows that are far from the top are so among the first classes: looked at where they lie.
    leading = np.asarray(problem.logits[..., :FIRST_CLASSES], problem.loss_dtype)
    leading = leading.reshape(len(targets), leading.shape[-1])
    in_top &= correct | (count_true(leading > targets[:, None]) < TOP)
    doubtful = np.flatnonzero(in_top & ~correct)
    step = BLOCK_ELEMENTS // FIRST_CLASSES
    columns = np.arange(n_classes)
    for start in range(0, len(doubtful), step):
        rows = doubtful[start : start + step]
        in_top[rows] = False
        before = np.zeros(len(rows), np.int64)
        first, stop = 0, FIRST_CLASSES
        while first < n_classes and len(rows):
            z, target = logits_of(problem, rows, slice(first, stop)), targets[rows, None]
            ahead = z == target
            ahead &= columns[first:stop] < classes[rows, None]
            ahead |= z > target
            before += count_true(ahead)
            rows, before = rows[before < TOP], before[before < TOP]
            first, stop = stop, 2 * stop
        in_top[rows] = True
    return in_top


def count_true(flags):
    """Return how many flags (n, m) of each row are true; faster than a sum of them."""
    return np.bitwise_count(np.packbits(flags, axis=1)).sum(axis=1, dtype=np.int64)
