"""Any call at all: a decoder from choices to calls of every public function, and what must be true of each of them.

`decode` makes a call out of a source of choices (bytes, a seed, or hypothesis); `check` makes it. A call that was
spoiled on purpose raises the documented error, names the argument and leaves every array as it was, to the bit. Any
other gives the documented value within its bounds, without a warning, and the same bits alone, with gradient, in place,
on other threads.
"""

import inspect
import re
import warnings
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
from test_activations import true_activations
from test_binary import true_entries
from test_further_losses import softmax_parts, true_divergence, true_target_loss
from test_layouts import READABLE_LAYOUTS, WRITABLE_LAYOUTS, assert_same_bits
from test_options import EXTENDED, Rows, assemble, assert_allowed, computing_dtype, dense_targets, truth_of
from truth import GRADIENT_BOUND, LOSS_BOUND

import fastce
from fastce import SparseTargets, reference

NAMES = [
    name for name in fastce.__all__ if inspect.isfunction(getattr(fastce, name)) and hasattr(reference, name)
]
PARAMETERS = {name: list(inspect.signature(getattr(fastce, name)).parameters) for name in NAMES}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]
INTEGERS = ["i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1"]
LENGTHS = [1, 2, 3, 5, 10, 16, 17, 33, 48, 49, 65, 96, 97, 130, 257, 1000, 4097]
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, 5e-324, 88.7, -104.0, 1000, -1000.1, 3.4e38, -1.7e308]


