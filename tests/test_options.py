"""Any combination of options gives the loss, gradient and Hessian of the documented formulas, within its bounds.

`truth_of` is those formulas in extended precision, written for this file alone; other test files use it too.
"""

import importlib.util
import itertools
import sys
import types
import unittest
import warnings
from dataclasses import dataclass

import hard_rows
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss
from test_gradients import central_differences
from test_layouts import READABLE_LAYOUTS, WRITABLE_LAYOUTS, assert_same_bits
from truth import GRADIENT_BOUND, LOSS_BOUND

import fastce
from fastce import SparseTargets, reference

EXTENDED = np.longdouble


# The truth


@dataclass
class Rows:
    """What the formulas say of rows (N, C) in extended precision; `*_size` is what a relative bound refers to.

    `doubt` is one unit in the last place of a capped logit: the documentation bounds the error of what follows from the
    rounded logits, not of the rounding.
    """

    losses: np.ndarray
    losses_size: np.ndarray
    gradient: np.ndarray
    gradient_size: np.ndarray
    hessian: np.ndarray
    hessian_size: np.ndarray
    probability: np.ndarray
    lse: np.ndarray
    mass: np.ndarray
    doubt: np.ndarray
    slope_doubt: np.ndarray


def computing_dtype(dtype):
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def transformed(x, dtype, logit_scale, softcap):
    """Return logits scaled and capped, as rounded to `dtype`, then dz/dx, the doubt of z, and that of dz/dx."""
    x = x.astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(dtype.type(logit_scale))
    logit_scale = rounded if 0 < rounded < np.inf else logit_scale
    if softcap is None:
        return (x * logit_scale).astype(dtype), np.full(x.shape, EXTENDED(logit_scale)), 0.0, 0.0
    inner = x.astype(EXTENDED) * logit_scale / EXTENDED(softcap)
    z = np.where(np.isinf(x), x, softcap * np.tanh(inner)).astype(dtype)
    slope = logit_scale / np.cosh(inner) ** 2
    doubt = np.spacing(np.abs(np.where(np.isfinite(z), z, 0)))
    # d log(slope) = 2 tanh(inner) d inner, and `inner` is a product and a quotient of float64. A slope below the normal
    # numbers has lost its digits.
    slope_doubt = np.where(np.isfinite(inner), np.abs(inner), 0) * 2.0**-50
    return z, slope, doubt, np.where(slope < 8 * np.finfo(dtype).smallest_normal, 1.0, slope_doubt)


def solve(x, a, shown, *, logit_scale=1.0, softcap=None, z_loss=0.0):
    """Return the Rows of logits x (N, C), of their own dtype, for weighted and smoothed mass `a` (N, C)."""
    dtype = computing_dtype(x.dtype)
    with np.errstate(all="ignore"):
        z, slope, doubt, slope_doubt = transformed(x, dtype, logit_scale, softcap)
        z = np.where(shown, z, -np.inf).astype(EXTENDED)
        bad = np.isnan(z).any(1) | np.isposinf(z).any(1) | np.isneginf(z).all(1)
        index = np.where(np.isnan(z), -np.inf, z).argmax(1)
        at_top = np.arange(len(z)), index
        top = z[at_top][:, None]
        e = np.exp(z - top)
        e[at_top] = 0
        others = e.sum(1, keepdims=True)
        log_sum = np.log1p(others)
        p = e / (1 + others)
        p[at_top] = (1 / (1 + others))[:, 0]
        miss = 1 - p
        miss[at_top] = (others / (1 + others))[:, 0]

        total = a.sum(1, keepdims=True)
        terms = np.where(a > 0, a * ((top - z) + log_sum), 0)
        lse, reach = top + log_sum, np.abs(top) + log_sum
        losses = terms.sum(1) + z_loss * lse[:, 0] ** 2
        losses_size = terms.sum(1) + z_loss * reach[:, 0] ** 2
        gradient = p * total - a
        elsewhere = a.copy()
        elsewhere[at_top] = 0
        gradient[at_top] = p[at_top] * elsewhere.sum(1) - (a * miss)[at_top]
        gradient += p * 2 * z_loss * lse
        single = ((a > 0).sum(1, keepdims=True) <= 1) & (z_loss == 0)
        gradient_size = np.where(single, np.abs(gradient), p * (total + 2 * z_loss * reach) + a)
        hessian = p * ((total + 2 * z_loss * lse) * miss + 2 * z_loss * p)
        hessian_size = p * (total + 2 * z_loss * (reach + 1))
        slope = np.where(np.isneginf(x), 0, slope) if softcap is not None else slope
        for array in (gradient, gradient_size):
            array *= slope
        for array in (hessian, hessian_size):
            array *= slope**2
        losses[bad] = np.nan
        for array in (gradient, hessian):
            array[bad] = np.nan
            array[~shown] = 0
    doubts = np.broadcast_to(doubt, z.shape).max(1).astype(EXTENDED)
    return Rows(
        losses, losses_size, gradient, gradient_size, hessian, hessian_size, p, lse[:, 0], total[:, 0], doubts,
        np.broadcast_to(slope_doubt, z.shape),
    )  # fmt: skip


@dataclass
class Truth:
    """A call's true results, of the shapes they are returned in, and how far from them it may be."""

    loss: np.ndarray
    loss_allowed: np.ndarray
    gradient: np.ndarray
    gradient_allowed: np.ndarray
    hessian: np.ndarray
    hessian_allowed: np.ndarray


def dense_targets(targets, shape, axis, ignore_index):
    """Return (q (N, C), which rows count (N,), class ids (N,) or None)."""
    classes = shape[axis]
    if isinstance(targets, SparseTargets):
        n_rows = int(np.prod(shape)) // classes
        entries = np.shape(targets.indices)[-1]
        indices, values = (np.reshape(array, (n_rows, entries)) for array in (targets.indices, targets.values))
        q = np.zeros((n_rows, classes), EXTENDED)
        np.add.at(q, (np.arange(n_rows)[:, None], indices), values.astype(EXTENDED))
        return q, np.ones(n_rows, bool), None
    targets = np.asarray(targets)
    if targets.dtype.kind == "f":
        q = np.moveaxis(targets, axis, -1).reshape(-1, classes).astype(EXTENDED)
        return q, np.ones(len(q), bool), None
    ids = targets.reshape(-1).astype(np.int64)
    ignored = [] if ignore_index is None else np.atleast_1d(np.array(ignore_index, np.int64))
    live = ~np.isin(ids, ignored)
    q = np.zeros((len(ids), classes), EXTENDED)
    q[np.flatnonzero(live), ids[live]] = 1
    return q, live, ids


def truth_of(
    logits, targets, *, axis=-1, weight=None, sample_weight=None, ignore_index=-100, label_smoothing=0.0,
    logit_scale=1.0, softcap=None, z_loss=0.0, class_mask=None, reduction="mean", denominator=None, num_threads=None,
    grad_output=None, out=None, hess_out=None,
):  # fmt: skip
    """Return the Truth of a call of cross_entropy_with_grad_hess (with `softcap` too)."""
    logits = np.asarray(logits)
    last = np.moveaxis(logits, axis, -1)
    row_shape, classes = last.shape[:-1], last.shape[-1]
    q, live, ids = dense_targets(targets, logits.shape, axis, ignore_index)
    n_rows = len(q)
    w = np.ones(classes, EXTENDED) if weight is None else np.asarray(weight).astype(EXTENDED)
    s = np.ones(n_rows, EXTENDED)
    if sample_weight is not None:
        s = np.asarray(sample_weight).astype(EXTENDED).reshape(-1)
    counts = live & (s != 0)
    shown = np.ones((n_rows, classes), bool)
    if class_mask is not None:
        shown = np.moveaxis(np.broadcast_to(class_mask, logits.shape), axis, -1).reshape(-1, classes)

    with np.errstate(invalid="ignore", divide="ignore"):
        q = np.where(counts[:, None], q, 0)
        smooth = np.where(shown, label_smoothing / shown.sum(1, keepdims=True), 0)
        a = w * ((1 - EXTENDED(label_smoothing)) * q + (smooth if label_smoothing else 0))
    x = np.where(counts[:, None], last.reshape(-1, classes), 0).astype(logits.dtype)
    rows = solve(x, a, shown, logit_scale=logit_scale, softcap=softcap, z_loss=z_loss)

    # The factor of each row, and what the mean is divided by.
    factor = np.broadcast_to(np.asarray(1.0 if grad_output is None else grad_output, EXTENDED), row_shape).reshape(-1)
    divisor, divisor_doubt = EXTENDED(1), EXTENDED(0)
    if reduction == "mean":
        weights = s * (w[np.where(live, ids, 0)] if ids is not None else 1)
        weights = weights[counts]
        divisor = weights.sum() if denominator is None else EXTENDED(denominator)
        with np.errstate(invalid="ignore", divide="ignore"):
            divisor_doubt = 2.0**-51 * np.abs(weights).sum() / np.abs(divisor) if denominator is None else 0.0
    nothing = reduction == "mean" and divisor == 0
    with np.errstate(all="ignore"):
        return assemble(rows, counts, s, factor, divisor, divisor_doubt, nothing, logits, axis, reduction)


