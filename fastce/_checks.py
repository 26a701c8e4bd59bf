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