class Seeded:
    """Choices that follow from a number."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def below(self, n):
        return int(self.rng.integers(n))


class Bytes:
    """Choices read from bytes, four for each; once they are used up, the first of every choice."""

    def __init__(self, data):
        self.words = np.frombuffer(data[: len(data) // 4 * 4], "<u4")
        self.used = 0

    def below(self, n):
        word = int(self.words[self.used]) if self.used < len(self.words) else 0
        self.used += 1
        return word % n


class Drawn:
    """Choices drawn by hypothesis, which then finds the least call that fails."""

    def __init__(self, draw):
        from hypothesis import strategies

        self.draw, self.integers = draw, strategies.integers

    def below(self, n):
        return self.draw(self.integers(0, n - 1))


@dataclass
class Call:
    """A call by keyword; `faults` are the (argument, exceptions) that were planted in it, if any."""

    name: str
    arguments: dict
    faults: list = field(default_factory=list)

    def __repr__(self):
        return f"{self.name}({self.arguments!r}), faults {self.faults}"

    def make(self, name=None, **changes):
        """Call the function, or the one that is named with those of the arguments that it knows."""
        arguments = {**self.arguments, **changes}
        if name is not None:
            arguments = {key: value for key, value in arguments.items() if key in PARAMETERS[name]}
        return getattr(fastce, name or self.name)(**arguments)


# ---- the decoder ---------------------------------------------------------------------------------------------------


class Decoder:
    """Makes one call; arrays have their class axis last until `finish` moves it to its place and lays them out."""

    def __init__(self, source):
        self.source = source
        self.name = self.pick(NAMES)
        self.known = PARAMETERS[self.name]
        self.by_entry = self.name.startswith("binary")
        self.scores_name = "probs" if "probs" in self.known else "logits"
        self.dtype = self.pick(DTYPES)
        self.rng = np.random.default_rng(source.below(2**32))
        self.arguments, self.faults = {}, []
        self.has_extreme = False

    def pick(self, values):
        return values[self.source.below(len(values))]

    def chance(self, percent):
        return self.source.below(100) >= 100 - percent

    def extreme(self, *values):
        """Return one of the values, of which one call has no more than one: products of two leave any range."""
        value = self.pick([1.0, *values])
        if self.has_extreme:
            return 1.0
        self.has_extreme = value != 1.0
        return value

    def call(self):
        self.choose_shape()
        self.scores = self.probabilities() if self.scores_name == "probs" else self.logits()
        self.choose_numbers()
        self.choose_weights()
        self.targets = self.entry_targets() if self.by_entry else self.row_targets()
        self.spoil_what_does_not_count()
        self.choose_mask()
        self.finish()
        if self.chance(30):
            for _ in range(1 + self.chance(20)):
                self.plant_fault()
        return Call(self.name, self.arguments, self.faults)

    def choose_shape(self):
        classes = self.pick(LENGTHS[:9]) if self.chance(75) else self.pick(LENGTHS)
        lengths = [1, 2, 3, 4, 6, 0] if classes < 200 else [1, 2, 0]
        rows = tuple(self.pick(lengths) for _ in range(self.pick([1, 2, 0, 3])))
        if self.chance(2):
            rows, classes = self.pick([((2,), 70_000), ((3000,), 10), ((20_000,), 3), ((300,), 130), ((40,), 1000)])
        self.row_shape, self.classes, self.shape = rows, classes, (*rows, classes)
        self.axis = 0
        if "axis" in self.known:
            self.axis = self.source.below(len(self.shape)) - len(self.shape) if self.chance(40) else -1
            if self.chance(80):
                self.arguments["axis"] = self.axis if self.chance(50) else self.axis + len(self.shape)
            elif self.axis != -1:
                self.arguments["axis"] = np.int8(self.axis)

    def logits(self):
        kind = self.pick(["ordinary", "confident", "bits", "special", "wide", "whole", "constant", "offset"])
        x = self.rng.normal(0, self.pick([1, 5, 60, 0.01, 700]), self.shape)
        if kind == "confident":
            x[..., self.source.below(self.classes)] += self.pick([10, 40, 95, 600])
        elif kind == "bits":
            bits = self.rng.integers(0, 256, (*self.shape, self.dtype.itemsize), dtype=np.uint8)
            x = bits.view(self.dtype)[..., 0]
        elif kind == "special":
            x = np.where(self.rng.random(self.shape) < self.pick([0.1, 0.5]), self.rng.choice(SPECIAL, self.shape), x)
        elif kind == "wide":
            x = np.sign(x) * 10 ** self.rng.uniform(-40, 38, self.shape)
        elif kind == "whole":
            x = np.round(x)
        elif kind == "constant":
            x = np.broadcast_to(x[..., :1], self.shape)
        elif kind == "offset":
            x += self.pick([-1e8, -300.0, 1e4, 1e30])
        return cast(x, self.dtype)

    def probabilities(self):
        if self.by_entry:
            p = self.rng.random(self.shape)
            return cast(np.where(self.rng.random(self.shape) < 0.2, np.round(p), p), self.dtype)
        e = np.exp(self.rng.normal(0, self.pick([0.1, 2, 30]), self.shape))
        return cast(e / e.sum(-1, keepdims=True), self.dtype)

    def choose_numbers(self):
        """Choose the options that are numbers; most calls have few of them."""
        self.reduction = "none" if self.name in ACTIVATIONS or "stats" in self.name else "mean"
        if "reduction" in self.known and self.chance(70):
            self.reduction = self.arguments["reduction"] = self.pick(["none", "sum", "mean"])
        for name, values in NUMBERS.items():
            if name in self.known and self.chance(25):
                self.arguments[name] = self.pick(values)
        if self.reduction != "mean":
            self.arguments.pop("denominator", None)
        if self.name.endswith("_hess") and self.arguments.get("softcap") is not None:
            self.faults.append(("softcap", ValueError))

    def choose_weights(self):
        kinds = [np.float64, np.float32, np.float16, BFLOAT16, np.int8]
        if "weight" in self.known and self.chance(25):
            weight = self.rng.uniform(0.1, 3, self.classes) * self.extreme(1.0, 1e-30, 1e30)
            weight = weight * (self.rng.random(self.classes) < 0.8)
            self.arguments["weight"] = cast(weight, self.pick(kinds[:2] if abs(weight).max() > 100 else kinds))
        if "sample_weight" in self.known and self.chance(30):
            shape = self.broadcasting(self.shape) if self.by_entry else self.row_shape
            weight = self.rng.uniform(0.1, 3, shape) * self.rng.choice(self.pick([[1], [0, 1], [-1, 1]]), shape)
            weight = weight * self.extreme(1.0, 1e-30, 1e30)
            kind = self.pick(kinds[:2] if self.has_extreme else kinds)
            self.arguments["sample_weight"] = cast(weight, kind)
        if "pos_weight" in self.known and self.chance(30):
            weight = self.rng.uniform(0, 3, self.broadcasting(self.shape)) * self.extreme(0.0, 1e-20, 1e20)
            self.arguments["pos_weight"] = cast(weight, self.pick(kinds[:2]))
        if "grad_output" in self.known and self.chance(30):
            shape = (self.shape if self.by_entry else self.row_shape) if self.reduction == "none" else ()
            factor = self.rng.normal(0, 2, shape if self.chance(70) else ())
            factors = self.pick([[1.0], [0.0, 1.0], [np.nan, np.inf, 1.0]])
            factor = factor * self.rng.choice(factors, factor.shape) * self.extreme(1e-30, 1e30)
            self.arguments["grad_output"] = cast(factor, self.pick(kinds[:2]))

    def broadcasting(self, shape):
        """Return a shape that broadcasts to this one."""
        if self.chance(50):
            return shape
        shape = tuple(length if self.chance(50) else 1 for length in shape)
        return shape[self.source.below(len(shape) + 1) :]

    def entry_targets(self):
        shape = self.broadcasting(self.shape)
        kind = self.pick(["f4", "f8", "?", "i8", "u1", "f2"])
        y = self.rng.random(shape)
        return (y if kind[0] == "f" and self.chance(60) else np.round(y)).astype(kind)

    def row_targets(self):
        self.ids = None
        if "targets" not in self.known:
            return None
        soft = ["distribution", "distribution", "sparse"] if "from_logits" not in self.known else ["distribution"]
        only_ids = self.name.startswith(("focal", "poly"))
        if "from_logits" in self.known or (not only_ids and self.chance(45)):
            return self.soft_targets(self.pick(soft))
        dtype = np.dtype(self.pick(INTEGERS))
        ids = self.rng.integers(0, self.classes, self.row_shape)
        ignored = {-100}
        if self.chance(40):
            choice = self.pick([None, 255, -1, self.classes // 2, (-1, 255, 0), [3, 3, -100], 2**63 - 1])
            self.arguments["ignore_index"] = choice
            ignored = set() if choice is None else set(np.atleast_1d(choice).tolist())
        kept = [value for value in ignored if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max]
        if self.classes - 1 > np.iinfo(dtype).max:
            dtype = np.dtype(np.int64)
        if kept and self.chance(60):
            ids = np.where(self.rng.random(ids.shape) < 0.3, self.rng.choice(kept, ids.shape), ids)
        self.ids, self.live = ids, ~np.isin(ids, list(ignored))
        return ids.astype(dtype)

    def soft_targets(self, kind):
        self.live = np.ones(self.row_shape, bool)
        if "ignore_index" in self.known and self.chance(20):
            self.arguments["ignore_index"] = self.pick([None, -100])
        if self.scores_name == "probs":
            kind = "distribution"
        dtype = self.pick(DTYPES)
        if kind == "sparse":
            shape = (*self.row_shape, self.pick([1, 2, 5, 0]))
            values = self.rng.choice([0.0, 0.3, 1.0, 2.5], shape)
            kinds = INTEGERS[:3] if self.classes < 2**15 else INTEGERS[:2]
            ids = self.rng.integers(0, self.classes, shape).astype(self.pick(kinds))
            return SparseTargets(ids, values.astype(self.pick(["f8", "f4", "f2"])))
        if self.arguments.get("from_logits"):
            return self.logits()
        q = self.rng.random(self.shape) * (self.rng.random(self.shape) < self.pick([0.5, 1.0, 0.05]))
        if self.chance(60):
            q /= np.maximum(q.sum(-1, keepdims=True), 1e-3)
        if self.chance(15) and not self.has_extreme:
            self.has_extreme = True
            q = q * 10 ** self.rng.uniform(-320, 0, self.shape)
        return cast(q * self.pick([1.0, 1.0, 3.0, 1e-6]), dtype)

    def spoil_what_does_not_count(self):
        """Put nan where nothing may be read: rows and entries that are ignored or have the weight 0."""
        if self.targets is None:
            self.counts = np.ones(self.row_shape, bool)
            return
        weight = np.asarray(self.arguments.get("sample_weight", 1.0)).astype(np.float64)
        self.counts = (
            np.broadcast_to(weight != 0, self.shape) if self.by_entry else self.live & (weight != 0)
        )
        if self.chance(50):
            self.scores = self.scores.copy()
            self.scores[~self.counts] = np.nan
            dense = isinstance(self.targets, np.ndarray) and self.targets.dtype.kind not in "iub?"
            if dense and self.targets.shape == self.shape:
                self.targets[~self.counts] = np.nan

    def choose_mask(self):
        # A mass on a hidden class is an infinite loss, unless a tiny weight takes it out of the dtype's range.
        if "class_mask" not in self.known or self.has_extreme or not self.chance(25):
            return
        of_rows = self.chance(50)
        mask = self.rng.random(self.shape if of_rows else self.classes) < self.pick([0.7, 0.2])
        mask[..., self.source.below(self.classes)] = True
        if of_rows:
            mask[~self.counts] = False
        elif len(self.shape) > 1:
            mask = mask.reshape((1,) * len(self.row_shape) + (self.classes,))
        self.arguments["class_mask"] = mask

    def finish(self):
        """Move class axes to their place, lay arrays out anyhow, and choose buffers and threads."""
        arguments = self.arguments
        arguments[self.scores_name] = self.placed(self.scores)
        if isinstance(self.targets, SparseTargets):
            targets = self.targets
            arguments["targets"] = SparseTargets(self.laid(targets.indices), self.laid(targets.values))
        elif self.targets is not None:
            by_class = not self.by_entry and self.ids is None
            arguments["targets"] = self.placed(self.targets) if by_class else self.laid(self.targets)
        for name in ("weight", "sample_weight", "pos_weight", "grad_output"):
            if name in arguments:
                arguments[name] = self.laid(arguments[name])
        if "class_mask" in arguments:
            mask = arguments["class_mask"]
            arguments["class_mask"] = self.laid(np.moveaxis(mask, -1, self.axis) if mask.ndim > 1 else mask)
        for name in ("out", "hess_out"):
            if name in self.known and self.chance(50):
                arguments[name] = self.buffer(name)
        if self.chance(50):
            arguments["num_threads"] = self.pick([1, 2, 3, None])

    def buffer(self, name):
        """Return a buffer for a gradient: the logits themselves, another array, or one that the ids lie in."""
        logits = self.arguments["logits"]
        dtype = self.dtype
        if name == "out" and self.chance(40) and is_writable(logits):
            return logits if self.chance(50) else logits[...]
        if "hess_out" in self.known and self.chance(30):
            dtype = self.pick(DTYPES)
        memory = np.full(np.shape(logits), 7, dtype)
        if name == "out" and getattr(self, "ids", None) is not None and self.chance(10) and dtype.itemsize == 8:
            lent = memory.reshape(-1).view(np.int64)[: self.ids.size].reshape(self.row_shape)
            lent[...] = self.ids
            self.arguments["targets"] = lent
            return memory
        return self.pick(WRITABLE_LAYOUTS)(memory) if memory.size and memory.ndim else memory

    def placed(self, array):
        array = array if self.by_entry else np.moveaxis(array, -1, self.axis)
        return self.laid(np.ascontiguousarray(array) if array.ndim and self.chance(80) else array)

    def laid(self, array):
        """Return the array in some layout, or as a list."""
        if array.ndim == 0 or array.size == 0 or self.chance(50):
            return array
        if self.chance(10) and array.dtype in (np.float64, np.int64, np.bool_) and array.size < 100:
            return array.tolist()
        layout = self.pick(READABLE_LAYOUTS)
        if array.dtype == BFLOAT16 and "swapped" in layout.__name__:
            return array
        return layout(array)

    # ---- faults ----

    def plant_fault(self):
        """Spoil one argument so that the call must be refused."""
        name = self.pick([name for name in self.known if name != "hess_out"] + ["keyword"])
        makers = FAULTS.get(name, []) if name != "keyword" else [(lambda decoder: {"reductoin": 1}, TypeError)]
        if not makers or name in [spoiled for spoiled, _ in self.faults]:
            return
        maker, expected = self.pick(makers)
        changes = maker(self) if callable(maker) else {name: maker}
        if changes:
            self.arguments |= changes
            self.faults.append(("reductoin" if name == "keyword" else name, expected))


BINARY_LOSSES = ("binary_cross_entropy", "binary_cross_entropy_from_probs")
ACTIVATIONS = ("softmax", "log_softmax", "logsumexp")
NUMBERS = {
    "from_logits": [False, True],
    "keepdims": [False, True, np.True_],
    "denominator": [3.5, 1e-3, 1e6, np.float32(2), 7],
    "label_smoothing": [0.0, 0.1, 0.5, 0.9, 1.0, 1e-12, np.float32(0.1), np.array(0.25)],
    "logit_scale": [1.0, 0.5, 1.7, 1e-3, 30.0, np.float16(2), 3],
    "softcap": [None, 30.0, 0.7, 1e4],
    "z_loss": [0.0, 1e-4, 0.3, 100.0],
    "gamma": [2.0, 0.0, 0.5, 5, 30.0],
    "epsilon": [1.0, 0.0, 3.5, -1.0, -0.3],
}


def cast(array, dtype):
    with np.errstate(all="ignore"):
        return np.asarray(array).astype(dtype)


def is_writable(array):
    """Return whether an argument is an array that a gradient may be written to in place."""
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        return False
    return array.flags.writeable and array.dtype.isnative and not overlaps_itself(array)


def overlaps_itself(array):
    return any(stride == 0 and length > 1 for stride, length in zip(array.strides, array.shape, strict=True))


def scores_of(decoder):
    return decoder.arguments[decoder.scores_name]


def wrong_scores(value):
    def maker(decoder):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {decoder.scores_name: value(np.asarray(scores_of(decoder)))}

    return maker


def without_classes(decoder):
    shape = list(decoder.shape)
    shape[decoder.axis] = 0
    return None if decoder.by_entry else {decoder.scores_name: np.zeros(shape, decoder.dtype)}


def hiding(array):
    masked = np.ma.array(array, mask=False)
    if array.size:
        masked.mask.reshape(-1)[0] = True
    return masked if array.size else array.astype(np.int64)


def id_out_of_range(decoder):
    ids = getattr(decoder, "ids", None)
    if ids is None or not ids.size or not decoder.live.any():
        return None
    bad = np.asarray(decoder.arguments["targets"]).astype(np.int64)
    row = tuple(decoder.pick(np.argwhere(decoder.live).tolist())) if bad.ndim else ()
    ignored = decoder.arguments.get("ignore_index", -100)
    value = decoder.pick([decoder.classes, -1, -7, 10**12, -(2**62)])
    if value in np.atleast_1d(np.array(-100 if ignored is None else ignored, object)):
        return None
    bad[row] = value
    return {"targets": bad}


def mass_out_of_range(decoder):
    targets = decoder.targets
    if decoder.by_entry or not isinstance(targets, np.ndarray) or getattr(decoder, "ids", None) is not None:
        return None
    if decoder.arguments.get("from_logits") or not decoder.counts.any():
        return None
    bad = targets.astype(np.float64)
    row = tuple(decoder.pick(np.argwhere(decoder.counts).tolist())) if decoder.row_shape else ()
    bad[(*row, decoder.source.below(decoder.classes))] = decoder.pick([-1e-9, np.nan, np.inf, -np.inf])
    return {"targets": np.moveaxis(bad, -1, decoder.axis)}


def entry_out_of_range(decoder):
    if not decoder.by_entry or not decoder.counts.size or not decoder.counts.any():
        return None
    bad = np.broadcast_to(decoder.targets, decoder.shape).astype(np.float64)
    at = tuple(decoder.pick(np.argwhere(decoder.counts)[:50].tolist()))
    bad[at] = decoder.pick([-1e-9, 1.0000001, np.nan, 2, -1, np.inf])
    return {"targets": bad}


def targets_of_another_shape(decoder):
    shape = (*np.shape(decoder.arguments.get(decoder.scores_name)), 2, 2)
    return {"targets": np.zeros(shape, np.int64)}


def changed(name, make):
    """A fault of an array argument, made of what it would be at its best."""

    def maker(decoder):
        shape = {"weight": (decoder.classes,), "pos_weight": decoder.shape}.get(
            name, decoder.shape if decoder.by_entry else decoder.row_shape
        )
        # What did not count holds nan, which must not become the first error.
        best = np.array(decoder.counts, np.float64, order="C") if name == "sample_weight" else np.ones(shape)
        bad = make(best)
        return None if bad is None else {name: bad}

    return maker


def with_entry(value):
    def make(array):
        if not array.size:
            return None
        array.reshape(-1)[array.size // 2] = value
        return array

    return make


def all_hidden(decoder):
    if not decoder.counts.any():
        return None
    mask = np.ones(decoder.shape, bool)
    mask[tuple(np.argwhere(decoder.counts)[0]) if decoder.row_shape else ()] = False
    return {"class_mask": np.moveaxis(mask, -1, decoder.axis)}


def wrong_out(make):
    """A buffer that does not fit, made of one that does."""

    def maker(decoder):
        bad = make(np.full(np.shape(scores_of(decoder)), 7, decoder.dtype), decoder)
        return None if bad is None else {"out": bad}

    return maker


def frozen(out, decoder):
    out.flags.writeable = False
    return out


def shifted_logits(out, decoder):
    """A view of the logits' memory that is not the logits."""
    logits = scores_of(decoder)
    if not isinstance(logits, np.ndarray) or logits.size < 2 or logits.dtype != decoder.dtype:
        return None
    memory = np.zeros(logits.size + 1, decoder.dtype)
    decoder.arguments[decoder.scores_name] = memory[:-1].reshape(logits.shape)
    decoder.arguments[decoder.scores_name][...] = logits
    return memory[1:].reshape(logits.shape)