def assemble(rows, counts, s, factor, divisor, divisor_doubt, nothing, logits, axis, reduction):
    dtype = computing_dtype(logits.dtype)
    smallest = EXTENDED(np.finfo(dtype).smallest_normal)
    row_shape = np.moveaxis(logits, axis, -1).shape[:-1]
    size = np.where(counts, np.abs(s), 0)
    losses = np.where(counts, rows.losses * s, 0)
    doubtful = rows.mass + np.where(np.isfinite(rows.losses_size), 2 * np.sqrt(rows.losses_size), 0)
    allowed = size * (np.nan_to_num(rows.losses_size, posinf=0) * LOSS_BOUND[dtype.name] + 4 * rows.doubt * doubtful)
    allowed = np.where(counts, np.maximum(allowed, smallest * np.maximum(1, size)), 0)
    if reduction == "none":
        loss, loss_allowed = losses.reshape(row_shape), allowed.reshape(row_shape)
    else:
        loss = losses.sum() / divisor if not nothing else EXTENDED(np.nan)
        finite = np.abs(np.where(np.isfinite(losses), losses, 0))
        loss_allowed = (allowed.sum() + finite.sum() * divisor_doubt) / abs(divisor)

    def derivative(value, value_size, bound, doubts):
        scale = np.where(counts, s * factor / divisor, 0)[:, None]
        result = np.where(counts[:, None] & ~np.bool_(nothing), value * scale, 0)
        error = value_size * (bound + divisor_doubt + doubts * rows.doubt[:, None] + doubts * rows.slope_doubt)
        reach = rows.mass[:, None] + 1
        error = (error + np.where(rows.probability < smallest, smallest * reach, 0)) * np.abs(scale)
        error = np.where(counts[:, None] & ~np.bool_(nothing), np.maximum(error, smallest), 0)
        full = (*row_shape, logits.shape[axis])
        return np.moveaxis(result.reshape(full), -1, axis), np.moveaxis(error.reshape(full), -1, axis)

    bound = GRADIENT_BOUND[dtype.name]
    return Truth(
        loss, loss_allowed,
        *derivative(rows.gradient, rows.gradient_size, bound, 4),
        *derivative(rows.hessian, rows.hessian_size, bound, 8),
    )  # fmt: skip


def assert_allowed(got, true, allowed, what=""):
    """Every entry is within `allowed` of the truth; nan where it is nan, infinity where it overflows."""
    got, true, allowed = np.asarray(got), np.asarray(true), np.asarray(allowed)
    assert got.shape == true.shape, f"{what}: shape {got.shape}, not {true.shape}"
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = true.astype(got.dtype)
        special = ~np.isfinite(rounded)
        np.testing.assert_array_equal(got[special], rounded[special], err_msg=str(what))
        error = np.abs(np.where(special, 0, got.astype(EXTENDED)) - np.where(special, 0, true))
        excess = np.where(special | (error == 0), 0, error / allowed)
    excess = np.where(np.isnan(excess), np.inf, excess)
    if excess.size and excess.max() > 1:
        at = np.unravel_index(np.argmax(excess), excess.shape)
        raise AssertionError(
            f"{what}: {np.count_nonzero(excess > 1)} of {excess.size} entries are off; worst at "
            f"{tuple(int(i) for i in at)}: got {got[at]!r}, true value {true[at]!r}, "
            f"{float(excess[at]):.3g} times the allowed error"
        )


def assert_true(logits, targets, *, what="", out=None, **options):
    """The three functions give the truth, the same loss bits each; return (loss, gradient)."""
    truth = truth_of(logits, targets, **options)
    plain = {name: value for name, value in options.items() if name != "grad_output"}
    alone = fastce.cross_entropy(logits, targets, **plain)
    hessian = None
    if options.get("softcap") is None:
        hessian = fastce.cross_entropy_with_grad_hess(logits, targets, **options)
    loss, gradient = fastce.cross_entropy_with_grad(logits, targets, out=out, **options)
    assert_allowed(loss, truth.loss, truth.loss_allowed, f"{what} loss")
    assert_allowed(gradient, truth.gradient, truth.gradient_allowed, f"{what} gradient")
    assert_same_bits(alone, loss, f"{what} loss alone")
    if hessian is not None:
        assert_allowed(hessian[0], truth.loss, truth.loss_allowed, f"{what} loss with the Hessian")
        assert_allowed(hessian[1], truth.gradient, truth.gradient_allowed, f"{what} gradient with the Hessian")
        assert_allowed(hessian[2], truth.hessian, truth.hessian_allowed, f"{what} Hessian")
    return loss, gradient


# The cross product of all options, sampled

CHOICES = {
    "targets": ["ids", "distribution", "sparse"],
    "dtype": ["float32", "float64"],
    "weight": ["no weight", "weights", "weights with zeros"],
    "sample_weight": ["no sample weight", "sample weights", "of any sign", "with zeros"],
    "label_smoothing": [0.0, 0.1, 1.0],
    "ignore_index": ["default", 255, "a class", "list", "nothing"],
    "logit_scale": [1.0, 0.5, 1.7],
    "softcap": [None, 0.7, 30.0],
    "z_loss": [0.0, 1e-4, 0.3],
    "class_mask": ["no mask", "mask of classes", "mask of rows"],
    "reduction": ["none", "sum", "mean", "denominator"],
    "axis": ["last", "first", "middle"],
    "layout": [np.copy, np.asfortranarray, *WRITABLE_LAYOUTS[2:9]],
    "buffer": ["fresh", "out", "in place"],
    "grad_output": ["no factor", "a factor", "a factor a row"],
    "logits": ["ordinary", "wide", "offset", "minus infinity", "spoiled"],
}
SAMPLE = 400
CLASS_COUNTS = [1, 2, 3, 5, 10, 15, 16, 17, 21, 33, 48, 49, 64, 96, 97, 100, 128, 129, 257, 1000, 4096, 4097]


def choices(seed):
    rng = np.random.default_rng(seed)
    return {name: values[rng.integers(len(values))] for name, values in CHOICES.items()}


def random_logits(kind, shape, dtype, rng):
    """Logits (..., C) of one kind of the cross product."""
    x = rng.normal(0, 60 if kind == "wide" else 3, shape)
    if kind == "offset":
        x += rng.choice([-1e8, -300, 50, 700, 1e8])
    x = x.astype(dtype)
    if kind == "minus infinity":
        x[rng.random(shape) < 0.3] = -np.inf
    if kind == "spoiled":
        for bad in (np.nan, np.inf, -np.inf):
            at = tuple(rng.integers(0, length) for length in shape[:-1])
            x[at][rng.integers(0, shape[-1]) if bad != -np.inf else ...] = bad
    return x


