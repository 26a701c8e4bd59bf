"""Picks the compiled target, chooses the number of threads, and walks the batch in blocks of rows.

Everything that arrives here has been checked (fastce._checks). Rows that lie contiguous, aligned and native in memory
are handed to the kernels where they are; others pass through a buffer of a fixed size, block by block.
"""

import importlib
import os
import warnings
from pathlib import Path

import numpy as np

from fastce._kernels.cpu import runnable_targets
from fastce._version import __version__

# Elements of the buffer that other layouts pass through: 1 MB of float64 at the most, an L2 cache.
BUFFER_ELEMENTS = 131072
# Elements between two returns to Python, which is where Ctrl-C is noticed: about 30 ms on one thread.
SLAB_ELEMENTS = 1 << 26
# Below this many elements one thread is as fast as two: at 32768, two threads took 1.07 (C = 10) and 0.89 (C = 1000) of
# the time of one, at 65536 0.69 and 0.75.
SERIAL_ELEMENTS = 32768
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


TARGET, kernels = load_kernels()


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


WARNED: set[str] = set()


def warn_once(message):
    """Issue a RuntimeWarning the first time that this message is heard."""
    if message not in WARNED:
        WARNED.add(message)
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


def plain_cross_entropy(logits, targets, out, with_grad):
    """Return (mean loss, gradient or None) of a call without options on plain arrays, or None if it is not one."""
    return kernels.plain_cross_entropy(logits, targets, out, with_grad, SERIAL_ELEMENTS, default_threads)


def cross_entropy_rows(logits, ids, losses, scale, out, num_threads):
    """Fill `losses` and, unless it is None, `out` with the gradients of all rows, each times `scale`.

    `logits` and `out` have any layout, class axis last; `ids` and `losses` are flat over the other axes; `scale` is a
    float or an array like `losses`.
    """
    n_rows, n_classes = len(ids), logits.shape[-1]
    if n_rows == 0:
        return
    scales = scale if isinstance(scale, np.ndarray) else None
    scale = 1.0 if scales is not None else scale
    num_threads = threads_for(logits.size, num_threads)
    dtype = logits.dtype.newbyteorder("=")
    rows, grads = as_rows(logits), None if out is None else as_rows(out)
    where_they_lie = rows is not None and (out is None or grads is not None)
    step = min(n_rows, max(1, (SLAB_ELEMENTS if where_they_lie else BUFFER_ELEMENTS) // n_classes))
    # All memory that the walk needs is had before the first block is written.
    buffer = None if where_they_lie else np.empty((step, n_classes), dtype)
    memory = np.empty(kernels.memory_needed(step, n_classes, dtype == np.float32, out is not None, num_threads), "u1")

    def run(first, stop, rows, grads):
        part = slice(first, stop)
        part_scales = None if scales is None else scales[part]
        kernels.cross_entropy_rows(rows, ids[part], losses[part], scale, part_scales, grads, memory, num_threads)

    if buffer is None:
        for first in range(0, n_rows, step):
            part = slice(first, first + step)
            run(first, first + step, rows[part], None if grads is None else grads[part])
        return
    for index, first, stop in row_blocks(logits.shape[:-1], step):
        block = buffer[: stop - first]
        shaped = block.reshape(logits[index].shape)
        np.copyto(shaped, logits[index])
        run(first, stop, block, None if out is None else block)
        if out is not None:
            np.copyto(out[index], shaped)


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
    n_rows = int(np.prod(row_shape, dtype=np.int64))
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