def on_itself(out, decoder):
    return np.lib.stride_tricks.as_strided(out, out.shape, (0,) * out.ndim) if out.size > 1 else None


NO_INTEGER = [(1.0, TypeError), ("1", TypeError), (True, TypeError)]
NO_NUMBER = [("1", TypeError), (1j, TypeError), (np.zeros(2), TypeError)]


def out_of(*values):
    return [(value, ValueError) for value in (*values, np.nan, np.inf)]


def array_faults(name, *bad):
    return [
        *((changed(name, with_entry(value)), ValueError) for value in (*bad, np.nan, np.inf)),
        (changed(name, lambda array: array.astype(complex)), TypeError),
        (changed(name, lambda array: array.astype(str)), TypeError),
        (changed(name, lambda array: np.zeros((*array.shape, 2, 5))), ValueError),
    ]


REFUSED_SCORES = [
    (wrong_scores(lambda array: np.zeros(array.shape, np.int64)), TypeError),
    (wrong_scores(lambda array: array.astype(np.complex128)), TypeError),
    (wrong_scores(lambda array: array.astype(np.longdouble)), TypeError),
    (wrong_scores(lambda array: array.astype(object)), TypeError),
    (wrong_scores(lambda array: np.full(array.shape, "0")), TypeError),
    (wrong_scores(lambda array: np.zeros(array.shape, bool)), TypeError),
    (wrong_scores(lambda array: None), TypeError),
    (wrong_scores(hiding), TypeError),
    (without_classes, ValueError),
]
FAULTS = {
    "logits": REFUSED_SCORES,
    "probs": REFUSED_SCORES,
    "targets": [
        *[(id_out_of_range, IndexError), (mass_out_of_range, ValueError), (entry_out_of_range, ValueError)] * 3,
        (targets_of_another_shape, (TypeError, ValueError)),
        (lambda decoder: {"targets": None}, TypeError),
        (lambda decoder: {"targets": "0"}, (TypeError, ValueError)),
        (lambda decoder: {"targets": [[0], [1, 2]]}, ValueError),
        (lambda decoder: {"targets": 1j}, (TypeError, ValueError)),
    ],
    "axis": [*NO_INTEGER, (17, ValueError), (-18, ValueError), (10**30, ValueError), (None, TypeError)],
    "weight": array_faults("weight", -1e-3),
    "sample_weight": array_faults("sample_weight"),
    "pos_weight": array_faults("pos_weight", -1e-3),
    "ignore_index": [(1.5, TypeError), ("x", TypeError), (True, TypeError), ([1, 2.0], TypeError), (2**70, ValueError)],
    "label_smoothing": [*NO_NUMBER, *out_of(-0.1, 1.1), (None, TypeError)],
    "logit_scale": [*NO_NUMBER, *out_of(0.0, -1.0), (None, TypeError)],
    "softcap": [*(("1", (TypeError, ValueError)), (1j, (TypeError, ValueError))), *out_of(0.0, -1.0)],
    "z_loss": [*NO_NUMBER, *out_of(-1e-9), (None, TypeError)],
    "gamma": [*NO_NUMBER, *out_of(-1e-9)],
    "epsilon": [*NO_NUMBER, *out_of(-1.5)],
    "class_mask": [
        (lambda decoder: {"class_mask": np.ones(decoder.shape)}, TypeError),
        (lambda decoder: {"class_mask": np.ones((3, *decoder.shape), bool)}, ValueError),
        (all_hidden, ValueError),
    ],
    "reduction": [("avg", ValueError), ("", ValueError), (None, TypeError), (1, TypeError)],
    "denominator": [*NO_NUMBER, *out_of(0.0, -2.0)],
    "num_threads": [*NO_INTEGER, (0, ValueError), (-(10**30), ValueError)],
    "keepdims": [(1, TypeError), (None, TypeError)],
    "from_logits": [(1, TypeError), ("yes", TypeError)],
    "grad_output": [
        ("1", TypeError),
        (1j, TypeError),
        (lambda decoder: {"grad_output": np.ones((*decoder.shape, 3))}, ValueError),
    ],
    "out": [
        (wrong_out(lambda out, decoder: out.tolist()), TypeError),
        (wrong_out(lambda out, decoder: out.astype(np.complex64)), TypeError),
        (wrong_out(lambda out, decoder: out.astype(out.dtype.newbyteorder())), TypeError),
        (wrong_out(lambda out, decoder: out[..., None].repeat(2, -1)), ValueError),
        (wrong_out(frozen), ValueError),
        (wrong_out(shifted_logits), ValueError),
        (wrong_out(on_itself), ValueError),
    ],
}