def random_targets(kind, shape, ignore_index, rng):
    """Targets for logits (..., C) with the class axis last."""
    classes = shape[-1]
    if kind == "ids":
        ids = rng.integers(0, classes, shape[:-1])
        ignored = {"default": [-100], 255: [255], "a class": [classes // 2], "list": [-1, 255, 0], "nothing": [0]}
        return np.where(rng.random(ids.shape) < 0.2, rng.choice(ignored[ignore_index], ids.shape), ids)
    if kind == "sparse":
        entries = int(rng.integers(1, 4))
        values = rng.choice([0.0, 0.3, 1.0, 2.5], (*shape[:-1], entries))
        return SparseTargets(rng.integers(0, classes, values.shape), values)
    q = rng.random(shape) * (rng.random(shape) < 0.5)
    return q / np.maximum(q.sum(-1, keepdims=True), 1e-3) * rng.choice([1.0, 0.6, 3.0], (*shape[:-1], 1))


def random_call(chosen, seed):
    """Return (logits, targets, options) of a call with the chosen options."""
    rng = np.random.default_rng([seed, 1])
    dtype, axis = np.dtype(chosen["dtype"]), {"last": -1, "first": 0, "middle": 1}[chosen["axis"]]
    shorter = np.linspace(2, 0.3, len(CLASS_COUNTS))
    classes = int(rng.choice(CLASS_COUNTS, p=shorter / shorter.sum()))
    n_axes = rng.integers({-1: 0, 0: 1, 1: 2}[axis], 4)
    row_shape = tuple(int(n) for n in rng.integers(1, 7 if classes < 100 else 3, n_axes))
    shape = (*row_shape, classes)
    ignore_index = chosen["ignore_index"] if chosen["targets"] == "ids" else "default"
    x = random_logits(chosen["logits"], shape, dtype, rng)
    targets = random_targets(chosen["targets"], shape, ignore_index, rng)

    options = {name: chosen[name] for name in ("label_smoothing", "logit_scale", "softcap", "z_loss", "reduction")}
    options["axis"] = axis
    if chosen["reduction"] == "denominator":
        options |= {"reduction": "mean", "denominator": float(rng.uniform(0.5, 50))}
    if ignore_index != "default":
        ignored = {255: 255, "a class": classes // 2, "list": [255, -1, 0], "nothing": None}
        options["ignore_index"] = ignored[ignore_index]
    if chosen["weight"] != "no weight":
        options["weight"] = rng.uniform(0.1, 3, classes)
    if chosen["weight"] == "weights with zeros":
        options["weight"] *= rng.random(classes) < 0.7
    if chosen["sample_weight"] != "no sample weight":
        factors = {"sample weights": [1], "of any sign": [-1, 1], "with zeros": [0, 1, 1]}[chosen["sample_weight"]]
        options["sample_weight"] = rng.uniform(0.1, 2, row_shape) * rng.choice(factors, row_shape)
    if chosen["grad_output"] != "no factor":
        by_row = chosen["grad_output"] == "a factor a row" and chosen["reduction"] == "none"
        options["grad_output"] = rng.normal(0, 3, row_shape if by_row else ())

    # Rows that do not count are never looked at: nan in logits and distributions, every class masked.
    _, live, _ = dense_targets(targets, shape, -1, options.get("ignore_index", -100))
    counts = live.reshape(row_shape) & (np.asarray(options.get("sample_weight", 1)) != 0)
    x[~counts] = np.nan
    if chosen["targets"] == "distribution":
        targets[~counts] = np.nan
    if chosen["class_mask"] != "no mask":
        mask = rng.random(shape if chosen["class_mask"] == "mask of rows" else (1,) * n_axes + (classes,)) < 0.7
        mask[..., rng.integers(classes)] = True
        if mask.shape == shape:
            mask[~counts] = False
        x[~mask & (rng.random(shape) < 0.3)] = np.nan
        options["class_mask"] = np.moveaxis(mask, -1, axis)
    if chosen["targets"] == "distribution":
        targets = np.ascontiguousarray(np.moveaxis(targets, -1, axis))
    return np.ascontiguousarray(np.moveaxis(x, -1, axis)), targets, options


def check_call(chosen, seed):
    """The call is true, and as true in any layout and through any buffer."""
    logits, targets, options = random_call(chosen, seed)
    what = {name: getattr(value, "__name__", value) for name, value in chosen.items()}
    layout = chosen["layout"]
    given = layout(logits)
    if chosen["targets"] == "distribution" and seed % 2:
        targets = layout(targets.astype(logits.dtype))
    loss, gradient = assert_true(given, targets, what=what, **options)
    assert_same_bits(given, logits, what)
    out = {"fresh": None, "out": layout(np.full_like(logits, 7)), "in place": given}[chosen["buffer"]]
    again = fastce.cross_entropy_with_grad(given, targets, out=out, **options)
    assert out is None or again[1] is out
    assert_same_bits(again[0], loss, what)
    assert_same_bits(again[1], gradient, what)
    if chosen["sample_weight"] != "of any sign":
        losses = np.asarray(loss)
        assert not (losses < 0).any() and not np.signbit(losses[losses == 0]).any(), what


@pytest.mark.parametrize("seed", range(SAMPLE))
def test_any_combination_of_options_is_true(seed):
    check_call(choices(seed), seed)


any_choices = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()})


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(any_choices, st.integers(0, 2**32))
def test_any_generated_combination_of_options_is_true(chosen, seed):
    check_call(chosen, seed)


@pytest.mark.parametrize("first", range(0, SAMPLE, 50))
def test_the_reference_is_as_true(first):
    for seed in range(first, first + 50):
        logits, targets, options = random_call(choices(seed), seed)
        truth = truth_of(logits, targets, **options)
        loss, gradient, hessian = reference.cross_entropy_with_grad_hess(logits, targets, **options)
        assert_allowed(loss, truth.loss, truth.loss_allowed, f"{seed} loss")
        assert_allowed(gradient, truth.gradient, truth.gradient_allowed, f"{seed} gradient")
        if options["softcap"] is None:
            assert_allowed(hessian, truth.hessian, truth.hessian_allowed, f"{seed} Hessian")


def test_the_sample_holds_every_pair_of_options():
    seen = set()
    for seed in range(SAMPLE):
        seen.update(itertools.combinations([(name, str(value)) for name, value in choices(seed).items()], 2))
    for (one, values), (other, others) in itertools.combinations(CHOICES.items(), 2):
        for value, another in itertools.product(values, others):
            assert ((one, str(value)), (other, str(another))) in seen


# Rows on which careless code loses digits, and every way a kernel may take

OPTION_SETS = [
    {},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0},
    {"z_loss": 0.01},
    {"logit_scale": 0.3},
    {"logit_scale": 2.0},
    {"softcap": 20.0},
    {"softcap": 1e3, "logit_scale": 1.1},
    {"weight": ...},
    {"sample_weight": ...},
    {"class_mask": "classes"},
    {"class_mask": "rows"},
    {"class_mask": "rows", "label_smoothing": 0.1, "weight": ...},
    {"label_smoothing": 0.1, "weight": ..., "sample_weight": ..., "z_loss": 1e-4, "logit_scale": 0.7},
]


def filled(options, logits, targets, rng):
    """The options with random arrays where they say so; the targets of rows (N, C) stay unmasked."""
    rows, classes = logits.shape
    options = dict(options)
    if "weight" in options:
        options["weight"] = rng.uniform(0, 2, classes)
    if "sample_weight" in options:
        options["sample_weight"] = rng.normal(0, 2, rows)
    if "class_mask" in options:
        mask = rng.random(logits.shape if options["class_mask"] == "rows" else classes) < 0.7
        shown = np.broadcast_to(mask, logits.shape).copy()
        shown[np.arange(rows), targets] = True
        options["class_mask"] = shown if options["class_mask"] == "rows" else shown.any(0)
    return options


def few_rows(logits, targets, limit):
    """At most `limit` elements, all classes and evenly spread rows."""
    step = max(1, -(-logits.size // limit))
    return logits[::step], targets[::step]


def has_finite_range(logits):
    with np.errstate(over="ignore"):
        finite = np.where(np.isfinite(logits), logits, 0)
        return np.isfinite(finite.max() - finite.min())


@pytest.mark.parametrize("generator", hard_rows.GENERATORS, ids=lambda generator: generator.__name__)
def test_hard_rows_are_true_under_every_option(generator, dtype, rng):
    sets = itertools.cycle(OPTION_SETS)
    for number, (logits, targets) in enumerate(generator(dtype, rng)):
        logits, targets = few_rows(logits, targets, 1000)
        if logits.size > 5000 or not has_finite_range(logits):
            continue
        for options in itertools.islice(sets, 2):
            what = (generator.__name__, number, logits.shape, options)
            options = filled(options, logits, targets, rng)
            assert_true(logits, targets, reduction="none", what=what, **options)


BORDERS = [16, 17, 64, 65, 96, 97, 128, 129, 1024, 2049, 4096, 4097, 8193]
LONG_BORDERS = [65_536, 65_537]


@pytest.mark.parametrize("classes", BORDERS + LONG_BORDERS)
def test_rows_of_any_length_are_true(classes, dtype, rng):
    sets = OPTION_SETS if classes < 4000 else OPTION_SETS[::4] if classes < 10_000 else OPTION_SETS[1::6]
    for number, options in enumerate(sets):
        logits = rng.normal(0, 4, (2, classes)).astype(dtype)
        logits[1, rng.integers(classes)] = 40
        targets = np.array([classes - 1, logits[1].argmax()])
        q = rng.random(logits.shape) * (rng.random(logits.shape) < 0.1)
        sparse = SparseTargets(rng.integers(0, classes, (2, 3)), rng.random((2, 3)))
        for kind in ([targets], [q], [sparse])[number % 3]:
            what = (classes, options)
            assert_true(logits, kind, reduction="none", what=what, **filled(options, logits, targets, rng))


def test_short_rows_agree_with_mpmath(dtype, rng):
    # The extended precision that all the rest is measured with, and fastce, against another arithmetic.
    for generator in (hard_rows.confident, hard_rows.alternating, hard_rows.offsets, hard_rows.wide):
        for logits, targets in itertools.islice(generator(dtype, rng), 0, 40, 5):
            logits, targets = few_rows(logits[:, :12], np.minimum(targets, 11), 40)
            classes = logits.shape[1]
            weight, smoothing, z_loss = rng.uniform(0.1, 2, classes), 0.1, 0.01
            q = (1 - EXTENDED(smoothing)) * np.eye(classes, dtype=EXTENDED)[targets] + EXTENDED(smoothing) / classes
            rows = solve(logits, q * weight, np.ones(logits.shape, bool), z_loss=z_loss)
            with mpmath.workdps(60):
                for r, x in enumerate(logits):
                    e = [mpmath.exp(mpmath.mpf(float(value))) for value in x]
                    total = mpmath.fsum(e)
                    one = [int(c == targets[r]) for c in range(classes)]
                    share = mpmath.mpf(smoothing) / classes
                    spread = [(1 - mpmath.mpf(smoothing)) * t + share for t in one]
                    a = [mpmath.mpf(float(w)) * t for w, t in zip(weight, spread, strict=True)]
                    lse = mpmath.log(total)
                    loss = mpmath.fsum(m * -mpmath.log(v / total) for m, v in zip(a, e, strict=True)) + z_loss * lse**2
                    np.testing.assert_allclose(float(rows.losses[r]), float(loss), rtol=1e-15, atol=0)
                    for c in range(classes):
                        p = e[c] / total
                        gradient = p * (mpmath.fsum(a) + 2 * z_loss * lse) - a[c]
                        pull = mpmath.fsum(a) + 2 * z_loss * lse
                        hessian = p * (1 - p) * pull + 2 * z_loss * p * p
                        assert abs(float(rows.gradient[r, c] - EXTENDED(float(gradient)))) <= (
                            1e-15 * float(rows.gradient_size[r, c]) + 1e-300
                        )
                        assert abs(float(rows.hessian[r, c] - EXTENDED(float(hessian)))) <= (
                            1e-15 * float(rows.hessian_size[r, c]) + 1e-300
                        )
            assert_true(logits, targets, weight=weight, label_smoothing=smoothing, z_loss=z_loss, reduction="none")


def test_differences_beyond_the_dtype_s_range_are_not_infinite():
    logits = np.array([[3e38, -3e38], [-3e38, 3e38]], np.float32)
    assert_true(logits, [0, 1], label_smoothing=0.1, reduction="none")
    assert_true(logits, [1, 0], weight=[0.3, 0.3], reduction="none")
    assert_true(logits, np.array([[0, 1e-37], [0, 1e-3]]), reduction="none")


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-3}, {"label_smoothing": 0.1}], ids=str)
def test_tiny_and_huge_factors_reach_every_entry(options, dtype, rng):
    exponents = (-37, -30, 30, 37) if dtype == np.float32 else (-305, -250, -200, 200, 250, 305)
    for classes in (2, 10, 60, 97, 300, 5000):
        logits = rng.normal(0, 2, (3, classes)).astype(dtype)
        targets = rng.integers(0, classes, 3)
        targets[0] = logits[0].argmax()
        for exponent in exponents:
            given = {"grad_output": 10.0**exponent, "reduction": "none", **options}
            assert_true(logits, targets, what=(classes, exponent), **given)


