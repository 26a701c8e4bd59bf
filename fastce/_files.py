"""Arrays in .npy, .npz and .safetensors files: opened without reading their numbers, then read part by part."""

import contextlib
import importlib
import json
import math
import mmap
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

__all__ = ["FileError", "StoredArray", "open_array", "write_whole"]


class FileError(Exception):
    """A file that cannot be used; the message names it and says what is wrong."""


@dataclass(frozen=True)
class StoredArray:
    """An array in a file, with at least one axis, of which only the shape and the dtype are known yet.

    ``read(first, stop)`` returns the part ``[first:stop]`` of its first axis. Parts are asked for in order, each once:
    compressed files cannot be read otherwise. Parts of any other file are views of it, mapped into memory: the system
    reads what is looked at, when it is looked at, and forgets it when memory is short.
    """

    label: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]

    def load(self):
        """Return the whole array."""
        return self.read(0, self.shape[0])


def open_array(place, role):
    """Open the array stored at `place`: a path, which may end in ``:name`` for a file of several arrays.

    Without a name the only array of such a file is taken, or of several the one that is called like its `role`.
    """
    path, name = split_place(place)
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        raise FileError(f"{path}: the {role} must be in a file that ends in {', '.join(OPENERS)}")
    try:
        return opener(path, name, role)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from error


def split_place(place):
    """Return (path, name or "") of ``path:name``; in the path of a file that exists a colon is only a letter."""
    if not os.path.exists(place):
        parts = place.split(":")
        for end in range(1, len(parts)):  # the first that may be a file: a name may hold colons too
            path = Path(":".join(parts[:end]))
            if path.suffix.lower() in OPENERS:
                return path, ":".join(parts[end:])
    return Path(place), ""


def open_npy(path, name, role):
    """Open a .npy file."""
    if name:
        raise FileError(f"{path} holds one array, without a name: leave out :{name}")
    with path.open("rb") as stream:
        return map_npy(stream, str(path), path.stat().st_size)


def open_npz(path, name, role):
    """Open one array of a .npz file: mapped like a .npy file, or unpacked part by part if it is compressed."""
    import zipfile  # here, because it costs a tenth of the time in which the package is imported
    import zlib

    damages = [zipfile.BadZipFile, zlib.error, EOFError]
    with contextlib.suppress(ImportError):  # not every Python has it
        damages.append(importlib.import_module("lzma").LZMAError)
    with path.open("rb") as stream:
        try:
            with zipfile.ZipFile(path) as archive:
                names = [member.removesuffix(".npy") for member in archive.namelist() if member.endswith(".npy")]
                name = choose(path, names, name, role)
                member, label = archive.getinfo(f"{name}.npy"), f"{path}:{name}"
                packed = archive.open(member)  # it may be read when the archive is closed
            with contextlib.ExitStack() as unread:
                unread.callback(packed.close)
                if member.compress_type != zipfile.ZIP_STORED:
                    array = unpack_npy(packed, label, tuple(damages))
                    unread.pop_all()
                    return array
        # The last two: encrypted, or compressed in an unknown way.
        except (*damages, OSError, RuntimeError, NotImplementedError) as error:
            raise FileError(f"{path}: no .npz file that can be read, cut short or damaged: {error}") from error
        # A member begins with 30 bytes; the last four are the lengths of its name and of what else comes first.
        stream.seek(member.header_offset + 26)
        stream.seek(int(np.fromfile(stream, "<u2", 2).sum()), os.SEEK_CUR)
        return map_npy(stream, label, stream.tell() + member.file_size)


