"""The only room that refuses input. Every function returns what it was given in the form that the rest trusts.

Errors name the argument, what was expected and what came: TypeError for a kind that cannot be right, ValueError for
shapes and values, IndexError for class ids out of range. All of them are raised before anything is written.
"""

import math
import operator
from collections.abc import Iterable

import numpy as np

from fastce._engine import BUFFER_ELEMENTS, first_outside, flat_copy, is_mass, kernels, row_blocks, sum_of_entries

INT64_MAX = np.iinfo(np.int64).max
REDUCTIONS = ("none", "mean", "sum")
DEFAULT_IGNORED = -100
DEFAULT_IGNORED_IDS = np.array([DEFAULT_IGNORED])
FLOATING = "float16, bfloat16, float32 or float64"


def as_logits(logits, name="logits"):
    """Return `logits` as a plain floating array with at least one axis."""
    array = as_floating_array(name, logits)
    if array.ndim == 0:
        raise ValueError(f"{name} must have at least one axis, the class axis; got a 0-d array")
    return array


def as_floating_array(name, value):
    """Return `value` as a plain array, of any shape, of a dtype that fastce computes with."""
    array = as_plain_array(name, value)
    if not is_floating(array.dtype):
        raise TypeError(f"{name} must be a {FLOATING} array, got {array.dtype}; convert with .astype(np.float32)")
    return array


def as_real_array(name, value, *, any_size=False):
    """Return `value` as a plain array of integers or of floats; `any_size`: also of floats longer than float64."""
    array = as_plain_array(name, value)
    if array.dtype.kind not in ("iuf" if any_size else "iu") and not is_floating(array.dtype):
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    return array


def is_floating(dtype):
    """Return whether a dtype is one of FLOATING; bfloat16 is ml_dtypes'."""
    if dtype.kind == "f":
        return dtype.itemsize in (2, 4, 8)
    return dtype.kind == "V" and dtype.name == "bfloat16"  # the name takes a microsecond


def as_plain_array(name, value):
    """Return `value` as a base-class array of our own; a masked array that hides entries is refused.

    It is a view, so its shape, strides and dtype stay as they are checked, whatever is assigned to those of the
    caller's array in the meantime, by another thread or by the `__array__` of another argument.
    """
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise TypeError(
                f"{name} must not be a masked array with masked entries: a mask would be lost; "
                "fill them (masked scores with -inf), and leave rows out with ignore_index or sample_weight 0"
            )
        value = value.data
    try:
        return np.asarray(value).view()
    except ValueError as error:
        raise ValueError(f"{name} must be an array or make one: {error}") from error


def shown(value):
    """Return `value` as text for a message: not all of them can be written, and some are very long."""
    try:
        text = repr(value)
    except Exception:  # whatever the caller's object raises; an int of thousands of digits is a ValueError
        return f"an object of type {type(value).__name__} that has no repr"
    return text if len(text) <= 300 else text[:300] + "..."


def position_of(number, shape):
    """Return, as text, the indices of the element that has this number in C order; none for a 0-d array."""
    return ", ".join(str(int(index)) for index in np.unravel_index(number, shape))


def as_integer(name, expected, value):
    """Return `value` as an int; a bool is none."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {expected}, got {shown(value)}") from None


def as_bool(name, value):
    """Return `value` as a bool; nothing else is one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def as_axis(axis, shape):
    """Return the class axis as a non-negative int; it must hold at least one class."""
    ndim = len(shape)
    index = as_integer("axis", "an integer", axis)
    if not -ndim <= index < ndim:
        raise ValueError(f"axis must be in [{-ndim}, {ndim - 1}] for logits of shape {shape}, got {shown(index)}")
    if shape[index] == 0:
        raise ValueError(f"logits must have at least one class, got 0 along axis {index} of shape {shape}")
    return index % ndim