def decode(source):
    return Decoder(source).call()


# ---- the oracle ----------------------------------------------------------------------------------------------------


def check(call):
    """Make the call and raise AssertionError unless all is as documented; return whether it was refused."""
    memory = Memory(call)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        if call.faults:
            check_refusal(call)
            memory.check("after an error")
            return True
        fresh = {name: None for name in ("out", "hess_out") if name in PARAMETERS[call.name]}
        results = results_of(call.make(**fresh, num_threads=1))
        memory.check("after a call that had no buffer")
        again = call.make()
    again = tuple(np.copy(result) for result in check_buffers(call, results_of(again), results))
    memory.check("but for the buffers")
    check_types(call, results)
    check_partners(call, results[0])
    check_signs(call, results[0])
    truths = truth(call)
    check_values(call, results, truths)
    check_values(call, again, truths)
    return False


class Memory:
    """All memory that a call may reach, as it was before it, with what lies around and between its arrays."""

    def __init__(self, call):
        arrays = [value for value in call.arguments.values() if isinstance(value, np.ndarray)]
        targets = call.arguments.get("targets")
        if isinstance(targets, SparseTargets):
            arrays += [array for array in (targets.indices, targets.values) if isinstance(array, np.ndarray)]
        self.roots = [(root, root.tobytes()) for root in map(root_of, arrays)]
        buffers = [call.arguments.get(name) for name in ("out", "hess_out")]
        self.buffers = [(buffer, buffer.copy()) for buffer in buffers if isinstance(buffer, np.ndarray)]

    def check(self, when):
        """Put the buffers back as they were: now every byte must be what it was."""
        for buffer, content in self.buffers:
            if buffer.flags.writeable:
                buffer[...] = content
        for root, content in self.roots:
            assert root.tobytes() == content, f"memory has changed {when}"


