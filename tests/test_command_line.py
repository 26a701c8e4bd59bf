"""The command line says about files what fastce says about arrays, and explains what it cannot do."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from numpy.lib import format as npy
from sklearn.metrics import log_loss

import fastce
from fastce import _bench, _reading
from fastce.__main__ import main

N_ROWS, N_CLASSES = 203, 7


@pytest.fixture
def logits(rng):
    return 2 * rng.standard_normal((N_ROWS, N_CLASSES), dtype=np.float32)


@pytest.fixture
def targets(rng):
    return rng.integers(0, N_CLASSES, N_ROWS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory; files are read in many small parts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_reading, "PART_BYTES", 1000)
    return tmp_path


def reported(capsys, *arguments):
    """What ``report --json`` prints."""
    assert main(["report", *arguments, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


def expected(*arguments, **options):
    return json.loads(fastce.report(*arguments, **options).to_json())


# ---- report --------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_scikit_learn(logits, targets, folder, capsys):
    np.save("l.npy", logits)
    np.save("t.npy", targets)
    truth = log_loss(targets, fastce.softmax(logits.astype(np.float64)), labels=range(N_CLASSES))
    assert reported(capsys, "l.npy", "t.npy")["loss"] == pytest.approx(truth, rel=1e-6)


def save_npy(**arrays):
    """Save two files; return the arguments that name them."""
    for name, array in arrays.items():
        np.save(name, array)
    return [f"{name}.npy" for name in arrays]


def save_npz(**arrays):
    np.savez("run.npz", **arrays)
    return ["run.npz"]


def save_packed(**arrays):
    np.savez_compressed("run.npz", **arrays)
    return ["run.npz:logits", "run.npz:targets"]


def save_safetensors(**arrays):
    pytest.importorskip("safetensors.numpy").save_file(arrays, "run.safetensors")
    return ["run.safetensors"]


CHANGES = {
    "float32": lambda logits, targets: (logits, targets),
    "float16": lambda logits, targets: (logits.astype(np.float16), targets.astype(np.uint8)),
    "more axes": lambda logits, targets: (logits.reshape(29, 7, N_CLASSES), targets.reshape(29, 7)),
    "distributions": lambda logits, targets: (logits, fastce.softmax(logits[::-1].astype(np.float64))),
    "no rows": lambda logits, targets: (logits[:0], targets[:0]),
    "big-endian": lambda logits, targets: (logits.astype(">f8"), targets.astype(">i4")),
    "columns": lambda logits, targets: (np.asfortranarray(logits), targets),
    "columns of more axes": lambda logits, targets: (
        np.asfortranarray(logits.reshape(29, 7, N_CLASSES)), np.asfortranarray(targets.reshape(29, 7)),
    ),
}  # fmt: skip
NOT_IN_SAFETENSORS = {"big-endian", "columns", "columns of more axes"}  # rows in native byte order alone
CASES = [(save, change) for save in (save_npy, save_npz, save_packed) for change in CHANGES]
CASES += [(save_safetensors, change) for change in CHANGES if change not in NOT_IN_SAFETENSORS]


@pytest.mark.parametrize(("save", "change"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_files_give_the_report_of_their_arrays(save, change, logits, targets, folder, capsys):
    logits, targets = CHANGES[change](logits, targets)
    assert reported(capsys, *save(logits=logits, targets=targets)) == expected(logits, targets)


def test_options_mean_what_the_arguments_mean(logits, targets, folder, rng, capsys):
    targets[::5] = 255
    weight, sample_weight = rng.random(N_CLASSES), rng.random(N_ROWS)
    names = [f"<{c}> & co" for c in range(N_CLASSES)]
    for name, array in {"l": logits, "t": targets, "w": weight, "s": sample_weight}.items():
        np.save(name, array)
    (folder / "names.txt").write_text("\n".join(names) + "\n", "utf-8")
    arguments = ["l.npy", "t.npy", "--weight", "w.npy", "--sample-weight", "s.npy", "--ignore-index", "255"]
    got = reported(capsys, *arguments, "--class-names", "names.txt")
    assert got == expected(
        logits, targets, weight=weight, sample_weight=sample_weight, ignore_index=255, class_names=names
    )


def test_text_is_printed_unless_json_is_wanted(logits, targets, folder, capsys):
    np.savez("run.npz", logits=logits, targets=targets)
    assert main(["report", "run.npz"]) == 0
    assert capsys.readouterr().out == f"{fastce.report(logits, targets)}\n"


def test_json_has_null_for_what_is_no_number(logits, targets, folder, capsys):
    np.savez("run.npz", logits=logits, targets=np.full_like(targets, -100))
    assert reported(capsys, "run.npz")["loss"] is None


def test_a_page_and_a_picture_are_written(logits, targets, folder, capsys):
    pytest.importorskip("matplotlib")
    np.savez("run.npz", logits=logits, targets=targets)
    (folder / "a.html").write_text("an older one")
    assert main(["report", "run.npz", "--html", "a.html", "--plot", "a.PNG"]) == 0
    assert (folder / "a.PNG").read_bytes().startswith(b"\x89PNG")
    page = (folder / "a.html").read_text("utf-8")
    assert page.startswith("<!DOCTYPE html>") and "run.npz: 203 rows, 7 classes" in page
    assert sorted(os.listdir(folder)) == ["a.PNG", "a.html", "run.npz"]


# ---- what cannot be done -------------------------------------------------------------------------------------------


def refusal(capsys, *arguments):
    """The message of a command that fails for its files: one line on standard error, nothing else."""
    assert main([*arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("fastce: ") and shown.err.count("\n") == 1
    return shown.err


BAD_ARRAYS = {
    "transposed": (lambda z, t: (z.T.copy(), t), "logits look transposed"),
    "one-hot": (lambda z, t: (z, np.eye(N_CLASSES, dtype=int)[t]), "one-hot rows"),
    "fewer targets": (lambda z, t: (z, t[:-3]), r"\(203,\), got shape \(200,\)"),
    "float ids": (lambda z, t: (z, t.astype(float)), "class ids must be integers"),
    "integer logits": (lambda z, t: (z.astype(int), t), "logits must be a float16, bfloat16, float32 or float64 array"),
    "one axis": (lambda z, t: (z[0], t[:1]), r"at least two axes, rows and classes; got shape \(7,\)"),
    "no classes": (lambda z, t: (z[:, :0], t), "at least one class"),
    "labels from 1": (lambda z, t: (z, t + 1), "labels seem to start at 1"),
    "a class too many": (lambda z, t: (z, np.r_[t[:-1], 9]), r"targets\[202\] = 9 is out of range for 7 classes"),
    "negative mass": (lambda z, t: (z, np.r_[z[:-1] ** 2, -(z[-1:] ** 2)]), r"\[27, 0\] = -.* \[rows counted from 175"),
    "text": (lambda z, t: (z, np.array(["cat"] * N_ROWS)), "class ids must be integers"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_refused_with_their_files(case, logits, targets, folder, capsys):
    change, message = BAD_ARRAYS[case]
    logits, targets = change(logits, targets)
    np.save("l.npy", logits)
    np.save("t.npy", targets)
    said = refusal(capsys, "report", "l.npy", "t.npy")
    assert re.search(message, said), said
    assert "l.npy" in said


def test_what_is_wrong_with_small_files_is_said_before_large_ones_are_read(folder, capsys, monkeypatch):
    monkeypatch.setattr(_reading.LossMeter, "update", lambda *arguments: pytest.fail("logits were read"))
    np.save("l.npy", np.zeros((5, 3)))
    np.save("t.npy", [0, 1, 2, 2, 7])
    np.save("w.npy", [1.0, 1.0])
    assert "targets[4] = 7" in refusal(capsys, "report", "l.npy", "t.npy")
    np.save("t.npy", [0, 1, 2, 2, 2])
    assert "weight must have the shape of the classes, (3,)" in refusal(
        capsys, "report", "l.npy", "t.npy", "--weight", "w.npy"
    )


def test_files_that_cannot_be_read_or_written(folder, capsys, monkeypatch):
    assert "l.npy: No such file or directory" in refusal(capsys, "report", "l.npy", "t.npy")
    np.save("l.npy", np.zeros((5, 3)))
    assert "l.npy holds the logits alone: say which file holds the targets" in refusal(capsys, "report", "l.npy")
    np.save("t.npy", np.zeros(5, int))
    assert "names.txt: No such file" in refusal(capsys, "report", "l.npy", "t.npy", "--class-names", "names.txt")
    (folder / "names.txt").write_bytes(b"\xff\xfe")
    assert "no text in UTF-8" in refusal(capsys, "report", "l.npy", "t.npy", "--class-names", "names.txt")
    (folder / "names.txt").write_text("a\nb\n")
    assert "class_names" in refusal(capsys, "report", "l.npy", "t.npy", "--class-names", "names.txt")
    pytest.importorskip("matplotlib")
    (folder / "a.html").mkdir()
    assert "a.html: cannot be written" in refusal(capsys, "report", "l.npy", "t.npy", "--html", "a.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "LOGITS"),
        (["repotr"], "invalid choice"),
        (["report", "l.npy", "--no-such"], "unrecognized arguments"),
        (["report", "l.npy", "--ignore-index", "x"], "invalid int value"),
        (["report", "l.npy", "--plot", "a.docx"], "a picture ends in .png, .svg or .pdf"),
        (["report", "l.npy", "--html", "nowhere/a.html"], "there is no folder nowhere"),
        (["bench", "--seconds", "0"], "must be positive"),
        (["bench", "--seconds", "nan"], "must be positive"),
    ],
)
def test_a_wrong_command_line_is_status_2(arguments, message, folder, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "python -m fastce report logits.npy targets.npy" in capsys.readouterr().err


def test_what_is_not_installed_is_named_with_its_extra(folder, capsys, monkeypatch):
    for name in ("matplotlib", "safetensors"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("fastce._plots", "fastce._page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(fastce, name.split(".")[1], raising=False)
    np.savez("run.npz", logits=np.zeros((5, 3)), targets=np.zeros(5, int))
    assert main(["report", "run.npz", "--html", "a.html"]) == 2
    assert "pip install 'fastce[plot]'" in capsys.readouterr().err
    with pytest.raises(ImportError, match=r"pip install 'fastce\[plot\]'"):
        fastce.report(np.zeros((5, 3)), np.zeros(5, int)).plot()
    (folder / "run.safetensors").write_bytes(b"")
    assert main(["report", "run.safetensors"]) == 2
    assert "pip install 'fastce[cli]'" in capsys.readouterr().err
    assert main(["report", "run.npz"]) == 0  # text needs none of them


def test_interruption_and_lack_of_memory_end_quietly(folder, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    def too_large(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(_reading, "report_on_files", interrupted)
    assert main(["report", "l.npy"]) == 130
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(_reading, "report_on_files", too_large)
    assert "not enough memory" in refusal(capsys, "report", "l.npy")


@pytest.mark.parametrize("command", [[], ["report"], ["bench"], ["info"]], ids=" ".join)
def test_help_tells_what_the_exit_status_means(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "exit status" in text
    assert all(len(line) <= 120 for line in text.splitlines())


# ---- whole processes -----------------------------------------------------------------------------------------------

LIMITED = """
import re, resource, sys
import numpy as np
from fastce.__main__ import main