def open_safetensors(path, name, role):
    """Open one tensor of a .safetensors file, which the library of that format has checked."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"{path}: to read it, install safetensors: pip install 'fastce[cli]'") from error
    with contextlib.suppress(ImportError):
        importlib.import_module("ml_dtypes")  # from then on NumPy knows bfloat16 by its name
    with path.open("rb") as stream:
        try:
            tensors = safe_open(path, framework="numpy")
            name = choose(path, list(tensors.keys()), name, role)
            shape = tuple(tensors.get_slice(name).get_shape())
            check_has_axes(f"{path}:{name}", shape)
            # The library refuses even an empty slice where the first axis is empty.
            dtype = (tensors.get_slice(name)[:0] if shape[0] else tensors.get_tensor(name)).dtype
        except (AttributeError, KeyError, TypeError) as error:
            raise FileError(
                f"{path}: holds numbers of a kind that NumPy lacks: {error}; for bfloat16 install ml_dtypes: "
                "pip install 'fastce[cli]'"
            ) from error
        except SafetensorError as error:
            raise FileError(f"{path}: no .safetensors file that can be read, cut short or damaged: {error}") from error
        head_length = int(np.fromfile(stream, "<u8", 1)[0])
        begin, end = json.loads(stream.read(head_length))[name]["data_offsets"]
        return map_array(stream, f"{path}:{name}", shape, dtype, "C", 8 + head_length + begin, 8 + head_length + end)


OPENERS = {".npy": open_npy, ".npz": open_npz, ".safetensors": open_safetensors}


def choose(path, names, name, role):
    """Return which of the arrays `names` is meant: `name`, or without it the only one, or the one called `role`."""
    wanted = name or (names[0] if len(names) == 1 else role)
    if wanted in names:
        return wanted
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "none"
    problem = f"no array is called {name}" if name else f"say which array holds the {role}, as in {path}:NAME"
    raise FileError(f"{path}: {problem}; its arrays: {listed}")


# ---- .npy data -----------------------------------------------------------------------------------------------------


def map_npy(stream, label, end):
    """Return the array whose .npy data begin here in an open file, and end at byte `end`."""
    shape, order, dtype = read_head(stream, label)
    return map_array(stream, label, shape, dtype, order, stream.tell(), end)


def map_array(stream, label, shape, dtype, order, begin, end):
    """Return an array that lies in bytes `begin` to `end` of an open file, mapped into memory."""
    expected = math.prod(shape) * dtype.itemsize
    if end - begin < expected or os.fstat(stream.fileno()).st_size < begin + expected:
        raise FileError(f"{label}: cut short: {dtype} of shape {shape} takes {expected:,} bytes")
    if expected == 0:
        array = np.empty(shape, dtype)
    else:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            mapped.madvise(mmap.MADV_SEQUENTIAL)
        array = np.ndarray(shape, dtype, mapped, begin, order=order)
    return StoredArray(label, shape, dtype, lambda first, stop: array[first:stop])


def unpack_npy(stream, label, damages):
    """Return the array whose .npy data come out of a stream, which raises `damages` where it is damaged."""
    shape, order, dtype = read_head(stream, label)

    def read(first, stop):
        part = np.empty((stop - first, *shape[1:]), dtype)
        fill(part, stream, label, damages)
        return part

    if order == "F":  # the numbers of one row lie apart, from the begin of the file to its end
        turned = np.empty(shape[::-1], dtype)
        fill(turned, stream, label, damages)
        return StoredArray(label, shape, dtype, lambda first, stop: turned.T[first:stop])
    return StoredArray(label, shape, dtype, read)


def read_head(stream, label):
    """Return (shape, "C" or "F", dtype) as .npy data begin with them; the stream is left at the first number."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        shape, in_fortran_order, dtype = readers[npy.read_magic(stream)](stream)
        if min(shape, default=0) < 0 or bool in map(type, shape):
            raise ValueError(shape)
        np.broadcast_to(np.empty((), dtype), shape)  # what NumPy can describe, in numbers and axes
    except (ValueError, KeyError, OverflowError) as error:
        raise FileError(f"{label}: no .npy data: empty, cut short, damaged or of another kind") from error
    if dtype.hasobject:
        raise FileError(f"{label}: holds Python objects, which are never read: they may run any code")
    check_has_axes(label, shape)
    return shape, "F" if in_fortran_order else "C", dtype


def fill(array, stream, label, damages):
    """Fill an array with the next bytes of a stream, which is closed if they cannot be had."""
    place = memoryview(array.reshape(-1).view(np.uint8))
    with contextlib.ExitStack() as unread:
        unread.callback(stream.close)
        fill_place(place, stream, label, damages)
        unread.pop_all()


def fill_place(place, stream, label, damages):
    try:
        while place:
            n_bytes = stream.readinto(place)
            if n_bytes == 0:
                raise FileError(f"{label}: cut short: {len(place):,} bytes are missing")
            place = place[n_bytes:]
    except damages as error:
        raise FileError(f"{label}: damaged: {error}") from error


def check_has_axes(label, shape):
    """Raise for a single number."""
    if not shape:
        raise FileError(f"{label} holds a single number, not an array")


# ---- results -------------------------------------------------------------------------------------------------------


def write_whole(path, data):
    """Write bytes to a file that appears, or replaces another, only once all of it is written."""
    place = Path(path).resolve()  # what a link points to is replaced, not the link
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device: nothing can take its place
            Path(path).write_bytes(data)
            return
        try:
            draft.write_bytes(data)
            if place.exists():
                draft.chmod(stat.S_IMODE(place.stat().st_mode))
            os.replace(draft, place)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from error