# The gradient is the derivative of the loss


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["ids", "distribution", "sparse"])
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.2, "weight": ...},
        {"sample_weight": ..., "z_loss": 0.3},
        {"softcap": 2.0, "logit_scale": 1.4},
        {"class_mask": "rows", "label_smoothing": 0.1, "weight": ..., "sample_weight": ..., "z_loss": 0.1}
        | {"softcap": 3},
    ],
    ids=lambda options: "-".join(options),
)  # fmt: skip
def test_finite_differences_give_the_gradient(options, kind, reduction, rng):
    logits = rng.normal(0, 2, (4, 6))
    ids = rng.integers(0, 6, 4)
    options = filled(options, logits, ids, rng)
    options["sample_weight"] = np.array([1.5, -0.7, 0.0, 2.0]) if "sample_weight" in options else None
    targets = ids
    if kind == "distribution":
        targets = rng.random((4, 6)) * options.get("class_mask", True)
    elif kind == "sparse":
        targets = SparseTargets(np.stack([ids, ids], 1), rng.random((4, 2)))
    gradient = fastce.cross_entropy_with_grad(logits, targets, reduction=reduction, **options)[1]
    expected = central_differences(
        lambda z: fastce.cross_entropy(z, targets, reduction=reduction, **options), logits
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-9)


# Against PyTorch


def torch_results(logits, targets, **options):
    torch = pytest.importorskip("torch", reason="torch, an optional oracle, is not installed")
    given = torch.tensor(logits, requires_grad=True)
    if options.get("weight") is not None:
        options["weight"] = torch.tensor(options["weight"].astype(logits.dtype))
    loss = torch.nn.functional.cross_entropy(given, torch.tensor(targets), **options)
    loss.sum().backward()
    return loss.detach().numpy(), given.grad.numpy()


def assert_same_as_torch(logits, targets, **options):
    theirs = torch_results(logits, targets, **options)
    axis = 1 if logits.ndim > 1 else 0
    options = {"axis": axis, **options}
    if targets.dtype.kind == "f":
        options.pop("ignore_index", None)
    ours = fastce.cross_entropy_with_grad(logits, targets, **options)
    # torch subtracts probabilities from targets and adds up in its own dtype: it is the less accurate side.
    close = {"rtol": 2e-5, "atol": 3e-6} if logits.dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-13}
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, **close)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (5, 7, 3), (2, 7, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_torch_agrees(shape, reduction, dtype, rng):
    axis = 1 if len(shape) > 1 else 0
    row_shape = np.delete(shape, axis)
    for smoothing, ignore_index, weighted in [(0.0, 2, False), (0.0, -100, True), (0.1, 255, False), (0.3, 2, True)]:
        logits = rng.normal(0, 3, shape).astype(dtype)
        ids = np.array(rng.integers(3, 7, row_shape))
        if ids.ndim:
            ids.flat[::4] = ignore_index
        q = np.moveaxis(rng.dirichlet(np.ones(7), row_shape), -1, axis).astype(dtype)
        options = {"label_smoothing": smoothing, "reduction": reduction}
        options["weight"] = rng.uniform(0, 2, 7) if weighted else None
        assert_same_as_torch(logits, ids, ignore_index=ignore_index, **options)
        assert_same_as_torch(logits, np.ascontiguousarray(q), **options)


def test_scikit_learn_s_log_loss_agrees_under_row_weights(rng):
    logits, ids, s = rng.normal(0, 2, (40, 6)), rng.integers(0, 6, 40), rng.random(40)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for normalize, reduction in ((True, "mean"), (False, "sum")):
        theirs = log_loss(ids, p, labels=range(6), sample_weight=s, normalize=normalize)
        ours = fastce.cross_entropy(logits, ids, sample_weight=s, reduction=reduction)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.fixture
def torch_samples(monkeypatch):
    """The module of PyTorch's own sample inputs; it imports a test framework's helper that it does not bring along."""
    pytest.importorskip("torch", reason="torch, an optional oracle, is not installed")
    if importlib.util.find_spec("expecttest") is None:
        monkeypatch.setitem(sys.modules, "expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
    return pytest.importorskip("torch.testing._internal.common_modules")


def numbers(tensor):
    return None if tensor is None else tensor.detach().numpy()


def plain_options(options):
    """PyTorch's keywords as fastce's: weights are made non-negative, which fastce asks for."""
    options = {name: value for name, value in options.items() if value is not None}
    if "weight" in options:
        options["weight"] = np.abs(numbers(options["weight"]))
    return options


def usable_targets(tensor):
    """A sample's targets: distributions are made non-negative."""
    targets = numbers(tensor)
    return np.abs(targets) if targets.dtype.kind == "f" else targets


def test_the_sample_inputs_of_torch_agree(torch_samples, dtype):
    import torch
    from torch.testing._internal.common_methods_invocations import op_db

    torch_dtype = getattr(torch, dtype.name)
    operator = next(entry for entry in op_db if entry.name == "nn.functional.cross_entropy")
    count = 0
    for sample in operator.sample_inputs("cpu", torch_dtype, requires_grad=False):
        assert_same_as_torch(numbers(sample.input), usable_targets(sample.args[0]), **plain_options(sample.kwargs))
        count += 1
    assert count > 10


def test_the_module_inputs_and_reference_of_torch_agree(torch_samples, dtype):
    import torch

    torch_dtype = getattr(torch, dtype.name)
    module = next(entry for entry in torch_samples.module_db if entry.module_cls is torch.nn.CrossEntropyLoss)
    count = 0
    for sample in module.module_inputs_func(module, "cpu", torch_dtype, False, True):
        logits, targets = sample.forward_input.args
        options = plain_options(sample.constructor_input.kwargs)
        assert_same_as_torch(numbers(logits), usable_targets(targets), **options)
        count += 1
    assert count > 50


# Corner cases: what a mean is divided by


def one_hot(ids, classes):
    return np.eye(classes)[ids]


def test_means_divide_by_the_documented_denominators(dtype, rng):
    logits = rng.normal(0, 2, (6, 5)).astype(dtype)
    ids = np.array([0, 3, -100, 4, 1, -100])
    live = ids >= 0
    w, s = rng.uniform(0.1, 3, 5), rng.uniform(0.1, 3, 6)
    q = rng.random((6, 5))
    sparse = SparseTargets(rng.integers(0, 5, (6, 2)), rng.random((6, 2)))
    cases = [
        (ids, {}, 4),
        (ids, {"weight": w}, w[ids[live]].sum()),
        (ids, {"label_smoothing": 0.1}, 4),
        (ids, {"label_smoothing": 0.1, "weight": w}, w[ids[live]].sum()),
        (ids, {"label_smoothing": 1.0, "weight": w}, w[ids[live]].sum()),
        (ids, {"z_loss": 0.1, "weight": w}, w[ids[live]].sum()),
        (ids, {"sample_weight": s}, s[live].sum()),
        (ids, {"sample_weight": s, "weight": w}, (s[live] * w[ids[live]]).sum()),
        (q, {}, 6),
        (q, {"weight": w}, 6),
        (q, {"weight": w, "label_smoothing": 0.1}, 6),
        (q, {"sample_weight": s, "weight": w}, s.sum()),
        (sparse, {"weight": w}, 6),
        (sparse, {"sample_weight": s, "weight": w}, s.sum()),
    ]
    for targets, options, denominator in cases:
        total, of_sum = fastce.cross_entropy_with_grad(logits, targets, reduction="sum", **options)
        mean, of_mean = fastce.cross_entropy_with_grad(logits, targets, **options)
        np.testing.assert_allclose(mean, total / denominator, rtol=1e-14, err_msg=str(options))
        np.testing.assert_allclose(of_mean, of_sum / denominator, rtol=1e-6, atol=1e-7, err_msg=str(options))


def test_one_hot_distributions_and_class_ids_have_other_weighted_means(rng):
    logits, ids, w = rng.normal(0, 2, (6, 5)), rng.integers(0, 5, 6), np.array([0.1, 1, 2, 3, 4])
    by_ids = fastce.cross_entropy(logits, ids, weight=w)
    by_rows = fastce.cross_entropy(logits, one_hot(ids, 5), weight=w)
    np.testing.assert_allclose(by_rows, by_ids * w[ids].sum() / 6, rtol=1e-14)
    assert abs(by_rows / by_ids - 1) > 1e-3


def test_the_class_weight_cancels_in_the_mean_of_one_row(rng):
    logits = rng.normal(0, 2, (1, 5))
    plain = fastce.cross_entropy(logits, [2])
    np.testing.assert_allclose(fastce.cross_entropy(logits, [2], weight=[1, 1, 7, 1, 1]), plain, rtol=1e-15)
    assert fastce.cross_entropy(logits, [2], weight=[1, 1, 7, 1, 1], reduction="sum") > 6 * plain


def test_the_weighted_mean_is_not_the_mean_of_the_rows(rng):
    logits, ids, w = rng.normal(0, 2, (9, 3)), np.arange(9) % 3, [0.1, 1, 10]
    rows = fastce.cross_entropy(logits, ids, weight=w, reduction="none")
    assert abs(fastce.cross_entropy(logits, ids, weight=w) / rows.mean() - 1) > 1e-2
    np.testing.assert_allclose(
        fastce.cross_entropy(logits, ids, weight=w, denominator=9), rows.mean(), rtol=1e-14
    )


def test_smoothing_divides_by_the_number_of_classes_not_by_the_sum_of_weights(rng):
    logits, w = rng.normal(0, 2, (1, 4)), np.array([1.0, 2, 3, 4])
    log_p = logits[0] - np.log(np.exp(logits[0]).sum())
    expected = -0.9 * w[1] * log_p[1] - 0.1 / 4 * (w * log_p).sum()
    got = fastce.cross_entropy(logits, [1], weight=w, label_smoothing=0.1, reduction="sum")
    np.testing.assert_allclose(got, expected, rtol=1e-14)


NOTHING_LEFT = [
    ("all rows ignored", [-100, -100], {}),
    ("all rows of sample weight 0", [0, 1], {"sample_weight": [0, 0]}),
    ("ignored or of sample weight 0", [0, -100], {"sample_weight": [0, 2]}),
    ("class weights of 0", [0, 1], {"weight": [0, 0, 3]}),
    ("sample weights that cancel", [0, 1], {"sample_weight": [1.5, -1.5]}),
    ("distributions of sample weight 0", np.full((2, 3), 1 / 3), {"sample_weight": [0, 0]}),
    ("distributions whose weights cancel", np.full((2, 3), 1 / 3), {"sample_weight": [1, -1]}),
    ("sparse targets of sample weight 0", SparseTargets([[0], [1]], [[1.0], [1.0]]), {"sample_weight": [0, 0]}),
]


@pytest.mark.parametrize(("targets", "options"), [case[1:] for case in NOTHING_LEFT], ids=[c[0] for c in NOTHING_LEFT])
@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}, {"class_mask": [True, False, True]}])
def test_a_mean_of_nothing_is_nan_and_has_gradient_zero_even_in_nan_rows(targets, options, more, dtype):
    for spoiled in (False, True):
        logits = np.array([[1, 2, 3], [0, 0, 5]], dtype)
        if spoiled:
            logits[:] = [[np.nan], [np.inf]]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out, hess_out = np.full_like(logits, 7), np.full_like(logits, 7)
            loss, gradient = fastce.cross_entropy_with_grad(logits, targets, out=out, **options, **more)
            results = fastce.cross_entropy_with_grad_hess(logits, targets, hess_out=hess_out, **options, **more)
            alone = fastce.cross_entropy(logits, targets, **options, **more)
        assert np.isnan(loss) and np.isnan(alone) and np.isnan(results[0]) and type(loss) is float
        for array in (gradient, results[1], results[2]):
            assert not array.any() and not np.signbit(array).any()
    counts = "class weights" not in str(options) and "sample_weight" in options and not np.any(options["sample_weight"])
    if counts:
        assert fastce.cross_entropy(logits, targets, reduction="sum", **options, **more) == 0.0


