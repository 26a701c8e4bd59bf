"""The package as Python's machinery meets it: imports of every kind, pickles, signatures, and files that vanish."""

import copy
import inspect
import os
import pickle
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

import fastce

PACKAGE = Path(fastce.__file__).parent
SANITIZED = "FASTCE_SANITIZED" in os.environ
FUNCTIONS = [getattr(fastce, name) for name in fastce.__all__ if inspect.isfunction(getattr(fastce, name))]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_functions_survive_pickles_and_copies(function):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(function, protocol)) is function
    assert copy.copy(function) is function and copy.deepcopy(function) is function
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def test_sparse_targets_and_statistics_survive_pickles_and_copies():
    logits, targets = np.zeros((2, 3)), fastce.SparseTargets(np.array([[0], [1]]), np.ones((2, 1)))
    stats = fastce.cross_entropy_stats(logits, targets)
    for again in (lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy, copy.copy):
        assert fastce.cross_entropy(logits, again(targets)) == fastce.cross_entropy(logits, targets)
        for one, other in zip(again(stats), stats, strict=True):
            np.testing.assert_array_equal(one, other)
        assert type(again(stats)) is fastce.CrossEntropyStats


RELOADED = """
import importlib, sys, threading
import numpy as np
import fastce

def loss():
    return sys.modules["fastce"].cross_entropy_with_grad(np.arange(60000.0).reshape(-1, 6) % 7, np.zeros(10000, int))

expected = loss()
old = fastce.cross_entropy
for name in sorted(name for name in sys.modules if name.split(".")[0] == "fastce"):
    importlib.reload(sys.modules[name])
again = loss()
assert again[0] == expected[0] and (again[1] == expected[1]).all()
# A second copy of the package in the same process: removed from the modules and imported anew, in a thread.
for name in [name for name in sys.modules if name.split(".")[0] == "fastce"]:
    del sys.modules[name]
thread = threading.Thread(target=importlib.import_module, args=("fastce",))
thread.start()
thread.join()
again = loss()
assert again[0] == expected[0] and (again[1] == expected[1]).all()
assert old([[20.0, 0.0]], [0]) > 0
print("reloaded")
"""


def test_the_package_may_be_reloaded_and_imported_twice(run_python):
    assert run_python("-c", RELOADED).stdout.split() == ["reloaded"]


