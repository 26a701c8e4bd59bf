"""Nothing that the process is set to changes a result, and nothing that it is set to is changed."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import fastce

TESTS = Path(__file__).parent
# The least that Linux gives a thread; a sanitizer's red zones take more.
STACK = "256k" if "FASTCE_SANITIZED" in os.environ else "16k"
EVERY_FUNCTION = str(TESTS / "every_function.py")
GLIBC_ON_X86_64 = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc",
    reason="sets the floating-point modes through the layout of glibc's fenv_t",
)


@pytest.fixture(scope="module")
def undisturbed():
    """What every_function.py prints where nothing is set."""
    done = subprocess.run(
        [sys.executable, EVERY_FUNCTION], env=os.environ | {"PYTHONPATH": str(TESTS.parent)}, capture_output=True,
        text=True, timeout=300, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert "refuses nothing" not in done.stdout
    return done.stdout


def test_every_public_function_is_called(undisturbed):
    # The rest of this file promises it for all of them.
    functions = {name for name in fastce.__all__ if callable(getattr(fastce, name))}
    called = {line.split("-")[0].split()[0] for line in undisturbed.splitlines()}
    assert called == functions - {"CrossEntropyStats", "LossMeter", "LossReport", "SparseTargets"}


@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_NUM_THREADS": "0", "OMP_DYNAMIC": "true"},
        {"OMP_NUM_THREADS": "abc", "OMP_THREAD_LIMIT": "1"},
        {"OMP_NUM_THREADS": "99999", "OMP_MAX_ACTIVE_LEVELS": "0", "OMP_NESTED": "true"},
        {"OMP_WAIT_POLICY": "active", "OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "OMP_CANCELLATION": "true"},
        {"OMP_STACKSIZE": STACK, "OMP_SCHEDULE": "guided,7", "MALLOC_PERTURB_": "165", "FASTCE_NUM_THREADS": "3"},
    ],
    ids=lambda variables: "-".join(f"{name}={value}" for name, value in variables.items()),
)
def test_openmp_may_be_told_anything(variables, undisturbed, run_python):
    # libgomp says on standard error what it does not understand.
    assert run_python(EVERY_FUNCTION, **variables).stdout == undisturbed


@pytest.mark.parametrize(
    "flags", [["-O", "-W", "error"], ["-OO"], ["-X", "dev", "-W", "error"]], ids=lambda flags: " ".join(flags)
)
def test_python_may_be_run_with_any_flag(flags, undisturbed, run_python):
    # Without assertions and docstrings, and with the debug hooks of every allocator.
    done = run_python(*flags, EVERY_FUNCTION, PYTHONMALLOC="debug" if "-OO" in flags else None)
    assert done.stdout == undisturbed
    assert done.stderr == ""


FENV = """
import ctypes

LIBM = ctypes.CDLL("libm.so.6")
ENVIRONMENT = ctypes.c_uint32 * 8   # the x87 unit's state, then MXCSR

def modes():
    now = ENVIRONMENT()
    LIBM.fegetenv(now)
    return now[0] & 0xFFFF, now[7] & ~0x3F

def set_modes(x87, mxcsr):
    wanted = ENVIRONMENT()
    LIBM.fegetenv(wanted)
    wanted[0], wanted[7] = wanted[0] & ~0xFFFF | x87, mxcsr
    LIBM.fesetenv(wanted)
"""

# Small cases: this is done in every mode. The worst figures are those of losses that NumPy rounds once more, and of
# smoothing's share, which Python divides.
ROUNDING = (
    FENV
    + """
import numpy as np, every_function, fastce

plain = modes()
shapes = [(9, 3), (5000, 10), (7, 97), (20, 1000), (3, 5003), (2, 40_000)]
checked = 0
for bits in (1, 2, 3):      # down, up, towards zero; the x87 unit has them in bits 10 and 11, SSE in 13 and 14
    for both in (True, False):
        host = plain[0] | (bits << 10 if both else 0), plain[1] | bits << 13
        for dtype in (np.float32, np.float64):
            tiny, eps = np.finfo(dtype).tiny, np.finfo(dtype).eps
            for name, call in every_function.calls(dtype, shapes if both else shapes[1:2]):
                if "from_probs" in name or name == "build_info" or "-6-" in name:
                    continue    # NumPy's arithmetic; no numbers; float16, whose units are others
                set_modes(*plain)
                expected = every_function.arrays_of(call())
                set_modes(*host)
                got = every_function.arrays_of(call())
                left = modes()
                set_modes(*plain)
                assert left == host, (name, left, host)
                for index, (one, other) in enumerate(zip(got, expected)):
                    if one.dtype.kind != "f":
                        np.testing.assert_array_equal(one, other)
                        continue
                    assert (np.isnan(one) == np.isnan(other)).all(), name
                    size = np.abs(other.astype(np.float64))
                    # Gradients have terms of both signs, and are known relatively to those.
                    size = np.maximum(size, 1.0 if index else tiny)
                    finite = np.isfinite(other)
                    error = np.abs(one[finite].astype(np.float64) - other[finite]) / size[finite]
                    assert error.max(initial=0.0) <= 16 * eps, (name, index, bits, error.max() / eps)
                    checked += 1