@pytest.mark.parametrize("kind", ["ids", "distribution", "sparse"])
@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_no_rows(kind, options, dtype, rng):
    logits = np.zeros((0, 5), dtype)
    targets = {
        "ids": [], "distribution": np.zeros((0, 5)), "sparse": SparseTargets(np.zeros((0, 2), int), np.zeros((0, 2)))
    }[kind]  # fmt: skip
    options = {name: {"class_mask": np.ones(5, bool), "sample_weight": [], "weight": np.ones(5)}.get(name, value)
               for name, value in options.items()}  # fmt: skip
    loss, gradient = fastce.cross_entropy_with_grad(logits, targets, **options)
    assert np.isnan(loss) and gradient.shape == (0, 5) and gradient.dtype == dtype
    assert fastce.cross_entropy(logits, targets, reduction="sum", **options) == 0.0
    assert fastce.cross_entropy(logits, targets, denominator=2, **options) == 0.0
    assert fastce.cross_entropy(logits, targets, reduction="none", **options).shape == (0,)
    if "softcap" not in options:
        _, _, hessian = fastce.cross_entropy_with_grad_hess(logits, targets, **options)
        assert hessian.shape == (0, 5) and hessian.dtype == dtype


@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_one_class_is_certain(options, dtype, rng):
    logits = np.array([[3.5], [-700.0], [1e8]], dtype)
    for targets in ([0, 0, 0], np.ones((3, 1)), SparseTargets([[0]] * 3, [[1.0]] * 3)):
        given = filled(options, logits, np.zeros(3, int), rng)
        losses, gradient = assert_true(logits, targets, reduction="none", **given)
        if "z_loss" not in options:
            assert not np.any(losses) and not gradient.any()


# Corner cases: rows that do not count


def cases_with_two_rows_left_out(ids, s, q):
    """Yield (targets, sample weights) of rows of which the second and the fifth do not count."""
    left_out = np.isin(np.arange(6), [1, 4])
    yield np.where(left_out, -100, ids), s
    for targets in (ids, q, SparseTargets(ids[:, None], s[:, None] ** 2)):
        yield targets, np.where(left_out, 0, s)


@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_rows_that_do_not_count_are_never_read(options, dtype, rng):
    for classes in (1, 20, 97, 5000):
        logits = rng.normal(0, 3, (6, classes)).astype(dtype)
        ids = rng.integers(0, classes, 6)
        given = {"reduction": "none", **filled(options, logits, ids, rng)}
        s = np.array(given.pop("sample_weight", np.ones(6)))
        q = rng.random((6, classes)) * given.get("class_mask", True)
        for targets, weights in cases_with_two_rows_left_out(ids, s, q):
            given["sample_weight"] = weights
            clean = fastce.cross_entropy_with_grad(logits, targets, **given)
            for bad in (np.nan, np.inf, -np.inf):
                spoiled, out = logits.copy(), np.full_like(logits, 7)
                spoiled[[1, 4]] = bad
                if targets is q:
                    q[[1, 4]] = -1.0 if bad == np.inf else bad
                got = fastce.cross_entropy_with_grad(spoiled, targets, out=out, **given)
                for one, other in zip(got, clean, strict=True):
                    assert_same_bits(one, other)
                    assert not one[[1, 4]].any()
                assert not np.signbit(got[1][[1, 4]]).any()
                for factor in (np.nan, np.inf):
                    gradient = fastce.cross_entropy_with_grad(spoiled, targets, grad_output=factor, **given)[1]
                    assert not gradient[[1, 4]].any()


def test_a_row_of_sample_weight_zero_may_have_every_class_masked(dtype):
    logits = np.zeros((3, 2), dtype)
    mask = np.array([[True, True], [False, False], [True, False]])
    losses = fastce.cross_entropy(logits, [0, 1, 0], class_mask=mask, sample_weight=[1, 0, 1], reduction="none")
    np.testing.assert_allclose(losses, [np.log(2), 0, 0], rtol=1e-7)
    losses = fastce.cross_entropy(logits, [0, -100, 0], class_mask=mask, reduction="none")
    np.testing.assert_allclose(losses, [np.log(2), 0, 0], rtol=1e-7)


def test_class_ids_of_rows_of_sample_weight_zero_are_checked_all_the_same():
    with pytest.raises(IndexError, match=r"targets\[1\] = 7"):
        fastce.cross_entropy(np.zeros((3, 2)), [0, 7, 0], sample_weight=[1, 0, 1])


# Corner cases: nan and infinities


EVERY_KIND = ["ids", "distribution", "sparse"]


def as_kind(kind, ids, classes):
    """The same targets as class ids, as one-hot rows, or as sparse targets."""
    ids = np.asarray(ids)
    if kind == "distribution":
        return one_hot(ids, classes)
    return SparseTargets(ids[..., None], np.ones((*ids.shape, 1))) if kind == "sparse" else ids


# Class ids under every option, the other kinds of targets under some.
KIND_CASES = [("ids", options) for options in OPTION_SETS]
KIND_CASES += itertools.product(["distribution", "sparse"], [OPTION_SETS[0], OPTION_SETS[3], OPTION_SETS[12]])
each_kind = pytest.mark.parametrize(("kind", "options"), KIND_CASES, ids=str)


@each_kind
def test_one_bad_logit_spoils_its_row_and_no_other(kind, options, dtype, rng):
    for classes, bad in itertools.product([2, 20, 97, 2051], [np.nan, np.inf]):
        where = np.array([0, classes - 1])
        logits = rng.normal(0, 3, (2 * len(where), classes)).astype(dtype)
        ids = rng.integers(0, classes, len(logits))
        given = filled(options, logits, ids, rng)
        shown = np.array(np.broadcast_to(given.get("class_mask", True), logits.shape))
        shown[2 * np.arange(len(where)), where] = True
        if "class_mask" in given:
            given["class_mask"] = shown
        targets = as_kind(kind, ids, classes)
        clean = fastce.cross_entropy_with_grad(logits, targets, reduction="none", **given)
        logits[2 * np.arange(len(where)), where] = bad
        losses, gradient = assert_true(logits, targets, reduction="none", **given)
        assert np.isnan(losses[::2]).all()
        np.testing.assert_array_equal(np.isnan(gradient[::2]), shown[::2])
        assert not gradient[~shown].any()
        np.testing.assert_array_equal(losses[1::2], clean[0][1::2])
        np.testing.assert_array_equal(gradient[1::2], clean[1][1::2])


