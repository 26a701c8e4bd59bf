"""Picks the compiled target, chooses the number of threads, and walks the batch in blocks of rows.

Everything that arrives here has been checked (fastce._checks). Rows that lie contiguous, aligned and native in memory
are handed to the kernels where they are; others pass through a buffer of a fixed size, block by block.
"""

import importlib
import math
import os
import warnings
from itertools import product
from pathlib import Path

import numpy as np

from fastce._kernels.cpu import runnable_targets
from fastce._version import __version__

# Elements of the buffer that other layouts pass through: 1 MB of float64 at the most, an L2 cache.
BUFFER_ELEMENTS = 131072
# Elements between two returns to Python, which is where Ctrl-C is noticed: 20 ms on one thread, of the general kernels
# with every option up to 100 ms. A row costs as much as so many elements, besides its own.
SLAB_ELEMENTS = 1 << 24
GENERAL_SLAB_ELEMENTS = 1 << 22
ROW_ELEMENTS = 32
# Below this many elements one thread is as fast as two: at 32768, two threads took 1.07 (C = 10) and 0.89 (C = 1000) of
# the time of one, at 65536 0.69 and 0.75.
SERIAL_ELEMENTS = 32768
# The same as in plain.pxd: the short ways leave calls that ask for more to the checks and so to this bound.
MAX_THREADS = 256


def built_targets():
    """Return the names of the targets whose modules were built, best first."""
    kernels = Path(__file__).with_name("_kernels")
    return [name for name in ("v4", "v3", "baseline") if any(kernels.glob(f"rows_{name}.*"))]


def available_targets():
    """Return the targets that are both built and runnable on this processor, best first."""
    return [name for name in built_targets() if name in runnable_targets()]


def load_kernels():
    """Return (name, module) of the best available target, or of the one that FASTCE_TARGET names."""
    available = available_targets()
    if not available:
        raise ImportError("fastce's compiled modules are missing; install the package, see README.md")
    wanted = os.environ.get("FASTCE_TARGET") or available[0]
    if wanted not in available:
        raise ImportError(
            f"FASTCE_TARGET={wanted!r} is not available here; available targets: {', '.join(sorted(available))}"
        )
    return wanted, importlib.import_module(f"fastce._kernels.rows_{wanted}")


def load_module(name):
    """Return another kernel module of the target in use."""
    return importlib.import_module(f"fastce._kernels.{name}_{TARGET}")


TARGET, kernels = load_kernels()
soft = load_module("soft")
binary = load_module("binary")
passage = load_module("passage")
probabilities = load_module("probabilities")
divergence = load_module("divergence")


def build_info():
    """Describe the installed build and how it runs here.

    Returns
    -------
    dict
        ``version``: that of the package; ``target``: the CPU target in use; ``available_targets``: those that this
        CPU runs, best first; ``built_targets``: those that were compiled; ``openmp``: whether the build can use more
        than one thread; ``num_threads``: how many a large batch takes by default.

    Examples
    --------
    >>> import fastce
    >>> info = fastce.build_info()
    >>> info["target"] in info["available_targets"]
    True
    """
    return {
        "version": __version__,
        "target": TARGET,
        "available_targets": available_targets(),
        "built_targets": built_targets(),
        "openmp": kernels.has_openmp(),
        "num_threads": default_threads(),
    }


# ---- threads -------------------------------------------------------------------------------------------------------


def default_threads():
    """Return how many threads a large batch takes: FASTCE_NUM_THREADS, else OpenMP's limit, capped by the CPUs.

    OpenMP's limit is read at each call, so ``OMP_NUM_THREADS`` and ``threadpoolctl`` are respected. The CPUs are
    those of the affinity mask and of the cgroup quota, whichever is less.
    """
    text = os.environ.get("FASTCE_NUM_THREADS")
    if text:
        if text.isdecimal() and text.strip("0"):
            return int(text) if len(text) < 4 and int(text) < MAX_THREADS else MAX_THREADS
        warn_once(f"FASTCE_NUM_THREADS={text!r} is not a positive integer and is ignored")
    return max(1, min(kernels.openmp_limit(), usable_cpus(), MAX_THREADS))


WARNED: dict[str, object] = {}