print(checked)
"""
)


@GLIBC_ON_X86_64
@pytest.mark.parametrize("target", fastce.build_info()["available_targets"])
def test_the_rounding_mode_of_the_host_is_harmless_and_stays(target, run_python):
    done = run_python("-c", ROUNDING, FASTCE_TARGET=target, PYTHONPATH=f"{TESTS}{os.pathsep}{TESTS.parent}")
    assert int(done.stdout) > 500


BORN_ROUNDING_UP = (
    FENV
    + """
import numpy as np, fastce

rng = np.random.default_rng(0)
logits, targets = rng.normal(0, 30, (60_000, 10)), rng.integers(0, 10, 60_000)
expected = fastce.cross_entropy(logits, targets, num_threads=1)
plain = modes()
set_modes(plain[0] | 2 << 10, plain[1] | 2 << 13)
fastce.cross_entropy(logits, targets, num_threads=2)    # starts the other thread, which keeps this mode
set_modes(*plain)
assert fastce.cross_entropy(logits, targets, num_threads=2) == expected
"""
)


@GLIBC_ON_X86_64
def test_threads_that_were_born_in_another_rounding_mode_give_the_same_bits(run_python):
    run_python("-c", BORN_ROUNDING_UP)


SMOOTHED_WHILE_ROUNDING_UP = (
    FENV
    + """
import numpy as np, fastce

plain = modes()
lengths = range(3, 60)      # many more than the engine remembers, so that the second round divides anew

def smoothed(classes):
    rng = np.random.default_rng(classes)
    logits = rng.normal(0, 3, (4, classes)).astype(np.float32)
    return fastce.cross_entropy_with_grad(logits, rng.integers(0, classes, 4), label_smoothing=0.7)

expected = [smoothed(classes) for classes in lengths]
for classes, (loss, grad) in zip(lengths, expected):
    set_modes(plain[0] | 2 << 10, plain[1] | 2 << 13)
    smoothed(classes)
    set_modes(*plain)
    again = smoothed(classes)
    assert again[0] == loss and (again[1] == grad).all(), classes
"""
)


@GLIBC_ON_X86_64
def test_a_call_in_another_rounding_mode_changes_no_bit_of_a_later_one(run_python):
    run_python("-c", SMOOTHED_WHILE_ROUNDING_UP)


HALVES_IN_OTHER_MODES = (
    FENV
    + """
import numpy as np, fastce

plain = modes()
rng = np.random.default_rng(0)
types = [np.dtype(np.float16)]
try:
    import ml_dtypes
except ImportError:
    pass
else:
    types.append(np.dtype(ml_dtypes.bfloat16))
for half in types:
    for shape in ((40, 9), (3, 200), (300, 130)):
        logits = rng.normal(0, 4, shape).astype(half)
        logits[0] = np.arange(shape[1], dtype=np.uint16).view(half)     # 0 and subnormal numbers
        for given in (logits, np.asfortranarray(logits)):
            expected = fastce.softmax(given)
            for bits in (1, 2, 3):
                for flush in (0, 0x8040):
                    set_modes(plain[0] | bits << 10, plain[1] | bits << 13 | flush)
                    got = fastce.softmax(given)
                    set_modes(*plain)
                    assert (got.view(np.uint16) == expected.view(np.uint16)).all(), (half, shape, bits, flush)
"""
)


@GLIBC_ON_X86_64
@pytest.mark.parametrize("target", fastce.build_info()["available_targets"])
def test_half_types_are_rounded_to_nearest_in_any_mode_of_the_host(target, run_python):
    run_python("-c", HALVES_IN_OTHER_MODES, FASTCE_TARGET=target)


FLUSHED = (
    FENV
    + """
x87, mxcsr = modes()
set_modes(x87, mxcsr | 0x8040)  # subnormal results and operands are zero
import numpy as np
import warnings
warnings.simplefilter("ignore")     # NumPy notices
import every_function

results = {}
for flush in (True, False):
    for dtype in (np.float32, np.float64):
        for name, call in every_function.calls(dtype):
            set_modes(x87, mxcsr | (0x8040 if flush else 0))
            results[flush, dtype, name] = every_function.arrays_of(call())
            assert modes() == (x87, mxcsr | (0x8040 if flush else 0)), name
set_modes(x87, mxcsr)
for (flush, dtype, name), got in results.items():
    if not flush or name == "build_info":
        continue
    for one, other in zip(got, results[False, dtype, name]):
        if one.dtype == np.float16:
            continue    # what is subnormal there comes of normal float32
        # 0 or the same where the result is subnormal, else the same but for what subnormal parts add.
        smallest = np.finfo(dtype).tiny
        np.testing.assert_allclose(one, other, rtol=4 * np.finfo(dtype).eps, atol=4 * smallest, err_msg=name)
