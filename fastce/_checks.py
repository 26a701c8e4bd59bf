"""The only room that refuses input. Every function returns what it was given in the form that the rest trusts.

Errors name the argument, what was expected and what came: TypeError for a kind that cannot be right, ValueError for
shapes and values, IndexError for class ids out of range. All of them are raised before anything is written.
"""

import math
import operator
from collections.abc import Iterable

import numpy as np

from fastce._engine import kernels

INT64_MAX = np.iinfo(np.int64).max
REDUCTIONS = ("none", "mean", "sum")


def as_logits(logits):
    """Return `logits` as a plain float32 or float64 array with at least one axis."""
    array = as_plain_array("logits", logits)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        raise TypeError(
            f"logits must be a float32 or float64 array, got {array.dtype}; convert with .astype(np.float32)"
        )
    if array.ndim == 0:
        raise ValueError("logits must have at least one axis, the class axis; got a 0-d array")
    return array


def as_plain_array(name, value):
    """Return `value` as a base-class array; a masked array that hides entries is refused."""
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise TypeError(
                f"{name} must not be a masked array with masked entries: a mask would be lost; "
                "fill masked logits with -inf, or ignore rows with ignore_index"
            )
        value = value.data
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be an array or make one: {error}") from error


def as_integer(name, expected, value):
    """Return `value` as an int; a bool is none."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {expected}, got {value!r}") from None


def as_axis(axis, shape):
    """Return the class axis as a non-negative int; it must hold at least one class."""
    ndim = len(shape)
    index = as_integer("axis", "an integer", axis)
    if not -ndim <= index < ndim:
        raise ValueError(f"axis must be in [{-ndim}, {ndim - 1}] for logits of shape {shape}, got {index}")
    if shape[index] == 0:
        raise ValueError(f"logits must have at least one class, got 0 along axis {index} of shape {shape}")
    return index % ndim


def as_ignored(ignore_index):
    """Return the ids to ignore as an int64 array without repetitions."""
    if ignore_index is None:
        return np.empty(0, np.int64)
    if isinstance(ignore_index, np.ndarray):
        ignore_index = ignore_index.tolist()
    several = isinstance(ignore_index, Iterable) and not isinstance(ignore_index, (str, bytes, bytearray))
    ignored: list[int] = []
    for value in ignore_index if several else [ignore_index]:
        ignored.append(as_integer("ignore_index", "an integer, a sequence of integers or None", value))
        if not -INT64_MAX - 1 <= ignored[-1] <= INT64_MAX:
            raise ValueError(f"ignore_index must fit in int64, got {ignored[-1]}")
    return np.array(sorted(set(ignored)), dtype=np.int64)


def as_class_ids(targets, logits_shape, axis, ignored):
    """Return (private int64 copy of the ids, flat, with ignored ones replaced by -1; number of live rows)."""
    array = as_plain_array("targets", targets)
    n_classes = logits_shape[axis]
    row_shape = logits_shape[:axis] + logits_shape[axis + 1 :]
    if array.size == 0 and array.shape == (0,) and not isinstance(targets, np.ndarray):
        array = array.astype(np.int64)
    check_targets_match(array, logits_shape, row_shape, axis)
    values = array.flatten()  # a copy in any case: from here on nobody else can change the ids
    if values.dtype.kind == "u" and values.dtype.itemsize == 8 and values.size and values.max() > INT64_MAX:
        raise_out_of_range(values, row_shape, n_classes, ignored)
    ids = values.astype(np.int64, copy=False)
    first_bad, n_live = kernels.encode_ids(ids, n_classes, ignored)
    if first_bad >= 0:
        raise_out_of_range(values, row_shape, n_classes, ignored)
    return ids, n_live


def check_targets_match(array, logits_shape, row_shape, axis):
    """Raise unless `array` holds integers of the rows' shape; say which likely mistake was made."""
    if array.dtype.kind not in "iu":
        remedy = "; convert with .astype(np.int64)" if array.dtype.kind in "fb" else ""
        raise TypeError(
            f"targets: class ids must be integers of shape {row_shape}, "
            f"got {array.dtype} of shape {array.shape}{remedy}"
        )
    if array.shape == row_shape:
        return
    expected = f"targets must have the shape of logits without the class axis, {row_shape}"
    came = f"got shape {array.shape} with logits of shape {logits_shape} and class axis {axis}"
    hint = ""
    if array.shape == logits_shape:
        hint = "; these look like one-hot rows: pass class ids, targets.argmax(axis)"
    elif array.shape == (*row_shape, 1):
        hint = "; drop the last axis with targets[..., 0]"
    elif array.ndim == len(row_shape) and sorted(array.shape) == sorted(row_shape):
        hint = "; the axes look transposed"
    elif len(row_shape) == 1 and array.shape == (logits_shape[axis],):
        hint = "; the logits look transposed: pass axis=" + ("0" if axis else "-1")
    raise ValueError(f"{expected}, {came}{hint}")