def as_ignored(ignore_index):
    """Return the ids to ignore as an int64 array without repetitions."""
    if ignore_index is DEFAULT_IGNORED:
        return DEFAULT_IGNORED_IDS
    if ignore_index is None:
        return np.empty(0, np.int64)
    if isinstance(ignore_index, (np.ndarray, memoryview)):
        ignore_index = ignore_index.tolist()
    several = isinstance(ignore_index, Iterable) and not isinstance(ignore_index, (str, bytes, bytearray))
    ignored: list[int] = []
    for value in ignore_index if several else [ignore_index]:
        ignored.append(as_integer("ignore_index", "an integer, a sequence of integers or None", value))
        if not -INT64_MAX - 1 <= ignored[-1] <= INT64_MAX:
            raise ValueError(f"ignore_index must fit in int64, got {shown(ignored[-1])}")
    return np.array(sorted(set(ignored)), dtype=np.int64)


def as_class_ids(targets, logits_shape, axis, ignored):
    """Return (private int64 copy of the ids, flat, with ignored ones replaced by -1; number of live rows)."""
    array = as_plain_array("targets", targets)
    n_classes = logits_shape[axis]
    row_shape = logits_shape[:axis] + logits_shape[axis + 1 :]
    if is_empty_list(targets, array):
        array = array.astype(np.int64)
    check_targets_match(array, logits_shape, row_shape, axis)
    return as_indices("targets", array, row_shape, n_classes, ignored)


def is_empty_list(targets, array):
    """Return whether `targets` is the empty list, which NumPy takes for floats."""
    return array.shape == (0,) and not isinstance(targets, np.ndarray)


def as_indices(name, array, shape, n_classes, ignored):
    """Return (private int64 copy of class indices, flat, with ignored ones replaced by -1; how many are not)."""
    values = flat_copy(array, array.dtype)  # from here on nobody else can change the ids
    if values.dtype.kind == "u" and values.dtype.itemsize == 8 and values.size and values.max() > INT64_MAX:
        raise_out_of_range(name, values, shape, n_classes, ignored)
    ids = values if values.dtype == np.int64 else flat_copy(values, np.int64)
    first_bad, n_live = kernels.encode_ids(ids, n_classes, ignored)
    if first_bad >= 0:
        raise_out_of_range(name, values, shape, n_classes, ignored)
    return ids, n_live


def check_targets_match(array, logits_shape, row_shape, axis):
    """Raise unless `array` holds integers of the rows' shape; say which likely mistake was made."""
    if is_floating(array.dtype) and array.shape not in (row_shape, logits_shape):
        check_rows_shape(array, logits_shape, row_shape, axis)
    if array.dtype.kind not in "iu":
        remedy = "; convert with .astype(np.int64)" if array.dtype.kind in "fb" else ""
        raise TypeError(
            f"targets: class ids must be integers of shape {row_shape}, "
            f"got {array.dtype} of shape {array.shape}{remedy}"
        )
    check_rows_shape(array, logits_shape, row_shape, axis)


def check_rows_shape(array, logits_shape, row_shape, axis):
    """Raise unless `array` has the rows' shape; say which likely mistake was made."""
    if array.shape == row_shape:
        return
    expected = f"targets must have the shape of logits without the class axis, {row_shape}"
    if is_floating(array.dtype):
        expected += ", or as distributions that of logits"
    came = f"got shape {array.shape} with logits of shape {logits_shape} and class axis {axis}"
    hint = ""
    if array.shape == logits_shape:
        hint = "; these look like one-hot rows: pass class ids, targets.argmax(axis)"
    elif array.shape == (*row_shape, 1):
        hint = "; drop the last axis with targets[..., 0]"
    elif sorted(array.shape) in (sorted(row_shape), sorted(logits_shape)):
        hint = "; the axes look transposed"
    elif len(row_shape) == 1 and array.shape == (logits_shape[axis],):
        hint = "; the logits look transposed: pass axis=" + ("0" if axis else "-1")
    raise ValueError(f"{expected}, {came}{hint}")


