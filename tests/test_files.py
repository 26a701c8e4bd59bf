"""Arrays come out of files as they went in, part by part; files that are not whole are refused in words that help."""

import io
import os
import zipfile

import numpy as np
import pytest
from numpy.lib import format as npy

from fastce._files import FileError, open_array, write_whole


def save_npy(path, array):
    np.save(path, array)
    return str(path)


def save_npy_2(path, array):
    with path.open("wb") as stream:
        npy.write_array(stream, array, version=(2, 0))
    return str(path)


def save_npz(path, array):
    np.savez(path, other=np.arange(3), scores=array)
    return f"{path}:scores"


def save_npz_packed(path, array):
    np.savez_compressed(path, other=np.arange(3), scores=array)
    return f"{path}:scores"


def save_npz_alone(path, array):
    np.savez_compressed(path, array)
    return str(path)


def save_safetensors(path, array):
    pytest.importorskip("safetensors.numpy").save_file({"other": np.arange(3), "scores": array}, path)
    return f"{path}:scores"


SAVERS = {
    ".npy": (save_npy, save_npy_2),
    ".npz": (save_npz, save_npz_packed, save_npz_alone),
    ".safetensors": (save_safetensors,),
}
CASES = [(suffix, saver) for suffix, savers in SAVERS.items() for saver in savers]


@pytest.fixture
def scores(rng):
    return rng.standard_normal((41, 7), dtype=np.float32)


def parts_of(stored, size):
    return [stored.read(first, min(first + size, stored.shape[0])) for first in range(0, stored.shape[0], size)]