def raise_out_of_range(values, row_shape, n_classes, ignored):
    """Raise the IndexError that names the lowest bad row, how many there are, and the likely mistake."""
    live = ~np.isin(values, ignored.astype(values.dtype)[ignored.astype(values.dtype) == ignored])
    bad = live & ((values < 0) | (values >= n_classes))
    rows = np.flatnonzero(bad)
    first = int(rows[0])
    value = int(values[first])
    position = ", ".join(str(int(i)) for i in np.unravel_index(first, row_shape)) if row_shape else ""
    others = "" if len(rows) == 1 else f" ({len(rows)} rows have a class id out of range; this is the first)"
    bad_values = values[bad]
    hint = ""
    if (bad_values == n_classes).all() and values[live].min() == 1:
        hint = "; labels seem to start at 1: pass targets - 1"
    elif value in (-1, 255):
        hint = f"; to leave such rows out pass ignore_index={value}"
    where = f"targets[{position}]" if row_shape else "targets"
    raise IndexError(
        f"{where} = {value} is out of range for {n_classes} classes (expected 0..{n_classes - 1}){others}{hint}"
    )


def check_reduction(reduction):
    """Raise unless `reduction` is one of the three words."""
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")


def as_real(name, value):
    """Return `value` as a float; anything but a real scalar is a TypeError."""
    array = value if isinstance(value, float) else np.asarray(value)
    if isinstance(array, np.ndarray):
        if array.ndim or array.dtype.kind not in "iuf":
            raise TypeError(f"{name} must be a real number, got {value!r}")
        value = array
    return float(value)


def as_denominator(denominator, reduction, n_live):
    """Return what a mean is divided by, as a float: `denominator` if it is given, else the number of live rows."""
    if denominator is None:
        return float(n_live)
    value = as_real("denominator", denominator)
    if reduction != "mean":
        raise ValueError(f"denominator goes only with reduction='mean', got reduction={reduction!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"denominator must be finite and > 0, got {denominator!r}")
    return value


def as_grad_output(grad_output, reduction, row_shape):
    """Return the factor of the gradient: a float, or a flat float64 array with one factor per row."""
    if grad_output is None:
        return 1.0
    array = as_plain_array("grad_output", grad_output)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"grad_output must be real numbers, got {array.dtype}")
    if array.ndim == 0:
        return float(array)
    if reduction != "none":
        raise ValueError(
            f"grad_output must be a scalar with reduction={reduction!r}, got an array of shape {array.shape}; "
            "an array goes with reduction='none'"
        )
    if array.shape != row_shape:
        raise ValueError(f"grad_output must have the rows' shape {row_shape}, got {array.shape}")
    with np.errstate(over="ignore"):
        return array.astype(np.float64).reshape(-1)