def test_the_package_may_be_imported_from_two_paths(run_python, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fastce", ignore=shutil.ignore_patterns("__pycache__", "*.pyx", "*.pxd"))
    code = f"""
import sys
import fastce
first = fastce.cross_entropy([[1.0, 2.0]], [0])
for name in [name for name in sys.modules if name.split(".")[0] == "fastce"]:
    del sys.modules[name]
sys.path.insert(0, {str(tmp_path)!r})
import fastce
assert fastce.__file__.startswith({str(tmp_path)!r})
assert fastce.cross_entropy([[1.0, 2.0]], [0], num_threads=2) == first
"""
    run_python("-c", code)


FIRST_CALLS = """
import threading
import numpy as np, fastce
logits, targets = np.random.default_rng(0).normal(size=(5000, 10)), np.zeros(5000, int)
barrier, losses = threading.Barrier(16), []

def run():
    barrier.wait()
    losses.append(fastce.cross_entropy_with_grad(logits, targets, num_threads=2)[0])

threads = [threading.Thread(target=run) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(losses) == 16 and set(losses) == {fastce.cross_entropy(logits, targets)}
"""


def test_the_first_call_may_be_made_by_many_threads_at_once(run_python):
    run_python("-X", "faulthandler", "-c", FIRST_CALLS, timeout=60)


SUBINTERPRETER = """
import fastce
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
code = '''
try:
    import fastce
    assert fastce.cross_entropy([[0.0, 0.0]], [0]) > 0.69
except ImportError as error:
    assert "interpreter" in str(error) or "per process" in str(error), error  # NumPy's words
'''
for _ in range(3):
    other = interpreters.create()
    failed = interpreters.run_string(other, code)
    assert failed is None, failed
    interpreters.destroy(other)
assert fastce.cross_entropy([[0.0, 0.0]], [0]) > 0.69
print("alive")
"""


def test_a_subinterpreter_gets_the_package_or_an_import_error(run_python):
    assert run_python("-W", "ignore", "-c", SUBINTERPRETER).stdout.split() == ["alive"]


def test_the_fault_handler_has_nothing_to_report(run_python):
    code = """
import numpy as np, fastce
for shape in ((6, 5), (50_000, 10), (3, 50_000)):
    fastce.cross_entropy_with_grad(np.zeros(shape), np.zeros(shape[0], int), num_threads=2)
"""
    assert run_python("-X", "faulthandler", "-c", code).stderr == ""


def test_an_archive_cannot_be_imported_from_and_says_so(run_python, tmp_path):
    # Compiled modules cannot be loaded out of a zip file: the error is an ordinary one.
    only_python = shutil.ignore_patterns("__pycache__", "*.pyx", "*.pxd", "*.so")
    shutil.copytree(PACKAGE, tmp_path / "files" / "fastce", ignore=only_python)
    for module in (PACKAGE / "_kernels").glob("*.so"):
        (tmp_path / "files" / "fastce" / "_kernels" / module.name).touch()
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "files")
    code = f"import sys; sys.path.insert(0, {archive!r}); import fastce"
    done = run_python("-c", code, check=False)
    assert done.returncode == 1
    assert re.search(r"^(ImportError|ModuleNotFoundError): .*fastce", done.stderr.splitlines()[-1])


def test_use_writes_no_files(run_python, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fastce", ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(tmp_path.rglob("*"))
    code = f"""
import os, sys
os.chdir({str(tmp_path)!r})
sys.path.insert(0, {str(tmp_path)!r})
import numpy as np, fastce
assert fastce.__file__.startswith({str(tmp_path)!r})
fastce.cross_entropy_with_grad(np.zeros((50_000, 10)), np.zeros(50_000, int), num_threads=2)
fastce.binary_cross_entropy(np.zeros(5), np.ones(5))
"""
    run_python("-B", "-c", code, HOME=str(tmp_path), TMPDIR=str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm, of GNU binutils, is not installed")
@pytest.mark.skipif(SANITIZED, reason="the sanitizer exports symbols of its own")
@pytest.mark.parametrize("module", sorted((PACKAGE / "_kernels").glob("*.so")), ids=lambda path: path.name)
def test_modules_share_no_code_with_one_another(module):
    # Each exports its entry alone, and none is resolved by the loader at run time (ifunc): no target borrows the
    # functions of another, which might need another processor.
    lines = subprocess.run(
        ["nm", "--dynamic", "--defined-only", str(module)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    symbols = {line.split()[-1]: line.split()[-2] for line in lines}
    assert set(symbols) == {f"PyInit_{module.name.split('.')[0]}"}
    assert "i" not in symbols.values()


TRUNCATED = """
import os, sys
import numpy as np, fastce
logits = np.memmap(sys.argv[1], np.float32, "w+", shape=(4096, 64))
os.truncate(sys.argv[1], 4096)
print("before", flush=True)
fastce.cross_entropy(logits, np.zeros(4096, int))
print("after", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="this system has no SIGBUS")
def test_a_file_cut_short_ends_the_process_as_the_system_wants(run_python, tmp_path):
    # Nothing can be done about it; what matters is that no handler of ours hides it.
    script = tmp_path / "truncated.py"
    script.write_text(TRUNCATED)
    done = run_python(str(script), str(tmp_path / "logits"), check=False)
    assert done.stdout.split() == ["before"]
    if not SANITIZED:  # the sanitizer reports it and exits
        assert done.returncode == -signal.SIGBUS