@pytest.mark.parametrize(("suffix", "save"), CASES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize(
    ("shape", "dtype"), [((41, 7), "<f4"), ((41,), "<i8"), ((5, 3, 4), "<f2"), ((0, 7), "<f8"), ((9, 0), "<u1")]
)
def test_parts_of_a_file_make_the_array(suffix, save, dtype, shape, rng, tmp_path):
    array = (100 * rng.random(shape)).astype(dtype)
    stored = open_array(save(tmp_path / f"saved{suffix}", array), "logits")
    assert (stored.shape, stored.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(np.concatenate([array[:0], *parts_of(stored, 6)]), array)
    np.testing.assert_array_equal(open_array(save(tmp_path / f"again{suffix}", array), "logits").load(), array)


@pytest.mark.parametrize("save", [save_npy, save_npz, save_npz_packed], ids=lambda save: save.__name__)
@pytest.mark.parametrize("change", [np.asfortranarray, lambda array: array.astype(">f4")], ids=["columns", "big"])
def test_orders_of_memory_and_bytes_are_kept(save, change, scores, tmp_path):
    array = change(scores)
    stored = open_array(save(tmp_path / f"saved{'.npy' if save is save_npy else '.npz'}", array), "logits")
    assert stored.dtype == array.dtype
    np.testing.assert_array_equal(np.concatenate(parts_of(stored, 6)), scores)


def test_bfloat16_comes_out_of_safetensors(scores, tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = scores.astype(ml_dtypes.bfloat16)
    stored = open_array(save_safetensors(tmp_path / "saved.safetensors", array), "logits")
    assert stored.dtype == array.dtype
    np.testing.assert_array_equal(stored.load().astype(np.float32), array.astype(np.float32))


def test_the_command_line_reads_bfloat16(scores, tmp_path, run_python):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    stored = save_safetensors(tmp_path / "logits.safetensors", scores.astype(ml_dtypes.bfloat16))
    np.save(tmp_path / "targets.npy", np.zeros(len(scores), np.int64))
    arguments = "-m", "fastce", "report", stored, str(tmp_path / "targets.npy")
    assert "loss" in run_python(*arguments).stdout
    without = "import sys; sys.modules['ml_dtypes'] = None; from fastce.__main__ import main; sys.exit(main())"
    done = run_python("-c", without, *arguments[2:], check=False)
    assert done.returncode == 1 and "for bfloat16 install ml_dtypes" in done.stderr


@pytest.mark.parametrize(
    ("suffix", "save"), [(".npy", save_npy), (".npz", save_npz), (".safetensors", save_safetensors)],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_what_is_not_compressed_is_mapped(suffix, save, scores, tmp_path):
    stored = open_array(save(tmp_path / f"saved{suffix}", scores), "logits")
    first, again = stored.read(0, 41), stored.read(0, 41)
    assert np.shares_memory(first, again)
    assert not first.flags.writeable


def test_a_file_larger_than_memory_is_opened(tmp_path):
    path, rows = tmp_path / "huge.npy", 10**9  # 400 GB, of which only the head and the last row are on the disk
    with path.open("wb") as stream:
        npy.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (rows, 100)})
        try:
            stream.truncate(stream.tell() + rows * 400)
        except OSError:
            pytest.skip("this file system has no files of that size")
        stream.seek(-400, os.SEEK_END)
        stream.write(np.arange(100, dtype="<f4").tobytes())
    stored = open_array(str(path), "logits")
    assert not stored.read(10**8, 10**8 + 1).any()
    np.testing.assert_array_equal(stored.read(rows - 1, rows), [np.arange(100)])


# ---- which array ---------------------------------------------------------------------------------------------------


def test_an_array_is_found_by_its_name_its_role_or_because_it_is_alone(tmp_path):
    path = tmp_path / "run.npz"
    np.savez(path, logits=np.zeros((2, 3)), targets=np.ones(2), a=np.arange(4))
    assert open_array(str(path), "logits").shape == (2, 3)
    assert open_array(str(path), "targets").shape == (2,)
    assert open_array(f"{path}:a", "targets").shape == (4,)
    with pytest.raises(FileError, match=r"run\.npz: no array is called b; its arrays: logits, targets, a"):
        open_array(f"{path}:b", "targets")
    with pytest.raises(FileError, match=r"say which array holds the weight, as in .*run\.npz:NAME"):
        open_array(str(path), "weight")


def test_the_name_of_an_array_may_hold_colons(tmp_path):
    np.savez(tmp_path / "run.npz", **{"dense:0": np.arange(3), "dense:1": np.arange(4)})
    assert open_array(f"{tmp_path / 'run.npz'}:dense:1", "logits").shape == (4,)


def test_a_path_may_hold_colons(tmp_path):
    path = tmp_path / "12:30.npy"
    np.save(path, np.arange(5))
    np.testing.assert_array_equal(open_array(str(path), "targets").load(), np.arange(5))


# ---- files that cannot be used -------------------------------------------------------------------------------------


def npy_bytes(array=None, **options):
    stream = io.BytesIO()
    npy.write_array(stream, np.arange(500.0) if array is None else array, **options)
    return stream.getvalue()


def npy_with_head(descr, shape, numbers=b""):
    stream = io.BytesIO()
    npy.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + numbers


def npz_bytes(member=None, name="a.npy", compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr(name, npy_bytes() if member is None else member)
    return stream.getvalue()


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def safetensors_bytes(**tensors):
    return pytest.importorskip("safetensors.numpy").save(tensors or {"a": np.arange(500.0)})


BAD_FILES = {
    "empty": (".npy", lambda: b"", "no .npy data"),
    "text": (".npy", lambda: b"1,2\n3,4\n", "no .npy data"),
    "head cut short": (".npy", lambda: npy_bytes()[:40], "no .npy data"),
    "cut short": (".npy", lambda: npy_bytes()[:-1], r"cut short: float64 of shape \(500,\) takes 4,000 bytes"),
    "only a head": (".npy", lambda: npy_with_head("<f4", (10**6, 10**6)), "cut short.*4,000,000,000,000 bytes"),
    "size below zero": (".npy", lambda: npy_with_head("<f4", (-1, 3), b"0" * 99), "no .npy data"),
    "too many numbers": (".npy", lambda: npy_with_head("<f4", (0, 2**40, 2**40)), "no .npy data"),
    "a size beyond 64 bits": (".npy", lambda: npy_with_head("<f4", (0, 2**70)), "no .npy data"),
    "too many axes": (".npy", lambda: npy_with_head("<f4", (1,) * 70, b"0" * 4), "no .npy data"),
    "a size that is a bool": (".npy", lambda: npy_with_head("<f4", (True, 4), b"0" * 16), "no .npy data"),
    "one number": (".npy", lambda: npy_bytes(np.float32(3)), "holds a single number"),
    "objects": (".npy", lambda: npy_bytes(np.array([{}]), allow_pickle=True), "Python objects, which are never read"),
    "npz empty": (".npz", lambda: b"", "no .npz file"),
    "npz cut short": (".npz", lambda: npz_bytes()[:-30], "no .npz file"),
    "npz cut in front": (".npz", lambda: npz_bytes()[1000:], "cut short|no .npz file|no .npy data"),
    "npz of nothing": (".npz", lambda: npz_bytes(name="readme.txt"), "say which array.*its arrays: none"),
    "npz of no array": (".npz", lambda: npz_bytes(b"hello"), "no .npy data"),
    "npz of an array cut short": (".npz", lambda: npz_bytes(npy_bytes()[:-8]), "cut short"),
    "packed array cut short": (
        ".npz", lambda: npz_bytes(npy_bytes()[:-8], compression=zipfile.ZIP_DEFLATED), "cut short: 8 bytes are missing",
    ),
    "packed array damaged": (".npz", lambda: flipped(npz_bytes(compression=zipfile.ZIP_DEFLATED), 400), "damaged"),
    "lzma array damaged": (".npz", lambda: flipped(npz_bytes(compression=zipfile.ZIP_LZMA), 60), "damaged"),
    "npz of objects": (".npz", lambda: npz_bytes(npy_bytes(np.array([{}]), allow_pickle=True)), "Python objects"),
    "safetensors empty": (".safetensors", lambda: b"", "no .safetensors file"),
    "safetensors cut short": (".safetensors", lambda: safetensors_bytes()[:-8], "cut short"),
    "safetensors of one number": (".safetensors", lambda: safetensors_bytes(a=np.array(3.0)), "holds a single number"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_used_is_refused_by_name(case, tmp_path):
    suffix, make, message = BAD_FILES[case]
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(make())
    with pytest.raises(FileError, match=message) as caught:
        open_array(str(path), "logits").load()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", SAVERS)
def test_the_systems_own_words_for_what_cannot_be_opened(suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    with pytest.raises(FileError, match=rf"nothing\{suffix}: No such file or directory"):
        open_array(str(tmp_path / f"nothing{suffix}"), "logits")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(FileError, match=rf"folder\{suffix}: Is a directory"):
        open_array(str(tmp_path / f"folder{suffix}"), "logits")


def test_files_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(FileError, match=r"a\.csv: the targets must be in a file that ends in \.npy, \.npz, "):
        open_array("a.csv", "targets")
    with pytest.raises(FileError, match=r"a\.npy holds one array, without a name: leave out :x"):
        open_array("a.npy:x", "targets")


# ---- results -------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_whole(path, b"first")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second" and os.listdir(tmp_path) == ["report.html"]

    def fail(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FileError, match=r"report\.html: cannot be written: No space left on device"):
        write_whole(path, b"third")
    assert path.read_bytes() == b"second" and os.listdir(tmp_path) == ["report.html"]


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", b"data")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"data"
    (tmp_path / "null").symlink_to("/dev/null")
    write_whole(tmp_path / "null", b"data")
    assert (tmp_path / "null").is_symlink() and not (tmp_path / "null").is_file()


def test_pipes_are_written_to_by_any_name(tmp_path):
    end, begin = os.pipe()
    write_whole(f"/dev/fd/{begin}", b"data")
    os.close(begin)
    with open(end, "rb") as stream:
        assert stream.read() == b"data"


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = tmp_path / "report.html"
    path.write_bytes(b"first")
    path.chmod(0o600)
    write_whole(path, b"second")
    assert path.read_bytes() == b"second" and path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileError, match=r"nowhere/report\.html: cannot be written: No such file or directory"):
        write_whole(tmp_path / "nowhere" / "report.html", b"data")