"""
)


@GLIBC_ON_X86_64
def test_a_host_that_flushes_subnormal_numbers_gets_the_normal_ones(run_python):
    run_python("-c", FLUSHED, PYTHONPATH=f"{TESTS}{os.pathsep}{TESTS.parent}")


STATE = """
import ctypes, gc, locale, os, random, signal, sys, threading, warnings
import decimal
import numpy as np

def openmp():
    libgomp = ctypes.CDLL("libgomp.so.1")
    kind, chunk = ctypes.c_int(), ctypes.c_int()
    libgomp.omp_get_schedule(ctypes.byref(kind), ctypes.byref(chunk))
    names = ["max_threads", "nested", "dynamic", "max_active_levels", "thread_limit", "cancellation", "num_threads"]
    return kind.value, chunk.value, *(getattr(libgomp, f"omp_get_{name}")() for name in names)

def caught_signals():
    with open("/proc/self/status") as status:
        masks = [line.split() for line in status if line.startswith(("SigBlk", "SigIgn", "SigCgt"))]
    # Without signals 32 and 33, which the C library uses to speak to its threads.
    return [(name, int(mask, 16) & ~(3 << 31)) for name, mask in masks]

def state():
    return {
        "OpenMP": openmp(),
        "signals": caught_signals(),
        "handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "alarm": signal.getitimer(signal.ITIMER_REAL),
        "NumPy's errors": np.geterr(),
        "NumPy's printing": np.get_printoptions(),
        "warnings": list(warnings.filters),
        "locale": locale.setlocale(locale.LC_ALL),
        "random numbers": (random.getstate(), str(np.random.get_state())),
        "sys.path": list(sys.path),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.meta_path[:], sys.path_hooks[:]),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval(), gc.get_threshold(), gc.isenabled()),
        "decimals": str(decimal.getcontext()),
        "environment": dict(os.environ),
        "processors": os.sched_getaffinity(0),
        "folder": os.getcwd(),
        "streams": (sys.stdout, sys.stderr, sys.stdin),
        "Python's threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
    }

openmp()
before = state()
threads = len(os.listdir("/proc/self/task"))
import fastce
assert len(os.listdir("/proc/self/task")) == threads, "import starts threads"

def check(when):
    for name, value in state().items():
        assert value == before[name], (when, name, before[name], value)

check("import")
import every_function
for dtype in (np.float32, np.float64):
    for _, call in every_function.calls(dtype):
        call()
check("calls")
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="looks at Linux's /proc")
@pytest.mark.skipif(not fastce.build_info()["openmp"], reason="looks at libgomp's settings")
def test_import_and_calls_leave_the_process_as_it_was(run_python):
    run_python("-c", STATE, PYTHONPATH=f"{TESTS}{os.pathsep}{TESTS.parent}")


# Whatever Python can tell of a process that reaches out: no file but those that import reads, no process, no socket, no
# foreign function, no memory that is both written and run.
AUDIT = """
import os, sys
import numpy as np

def executable():
    with open("/proc/self/maps") as maps:
        regions = [line.split() for line in maps]
    return {(region[1], *region[5:]) for region in regions if "x" in region[1]}

FORBIDDEN = (
    "socket.", "subprocess.", "os.", "shutil.", "ctypes.", "mmap.", "tempfile.", "urllib.", "http.", "ftplib.",
    "smtplib.", "pty.", "fcntl.", "signal.", "syslog.", "webbrowser.", "sqlite3.", "code.__new__", "builtins.input",
)
ALLOWED = {"os.listdir", "os.scandir"}      # looking for modules
found, importing = [], True

def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC) or not importing:
            # What is asked of the system at each call: how many processors it grants.
            if flags & 3 or not str(path).startswith(("/proc/", "/sys/fs/cgroup/")):
                found.append((event, str(path), mode, flags))
    elif event in ("compile", "exec", "import") and not importing:
        found.append((event, *map(str, arguments)))
    elif event.startswith(FORBIDDEN) and event not in ALLOWED:
        found.append((event, *map(str, arguments)))

sys.addaudithook(watch)
import fastce
assert not found, found
import every_function
# Some modules of Python and NumPy come at the first use of a function.
for _, call in every_function.calls(np.float32, [(2, 3)]):
    call()
for _, call in every_function.refused():
    try:
        call()
    except (TypeError, ValueError, IndexError):
        pass
assert not found, found
importing = False
before = executable()
for dtype in (np.float32, np.float64):
    for _, call in every_function.calls(dtype):
        call()
for _, call in every_function.refused():
    try:
        call()
    except (TypeError, ValueError, IndexError):
        pass
assert not found, found
after = executable()
assert after == before, after - before      # nothing is compiled at run time
assert not [region for region in after if "w" in region[0]], after
open(os.devnull, "w").close()
assert found.pop()[1] == os.devnull     # the hook would have seen it
"""


@pytest.mark.skipif(not os.path.isfile("/proc/self/maps"), reason="looks at Linux's /proc")
def test_nothing_is_sent_written_started_or_compiled_at_run_time(run_python):
    run_python("-c", AUDIT, PYTHONPATH=f"{TESTS}{os.pathsep}{TESTS.parent}", PYTHONDONTWRITEBYTECODE="1")
