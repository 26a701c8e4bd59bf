"""A report on logits that lie in files, read part by part: they may be larger than memory."""

import contextlib
import math
import sys
from pathlib import Path

import numpy as np

from fastce._checks import is_floating
from fastce._files import FileError, open_array, split_place
from fastce._problem import AXIS, IGNORE_INDEX, pose
from fastce.meter import LossMeter

__all__ = ["report_on_files"]

# Of the logits that are read at once: much beside what a part costs for each class, little beside memory.
PART_BYTES = 1 << 26


def report_on_files(
    logits, targets=None, *, weight=None, sample_weight=None, ignore_index=IGNORE_INDEX, class_names=None,
    progress=False,
):
    """Return the LossReport on arrays in files, each given by its place as `open_array` takes it.

    Without `targets` they are the array of that name in the file of the logits. `class_names` is a text file with a
    name in every line. `progress` shows a bar where standard error is a terminal and tqdm is installed.
    """
    scores = open_array(logits, "logits")
    goal = open_array(targets or beside(logits), "targets")
    if len(scores.shape) < 2:
        raise FileError(f"{scores.label}: logits have at least two axes, rows and classes; got shape {scores.shape}")
    class_weights = open_array(weight, "weight").load() if weight else None
    row_weights = open_array(sample_weight, "sample weights").load() if sample_weight else None
    names = read_lines(class_names) if class_names else None
    ids = None if goal.shape == scores.shape and is_floating(goal.dtype) else goal.load()

    meter = LossMeter(weight=class_weights, ignore_index=ignore_index, class_names=names)
    first = 0
    try:
        check_whole(scores, ids, class_weights, row_weights, ignore_index)
        for first, stop in parts_of(scores, progress):
            batch = goal.read(first, stop) if ids is None else ids[first:stop]
            batch_weights = None if row_weights is None else row_weights[first:stop]
            meter.update(scores.read(first, stop), batch, batch_weights)
    except (TypeError, ValueError, IndexError) as error:
        counted = f"rows counted from {first}; " if first else ""
        raise FileError(f"{error} [{counted}logits: {described(scores)}; targets: {described(goal)}]") from error
    return meter.compute()


def beside(logits):
    """Return the place of the targets that lie in the file of the logits."""
    path, _ = split_place(logits)
    if path.suffix.lower() == ".npy":
        raise FileError(f"{path} holds the logits alone: say which file holds the targets")
    return f"{path}:targets"


def check_whole(scores, ids, class_weights, row_weights, ignore_index):
    """Raise what is wrong with anything but the logits' numbers, in terms of the whole, before those are read."""
    stand_in = np.broadcast_to(np.zeros((), scores.dtype), scores.shape)
    if ids is None:
        ids, ignore_index = np.zeros(scores.shape[:-1], np.uint8), None
    pose(stand_in, ids, AXIS, None, weight=class_weights, sample_weight=row_weights, ignore_index=ignore_index)


def parts_of(scores, progress):
    """Yield (first, stop) along the first axis, at least once, and move the bar on after each part."""
    n_rows, row_bytes = scores.shape[0], scores.dtype.itemsize * math.prod(scores.shape[1:])
    step = max(1, PART_BYTES // max(1, row_bytes))
    with new_bar(n_rows * row_bytes, progress) as bar:
        for first in range(0, max(1, n_rows), step):
            stop = min(first + step, n_rows)
            yield first, stop
            bar.update((stop - first) * row_bytes)


def new_bar(n_bytes, progress):
    """Return tqdm's progress bar, or one that shows nothing."""
    if progress and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(total=n_bytes, unit="B", unit_scale=True, desc="reading", leave=False)
    return NoBar()


class NoBar:
    """A progress bar for where there is none."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def update(self, n_bytes):
        """Show nothing."""


def read_lines(path):
    """Return the lines of a text file."""
    try:
        return Path(path).read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: no text in UTF-8: {error}") from error


def described(stored):
    """Return where an array lies and what it is, for a message."""
    return f"{stored.label}, {stored.dtype} of shape {stored.shape}"