def check_out(out, logits, given):
    """Raise unless `out` can take the gradient; `given` are the (name, argument) pairs it must not overlap.

    `out` may be `logits` itself: same memory, same layout. Class ids are copied first and may lie anywhere.
    """
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a numpy array, got {type(out).__name__}")
    if out.dtype.kind != "f" or out.dtype.newbyteorder("=") != logits.dtype.newbyteorder("="):
        raise TypeError(f"out must have the dtype of logits, {logits.dtype.newbyteorder('=')}, got {out.dtype}")
    if not out.dtype.isnative:
        raise TypeError(f"out must have native byte order, got {out.dtype}")
    if out.shape != logits.shape:
        raise ValueError(f"out must have the shape of logits, {logits.shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError("out must be a plain array, got a masked array")
    if overlaps_itself(out):
        raise ValueError(f"out overlaps itself: strides {out.strides} for shape {out.shape}")
    if same_memory(out, logits):
        given = [pair for pair in given if pair[0] != "logits"]
    for name, value in given:
        if isinstance(value, np.ndarray) and share_memory(out, value):
            remedy = "; pass logits itself to work in place, or a separate array" if name == "logits" else ""
            raise ValueError(f"out overlaps {name}{remedy}")


def same_memory(a, b):
    """Return whether two arrays of one shape and dtype are the same elements at the same places."""
    pairs = zip(a.shape, a.strides, b.strides, strict=True)
    return a.dtype == b.dtype and a.ctypes.data == b.ctypes.data and all(x == y for length, x, y in pairs if length > 1)


def overlaps_itself(array):
    """Return whether two elements of `array` may lie in the same place.

    Each axis, from the smallest stride up, must step over all that the axes below it reach. Layouts in which axes
    interleave without touching, which only hand-made strides produce, count as overlapping.
    """
    if array.size < 2:
        return False
    reach = array.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (length - 1)
    return False


def share_memory(a, b):
    """Return whether two arrays share an element; an undecided case counts as sharing."""
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def as_num_threads(num_threads):
    """Return None or the number of threads as an int >= 1."""
    if num_threads is None:
        return None
    value = as_integer("num_threads", "an integer >= 1 or None", num_threads)
    if value < 1:
        raise ValueError(f"num_threads must be >= 1 or None, got {value}")
    return value


# ---- probabilities ----

# The relative spacing of every dtype that probabilities and distributions may have.
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
FLOATING = "float16, bfloat16, float32 or float64"


def as_probs(probs):
    """Return `probs` as a plain array of a dtype in EPSILON, of any shape."""
    array = as_unmasked_array("probs", probs)
    if array.dtype.name not in EPSILON:
        raise TypeError(f"probs must be a {FLOATING} array, got {array.dtype}; convert with .astype(np.float32)")
    return array


def as_unmasked_array(name, value):
    """Return `value` as a base-class array; masked entries are refused in words that suit any argument."""
    if np.ma.is_masked(value):
        raise TypeError(
            f"{name} must not be a masked array with masked entries: a mask would be lost; "
            "fill them, and leave their rows out with sample_weight 0 or ignore_index"
        )
    return as_plain_array(name, value)


def as_real_array(name, value):
    """Return `value` as an array of real numbers, of any dtype that has them."""
    array = as_unmasked_array(name, value)
    if array.dtype.kind not in "iuf" and array.dtype.name not in EPSILON:
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    return array


def as_class_weight(weight, n_classes):
    """Return the weights of the classes as a float64 array (C,), or None."""
    if weight is None:
        return None
    array = as_real_array("weight", weight)
    if array.shape != (n_classes,):
        raise ValueError(f"weight must have one entry per class, shape ({n_classes},), got {array.shape}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float64)
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        raise ValueError(f"weight must be finite and >= 0, got {array[bad][0]} for class {int(bad.argmax())}")
    return array


def as_sample_weight(sample_weight, row_shape):
    """Return the weights of the rows as a flat float64 array, or None."""
    if sample_weight is None:
        return None
    array = as_real_array("sample_weight", sample_weight)
    if array.shape != row_shape:
        raise ValueError(f"sample_weight must have the rows' shape {row_shape}, got {array.shape}")
    with np.errstate(over="ignore"):
        flat = array.astype(np.float64).reshape(-1)
    check_finite("sample_weight", flat, places(row_shape, 0, np.ones(flat.shape, bool), "row"))
    return flat


def as_probs_axis(axis, shape):
    """Return the class axis of `probs` as a non-negative int."""
    if not shape:
        raise ValueError("probs must have at least one axis, the class axis; got a 0-d array")
    return about_probs(as_axis, axis, shape)


def as_probs_targets(targets, shape, axis, ignore_index):
    """Return (class ids as of :func:`as_class_ids`, None) or (None, distributions, an array of the shape of probs)."""
    array = as_unmasked_array("targets", targets)
    ignored = as_ignored(ignore_index)
    row_shape = shape[:axis] + shape[axis + 1 :]
    if array.shape == row_shape or not (array.dtype.kind == "f" or array.dtype.name in EPSILON):
        ids, _ = about_probs(as_class_ids, targets, shape, axis, ignored)
        return ids, None
    if array.shape != shape:
        raise ValueError(
            f"targets must be class ids of shape {row_shape} or distributions of the shape of probs, {shape}, "
            f"got {array.dtype} of shape {array.shape}"
        )
    if array.dtype.name not in EPSILON:
        raise TypeError(f"targets: distributions must be a {FLOATING} array, got {array.dtype}")
    if ignored.tolist() not in ([], [-100]):
        raise ValueError(
            f"ignore_index goes only with class ids, got {ignore_index!r} with distributions; "
            "leave rows out with sample_weight 0"
        )
    return None, array


def about_probs(check, *arguments):
    """Call a check that was written for logits; its messages then speak of probs."""
    try:
        return check(*arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("logits", "probs")) from None


def as_binary_targets(targets, shape):
    """Return the binary targets, bool, integer or floating, as a view that has the shape of probs."""
    array = as_unmasked_array("targets", targets)
    if array.dtype.kind not in "biu" and array.dtype.name not in EPSILON:
        raise TypeError(f"targets must be a bool, integer, {FLOATING} array, got {array.dtype}")
    return as_broadcast("targets", array, shape)


def as_binary_sample_weight(sample_weight, shape):
    """Return the weights of the entries as a view that has the shape of probs, or None."""
    if sample_weight is None:
        return None
    return as_broadcast("sample_weight", as_real_array("sample_weight", sample_weight), shape)


def as_broadcast(name, array, shape):
    """Return a view of `array` that has the shape of probs."""
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to the shape of probs, {shape}, got {array.shape}") from None


def places(shape, first, live, word):
    """Return the function that names the i-th live row of a block, whose rows are `first` and on of a batch."""

    def place(i):
        row = first + int(np.flatnonzero(live)[i])
        position = ", ".join(str(int(index)) for index in np.unravel_index(row, shape)) if shape else ""
        return f"{word} [{position}]" if shape else f"the only {word}"

    return place


def check_finite(name, values, place):
    """Raise unless all `values` (n,) are finite."""
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(f"{name} must be finite, got {values[bad][0]} in {place(bad.argmax())}")


def check_unit_interval(name, values, place, remedy):
    """Raise unless all `values` (n, m) are in [0, 1]; `remedy` is what to do about a finite one that is not."""
    if values.size == 0 or (values.min() >= 0 and values.max() <= 1):  # a nan fails both
        return
    row, column = np.argwhere(~((values >= 0) & (values <= 1)))[0]
    value = values[row, column]
    advice = f"; {remedy}" if math.isfinite(value) else ""
    raise ValueError(f"{name} must be finite and within [0, 1], got {value:.9g} in {place(row)}{advice}")


def check_sum_to_one(totals, tolerance, place):
    """Raise unless the sums (n,) of rows of probabilities are 1 within `tolerance`."""
    off = np.abs(totals - 1.0) > tolerance
    if off.any():
        raise ValueError(
            f"probs must sum to 1 within {tolerance:.2g} along the class axis, got {totals[off][0]:.9g} "
            f"in {place(off.argmax())}; divide by the sum (nothing is renormalised here), or for logits call "
            "cross_entropy"
        )


def check_distributions(q, place):
    """Raise unless all of `q` (n, m) is finite and >= 0."""
    if q.size == 0 or (q.min() >= 0 and q.max() < math.inf):
        return
    row, column = np.argwhere(~((q >= 0) & (q < math.inf)))[0]
    raise ValueError(f"targets: distributions must be finite and >= 0, got {q[row, column]:.9g} in {place(row)}")