@each_kind
def test_a_row_of_nothing_but_minus_infinity_is_nan(kind, options, dtype, rng):
    for classes in (2, 20, 97, 2051):
        logits = rng.normal(0, 3, (3, classes)).astype(dtype)
        logits[1] = -np.inf
        given = filled(options, logits, np.array([0, 1, 1]), rng)
        losses, gradient = assert_true(logits, as_kind(kind, [0, 1, 1], classes), reduction="none", **given)
        assert np.isnan(losses[1]) and np.isfinite(losses[[0, 2]]).all()
        assert np.isnan(gradient[1]).any() and np.isfinite(gradient[[0, 2]]).all()


@each_kind
def test_minus_infinity_elsewhere_has_gradient_zero(kind, options, dtype, rng):
    for classes in (3, 20, 97, 2051):
        logits = rng.normal(0, 3, (4, classes)).astype(dtype)
        logits[:, 1] = -np.inf
        given = filled(options, logits, np.array([0, 2, 0, 2]), rng)
        losses, gradient = assert_true(logits, as_kind(kind, [0, 2, 0, 2], classes), reduction="none", **given)
        if "label_smoothing" not in options:
            assert np.isfinite(losses).all() and not gradient[:, 1].any()
        else:
            # Smoothing puts mass on a class of probability 0, unless a mask says that it does not exist.
            masked = ~np.broadcast_to(given.get("class_mask", True), logits.shape)[:, 1]
            assert np.isinf(losses[~masked]).all() and np.isfinite(losses[masked]).all()
            assert np.isfinite(gradient).all() and not gradient[masked, 1].any()


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_target_of_minus_infinity_is_an_infinite_loss_with_a_finite_gradient(kind, dtype, rng):
    for classes in (2, 20, 97, 2051):
        logits = rng.normal(0, 3, (2, classes)).astype(dtype)
        logits[:, -1] = -np.inf
        targets = as_kind(kind, [classes - 1, classes - 1], classes)
        for options in ({}, {"z_loss": 0.1}, {"logit_scale": 2.0}, {"class_mask": np.ones(classes, bool)}):
            losses, gradient = assert_true(logits, targets, reduction="none", **options)
            assert np.isposinf(losses).all() and np.isfinite(gradient).all()
            np.testing.assert_array_equal(gradient[:, -1], -options.get("logit_scale", 1.0))
        losses, gradient = assert_true(logits, targets, reduction="none", sample_weight=[-1.0, 2.0])
        np.testing.assert_array_equal(losses, [-np.inf, np.inf])
        np.testing.assert_array_equal(gradient[:, -1], [1, -2])


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_weights_of_zero_make_an_infinite_loss_zero(kind, dtype):
    logits = np.array([[-np.inf, 1, 2], [0, -np.inf, 0]], dtype)
    targets = as_kind(kind, [0, 1], 3)
    for options in ({"weight": [0, 0, 1]}, {"sample_weight": [0, 0]}):
        losses, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none", **options)
        np.testing.assert_array_equal(losses, 0)
        assert not np.signbit(losses).any()
        assert not gradient.any()
        assert fastce.cross_entropy(logits, targets, reduction="sum", **options) == 0.0
    assert fastce.cross_entropy(logits, targets, weight=[0, 1, 1], reduction="sum") == np.inf


def test_full_smoothing_takes_no_notice_of_the_target(dtype):
    # The mass of the target itself is then 0, and 0 * log 0 = 0.
    logits = np.array([[0, 1, -np.inf]], dtype)
    mask = [True, True, False]
    losses = [
        fastce.cross_entropy(logits, [t], class_mask=mask, label_smoothing=1.0, reduction="none")[0] for t in range(3)
    ]
    assert np.isfinite(losses).all() and len(set(losses)) == 1


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"weight": ...}], ids=str)
def test_a_target_on_a_masked_class_is_an_infinite_loss_with_a_finite_gradient(kind, options, dtype, rng):
    for classes in (2, 20, 97, 2051):
        logits = rng.normal(0, 3, (4, classes)).astype(dtype)
        logits[1:, 0] = [np.nan, np.inf, -np.inf]
        mask = np.arange(classes) > 0
        given = filled(options, logits, np.full(4, 1), rng) | {"class_mask": mask}
        losses, gradient = assert_true(logits, as_kind(kind, np.zeros(4, int), classes), reduction="none", **given)
        assert np.isposinf(losses).all() and np.isfinite(gradient).all()
        assert not gradient[:, 0].any()
        weight = given.get("weight", np.ones(classes))[0]
        if not options or "weight" in options:
            np.testing.assert_allclose(gradient[:, 1:].sum(1), weight, rtol=1e-6)


def test_masked_classes_do_not_exist_whatever_their_logits(dtype, rng):
    for classes in (3, 20, 97, 5000):
        logits = rng.normal(0, 3, (5, classes)).astype(dtype)
        mask = rng.random((5, classes)) < 0.6
        mask[:, 0] = True
        options = {"class_mask": mask, "label_smoothing": 0.1, "z_loss": 0.1, "reduction": "none"}
        expected = fastce.cross_entropy_with_grad_hess(logits, np.zeros(5, int), **options)
        for hidden in (np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0):
            changed = np.where(mask, logits, dtype.type(hidden))
            got = fastce.cross_entropy_with_grad_hess(changed, np.zeros(5, int), **options)
            for one, other in zip(got, expected, strict=True):
                assert_same_bits(one, other)
            assert not got[1][~mask].any() and not got[2][~mask].any()


def test_any_byte_but_zero_shows_a_class(dtype):
    logits = np.zeros((2, 3), dtype)
    for row_mask in ([[2, 2, 0], [2, 128, 255]], [[4, 1, 0], [128, 1, 0]]):
        mask = np.array(row_mask, np.uint8).view(bool)
        for options in ({}, {"label_smoothing": 0.1}, {"softcap": 2.0}):
            got = fastce.cross_entropy(logits, [0, 1], class_mask=mask, reduction="none", **options)
            np.testing.assert_allclose(got, np.log(np.count_nonzero(np.array(row_mask), axis=1)), rtol=1e-6)


def test_a_mask_equals_taking_the_classes_out(dtype, rng):
    logits = rng.normal(0, 3, (5, 40)).astype(dtype)
    mask = np.arange(40) % 3 != 1
    for options in ({}, {"label_smoothing": 0.2}, {"z_loss": 0.3}, {"softcap": 4.0}):
        ids = np.array([0, 2, 3, 38, 39])
        within = np.searchsorted(np.flatnonzero(mask), ids)
        truth = truth_of(logits[:, mask], within, reduction="none", **options)
        losses, gradient = fastce.cross_entropy_with_grad(logits, ids, class_mask=mask, reduction="none", **options)
        assert_allowed(losses, truth.loss, truth.loss_allowed)
        assert_allowed(gradient[:, mask], truth.gradient, truth.gradient_allowed)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 7), (5, 7), (4, 1, 7), (4, 5, 7), (4, 1, 1), (1, 5, 1), (5, 1)])
def test_a_mask_broadcasts_to_the_logits(shape, dtype, rng):
    logits = rng.normal(0, 3, (4, 5, 7)).astype(dtype)
    ids = rng.integers(0, 7, (4, 5))
    mask = np.ones(shape, bool) if not shape or shape[-1] == 1 else rng.random(shape) < 0.6
    if mask.ndim and mask.shape[-1] > 1:
        mask[..., 3] = True
    whole = np.broadcast_to(mask, logits.shape).copy()
    one = fastce.cross_entropy_with_grad(logits, ids, class_mask=mask, reduction="none")
    other = fastce.cross_entropy_with_grad(logits, ids, class_mask=whole, reduction="none")
    assert_true(logits, ids, class_mask=mask, reduction="none")
    for got, expected in zip(one, other, strict=True):
        assert_same_bits(got, expected)


# Corner cases: numbers


@pytest.mark.parametrize("options", [{}, *({name: value} for name, value in [
    ("class_mask", True), ("logit_scale", 1.0), ("label_smoothing", 0.0), ("z_loss", 0.0)])], ids=str)  # fmt: skip
def test_the_first_half_of_many_classes_at_minus_infinity(options, dtype):
    # Where sums are built up piece by piece, the first pieces have the maximum -inf: -inf - -inf is nan.
    logits = np.full((2, 100_000), -np.inf, dtype)
    logits[:, 50_000:] = 0
    for more in ({}, {"z_loss": 1e-4}):
        losses, gradient = fastce.cross_entropy_with_grad(
            logits, [60_000, 99_999], reduction="none", **{**options, **more}
        )
        expected = np.log(50_000) + more.get("z_loss", 0) * np.log(50_000) ** 2
        np.testing.assert_allclose(losses, expected, rtol=LOSS_BOUND[dtype.name])
        assert not gradient[:, :50_000].any() and np.isfinite(gradient).all()