def warn_once(message):
    """Issue a RuntimeWarning the first time that this message is heard, in whichever thread."""
    mine = object()
    if WARNED.setdefault(message, mine) is mine:  # one step, without a lock that a forked child might find held
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def usable_cpus():
    """Return the number of CPUs this process may use at once, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), CGROUP_CPUS)
    return os.cpu_count() or 1


def cgroup_cpus():
    """Return the CPU quota of this process's control groups in whole CPUs, rounded up, or a huge number."""
    least = 1 << 20
    for quota, period in cgroup_quotas():
        if quota.isdecimal() and int(quota) > 0:
            least = min(least, max(1, -(-int(quota) // int(period))))
    return least


def cgroup_quotas():
    """Yield (quota, period) as text for the control group of this process and those above it, versions 2 and 1."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, name in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", "cpu" if controllers else "")
        folder = root / name.lstrip("/")
        for place in (folder, *folder.parents):
            try:
                if controllers:
                    yield (place / "cpu.cfs_quota_us").read_text().strip(), (place / "cpu.cfs_period_us").read_text()
                else:
                    quota, period = (place / "cpu.max").read_text().split()
                    yield quota, period
            except (OSError, ValueError):
                pass
            if place == root:
                break


CGROUP_CPUS = cgroup_cpus()


def threads_for(n_elements, num_threads):
    """Return the team size for a batch: what was asked for, else 1 for a small batch and the default for others."""
    if num_threads is not None:
        return min(num_threads, MAX_THREADS)
    return 1 if n_elements < SERIAL_ELEMENTS else default_threads()


# ---- calls ---------------------------------------------------------------------------------------------------------


def cross_entropy_rows(
    logits, ids, losses, scale, out, hess, num_threads, weight=None, sample_weight=None, mask=None, options=None
):
    """Fill `losses` and, unless they are None, `out` with the gradients of all rows, each times `scale`, and `hess`.

    `logits`, `out` and `hess` (which goes with `out`) have any layout and dtype, class axis last; `ids`, `losses` and
    `sample_weight` are flat over the other axes; `weight` is that of the classes; `scale` is a float or an
    array like `losses`; `mask` is bool, broadcast to logits' shape; `options` are the kernel's keywords for numbers.
    """
    n_rows, n_classes = len(ids), logits.shape[-1]
    if n_rows == 0:
        return
    scales = scale if isinstance(scale, np.ndarray) else None
    scale = 1.0 if scales is not None else scale
    num_threads = threads_for(logits.size, num_threads)
    dtype = computing_dtype(logits.dtype)
    options = options or {}
    if hess is None and mask is None and not options and n_classes <= kernels.MAX_COLUMN_CLASSES:
        columns, grads = both_as_columns(logits, out, dtype)
        if columns is not None:
            column_rows(columns, grads, ids, losses, scale, scales, num_threads, weight, sample_weight)
            return
    # All memory that the walk needs is had before the first block is written.
    mask, common = split_mask(mask)
    walk = Walk(n_rows, n_classes, dtype, [logits, mask], [out, hess], slab_rows(n_classes, num_threads), num_threads)
    memory = np.empty(
        kernels.memory_needed(walk.step, n_classes, dtype == np.float32, out is not None, num_threads, common), "u1"
    )
    for part, (rows, shown), (grads, curves) in walk:
        kernels.cross_entropy_rows(
            rows, ids[part], losses[part], scale, part_of(scales, part), grads, memory, num_threads,
            weight, part_of(sample_weight, part), curves, mask=shown, common_mask=common, **options,
        )


def split_mask(mask):
    """Return (mask of every row, None) or (None, mask (C,) of all rows), as bytes; (None, None) for None."""
    if mask is None:
        return None, None
    mask = mask.view(np.uint8)
    if is_common(mask):
        return None, np.ascontiguousarray(mask[(0,) * (mask.ndim - 1)])
    return mask, None


def column_rows(logits, out, ids, losses, scale, scales, num_threads, weight, sample_weight):
    """Do what cross_entropy_rows does for logits (G, C, n), of which neighbouring rows lie side by side."""
    n_classes = logits.shape[1]
    memory = np.empty(kernels.column_memory_needed(n_classes, logits.itemsize, num_threads), "u1")
    for index, part in column_parts(logits.shape, slab_rows(n_classes, num_threads)):
        kernels.cross_entropy_columns(
            logits[index], ids[part], losses[part], scale, part_of(scales, part), None if out is None else out[index],
            memory, num_threads, weight, part_of(sample_weight, part),
        )


def column_parts(shape, step):
    """Yield (index, slice of the flattened rows): parts of at most `step` rows of columns (G, C, n)."""
    n_groups, _, n = shape
    for groups, columns in product(slices(n_groups, max(1, step // n)), slices(n, step)):
        part = slice(groups.start * n + columns.start, (groups.stop - 1) * n + columns.stop)
        yield (groups, slice(None), columns), part


def both_as_columns(logits, out, dtype):
    """Return logits and what they become, which may be None, as of as_columns; (None, None) unless both lie so."""
    columns = as_columns(logits, dtype)
    places = None if out is None or columns is None else as_columns(out, dtype)
    if out is not None and (places is None or places.shape != columns.shape):
        return None, None
    return columns, places


def as_columns(array, dtype):
    """Return `array`, class axis last, as (G, C, n) with a contiguous last axis of rows, or None if it is not so."""
    strides, shape = array.strides, array.shape
    if array.dtype != dtype or not array.flags.aligned or array.ndim < 2 or shape[-1] == 1:
        return None
    if strides[-2] != array.itemsize or strides[-1] < shape[-2] * array.itemsize:
        return None
    n, axis = 1, array.ndim - 2
    while axis >= 0 and (shape[axis] == 1 or strides[axis] == n * array.itemsize):
        n *= shape[axis]
        axis -= 1
    if axis > 0 or strides[-1] < n * array.itemsize:
        return None
    groups, group_stride = (shape[0], strides[0]) if axis == 0 else (1, 0)
    return np.lib.stride_tricks.as_strided(array, (groups, shape[-1], n), (group_stride, strides[-1], array.itemsize))


def soft_rows(logits, losses, out, hess, distribution, mask, per_row, constants, num_threads):
    """Fill `losses` and, unless they are None, `out` and `hess` by the general kernels.

    Arrays with a class axis have any layout and dtype, class axis last; `mask` is bool, broadcast to logits' shape.
    `per_row` are the kernel's keywords for arrays over the flattened rows (others are left out), `constants` the rest.
    """
    n_rows, n_classes = len(losses), logits.shape[-1]
    if n_rows == 0:
        return
    num_threads = threads_for(logits.size, num_threads)
    dtype = computing_dtype(logits.dtype)
    mask, common = split_mask(mask)
    if common is not None:
        constants = constants | {"mask": common[None]}
    slab = slab_rows(n_classes, num_threads, GENERAL_SLAB_ELEMENTS)
    walk = Walk(n_rows, n_classes, dtype, [logits, distribution, mask], [out, hess], slab, num_threads)
    memory = np.empty(soft.memory_needed(walk.step, n_classes, dtype.itemsize, num_threads), "u1")
    for part, (rows, targets, shown), (grads, curves) in walk:
        arrays = {name: part_of(array, part) for name, array in per_row.items()}
        if shown is not None:
            arrays["mask"] = shown
        if "statistics" in arrays:
            arrays["statistics"] = tuple(array[part] for array in per_row["statistics"])
        soft.soft_rows(
            rows, losses[part], memory, num_threads, distribution=targets, out=grads, hess=curves,
            out_bytes=walk.out_bytes, **arrays, **constants,
        )


def is_mass(array, num_threads):
    """Return whether all numbers of an array, of any layout, are finite and >= 0."""
    if array.flags.c_contiguous and array.flags.aligned and array.dtype in (np.float32, np.float64):
        num_threads = threads_for(array.size, num_threads)
        numbers = array.reshape(-1)
        return all(soft.is_mass(numbers[part], num_threads) for part in slices(array.size, SLAB_ELEMENTS))
    with np.errstate(invalid="ignore"):
        return all(part.min() >= 0 and part.max() < np.inf for part in parts_of(array))


def newton_terms(slopes, factor, row_weights, num_threads):
    """Return float32 (w g, factor w |g| (1 - |g|)), (n, K) in Fortran order, for slopes g; w (n,) may be None."""
    grad, hess = np.empty_like(slopes, np.float32), np.empty_like(slopes, np.float32)
    num_threads = threads_for(slopes.size, num_threads)
    soft.newton_terms(slopes.T, row_weights, factor, grad.T, hess.T, num_threads)
    return grad, hess


def parts_of(array, limit=BUFFER_ELEMENTS):
    """Yield views that together are `array`, of at most `limit` elements where that can be had along the first axes."""
    if array.size <= limit or array.ndim == 0:
        if array.size:
            yield array
        return
    step = max(1, limit * len(array) // array.size)
    if step > 1:
        for start in range(0, len(array), step):
            yield array[start : start + step]
        return
    for part in array:
        yield from parts_of(part, limit)


def softmax_rows(logits, out, num_threads):
    """Fill `out` with softmax; both have any layout, class axis last."""
    n_rows, n_classes = logits.size // logits.shape[-1], logits.shape[-1]
    if n_rows == 0:
        return
    num_threads = threads_for(logits.size, num_threads)
    dtype = computing_dtype(logits.dtype)
    slab = slab_rows(n_classes, num_threads)
    if n_classes <= kernels.MAX_STRIDED_CLASSES:
        columns, places = both_as_columns(logits, out, dtype)
        if columns is not None:
            memory = np.empty(kernels.strided_memory_needed(n_rows, n_classes, dtype == np.float32, num_threads), "u1")
            for index, _ in column_parts(columns.shape, slab):
                kernels.softmax_columns(columns[index], places[index], memory, num_threads)
            return
    walk = Walk(n_rows, n_classes, dtype, [logits], [out], slab, num_threads)
    memory = np.empty(kernels.memory_needed(walk.step, n_classes, dtype == np.float32, True, num_threads), "u1")
    step = min(n_rows, walk.step)
    ids, losses = np.zeros(step, np.int64), np.empty(step)
    for _, (rows,), (values,) in walk:
        kernels.softmax_rows(rows, ids[: len(rows)], losses, values, memory, num_threads)


def log_softmax_rows(logits, out, lse, num_threads):
    """Fill, unless they are None, `out` with log_softmax and `lse` (flat float64) with logsumexp."""
    n_rows, n_classes = logits.size // logits.shape[-1], logits.shape[-1]
    if n_rows == 0:
        return
    num_threads = threads_for(logits.size, num_threads)
    dtype = computing_dtype(logits.dtype)
    slab = slab_rows(n_classes, num_threads, GENERAL_SLAB_ELEMENTS)
    if n_classes <= soft.MAX_STRIDED_CLASSES:
        columns, places = both_as_columns(logits, out, dtype)
        if columns is not None:
            memory = np.empty(soft.strided_memory_needed(n_rows, n_classes, dtype.itemsize, num_threads), "u1")
            for index, part in column_parts(columns.shape, slab):
                values = None if places is None else places[index]
                soft.log_softmax_columns(columns[index], values, part_of(lse, part), memory, num_threads)
            return
    walk = Walk(n_rows, n_classes, dtype, [logits], [out], slab, num_threads)
    memory = np.empty(soft.memory_needed(walk.step, n_classes, dtype.itemsize, num_threads), "u1")
    for part, (rows,), (values,) in walk:
        soft.log_softmax_rows(rows, values, part_of(lse, part), walk.out_bytes, memory, num_threads)


def probability_rows(probs, ids, distributions, weight, sample_weight, tolerance, losses, factors, num_threads):
    """Fill `losses` and `factors` (N,) float64; return the number of the first row that is not in order, or -1.

    The sum of the factors is what a mean divides by; they may be None.

    `probs` and `distributions` have any layout and dtype, class axis last; `ids` (N,) or they are None, and so may be
    `weight` (C,) and `sample_weight` (N,).
    """
    n_rows, n_classes = len(losses), probs.shape[-1]
    if n_rows == 0:
        return -1
    num_threads = threads_for(probs.size, num_threads)
    dtype = computing_dtype(probs.dtype)
    if distributions is not None:  # read in the same dtype: float64 holds the numbers of any other
        dtype = np.promote_types(dtype, computing_dtype(distributions.dtype))
    slab = slab_rows(n_classes, num_threads, GENERAL_SLAB_ELEMENTS)
    walk = Walk(n_rows, n_classes, dtype, [probs, distributions], [None], slab, num_threads)
    memory = np.empty(probabilities.memory_needed(walk.step, n_classes, num_threads), "u1")
    for part, (rows, mass), _ in walk:
        bad = probabilities.rows_of_probabilities(
            rows, losses[part], memory, tolerance, num_threads, ids=part_of(ids, part), distributions=mass,
            weight=weight, sample_weight=part_of(sample_weight, part), factors=part_of(factors, part),
        )
        if bad >= 0:
            return part.start + bad
    return -1


def divergence_rows(logits, targets, from_logits, losses, sample_weight, scale, out, num_threads):
    """Fill `losses` and, unless it is None, `out` with the gradients, times `scale`, of divergences from a teacher.

    `logits`, `targets` and `out` have any layout and dtype, class axis last; `losses` and `sample_weight` are flat over
    the other axes; `scale` is a float or an array like `losses`.
    """
    n_rows, n_classes = len(losses), logits.shape[-1]
    if n_rows == 0:
        return
    num_threads = threads_for(logits.size, num_threads)
    dtype = computing_dtype(logits.dtype)
    dtypes = dtype, computing_dtype(targets.dtype), dtype
    slab = slab_rows(n_classes, num_threads, GENERAL_SLAB_ELEMENTS)
    walk = Walk(n_rows, n_classes, dtype, [logits, targets], [out], slab, num_threads, dtypes)
    memory = np.empty(divergence.memory_needed(walk.step, n_classes, num_threads), "u1")
    scales = scale if isinstance(scale, np.ndarray) else None
    scale = 1.0 if scales is not None else scale
    for part, (rows, others), (grads,) in walk:
        divergence.divergence_rows(
            rows, others, from_logits, losses[part], part_of(sample_weight, part), scale, part_of(scales, part), grads,
            memory, num_threads,
        )


def computing_dtype(dtype):
    """Return the native dtype that computes for `dtype`: float32 for the half types, float64 for longer floats."""
    return np.dtype(np.float64 if dtype.itemsize >= 8 else np.float32)


def is_common(mask):
    """Return whether a broadcast mask is the same for all rows."""
    return all(stride == 0 or length == 1 for stride, length in zip(mask.strides[:-1], mask.shape[:-1], strict=True))


def part_of(array, part):
    return array[part] if isinstance(array, np.ndarray) else None


def slab_rows(n_classes, num_threads, elements=SLAB_ELEMENTS):
    """Return how many rows are handed to the kernels at a time: at least one for each thread."""
    return max(num_threads, elements // (n_classes + ROW_ELEMENTS))


def slices(n, step):
    """Yield the slices of `n` elements by `step`."""
    for first in range(0, n, step):
        yield slice(first, min(first + step, n))


def flat_copy(array, dtype):
    """Return the elements of an array in C order as a private array of this dtype."""
    if array.size <= BUFFER_ELEMENTS:
        return array.astype(dtype).reshape(-1)
    numbers = np.empty(array.shape, dtype)
    copy_in_blocks(numbers, array)
    return numbers.reshape(-1)


def copy_in_blocks(place, source):
    """Copy a number or an array of the same shape, of any layout and dtype; between the blocks Ctrl-C is noticed."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for index, _, _ in row_blocks(place.shape, SLAB_ELEMENTS):
            np.copyto(place[index], source[index] if isinstance(source, np.ndarray) else source, casting="unsafe")


def round_numbers(numbers, place):
    """Copy flat float64 `numbers` to a contiguous array of any float dtype, taking no memory: results stand already."""
    with np.errstate(over="ignore", under="ignore"):
        for first in range(0, len(numbers), SLAB_ELEMENTS):
            part = slice(first, first + SLAB_ELEMENTS)
            np.copyto(place.reshape(-1)[part], numbers[part], casting="same_kind")


class Walk:
    """The way through a batch in blocks: yields (slice of the flattened rows, input blocks, output blocks).

    Inputs and outputs have any layout and dtype, class axis last, or are None. Those that kernels can use stay where
    they are, `slab` rows at a time; the others pass through buffers of a fixed size, had when the walk is made. Kernels
    read and write `dtype`, or of each array its own of `dtypes`.
    """

    def __init__(self, n_rows, n_classes, dtype, inputs, outputs, slab, num_threads, dtypes=None):
        self.n_rows = n_rows
        self.arrays = [*inputs, *outputs]
        self.n_inputs = len(inputs)
        dtypes = dtypes or [dtype] * len(self.arrays)
        self.rows = [as_rows(a) if can_lie(a, d) else None for a, d in zip(self.arrays, dtypes, strict=True)]
        through = [i for i, array in enumerate(self.arrays) if array is not None and self.rows[i] is None]
        self.where_they_lie = not through
        # The size of the first output, 0 unless it stays where it is: kernels see a part of it.
        self.out_bytes = 0 if self.rows[len(inputs)] is None else outputs[0].nbytes
        self.step = min(n_rows, slab if self.where_they_lie else max(1, BUFFER_ELEMENTS // n_classes))
        self.buffers: list[np.ndarray | None] = [None] * len(self.arrays)
        for i in through:
            kind = np.uint8 if self.arrays[i].dtype == np.uint8 else dtypes[i]
            self.buffers[i] = np.empty((self.step, n_classes), kind)
        self.num_threads = num_threads
        # Kernels may write the first output over the logits, so one buffer serves both.
        if self.buffers[0] is not None and self.buffers[self.n_inputs] is not None:
            self.buffers[self.n_inputs] = self.buffers[0]
        passages = [(i, self.arrays[i], bits_of_bfloat(self.arrays[i])) for i in through]
        self.loads = [one for one in passages if one[0] < self.n_inputs]
        self.stores = passages[len(self.loads) :]

    def __iter__(self):
        if self.where_they_lie:
            for first in range(0, self.n_rows, self.step):
                part = slice(first, first + self.step)
                blocks = [part_of(rows, part) for rows in self.rows]
                yield part, blocks[: self.n_inputs], blocks[self.n_inputs :]
            return
        for index, first, stop in row_blocks(self.arrays[0].shape[:-1], self.step):
            part = slice(first, stop)
            blocks = [
                part_of(rows, part) if buffer is None else buffer[: stop - first]
                for rows, buffer in zip(self.rows, self.buffers, strict=True)
            ]
            for i, array, bits in self.loads:
                if not passage.load(bits[index], blocks[i], bits is not array, self.num_threads):
                    source = array[index]
                    copy_quietly(blocks[i].reshape(source.shape), source)
            yield part, blocks[: self.n_inputs], blocks[self.n_inputs :]
            for i, array, bits in self.stores:
                if not passage.store(blocks[i], bits[index], bits is not array, self.num_threads):
                    place = array[index]
                    copy_quietly(place, blocks[i].reshape(place.shape))


def bits_of_bfloat(array):
    """Return `array`, or the bits of one of ml_dtypes' native bfloat16, whose number only Python can tell."""
    dtype = array.dtype
    return array.view(np.uint16) if dtype.itemsize == 2 and dtype.kind != "f" and dtype.isnative else array


def copy_quietly(place, source):
    """Copy an array of another layout and dtype, as NumPy rounds it."""
    with np.errstate(all="ignore"):
        np.copyto(place, source, casting="unsafe")


def can_lie(array, dtype):
    """Return whether kernels that compute in `dtype` read or write this array as it is, if its layout allows."""
    return isinstance(array, np.ndarray) and (array.dtype == dtype or array.dtype == np.uint8)


def as_rows(array):
    """Return `array` as (N, C) rows that a kernel can use where they lie, or None if it cannot."""
    flags = array.flags
    if not (flags.aligned and array.dtype.isnative):
        return None
    if flags.c_contiguous:
        return array.reshape(-1, array.shape[-1])
    if array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        return None
    row_stride = 0
    n_rows = 1
    for length, stride in zip(array.shape[-2::-1], array.strides[-2::-1], strict=True):
        if length != 1:
            if n_rows == 1:
                row_stride = stride
            elif stride != row_stride * n_rows:
                return None
        n_rows *= length
    return np.lib.stride_tricks.as_strided(array, (n_rows, array.shape[-1]), (row_stride, array.itemsize))


def row_blocks(row_shape, limit):
    """Yield (index, first, stop): blocks of at most `limit` rows of the shape `row_shape`, in C order.

    ``array[index]`` holds the rows that are numbered first to stop.
    """
    n_rows = math.prod(row_shape)
    if n_rows <= limit:
        if n_rows:
            yield (...,), 0, n_rows
        return
    below = n_rows // row_shape[0]
    if below <= limit:
        step = limit // below
        for start in range(0, row_shape[0], step):
            stop = min(start + step, row_shape[0])
            yield (slice(start, stop), ...), start * below, stop * below
        return
    for i in range(row_shape[0]):
        for index, first, stop in row_blocks(row_shape[1:], limit):
            yield (i, *index), i * below + first, i * below + stop


# ---- entries -------------------------------------------------------------------------------------------------------

# Entries whose losses are summed by themselves, BLOCK in binary.pyx; buffers and slabs hold a whole number of them.
SUM_BLOCK = 512


def plain_binary(logits, targets, out, with_grad):
    """Return (mean loss, gradient or None) of a call without options on plain arrays, or None if it is not one."""
    return binary.plain_binary(logits, targets, out, with_grad, SERIAL_ELEMENTS, default_threads)


def binary_entries(
    logits, targets, pos_weight, sample_weight, grad_output, smoothing, scale, loss_scale, wide, losses, out,
    num_threads,
):
    """Return (sum of the losses, whether all targets are in [0, 1]); fill, unless they are None, `losses` and `out`.

    `logits` and `out` have any layout and dtype; the next four are a number, None or an array of any layout that
    broadcasts to the logits' shape; `losses` is a new array; `out` gets the gradient times `scale`, `loss_scale` times
    what the gradient alone is multiplied by; `wide` has float32 computed in float64.
    """
    shape, n_entries = logits.shape, logits.size
    dtype = computing_dtype(logits.dtype)
    read = [
        Entries(logits, shape, dtype),
        entries_of(targets, shape, integers=True),
        *(entries_of(value, shape) for value in (pos_weight, sample_weight, grad_output)),
    ]
    gradient = None if out is None else Entries(out, shape, dtype)
    step = give_buffers([*read, gradient], n_entries)
    sums = np.empty(-(-n_entries // SUM_BLOCK))
    num_threads = threads_for(n_entries, num_threads)
    inside = True
    for first in range(0, n_entries, step):
        stop = min(first + step, n_entries)
        inside &= binary.binary_entries(
            *(filled_part(argument, first, stop) for argument in read), smoothing, scale, loss_scale, wide,
            None if losses is None else losses.reshape(-1)[first:stop], sums[first // SUM_BLOCK :],
            None if gradient is None else gradient.part(first, stop), num_threads,
        )  # fmt: skip
        if gradient is not None:
            gradient.store(first, stop)
    return binary.sum_of_blocks(sums), inside


def binary_probabilities(probs, targets, sample_weight, losses, num_threads):
    """Return (sum of the losses, sum of the weights, whether all entries are in order); fill `losses` unless None.

    `probs` have any layout and dtype; `targets` and `sample_weight`, which may be None, are real arrays of any layout
    that broadcast to their shape; `losses` is a new array.
    """
    shape, n_entries = probs.shape, probs.size
    read = [
        Entries(probs, shape, computing_dtype(probs.dtype)),
        entries_of(targets, shape, integers=True),
        entries_of(sample_weight, shape),
    ]
    step = give_buffers(read, n_entries, BUFFER_ELEMENTS // 4)  # as three of them may be wanted
    sums = np.empty(-(-n_entries // SUM_BLOCK))
    weights = None if sample_weight is None else np.empty(len(sums))
    num_threads = threads_for(n_entries, num_threads)
    for first in range(0, n_entries, step):
        stop = min(first + step, n_entries)
        with np.errstate(all="ignore"):
            parts = [filled_part(argument, first, stop) for argument in read]
        in_order = binary.binary_probabilities(
            *parts, None if losses is None else losses.reshape(-1)[first:stop], sums[first // SUM_BLOCK :],
            None if weights is None else weights[first // SUM_BLOCK :], num_threads,
        )  # fmt: skip
        if not in_order:
            return math.nan, math.nan, False
    return binary.sum_of_blocks(sums), float(n_entries) if weights is None else binary.sum_of_blocks(weights), True


def first_outside(values, sample_weight, shape, low, high, num_threads):
    """Return the number, in C order, of the first entry with value outside [low, high] and weight not 0, or -1.

    Both arguments are numbers, None or arrays that broadcast to `shape`.
    """
    arguments = [entries_of(values, shape, integers=high == 1), entries_of(sample_weight, shape)]
    n_entries = math.prod(shape)
    step = give_buffers(arguments, n_entries)
    num_threads = threads_for(n_entries, num_threads)
    for first in range(0, n_entries, step):
        stop = min(first + step, n_entries)
        parts = [filled_part(argument, first, stop) for argument in arguments]
        at = binary.first_outside(*parts, stop - first, low, high, num_threads)
        if at >= 0:
            return first + at
    return -1


def sum_of_entries(array, num_threads):
    """Return the sum of a real array of any layout in float64; its bits depend on values and shape alone."""
    entries = entries_of(array, array.shape)
    step = give_buffers([entries], array.size)
    sums = np.empty(-(-array.size // SUM_BLOCK))
    num_threads = threads_for(array.size, num_threads)
    for first in range(0, array.size, step):
        part = filled_part(entries, first, min(first + step, array.size))
        binary.sum_in_blocks(part, sums[first // SUM_BLOCK :], num_threads)
    return binary.sum_of_blocks(sums)


class Entries:
    """An array as numbers in a row, in C order: where they lie, or part by part through a buffer."""

    def __init__(self, array, shape, dtype):
        self.array = array if array.shape == shape else np.broadcast_to(array, shape)
        self.dtype = dtype
        flags = self.array.flags
        self.lies = flags.c_contiguous and flags.aligned and array.dtype == dtype
        # What lies elsewhere is given a buffer by give_buffers.
        self.memory = self.array.view(np.ndarray).reshape(-1) if self.lies else np.empty(0, dtype)

    def part(self, first, stop):
        """Return entries `first` to `stop`, or the place in the buffer for them."""
        return self.memory[first:stop] if self.lies else self.memory[: stop - first]

    def load(self, first, stop):
        """Bring entries into the buffer."""
        for box, place in self.boxes(first, stop):
            np.copyto(place, box, casting="unsafe")

    def store(self, first, stop):
        """Bring entries from the buffer to where they belong, rounded to the array's dtype."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for box, place in self.boxes(first, stop):
                np.copyto(box, place, casting="unsafe")

    def boxes(self, first, stop):
        """Yield (view of the array, view of the buffer) pairs that cover the entries, unless they lie in a row."""
        if not self.lies:
            for index, start, end in boxes(self.array.shape, first, stop):
                box = self.array[index]
                yield box, self.memory[start - first : end - first].reshape(box.shape)


def entries_of(value, shape, *, integers=False):
    """Return an array as Entries of a dtype that the kernels read, exactly; a number or None as it is.

    `integers` are read as such only where all but 0 and 1 is refused.
    """
    if not isinstance(value, np.ndarray):
        return value
    dtype = value.dtype.newbyteorder("=")
    if dtype.kind in "biu":
        dtype = dtype if integers else np.dtype(np.float64)
    elif dtype.itemsize not in (4, 8):
        dtype = computing_dtype(dtype)
    return Entries(value, shape, dtype)


def give_buffers(arguments, n_entries, buffer_elements=BUFFER_ELEMENTS):
    """Give a buffer to each argument that does not lie as the kernels want it; return the entries of a step."""
    walking = [entries for entries in arguments if isinstance(entries, Entries) and not entries.lies]
    step = buffer_elements if walking else SLAB_ELEMENTS
    for entries in walking:
        entries.memory = np.empty(min(step, n_entries), entries.dtype)
    return step


def filled_part(argument, first, stop):
    """Return a part of Entries that holds their numbers; a number or None is the same for every part."""
    if not isinstance(argument, Entries):
        return argument
    argument.load(first, stop)
    return argument.part(first, stop)


def boxes(shape, first, stop):
    """Yield (index, start, end): boxes of an array that together hold the entries `first` to `stop` of its C order.

    ``array[index]`` holds those from `start` to `end`.
    """
    if not shape:
        yield (...,), first, stop
        return
    below = math.prod(shape[1:])
    while first < stop:
        i, offset = divmod(first, below)
        whole = 0 if offset else (stop - first) // below
        if whole:
            end = first + whole * below
            yield (slice(i, i + whole), ...), first, end
        else:
            end = min(stop, (i + 1) * below)
            for index, start, part_end in boxes(shape[1:], offset, end - i * below):
                yield (i, *index), start + i * below, part_end + i * below
        first = end