def root_of(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.view(np.ndarray)


def check_refusal(call):
    names = {name for name, _ in call.faults}
    expected = tuple({kind for _, kinds in call.faults for kind in (kinds if isinstance(kinds, tuple) else (kinds,))})
    try:
        call.make()
    except expected as error:
        words = set(re.findall(r"\w+", str(error)))
        assert words & names, f"the message does not name {names}: {error}"
    else:
        raise AssertionError("accepted in spite of its faults")


def results_of(returned):
    return tuple(returned) if isinstance(returned, tuple) else (returned,)


def check_buffers(call, results, fresh):
    """The buffers are returned and hold the bits of fresh arrays; no number of threads changes any. Return results."""
    places = [None, call.arguments.get("out"), call.arguments.get("hess_out")]
    if call.name in ACTIVATIONS:
        places = places[1:]
    for i, (result, expected) in enumerate(zip(results, fresh, strict=True)):
        place = places[i] if i < len(places) else None
        assert place is None or result is place, "a buffer was not returned"
        if result_dtype(result) == result_dtype(expected):
            assert_same_bits(plain(result), plain(expected), "in a buffer, or by other threads")
    return results


def result_dtype(result):
    return np.asarray(result).dtype


def plain(result):
    """Return a result as a float array that NumPy itself can compare."""
    array = np.asarray(result)
    return array.astype(np.float32) if array.dtype == BFLOAT16 else array


def check_types(call, results):
    scores = np.asarray(call.arguments["probs" if "probs" in call.arguments else "logits"])
    computed = computing_dtype(scores.dtype)
    if call.name == "cross_entropy_stats":
        dtypes = [computed, computed, np.int64, np.bool_, computed, computed]
    elif call.name in ACTIVATIONS:
        dtypes = [computed if call.name == "logsumexp" else scores.dtype.newbyteorder("=")]
    else:
        by_row = call.arguments.get("reduction") == "none"
        dtypes = [computed if by_row else float] + [scores.dtype.newbyteorder("=")] * (len(results) - 1)
    for result, dtype in zip(results, dtypes, strict=True):
        assert type(result) is (float if dtype is float else np.ndarray), type(result)
        assert dtype is float or result.dtype == dtype, result.dtype


def check_partners(call, loss):
    """The loss has the same bits alone, with the gradient, and with the Hessian."""
    base = call.name.removesuffix("_hess").removesuffix("_with_grad")
    partners = {base, f"{base}_with_grad", f"{base}_with_grad_hess"} & set(NAMES) - {call.name}
    if call.arguments.get("softcap") is not None:
        partners.discard(f"{base}_with_grad_hess")
    for name in partners:
        changes = {buffer: None for buffer in ("out", "hess_out") if buffer in PARAMETERS[name]}
        assert_same_bits(results_of(call.make(name, **changes))[0], loss, name)


def check_signs(call, loss):
    """No loss is negative or -0.0 where none of its parts can be."""
    if call.name in ACTIVATIONS or call.arguments.get("epsilon", 0) < 0:
        return
    if call.name.startswith("kl") and not call.arguments.get("from_logits"):
        return
    if (np.asarray(call.arguments.get("sample_weight", 1)).astype(float) < 0).any():
        return
    loss = np.asarray(loss)
    assert not (loss < 0).any() and not np.signbit(loss[loss == 0]).any(), "a negative loss"


def check_values(call, results, truths):
    for i, (result, (true, allowed)) in enumerate(zip(results, truths, strict=True)):
        if i == 0 and call.name not in ACTIVATIONS:
            result, true = as_defined(call, result, true)
        if allowed is None:
            np.testing.assert_array_equal(result, true, err_msg=f"result {i}")
        if np.asarray(result).dtype.kind in "ib":
            continue
        scores = np.asarray(call.arguments["probs" if "probs" in call.arguments else "logits"])
        if isinstance(result, np.ndarray) and result.dtype != computing_dtype(scores.dtype):
            allowed = allowed + rounding(result.dtype, true)
        anything = np.isinf(allowed)
        # Where the bound reaches beyond the dtype, an infinity of that sign is as right; where it reaches back into it,
        # a number within the bound is.
        dtypes = np.asarray(result).dtype, computing_dtype(scores.dtype)
        limit = min(EXTENDED(float(ml_dtypes.finfo(dtype).max)) for dtype in dtypes)
        values = plain(result).astype(EXTENDED)
        with np.errstate(invalid="ignore"):
            sign = np.sign(values)
            anything |= np.isinf(values) & (sign * true + np.where(anything, 0, allowed) >= limit)
            anything |= (np.abs(true) >= limit) & (np.abs(values - true) <= allowed)
        parts = (np.where(anything, 0, part) for part in (plain(result), true, allowed))
        assert_allowed(*parts, f"result {i}")


def as_defined(call, loss, true):
    """Return the loss and its truth where it is no number though the truth is one, with those of the definition.

    Sums, and products with weights, are those of float64: what leaves its range on the way is what it is in the
    reference.
    """
    with np.errstate(all="ignore"):
        over = ~np.isfinite(loss) & ~(np.asarray(true).astype(np.asarray(loss).dtype) == loss) & ~np.isnan(true)
        if not over.any():
            return loss, true
        arguments = {name: native(value) for name, value in call.arguments.items() if name not in ("out", "hess_out")}
        defined = np.asarray(results_of(getattr(reference, call.name)(**arguments))[0])
    return np.where(over & ~np.isfinite(defined), defined, loss), np.where(over & ~np.isfinite(defined), defined, true)


def rounding(dtype, true):
    """Return how far a rounding to `dtype` moves numbers."""
    precision, least = {"float16": (11, -25), "bfloat16": (8, -134), "float32": (24, -150), "float64": (53, -1075)}[
        dtype.name
    ]
    return np.where(np.isfinite(true), np.abs(true), 0) * EXTENDED(2.0**-precision) + EXTENDED(2) ** least


# ---- the truth: (true value, allowed error) of each result -----------------------------------------------------------


def truth(call):
    arguments = {name: native(value) for name, value in call.arguments.items()}
    for name in ("num_threads", "out", "hess_out"):
        arguments.pop(name, None)
    with np.errstate(all="ignore"):
        for prefix, formula in FORMULAS.items():
            if call.name.startswith(prefix):
                truths = formula(call.name, **arguments)
                break
    count = 3 if call.name.endswith("_hess") else 2 if call.name.endswith("_grad") else len(truths)
    if call.name in ("cross_entropy", "focal_loss", "poly_loss", "kl_divergence") or call.name in BINARY_LOSSES:
        count = 1
    return truths[:count]


def native(value):
    """Return an argument as a plain array of native byte order, of a dtype that the formulas know; others as is."""
    if isinstance(value, SparseTargets):
        return SparseTargets(native(value.indices), native(value.values))
    if not isinstance(value, (np.ndarray, list)):
        return value
    array = np.asarray(value)
    return array.astype(array.dtype.newbyteorder("="))


def of_cross_entropy(name, logits, targets, **options):
    if isinstance(targets, np.ndarray) and targets.dtype.kind not in "iu":
        targets = targets.astype(computing_dtype(logits.dtype))  # masses are rounded to it
    truth = truth_of(logits, targets, **options)
    kept = ("axis", "weight", "sample_weight", "ignore_index", "reduction", "denominator", "grad_output")
    batch = Batch(logits, targets, **{key: value for key, value in options.items() if key in kept})
    mass = (batch.w * (batch.q + np.where(float(options.get("label_smoothing", 0.0)) > 0, 1, 0))).sum(1)
    spread = np.where(np.isfinite(batch.x), np.abs(batch.x), 0).max(1) * max(1.0, float(options.get("logit_scale", 1)))
    truth.gradient_allowed = batch.widened(truth.gradient_allowed, mass)
    # A probability below the normal numbers may be lost before z_loss makes it steeper.
    steep = 2 * float(options.get("z_loss", 0.0)) * spread
    truth.hessian_allowed = batch.widened(truth.hessian_allowed, mass + steep)
    lost = np.abs(batch.s / batch.divisor()[0]) * (mass + spread) * np.finfo(batch.x.dtype).smallest_normal
    truth.loss_allowed = truth.loss_allowed + (
        lost.reshape(batch.row_shape) if batch.reduction == "none" else lost[batch.counts].sum()
    )
    if options.get("z_loss") and logits.dtype == np.float64:
        # Twice z_loss times such a log-sum-exp leaves the range of float64, and so does the loss.
        factor = np.nan_to_num(np.abs(batch.scale()), posinf=0).max(initial=1.0)
        huge = np.broadcast_to((spread * np.maximum(1, factor) > 1e300)[:, None], batch.x.shape)
        huge = np.moveaxis(huge.reshape(*batch.row_shape, batch.classes), -1, batch.axis)
        truth.gradient_allowed = np.where(huge, np.inf, truth.gradient_allowed)
        truth.hessian_allowed = np.where(huge, np.inf, truth.hessian_allowed)
    return finite_factors(options, logits, [
        (truth.loss, truth.loss_allowed), (truth.gradient, truth.gradient_allowed),
        (truth.hessian, truth.hessian_allowed),
    ])  # fmt: skip


def finite_factors(options, logits, truths):
    """Leave derivatives whose factor is no number open: they are data times that factor, or exactly 0."""
    factor = np.asarray(options.get("grad_output", 1.0), np.float64)
    if np.isfinite(factor).all():
        return truths
    if factor.ndim and factor.shape != logits.shape:
        factor = np.expand_dims(factor, options.get("axis", -1))
    open_ = ~np.isfinite(np.broadcast_to(factor, logits.shape))
    return [truths[0], *((true, np.where(open_, np.inf, allowed)) for true, allowed in truths[1:])]


class Batch:
    """Rows (N, C) of scores, 0 in those that do not count, their targets, and what their results are multiplied by."""

    def __init__(
        self, scores, targets, *, axis=-1, weight=None, sample_weight=None, ignore_index=-100, reduction="mean",
        denominator=None, grad_output=None,
    ):  # fmt: skip
        self.scores, self.axis, self.reduction, self.denominator = scores, axis, reduction, denominator
        last = np.moveaxis(scores, axis, -1)
        self.classes = last.shape[-1]
        self.row_shape = last.shape[:-1]
        n_rows = scores.size // self.classes
        if isinstance(targets, np.ndarray) and targets.dtype.kind not in "iu":
            targets = targets.astype(np.float64)
        self.q, live, self.ids = dense_targets(targets, scores.shape, axis, ignore_index)
        self.w = np.ones(self.classes, EXTENDED) if weight is None else weight.astype(EXTENDED)
        self.s = np.ones(n_rows, EXTENDED)
        if sample_weight is not None:
            self.s = np.asarray(sample_weight).astype(EXTENDED).reshape(-1)
        self.counts = live & (self.s != 0)
        self.live = live
        factor = np.asarray(1.0 if grad_output is None else grad_output).astype(EXTENDED)
        self.factor = np.broadcast_to(factor, last.shape[:-1]).reshape(-1)
        self.x = np.where(self.counts[:, None], last.reshape(-1, self.classes).astype(np.float64), 0.0)
        self.x = self.x.astype(computing_dtype(scores.dtype))
        self.q = np.where(self.counts[:, None], self.q, 0)
        self.bad = np.isnan(self.x).any(1) | np.isposinf(self.x).any(1) | np.isneginf(self.x).all(1)

    def divisor(self):
        """Return what the losses' sum is divided by, and its relative doubt."""
        if self.reduction != "mean" or self.denominator is not None:
            return EXTENDED(1.0 if self.denominator is None else self.denominator), EXTENDED(0)
        weights = (self.s * (1 if self.ids is None else self.w[np.where(self.live, self.ids, 0)]))[self.counts]
        total = weights.sum()
        return total, 2.0**-51 * np.abs(weights).sum() / np.abs(total)

    def scale(self):
        """Return what the gradient of each row's own loss is multiplied by."""
        return self.s * self.factor / self.divisor()[0]

    def widened(self, allowed, mass):
        """Return the bound of gradients that may lose terms below the normal numbers before they are scaled."""
        more = np.finfo(self.x.dtype).smallest_normal * (1 + np.nan_to_num(mass))
        more = more * np.nan_to_num(np.abs(self.scale()), posinf=0)
        return np.where(allowed > 0, allowed + np.expand_dims(more.reshape(self.row_shape), self.axis), 0)

    def assembled(self, losses, sizes, gradient=None, gradient_size=None, mass=None, probability=None):
        """Return the truths of a call, from those of its rows."""
        none = np.zeros(self.x.shape, EXTENDED)
        gradient, gradient_size = (none if part is None else part for part in (gradient, gradient_size))
        losses[self.bad], gradient[self.bad] = np.nan, np.nan
        rows = Rows(
            losses, sizes, gradient, gradient_size, none, none, none if probability is None else probability,
            losses, np.zeros(len(losses)) if mass is None else mass, np.zeros(len(losses)), none,
        )  # fmt: skip
        divisor, doubt = self.divisor()
        nothing = self.reduction == "mean" and divisor == 0
        truth = assemble(
            rows, self.counts, self.s, self.factor, divisor, doubt, nothing, self.scores, self.axis, self.reduction
        )
        return [(truth.loss, truth.loss_allowed), (truth.gradient, self.widened(truth.gradient_allowed, rows.mass))]


def of_target_loss(name, logits, targets, gamma=2.0, epsilon=1.0, **options):
    batch = Batch(logits, targets, **options)
    ids = np.where(batch.counts, batch.ids, 0)
    kind = name.split("_")[0]
    loss, size, gradient, gradient_size = true_target_loss(kind, batch.x, ids, gamma, epsilon)
    times = 1 + gamma if kind == "focal" else 1
    # What is below the normal numbers before it is weighted may be lost.
    least = EXTENDED(np.finfo(batch.x.dtype).smallest_normal) / LOSS_BOUND[batch.x.dtype.name]
    w = batch.w[ids]
    loss, size = (np.where(w == 0, 0, w * part) for part in (loss, size))
    mass = w * (1 + gamma if kind == "focal" else 1 + abs(epsilon))
    p, miss, _ = softmax_parts(batch.x)
    miss = np.where(np.arange(batch.classes) == ids[:, None], miss, 1)  # the size of what is p elsewhere
    gradient, gradient_size = gradient * w[:, None], gradient_size * w[:, None] * times
    size = size * times + w * least
    truths = batch.assembled(loss, size, gradient, gradient_size, mass, np.minimum(p, miss))
    return finite_factors(options, logits, truths)


def of_divergence(name, logits, targets, from_logits=False, **options):
    batch = Batch(logits, np.asarray(targets).astype(np.float64), ignore_index=None, **options)
    if from_logits:
        teacher = batch.q.astype(np.float64)
        q, _, minus_log = softmax_parts(teacher)
        q = np.where(q < np.finfo(np.float64).smallest_normal, 0, q)  # computed in float64
        unfit = np.isnan(teacher).any(1) | np.isposinf(teacher).any(1) | np.isneginf(teacher).all(1)
        loss, allowed, gradient, gradient_allowed = true_divergence(batch.x, q, -minus_log)
        batch.bad |= unfit & batch.counts
    else:
        q = batch.q
        loss, allowed, gradient, gradient_allowed = true_divergence(batch.x, q)
    name = batch.x.dtype.name
    mass = q.sum(1)
    # The documentation bounds gradients only; each term is a product of differences of float64 logarithms.
    allowed = 4 * allowed + 2.0**-49 * (1 + np.nan_to_num(mass))
    return finite_factors(options, logits, batch.assembled(
        loss, allowed / LOSS_BOUND[name], gradient, gradient_allowed / GRADIENT_BOUND[name], np.nan_to_num(mass),
        softmax_parts(batch.x)[0],
    ))  # fmt: skip


def of_probabilities(name, probs, targets, **options):
    batch = Batch(probs, targets, **options)
    mass = batch.w * batch.q
    terms = np.where(mass > 0, mass * -np.log(batch.x.astype(EXTENDED)), 0)
    batch.bad[:] = False
    return batch.assembled(terms.sum(1), terms.sum(1))[:1]


def of_entries(name, scores=None, targets=None, **options):
    """Sigmoid cross-entropy, from logits or from probabilities."""
    probs = options.pop("probs", None)
    scores = options.pop("logits", probs)
    dtype = computing_dtype(scores.dtype)
    x, y = scores.astype(dtype), np.broadcast_to(np.asarray(targets), scores.shape).astype(EXTENDED)
    weight, pos_weight = (
        np.asarray(1.0 if options.get(option) is None else options[option]).astype(EXTENDED)
        for option in ("sample_weight", "pos_weight")
    )
    weight = np.broadcast_to(weight, scores.shape)
    if probs is None:
        losses, gradient, magnitude = true_entries(
            np.where(weight == 0, 0, x), np.where(weight == 0, 0, y), pos_weight, weight,
            options.get("label_smoothing", 0.0),
        )  # fmt: skip
        spoiled = np.isnan(x) & (weight != 0)
        losses, gradient = (np.where(spoiled, np.nan, part) for part in (losses, gradient))
    else:
        p = x.astype(EXTENDED)
        losses = np.where(y != 0, -y * np.log(p), 0) + np.where(y != 1, -(1 - y) * np.log1p(-p), 0)
        losses = np.where(weight == 0, 0, losses * weight)
        gradient, magnitude = np.zeros_like(losses), np.zeros_like(losses)
    smallest = EXTENDED(np.finfo(dtype).smallest_normal)
    reach = np.maximum(1, np.abs(weight) * np.maximum(1, pos_weight))
    finite = np.where(np.isfinite(losses), np.abs(losses), 0)
    allowed = finite * LOSS_BOUND[dtype.name] + smallest * reach
    reduction, divisor, doubt = options.get("reduction", "mean"), EXTENDED(1), EXTENDED(0)
    if reduction == "mean":
        total = weight.sum()
        divisor = EXTENDED(options["denominator"]) if "denominator" in options else total
        doubt = 0 if "denominator" in options else 2.0**-51 * np.abs(weight).sum() / np.abs(total)
    scale = np.asarray(options.get("grad_output", 1.0)).astype(EXTENDED) / divisor
    gradient_allowed = (magnitude * (GRADIENT_BOUND[dtype.name] + doubt) + smallest * reach) * np.abs(scale) + smallest
    gradient = gradient * scale
    if divisor == 0:
        gradient, gradient_allowed = np.zeros_like(gradient), np.zeros_like(gradient)
    # An entry's loss, before it is weighted, that is infinite in its dtype is that, and so is what it is added to.
    infinite = finite > float(np.finfo(dtype).max) * np.minimum(1, np.abs(weight))
    if reduction == "none":
        loss = losses, np.where(infinite, np.inf, allowed)
    elif infinite.any():
        loss = EXTENDED(0), EXTENDED(np.inf)
    else:
        total = losses.sum() / divisor if divisor else EXTENDED(np.nan)
        loss = total, (allowed.sum() + finite.sum() * (doubt + 2.0**-50)) / np.abs(divisor)
    return finite_factors(options, scores, [loss, (gradient, gradient_allowed)])


def of_activations(name, logits, axis=-1, keepdims=False):
    dtype = computing_dtype(logits.dtype)
    last = np.moveaxis(logits.astype(dtype), axis, -1)
    x = last.reshape(-1, last.shape[-1])
    p, log_p, lse, reach = true_activations(x)
    bad = np.isnan(x).any(1) | np.isposinf(x).any(1) | np.isneginf(x).all(1)
    smallest = EXTENDED(np.finfo(dtype).smallest_normal)
    if name == "logsumexp":
        lse = np.where(bad, x.max(1).astype(EXTENDED), lse).reshape(last.shape[:-1])
        allowed = LOSS_BOUND[dtype.name] * np.nan_to_num(reach, posinf=0).reshape(lse.shape) + smallest
        return [tuple(np.expand_dims(part, axis) if keepdims else part for part in (lse, allowed))]
    true, bound = (p, GRADIENT_BOUND) if name == "softmax" else (log_p, LOSS_BOUND)
    true[bad] = np.nan
    size = np.where(np.isfinite(true), np.abs(true), 0)
    allowed = np.maximum(size * bound[dtype.name], smallest)
    return [tuple(np.moveaxis(part.reshape(last.shape), -1, axis) for part in (true, allowed))]


def of_statistics(name, logits, targets, **options):
    """The loss by its formula, the others by the reference, in float64, and the size of what they are made of."""
    loss = of_cross_entropy(name, logits, targets, reduction="none", **options)[0]
    dtype = computing_dtype(logits.dtype)
    if isinstance(targets, np.ndarray) and targets.dtype.kind not in "iu":
        targets = targets.astype(dtype)  # masses are rounded to it
    wide = reference.cross_entropy_stats(logits.astype(dtype), targets, **options)
    smallest = np.finfo(dtype).smallest_normal
    bound = 2 * LOSS_BOUND[dtype.name]
    x = np.moveaxis(logits.astype(np.float64), options.get("axis", -1), -1)
    cap = options.get("softcap")
    z = np.where(np.isfinite(x), np.abs(x), 0) * float(options.get("logit_scale", 1))
    spread = (z if cap is None else np.minimum(z, float(cap))).max(-1)
    moved = spread if cap is not None or options.get("logit_scale", 1) != 1 else 0.0
    truths = [loss]
    for value, size in ((wide.lse, spread + 10), (wide.probability, None), (wide.entropy, None)):
        number = value.astype(EXTENDED)
        size = np.abs(np.nan_to_num(number)) * (1 + moved) + moved * spread if size is None else size
        truths.append((number, size * bound + smallest * (1 + spread)))
    # The last place of a capped logit may be another one, and a tie with it.
    exact = None if cap is None else 0
    return [*truths[:2], (wide.predicted, exact), (wide.correct, exact), *truths[2:]]


FORMULAS = {
    "cross_entropy_from_probs": of_probabilities,
    "cross_entropy_stats": of_statistics,
    "cross_entropy": of_cross_entropy,
    "binary": of_entries,
    "focal": of_target_loss,
    "poly": of_target_loss,
    "kl": of_divergence,
    "softmax": of_activations,
    "log": of_activations,
}