def test_a_cap_leaves_minus_infinity_alone(dtype):
    # cap * tanh(-inf) would be -cap: masked logits would come back with a probability.
    logits = np.array([[0.3, -np.inf, -np.inf, -np.inf]], dtype)
    for cap in (0.1, 1.0, 30.0):
        losses, gradient = fastce.cross_entropy_with_grad(logits, [0], softcap=cap, reduction="none")
        assert losses[0] == 0 and not gradient.any()


def test_a_cap_leaves_infinity_and_nan_alone(dtype):
    logits = np.array([[0, np.inf], [0, np.nan], [0, 1]], dtype)
    losses, gradient = fastce.cross_entropy_with_grad(logits, [0, 0, 0], softcap=5.0, reduction="none")
    np.testing.assert_array_equal(np.isnan(losses), [True, True, False])
    np.testing.assert_array_equal(np.isnan(gradient).all(1), [True, True, False])


def test_the_scale_comes_before_the_cap_and_the_cap_before_the_mask(dtype):
    logits = np.array([[1.0, -2.0, 3.0]], dtype)
    z = 2.0 * np.tanh(np.array([1.0, -2.0, 3.0]) * 5.0 / 2.0)
    expected = np.log(np.exp(z[:2]).sum()) - z[0]
    got = fastce.cross_entropy(logits, [0], logit_scale=5.0, softcap=2.0, class_mask=[True, True, False])
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_scale_that_overflows_is_infinity(dtype):
    top = np.finfo(dtype).max
    logits = np.array([[top, 0], [0, -top], [0, 1]], dtype)
    losses, gradient = assert_true(logits, [0, 0, 0], logit_scale=4.0, reduction="none")
    np.testing.assert_array_equal(losses[:2], [np.nan, 0])
    assert np.isnan(gradient[0]).all() and not gradient[1].any() and np.isfinite(losses[2])


@pytest.mark.parametrize("level", [-1e4, -1e30, -200.0])
def test_rows_far_below_zero_are_ordinary(level, dtype):
    # Maxima that start at 0, -10000 or the smallest positive number lose such rows.
    for classes in (2, 10, 97, 5000):
        logits = np.full((2, classes), level, dtype)
        for options in ({}, {"label_smoothing": 0.1}, {"class_mask": np.ones(classes, bool)}, {"logit_scale": 0.5}):
            losses, _ = assert_true(logits, [0, classes - 1], reduction="none", **options)
            np.testing.assert_allclose(losses, np.log(classes), rtol=LOSS_BOUND[dtype.name] * 2)


def test_a_common_offset_costs_no_digits():
    logits = (1e4 + np.array([[0.25, 0, -3]])).astype(np.float32)
    exact = np.log1p(np.exp(-0.25) + np.exp(-3.25))
    for options in ({}, {"label_smoothing": 1e-30}, {"class_mask": [True] * 3}):
        np.testing.assert_allclose(fastce.cross_entropy(logits, [0], **options), exact, rtol=5e-7)
    np.testing.assert_allclose(exact, 0.597503, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"class_mask": True}, {"z_loss": 0.0}, {"weight": [1.0, 1.0]}], ids=str)
def test_a_confident_row_keeps_its_loss_and_its_gradient(options):
    for gap, loss in ((17, 4.1399376e-8), (80, 1.8048513e-35)):
        losses, gradient = fastce.cross_entropy_with_grad(
            np.array([[gap, 0]], np.float32), [0], reduction="none", **options
        )
        np.testing.assert_allclose(losses, [loss], rtol=5e-7)
        np.testing.assert_allclose(gradient, [[-loss, loss]], rtol=1e-6)


def test_very_many_small_terms_are_not_absorbed():
    # 31,999 classes 17 below the target: added to 1 one by one in float32 none of them would count.
    logits = np.full((1, 32_000), -17, np.float32)
    logits[0, 0] = 0
    for options in ({}, {"class_mask": np.ones(32_000, bool)}, {"logit_scale": 1.0, "z_loss": 1e-30}):
        np.testing.assert_allclose(
            fastce.cross_entropy(logits, [0], **options), np.log1p(31_999 * np.exp(-17.0)), rtol=5e-7
        )


def test_tail_probabilities_keep_their_digits(rng):
    # exp of a rounded log-softmax would have the relative error |log p| * 2^-24.
    logits = np.array([[0, -60, -80]], np.float32)
    for options in ({}, {"label_smoothing": 1e-12}, {"z_loss": 1e-12}):
        assert_true(logits, [0], reduction="none", **options)


# Corner cases: gradients


def test_the_gradient_of_z_loss_is_not_weighted_by_class(rng):
    logits = rng.normal(0, 2, (3, 4))
    w = np.array([5.0, 0.1, 2, 3])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    lse = np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.array([0, 1, 3])
    plain = fastce.cross_entropy_with_grad(logits, ids, weight=w, reduction="none")
    with_z = fastce.cross_entropy_with_grad(logits, ids, weight=w, z_loss=0.2, reduction="none")
    np.testing.assert_allclose(with_z[0] - plain[0], 0.2 * lse[:, 0] ** 2, rtol=1e-12)
    np.testing.assert_allclose(with_z[1] - plain[1], 0.4 * lse * p, rtol=1e-10)


@pytest.mark.parametrize("classes", [3, 4, 120, 5000])
def test_gradients_below_the_least_number_are_zero(classes, dtype):
    weights = np.array([1, 1e-300, 1e-320])
    for options in ({}, {"z_loss": 0.1}, {"logit_scale": 0.1}, {"label_smoothing": 0.1}):
        gradient = fastce.cross_entropy_with_grad(
            np.zeros((3, classes), dtype), [0, 1, 2], sample_weight=weights, reduction="sum", **options
        )[1]
        assert np.isfinite(gradient).all() and (np.abs(gradient[1:]) <= 1e-300).all()


@pytest.mark.parametrize("scale", [0.3, 1.7, 1e-3, 30.0, 1 + 1e-9])
@pytest.mark.parametrize("classes", [5, 200, 5000])
def test_scaled_logits_have_the_bits_of_numpy_s_product(classes, scale, dtype, rng):
    logits = rng.normal(100, 3, (40, classes)).astype(dtype)
    scaled = logits * dtype.type(scale)
    ids = rng.integers(0, classes, 40)
    for targets in (ids, np.eye(classes, dtype=dtype)[ids]):
        for options in ({}, {"label_smoothing": 0.1}, {"class_mask": np.ones(classes, bool)}):
            expected = fastce.cross_entropy(scaled, targets, reduction="none", **options)
            got = fastce.cross_entropy(logits, targets, logit_scale=scale, reduction="none", **options)
            assert_same_bits(got, expected, options)