with open("/proc/self/status") as status:
    held = int(re.search(r"VmData:\\s+(\\d+) kB", status.read())[1]) << 10
# Free-threaded Python reserves more than that for objects to come.
resource.setrlimit(resource.RLIMIT_DATA, (max(300 << 20, held + (200 << 20)),) * 2)
try:
    np.load("huge.npy")
except MemoryError:
    sys.exit(main(["report", "huge.npy", "targets.npy", "--json"]))
"""


@pytest.mark.skipif("FASTCE_SANITIZED" in os.environ, reason="a sanitizer takes more memory than is allowed here")
@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts private memory, without mapped files, as data")
def test_logits_may_be_larger_than_memory(tmp_path, run_python, monkeypatch):
    rows, classes = 1 << 17, 1 << 10
    monkeypatch.chdir(tmp_path)
    with open("huge.npy", "wb") as stream:
        npy.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (rows, classes)})
        stream.truncate(stream.tell() + 4 * rows * classes)  # 512 MB of zeros, which take no place on the disk
    np.save("targets.npy", np.zeros(rows, np.int8))
    done = run_python("-c", LIMITED, OPENBLAS_NUM_THREADS="1")
    report = json.loads(done.stdout)
    assert report["n_rows"] == rows and report["loss"] == pytest.approx(np.log(classes), rel=1e-7)


def test_the_module_runs(logits, targets, folder, run_python):
    np.savez("run.npz", logits=logits, targets=targets)
    done = run_python("-m", "fastce", "report", "run.npz")
    assert done.stdout == f"{fastce.report(logits, targets)}\n" and done.stderr == ""
    (folder / "names.txt").write_text("caf\u00e9\n" * N_CLASSES, "utf-8-sig")
    done = run_python("-m", "fastce", "report", "run.npz", "--class-names", "names.txt", PYTHONIOENCODING="ascii")
    assert "  caf\\xe9  " in done.stdout
    done = run_python("-W", "error", "-m", "fastce", "report", "nothing.npz", check=False)
    assert (done.returncode, done.stdout) == (1, "")


def command(*arguments):
    return [sys.executable, "-P", "-m", "fastce", *arguments]


@pytest.fixture
def environment():
    return {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(fastce.__file__))}


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="this system has no SIGPIPE")
def test_a_reader_that_goes_is_no_error(folder, environment):
    process = subprocess.Popen(
        command("report", "--help"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == -signal.SIGPIPE and said == b""


def test_a_terminal_shows_progress_and_nothing_is_left_of_it(logits, targets, folder, environment):
    pytest.importorskip("tqdm")
    pty = pytest.importorskip("pty")
    np.savez("run.npz", logits=logits, targets=targets)
    terminal, end = pty.openpty()
    pytest.importorskip("termios").tcsetwinsize(end, (24, 80))
    os.set_blocking(terminal, False)
    with subprocess.Popen(command("report", "run.npz"), env=environment, stdout=subprocess.PIPE, stderr=end) as process:
        text = process.stdout.read().decode()
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    os.close(end)
    assert process.returncode == 0
    assert text == f"{fastce.report(logits, targets)}\n"
    assert "reading:" in shown and shown.endswith("\r") and "\n" not in shown


# ---- info and bench ------------------------------------------------------------------------------------------------


def test_info_says_what_build_info_says(capsys):
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == fastce.build_info()
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name, value in fastce.build_info().items():
        assert f"{name}:" in text and (", ".join(value) if isinstance(value, list) else str(value)) in text


PACKAGES = {"NumPy": "numpy", "SciPy": "scipy", "scikit-learn": "sklearn", "PyTorch": "torch", "jax.jit": "jax"}


@pytest.mark.parametrize("rival", _bench.RIVALS)
def test_rivals_compute_the_same(rival, logits, targets):
    pytest.importorskip(PACKAGES[rival])
    calls = {"fastce": _bench.run_fastce(logits, targets), rival: _bench.RIVALS[rival](logits, targets)}
    for _ in range(2):  # a call must leave the arrays as they were
        _bench.check_agreement(calls)


def test_bench_shows_a_ratio_for_every_shape_and_rival(capsys, monkeypatch):
    monkeypatch.setattr(_bench, "SHAPES", ((20, 3), (30, 40)))
    monkeypatch.setattr(_bench, "RIVALS", {"NumPy": _bench.run_numpy, "broken": lambda *arrays: 1 / 0})
    assert main(["bench", "--seconds", "0.1"]) == 0
    *_, heads, first, second, missing = capsys.readouterr().out.splitlines()
    assert heads.split()[-2:] == ["fastce", "NumPy"]
    for line, shape in ((first, "20 x 3"), (second, "30 x 40")):
        assert shape in line and float(line.split()[-1].removesuffix("x")) > 0
    assert missing == "Not installed: broken"


def test_what_computes_something_else_is_not_timed(logits, targets):
    def halved(logits, targets):
        loss, grad = _bench.run_numpy(logits, targets)()
        return lambda: (loss, grad / 2)

    calls = {"fastce": _bench.run_fastce(logits, targets), "halved": halved(logits, targets)}
    with pytest.raises(ArithmeticError, match="halved and fastce do not agree"):
        _bench.check_agreement(calls)