def raise_out_of_range(name, values, row_shape, n_classes, ignored):
    """Raise the IndexError that names the lowest bad row, how many there are, and the likely mistake."""
    live = ~np.isin(values, ignored.astype(values.dtype)[ignored.astype(values.dtype) == ignored])
    bad = live & ((values < 0) | (values >= n_classes))
    rows = np.flatnonzero(bad)
    first = int(rows[0])
    value = int(values[first])
    of_rows = name == "targets"  # not the indices of sparse targets, of which a row has several
    what = "rows" if of_rows else "entries"
    others = "" if len(rows) == 1 else f" ({len(rows)} {what} have a class id out of range; this is the first)"
    bad_values = values[bad]
    hint = ""
    if (bad_values == n_classes).all() and values[live].min() == 1:
        hint = f"; labels seem to start at 1: pass {name} - 1"
    elif value in (-1, 255) and not of_rows:
        hint = "; fill up with any class and the value 0"
    elif value in (-1, 255):
        hint = f"; to leave such rows out pass ignore_index={value}"
    where = f"{name}[{position_of(first, row_shape)}]" if row_shape else name
    raise IndexError(
        f"{where} = {value} is out of range for {n_classes} classes (expected 0..{n_classes - 1}){others}{hint}"
    )


def check_reduction(reduction):
    """Raise unless `reduction` is one of the three words."""
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be one of {REDUCTIONS}, got {shown(reduction)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {shown(reduction)}")


def as_real(name, value):
    """Return `value` as a float, infinite if it is too large for one; anything but a real scalar is a TypeError."""
    if isinstance(value, (list, tuple, bool)):
        raise TypeError(f"{name} must be a real number, got {shown(value)}")
    if not isinstance(value, (float, int)):
        array = as_plain_array(name, value)
        if array.ndim or array.dtype.kind not in "iuf":
            raise TypeError(f"{name} must be a real number, got {shown(value)}")
        value = array
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def as_denominator(denominator, reduction):
    """Return what a mean is divided by, as a float, or None if it is not given."""
    if denominator is None:
        return None
    value = as_real("denominator", denominator)
    if reduction != "mean":
        raise ValueError(f"denominator goes only with reduction='mean', got reduction={reduction!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"denominator must be finite and > 0, got {shown(denominator)}")
    return value


def as_grad_output(grad_output, reduction, row_shape):
    """Return the factor of the gradient: a float, or a flat float64 array with one factor per row."""
    if grad_output is None:
        return 1.0
    array = as_real_array("grad_output", grad_output, any_size=True)
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
        return flat_copy(array, np.float64)


def check_out(out, logits, given, *, any_float=False, name="out"):
    """Return a plain view of `out`, of our own, or raise unless it can take the gradient.

    `given` are the (name, argument) pairs it must not overlap. `out` may be `logits` itself: same memory, same layout.
    Class ids are copied first and may lie anywhere. `any_float` lets it have another floating dtype than the logits.
    """
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name} must be a numpy array, got {type(out).__name__}")
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a plain array, got a masked array")
    place = np.ndarray.view(out, np.ndarray)
    if kernels.is_plain_gradient(place, logits):
        check_apart(place, given, name, besides_logits=True)
        return place
    dtype = logits.dtype.newbyteorder("=")
    if any_float and not is_floating(place.dtype):
        raise TypeError(f"{name} must be a {FLOATING} array, got {place.dtype}")
    if not any_float and not (is_floating(place.dtype) and place.dtype.newbyteorder("=") == dtype):
        raise TypeError(f"{name} must have the dtype of logits, {dtype}, got {place.dtype}")
    if not place.dtype.isnative:
        raise TypeError(f"{name} must have native byte order, got {place.dtype}")
    if place.shape != logits.shape:
        raise ValueError(f"{name} must have the shape of logits, {logits.shape}, got {place.shape}")
    if not place.flags.writeable:
        raise ValueError(f"{name} is read-only")
    if overlaps_itself(place):
        raise ValueError(f"{name} overlaps itself: strides {place.strides} for shape {place.shape}")
    check_apart(place, given, name, besides_logits=same_memory(place, logits))
    return place


def check_apart(out, given, name, *, besides_logits):
    """Raise if `out` shares memory with one of the arguments, logits excepted where that has been settled."""
    for other, value in given:
        if other == "logits" and besides_logits:
            continue
        if isinstance(value, np.ndarray) and share_memory(out, value):
            remedy = "; pass logits itself to work in place, or a separate array" if other == "logits" else ""
            raise ValueError(f"{name} overlaps {other}{remedy}")


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
        raise ValueError(f"num_threads must be >= 1 or None, got {shown(value)}")
    return value


# ---- reports -------------------------------------------------------------------------------------------------------


def as_count(name, value):
    """Return `value` as an int >= 1."""
    count = as_integer(name, "an integer >= 1", value)
    if count < 1:
        raise ValueError(f"{name} must be >= 1, got {shown(count)}")
    return count


def as_names(class_names):
    """Return the names of the classes, of whatever type, as strings, or None."""
    if class_names is None:
        return None
    if isinstance(class_names, (str, bytes)) or not isinstance(class_names, Iterable):
        raise TypeError(f"class_names must be a sequence of names, got {shown(class_names)}")
    return tuple(map(str, class_names))


def as_class_names(names, n_classes):
    """Return names, as `as_names` returns them, that are as many as there are classes; by default their ids."""
    if names is None:
        return tuple(map(str, range(n_classes)))
    if len(names) != n_classes:
        raise ValueError(f"class_names must name each of the {n_classes} classes, got {len(names)} names")
    return names


def check_no_negative_weight(sample_weight):
    """Raise if a weight of a row is negative: shares and frequencies would mean nothing."""
    if sample_weight is not None and (sample_weight < 0).any():
        first = int(np.argmax(sample_weight < 0))
        raise ValueError(f"sample_weight must be >= 0 here, got {sample_weight[first]} in row {first}")


def rows_shape_of(targets, n_classes):
    """Return the shape of the rows that targets of any kind are about, as far as their own shape tells."""
    if hasattr(targets, "indices"):
        return as_plain_array("targets.indices", targets.indices).shape[:-1]
    array = as_plain_array("targets", targets)
    soft = is_floating(array.dtype) and array.shape[-1:] == (n_classes,)
    return array.shape[:-1] if soft else array.shape


def check_any_mass(mass):
    """Raise unless the targets hold anything to count."""
    if not mass > 0:
        raise ValueError("targets must hold at least one row that counts, got none")


# ---- options -------------------------------------------------------------------------------------------------------


def as_number(name, value, expected, accepts):
    """Return `value` as a float that `accepts` says is fine; `expected` says in words what that is."""
    number = value if type(value) is float else as_real(name, value)
    if not accepts(number):
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")
    return number


def as_fraction(name, value):
    """Return `value` as a float in [0, 1]."""
    return as_number(name, value, "in [0, 1]", lambda number: 0 <= number <= 1)


def as_positive(name, value):
    """Return `value` as a finite float > 0."""
    return as_number(name, value, "finite and > 0", lambda number: 0 < number < math.inf)


def as_non_negative(name, value):
    """Return `value` as a finite float >= 0."""
    return as_number(name, value, "finite and >= 0", lambda number: 0 <= number < math.inf)


def as_softcap(softcap):
    """Return the cap as a float, 0.0 for None."""
    return 0.0 if softcap is None else as_positive("softcap", softcap)


def check_no_softcap(softcap):
    """Raise unless there is no cap: it has a second derivative of its own."""
    if softcap is not None:
        raise ValueError(
            f"softcap must be None for a Hessian, got {shown(softcap)}; apply the cap to the logits before the call"
        )


def as_numbers(name, value, shape, what, *, negative):
    """Return `value` as a private flat float64 array, finite, of the shape of `what`."""
    array = as_real_array(name, value)
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape of {what}, {shape}, got {array.shape}")
    numbers = flat_copy(array, np.float64)
    accepted = np.isfinite(numbers) if negative else np.isfinite(numbers) & (numbers >= 0)
    if not accepted.all():
        first = int(np.argmin(accepted))
        expected = "finite" if negative else "finite and >= 0"
        raise ValueError(f"{name} must be {expected}, got {name}[{position_of(first, shape)}] = {numbers[first]}")
    return numbers


def as_class_weight(weight, n_classes):
    """Return the class weights as a float64 array (C,), or None."""
    if weight is None:
        return None
    return as_numbers("weight", weight, (n_classes,), "the classes", negative=False)


def as_sample_weight(sample_weight, row_shape):
    """Return the weights of the rows as a flat float64 array, or None."""
    if sample_weight is None:
        return None
    return as_numbers("sample_weight", sample_weight, row_shape, "the rows", negative=True)


def as_class_mask(class_mask, logits_shape, axis):
    """Return the mask broadcast to logits' shape with the class axis last, or None.

    Whether a row has any class left is checked by check_classes_left, once it is known which rows count.
    """
    if class_mask is None:
        return None
    mask = as_plain_array("class_mask", class_mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"class_mask must be a bool array, got {mask.dtype}")
    try:
        return np.moveaxis(np.broadcast_to(mask, logits_shape), axis, -1)
    except ValueError:
        raise ValueError(
            f"class_mask must broadcast to the shape of logits, {logits_shape}, got {mask.shape}"
        ) from None


def check_classes_left(mask, live):
    """Raise unless every live row (bool array of the rows' shape, or None for all) has a class that is not masked."""
    distinct = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.strides)]
    left = np.empty(distinct.shape[:-1], np.bool_)
    for index, _, _ in row_blocks(left.shape, max(1, BUFFER_ELEMENTS // mask.shape[-1])):
        distinct[index].any(axis=-1, out=left[index])
    left = np.broadcast_to(left, mask.shape[:-1])
    bad = ~left if live is None else live & ~left
    if bad.any():
        row = position_of(np.argmax(bad), bad.shape)
        raise ValueError(
            f"class_mask hides every class of row [{row}]; leave it out with ignore_index or sample_weight 0"
        )


# ---- soft targets --------------------------------------------------------------------------------------------------


def is_distribution(targets, array, logits_shape):
    """Return whether targets are one number per class: floating, of the logits' shape."""
    return array.shape == logits_shape and is_floating(array.dtype) and not is_empty_list(targets, array)


def as_target_logits(targets, shape):
    """Return targets that are logits themselves as a plain floating array of the logits' shape."""
    array = as_logits(targets, "targets")
    if array.shape != shape:
        raise ValueError(f"targets must have the shape of logits, {shape}, got {array.shape}")
    return array


def check_distribution(array, axis, live, num_threads):
    """Raise unless every number of a distribution is finite and >= 0, rows that are not `live` excepted."""
    if is_mass(array, num_threads):
        return
    counts = np.True_ if live is None else np.expand_dims(live, axis)
    counts = np.broadcast_to(counts, array.shape)
    for index, first, _ in row_blocks(array.shape, BUFFER_ELEMENTS):
        part = array[index]
        with np.errstate(invalid="ignore"):
            bad = ~((part >= 0) & (part < np.inf)) & counts[index]
        if bad.any():
            at = int(np.argmax(bad))
            position = position_of(first + at, array.shape)
            raise ValueError(f"targets must be finite and >= 0, got targets[{position}] = {part.flat[at]}")


def check_no_ignore(ignore_index, default):
    """Raise unless `ignore_index` is the default or None: it means nothing for soft targets."""
    if ignore_index is None or (isinstance(ignore_index, int) and ignore_index == default):
        return
    raise ValueError(
        f"ignore_index goes only with class ids, got ignore_index={shown(ignore_index)} with soft targets; "
        "leave rows out with sample_weight 0"
    )


def as_sparse_targets(targets, logits_shape, axis):
    """Return (indices, values) of sparse targets: private (N, m) arrays of int64 and float64."""
    row_shape = logits_shape[:axis] + logits_shape[axis + 1 :]
    indices = as_plain_array("targets.indices", targets.indices)
    values = as_plain_array("targets.values", targets.values)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"targets.indices must be integers, got {indices.dtype}")
    if indices.ndim != len(row_shape) + 1 or indices.shape[:-1] != row_shape:
        raise ValueError(
            f"targets.indices must have the rows' shape and one axis more, {(*row_shape, 'm')}, got {indices.shape} "
            f"with logits of shape {logits_shape} and class axis {axis}"
        )
    numbers = as_numbers("targets.values", values, indices.shape, "targets.indices", negative=False)
    ids, _ = as_indices("targets.indices", indices, indices.shape, logits_shape[axis], np.empty(0, np.int64))
    n_entries = indices.shape[-1]
    shape = math.prod(row_shape), n_entries
    return ids.reshape(shape), numbers.reshape(shape)


# ---- probabilities ----------------------------------------------------------------------------------------------


def as_probs_axis(axis, shape):
    """Return the class axis of `probs` as a non-negative int."""
    if not shape:
        raise ValueError("probs must have at least one axis, the class axis; got a 0-d array")
    return about_probs(as_axis, axis, shape)


def as_probs_targets(targets, shape, axis, ignore_index):
    """Return (class ids as of :func:`as_class_ids`, None) or (None, distributions, an array of the shape of probs)."""
    array = as_plain_array("targets", targets)
    ignored = as_ignored(ignore_index)
    row_shape = shape[:axis] + shape[axis + 1 :]
    if array.shape == row_shape or not (array.dtype.kind == "f" or is_floating(array.dtype)):
        ids, _ = about_probs(as_class_ids, targets, shape, axis, ignored)
        return ids, None
    if array.shape != shape:
        raise ValueError(
            f"targets must be class ids of shape {row_shape} or distributions of the shape of probs, {shape}, "
            f"got {array.dtype} of shape {array.shape}"
        )
    if not is_floating(array.dtype):
        raise TypeError(f"targets: distributions must be a {FLOATING} array, got {array.dtype}")
    if ignored.tolist() not in ([], [-100]):
        raise ValueError(
            f"ignore_index goes only with class ids, got {shown(ignore_index)} with distributions; "
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
    array = as_plain_array("targets", targets)
    if array.dtype.kind not in "biu" and not is_floating(array.dtype):
        raise TypeError(f"targets must be a bool, integer, {FLOATING} array, got {array.dtype}")
    return as_broadcast("targets", array, shape)


def as_binary_sample_weight(sample_weight, shape):
    """Return the weights of the entries as a view that has the shape of probs, or None."""
    if sample_weight is None:
        return None
    return as_broadcast("sample_weight", as_real_array("sample_weight", sample_weight, any_size=True), shape)


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
        return f"{word} [{position_of(row, shape)}]" if shape else f"the only {word}"

    return place


def check_finite(name, values, place):
    """Raise unless all `values` (n,) are finite."""
    bad = ~np.isfinite(values)
    if bad.any():
        raise ValueError(f"{name} must be finite, got {values[bad][0]} in {place(bad.argmax())}")


def check_unit_interval(name, values, place, remedy):
    """Raise unless all `values` (n, m) are in [0, 1]; `remedy` is what to do about a finite one that is not."""
    inside = (values >= 0) & (values <= 1)  # once: another thread may write to what may be the caller's memory
    if inside.all():
        return
    row, column = np.argwhere(~inside)[0]
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
    accepted = (q >= 0) & (q < math.inf)  # once, as above
    if accepted.all():
        return
    row, column = np.argwhere(~accepted)[0]
    raise ValueError(f"targets: distributions must be finite and >= 0, got {q[row, column]:.9g} in {place(row)}")


def raise_changed(place):
    """Raise for numbers that were not in order when they were read, but are now: another thread must write to them."""
    raise ValueError(f"probs, targets or sample_weight changed while they were read, in {place}")


# ---- binary -----------------------------------------------------------------------------------------------------

LARGEST = np.finfo(np.float64).max


def as_entry_targets(targets, shape):
    """Return `targets` as an array that broadcasts to `shape`; check_entry_targets looks at their values."""
    array = as_plain_array("targets", targets)
    if array.dtype.kind not in "biu" and not is_floating(array.dtype):
        raise TypeError(f"targets must be floating, integer or bool, got {array.dtype}")
    check_broadcasts("targets", array, shape)
    return array


def check_broadcasts(name, array, shape):
    """Raise unless `array` broadcasts to `shape`, that of the logits; say which likely mistake was made."""
    try:
        np.broadcast_to(array, shape)
    except ValueError:
        hint = ""
        if array.shape == (*shape, 1):
            hint = f"; drop the last axis with {name}[..., 0]"
        elif (*array.shape, 1) == shape:
            hint = f"; add the last axis with {name}[..., np.newaxis]"
        elif len(shape) == 2 and array.shape == shape[::-1]:
            hint = "; the axes look transposed"
        elif array.size > math.prod(shape):
            hint = "; logits are not broadcast to other arguments"
        raise ValueError(
            f"{name} must broadcast to the shape of logits, {shape}, got shape {array.shape}{hint}"
        ) from None


def check_entry_targets(array, sample_weight, shape, num_threads):
    """Raise unless all `array` holds is in [0, 1], but for entries whose weight is 0."""
    if not isinstance(sample_weight, np.ndarray):
        if sample_weight == 0:
            return
        shape = array.shape
    first = first_outside(array, sample_weight, shape, 0.0, 1.0, num_threads)
    if first < 0:
        return
    where, value = entry_at("targets", array, shape, first)
    if array.dtype.kind in "iu":
        hint = "; class ids go to cross_entropy"
        if value == -1:
            hint = "; leave entries out with sample_weight 0, or pass (targets + 1) / 2 for labels -1 and 1"
        raise ValueError(f"targets must be 0 or 1, got {where} = {value}{hint}")
    raise ValueError(f"targets must be in [0, 1], got {where} = {value}")


def entry_at(name, array, shape, number):
    """Return (how to write entry `number` of `array` broadcast to `shape`, its value)."""
    position = np.unravel_index(number, shape)[len(shape) - array.ndim :]
    index = tuple(int(i) if length > 1 else 0 for i, length in zip(position, array.shape, strict=True))
    where = f"{name}[{', '.join(map(str, index))}]" if index else name
    return where, array[index]


def as_pos_weight(pos_weight, shape, num_threads):
    """Return (pos_weight as None, a float or an array that broadcasts to `shape`; whether it is of extreme size)."""
    array = as_entry_weight("pos_weight", pos_weight, shape)
    if array is None:
        return None, False
    low, high = 2.0**-30, 2.0**32
    number = as_float_if_one(array)
    if isinstance(number, float):
        if number == 0 or low <= number <= high:
            return number, False
    elif first_outside(array, array, array.shape, low, high, num_threads) < 0:
        return array, False
    check_entries("pos_weight", array, 0.0, num_threads, "finite and >= 0")
    return number, True


def as_entry_sample_weight(sample_weight, shape, num_threads):
    """Return (sample_weight as None, a float or an array that broadcasts to `shape`; its sum over all entries)."""
    n_entries = math.prod(shape)
    array = as_entry_weight("sample_weight", sample_weight, shape)
    if array is None:
        return None, float(n_entries)
    total = sum_of_entries(array, num_threads)
    if not math.isfinite(total):
        check_entries("sample_weight", array, -LARGEST, num_threads, "finite")
    return as_float_if_one(array), total * (n_entries // array.size) if n_entries else 0.0


def as_entry_weight(name, weight, shape):
    """Return `weight` as None or a real array that broadcasts to `shape`."""
    if weight is None:
        return None
    array = as_real_array(name, weight)
    check_broadcasts(name, array, shape)
    return array


def as_float_if_one(array):
    """Return an array of one number as a float, others and None as they are."""
    return float(array.reshape(())) if array is not None and array.size == 1 else array


def check_entries(name, array, low, num_threads, expected):
    """Raise unless all of `array` is finite and >= `low`."""
    first = first_outside(array, None, array.shape, low, LARGEST, num_threads)
    if first >= 0:
        where, value = entry_at(name, array, array.shape, first)
        raise ValueError(f"{name} must be {expected}, got {where} = {value}")


def as_entry_factors(grad_output, reduction, shape):
    """Return (factor of all gradients, factor of each entry's gradient or None); the array is not copied."""
    if grad_output is None:
        return 1.0, None
    array = as_real_array("grad_output", grad_output)
    if array.ndim == 0:
        return float(array), None
    if reduction != "none":
        raise ValueError(
            f"grad_output must be a scalar with reduction={reduction!r}, got an array of shape {array.shape}; "
            "an array goes with reduction='none'"
        )
    if array.shape != shape:
        raise ValueError(f"grad_output must have the shape of logits, {shape}, got {array.shape}")
    return 1.0, array