@pytest.mark.parametrize("classes", [4, 20, 300, 5000])
def test_smoothed_losses_are_finite_where_sums_of_logits_overflow(classes, dtype):
    # Half of the logits at the least number: their differences are finite, the sum of them is not.
    least = np.finfo(dtype).min
    logits = np.zeros((2, classes), dtype)
    logits[0, classes // 2 :] = least
    logits[1, 0] = least
    losses = fastce.cross_entropy(logits, [0, 1], label_smoothing=0.5, reduction="none")
    shares = 0.5 / classes * np.array([classes - classes // 2, 1])
    assert_allowed(losses, -shares * EXTENDED(least), np.abs(shares * EXTENDED(least)) * 3 * np.finfo(dtype).eps)


def test_the_chain_rule_of_scale_and_cap(rng):
    logits = rng.normal(0, 2, (3, 4))
    ids = np.array([0, 1, 3])
    z = 3.0 * np.tanh(1.7 * logits / 3.0)
    inner = fastce.cross_entropy_with_grad(z, ids)[1]
    got = fastce.cross_entropy_with_grad(logits, ids, logit_scale=1.7, softcap=3.0)[1]
    np.testing.assert_allclose(got, inner * 1.7 * (1 - (z / 3.0) ** 2), rtol=1e-12)


def test_negative_sample_weights_turn_the_gradient_round(dtype, rng):
    logits = rng.normal(0, 2, (5, 30)).astype(dtype)
    ids = rng.integers(0, 30, 5)
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1}):
        one = fastce.cross_entropy_with_grad(logits, ids, sample_weight=np.full(5, 1.3), reduction="none", **options)
        other = fastce.cross_entropy_with_grad(logits, ids, sample_weight=np.full(5, -1.3), reduction="none", **options)
        np.testing.assert_array_equal(one[0], -other[0])
        np.testing.assert_array_equal(one[1], -other[1])
        # The mean divides by a negative sum: it is that of positive weights.
        one = fastce.cross_entropy(logits, ids, sample_weight=np.full(5, 1.3), **options)
        assert fastce.cross_entropy(logits, ids, sample_weight=np.full(5, -1.3), **options) == one


def test_options_that_change_nothing_change_no_value(dtype, rng):
    logits = rng.normal(0, 3, (6, 50)).astype(dtype)
    ids = np.array([0, 1, -100, 49, 7, 7])
    truth = truth_of(logits, ids, reduction="none")
    neutral = [
        {"weight": np.ones(50)}, {"sample_weight": np.ones(6)}, {"label_smoothing": 0}, {"logit_scale": 1},
        {"softcap": None}, {"z_loss": 0}, {"class_mask": True}, {"class_mask": np.ones((6, 50), bool)},
        {"label_smoothing": np.float32(0), "logit_scale": np.int8(1), "z_loss": np.float64(0)},
    ]  # fmt: skip
    for options in neutral:
        losses, gradient = fastce.cross_entropy_with_grad(logits, ids, reduction="none", **options)
        assert_allowed(losses, truth.loss, truth.loss_allowed, options)
        assert_allowed(gradient, truth.gradient, truth.gradient_allowed, options)


# The same bits, whatever surrounds the row


GENERAL = [
    {"label_smoothing": 0.1},
    {"weight": ..., "label_smoothing": 0.1, "sample_weight": ...},
    {"z_loss": 1e-3, "logit_scale": 1.7},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_scale": 0.3},
    {"softcap": 9.0},
    {"class_mask": "classes"},
    {"class_mask": "rows", "logit_scale": 0.3},
    {"class_mask": "rows", "label_smoothing": 0.1},
    {"targets": "distribution"},
    {"targets": "distribution", "weight": ..., "class_mask": "rows", "label_smoothing": 0.3},
    {"targets": "sparse", "sample_weight": ...},
]
PLAIN = [{"weight": ...}, {"sample_weight": ...}, {"weight": ..., "sample_weight": ...}]
ROW_OPTIONS = ("sample_weight", "class_mask", "grad_output")


def problem(options, shape, dtype):
    """Return (logits (N, C), targets, options): rows of every magnitude, ignored ones and special ones among them."""
    rng = np.random.default_rng(shape)
    rows, classes = shape
    logits = (rng.normal(0, 1, shape) * rng.choice([1, 5, 60, 2000], (rows, 1))).astype(dtype)
    logits[rows // 2, classes // 2] = np.nan
    logits[rows // 3, :-1] = -np.inf
    ids = rng.integers(0, classes, rows)
    kind = options.get("targets", "ids")
    given = filled({name: value for name, value in options.items() if name != "targets"}, logits, ids, rng)
    if "sample_weight" in given:
        given["sample_weight"][::7] = 0
    given["grad_output"] = rng.normal(0, 2, rows)
    if kind == "distribution":
        return logits, (rng.random(shape) * (rng.random(shape) < 0.5)).astype(dtype), given
    if kind == "sparse":
        return logits, SparseTargets(np.stack([ids, ids[::-1]], 1), rng.random((rows, 2))), given
    ids[1::9] = -100
    return logits, ids, given


def rows_of(targets, part):
    if isinstance(targets, SparseTargets):
        return SparseTargets(targets.indices[part], targets.values[part])
    return targets[part]


def part_of(options, part):
    rows = {name: options[name][part] for name in ROW_OPTIONS if np.ndim(options.get(name)) and name != "class_mask"}
    if np.ndim(options.get("class_mask")) == 2:
        rows["class_mask"] = options["class_mask"][part]
    return {**options, **rows}


def gradients_of(logits, targets, options, **more):
    """Return loss, gradient and, where there is one, the Hessian of each row."""
    call = fastce.cross_entropy_with_grad if "softcap" in options else fastce.cross_entropy_with_grad_hess
    return call(logits, targets, reduction="none", **options, **more)


def assert_all_same(got, expected, what):
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other, what)


SHAPES = [(70, 3), (300, 33), (90, 97), (40, 1000), (9, 5000)]
# Rows that threads share, and rows too long to be kept between the loss and the gradient.
CASES = [
    *itertools.product(GENERAL + PLAIN, SHAPES),
    *((options, (3, 70_000)) for options in GENERAL),
    *((options, (3, 300_000)) for options in GENERAL[1:7:2]),
]
each_case = pytest.mark.parametrize(
    ("options", "shape"), CASES, ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value)
)


@each_case
def test_threads_change_no_bit(options, shape, dtype):
    logits, targets, given = problem(options, shape, dtype)
    expected = gradients_of(logits, targets, given, num_threads=1)
    for num_threads in range(2, 9) if shape[1] < 1000 else (2, 8):
        assert_all_same(gradients_of(logits, targets, given, num_threads=num_threads), expected, num_threads)
    out = logits.copy()
    assert_all_same(gradients_of(out, targets, given, num_threads=3, out=out), expected, "in place")


@each_case
def test_the_place_in_the_batch_changes_no_bit(options, shape, dtype):
    logits, targets, given = problem(options, shape, dtype)
    given["num_threads"] = 1
    expected = gradients_of(logits, targets, given)
    rows = shape[0]
    order = np.random.default_rng(1).permutation(rows)
    for part in (slice(0, 1), slice(1, 2), slice(rows // 2, None), slice(3, rows, 2), order):
        got = gradients_of(logits[part], rows_of(targets, part), part_of(given, part))
        assert_all_same(got, [result[part] for result in expected], part)
    for row in (0, rows // 2, rows // 2 + 1, rows - 1):
        got = gradients_of(logits[row], rows_of(targets, row), part_of(given, row))
        assert_all_same(got, [result[row] for result in expected], row)


@each_case
def test_loss_alone_out_and_in_place_change_no_bit(options, shape, dtype):
    logits, targets, given = problem(options, shape, dtype)
    given["num_threads"] = 1
    losses, gradient = fastce.cross_entropy_with_grad(logits, targets, reduction="none", **given)
    alone = {name: value for name, value in given.items() if name != "grad_output"}
    assert_same_bits(fastce.cross_entropy(logits, targets, reduction="none", **alone), losses)
    for reduction in ("sum", "mean"):
        loss, _ = fastce.cross_entropy_with_grad(logits, targets, reduction=reduction, **alone)
        assert_same_bits(fastce.cross_entropy(logits, targets, reduction=reduction, **alone), loss)
    for out in (np.full_like(logits, 7), np.full_like(logits, 7)[::-1], logits.copy()):
        source = out if out.base is None and np.array_equal(out, logits, equal_nan=True) else logits
        got = fastce.cross_entropy_with_grad(source, targets, reduction="none", out=out, **given)
        assert got[1] is out
        assert_all_same(got, (losses, gradient), "out")
    if "softcap" not in given:
        expected = gradients_of(logits, targets, given)
        out, hess_out = logits.copy(), np.full_like(logits, 7)
        got = gradients_of(out, targets, given, out=out, hess_out=hess_out)
        assert got[1] is out and got[2] is hess_out
        assert_all_same(got, expected, "Hessian in place")


@pytest.mark.parametrize("options", GENERAL + PLAIN, ids=lambda options: "-".join(options))
def test_layouts_change_no_bit(options, dtype):
    for shape in ((12, 5), (20, 33), (7, 97), (3, 5000)):
        logits, targets, given = problem(options, shape, dtype)
        expected = gradients_of(logits, targets, given)
        for layout in READABLE_LAYOUTS:
            arrays = {name: layout(value) if np.ndim(value) else value for name, value in given.items()}
            laid = layout(targets) if isinstance(targets, np.ndarray) else targets
            assert_all_same(gradients_of(layout(logits), laid, arrays), expected, layout)


# Few classes and no options but weights have a kernel of their own there; the others pass through buffers.
COLUMNS = [1, 2, 3, 7, 8, 9, 21, 33, 48, 49, 95, 96, 97, 130]


@pytest.mark.parametrize("options", [{}, *PLAIN, *GENERAL], ids=lambda options: "-".join(options) or "plain")
def test_class_axis_one_has_the_bits_of_class_axis_last(options, dtype):
    for classes in (3, 97) if options in GENERAL else COLUMNS:
        check_class_axis_one(options, classes, dtype)


def check_class_axis_one(options, classes, dtype):
    n = 2 * 7 * 19
    logits, targets, given = problem(options, (n, classes), dtype)
    # Ignored rows, rows of huge spread, special values, and factors at the ends of the range.
    given["grad_output"][:8] = [1e-30, 1e30, -1e-37, 1e37, 0, np.inf, np.nan, 1e-300]
    expected = gradients_of(logits, targets, given)
    plain = fastce.cross_entropy_with_grad(logits, targets, reduction="none", **given)

    def across(array):
        return np.ascontiguousarray(np.moveaxis(array.reshape(2, 7, 19, -1), -1, 1)) if np.ndim(array) == 2 else array

    def by_row(array):
        return array.reshape(2, 7, 19)

    row_by_row = ("sample_weight", "grad_output")
    moved = {name: by_row(value) if name in row_by_row else value for name, value in given.items()}
    if "class_mask" in given:
        mask = np.broadcast_to(given["class_mask"], logits.shape)
        moved["class_mask"] = across(mask) if given["class_mask"].ndim == 2 else given["class_mask"][:, None, None]
    if isinstance(targets, SparseTargets):
        laid = SparseTargets(*(array.reshape(2, 7, 19, -1) for array in (targets.indices, targets.values)))
    else:
        laid = across(targets) if targets.ndim == 2 else by_row(targets)
    x = across(logits)
    for num_threads in (1, 3):
        got = gradients_of(x, laid, moved, axis=1, num_threads=num_threads)
        assert_all_same(got, [by_row(expected[0]), *(across(array) for array in expected[1:])], num_threads)
        given_out = x.copy()
        for source, out in ((x, None), (x, np.full_like(x, 7)), (given_out, given_out)):
            losses, gradient = fastce.cross_entropy_with_grad(
                source, laid, axis=1, reduction="none", out=out, num_threads=num_threads, **moved
            )
            assert_same_bits(losses, by_row(plain[0]))
            assert_same_bits(gradient, across(plain[1]))
        alone = {name: value for name, value in moved.items() if name != "grad_output"}
        losses = fastce.cross_entropy(x, laid, axis=1, reduction="none", num_threads=num_threads, **alone)
        assert_same_bits(losses, by_row(plain[0]))
