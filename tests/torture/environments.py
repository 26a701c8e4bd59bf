"""Run large parts of the suite in processes that are set up in every way that a host may think of.

    python tests/torture/environments.py [--quick] [--only WORD]
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What starts processes of its own for every target is left to the plain suite, which has run it.
WHOLE = ["tests", "--ignore=tests/test_targets.py", "--ignore=tests/test_examples.py", "--ignore=tests/test_torture.py"]
NUMBERS = [f"tests/test_{name}.py" for name in ("values", "special_values", "options", "soft_targets", "layouts")]
NUMBERS += [f"tests/test_{name}.py" for name in ("gradients", "errors", "option_errors", "statistics", "binary")]
# Flushed to zero, subnormal results are not those of the formula; these tests do not ask for any.
NORMAL = ["tests/test_values.py", "tests/test_layouts.py", "tests/test_errors.py", "tests/test_option_errors.py"]
NORMAL += ["tests/test_threads.py"]
THREADS = ["tests/test_threads.py", "tests/test_layouts.py", "tests/test_values.py", "tests/test_memory.py"]

# As another library of the process may do: subnormal results and operands are zero from here on, by MXCSR, the last
# word of glibc's fenv_t on x86-64.
FLUSHING = """
import ctypes, sys
libm = ctypes.CDLL("libm.so.6")
modes = (ctypes.c_uint32 * 8)()
libm.fegetenv(modes)
modes[7] |= 0x8040
libm.fesetenv(modes)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""

CHECKING_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.check=3", "LD_PRELOAD": "libc_malloc_debug.so.0"}

# name, flags of Python, environment variables, tests
SETTINGS = [
    ("python -O", ["-O"], {}, NUMBERS),  # pytest's own assertions stay: it rewrites them
    ("python -X dev -W error", ["-X", "dev"], {"PYTHONWARNINGS": "error"}, WHOLE),
    ("PYTHONMALLOC=debug MALLOC_PERTURB_=165", [], {"PYTHONMALLOC": "debug", "MALLOC_PERTURB_": "165"}, WHOLE),
    ("glibc's checking malloc", [], CHECKING_MALLOC, NUMBERS),
    ("OMP_NUM_THREADS=99999", [], {"OMP_NUM_THREADS": "99999"}, THREADS),
    ("OMP_THREAD_LIMIT=1", [], {"OMP_THREAD_LIMIT": "1"}, NUMBERS),
    ("OMP_WAIT_POLICY=active OMP_PROC_BIND=true", [], {"OMP_WAIT_POLICY": "active", "OMP_PROC_BIND": "true"}, THREADS),
    ("OMP_STACKSIZE=16k", [], {"OMP_STACKSIZE": "16k", "FASTCE_NUM_THREADS": "3"}, THREADS + NUMBERS),
    ("FASTCE_NUM_THREADS=7", [], {"FASTCE_NUM_THREADS": "7"}, NUMBERS),
    ("subnormal numbers flushed to zero", ["-c", FLUSHING], {}, NORMAL),
]


def run(flags, variables, tests, quick):
    """Run tests in a process of its own; return (exit status, how many passed, what it printed)."""
    python = flags if "-c" in flags else [*flags, "-m", "pytest"]
    chosen = ["tests/test_values.py"] if quick else tests
    warnings = ["-W", "error"] if "dev" in flags else []
    done = subprocess.run(
        [sys.executable, *python, "-q", "-p", "no:cacheprovider", *warnings, *chosen], cwd=ROOT, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables, capture_output=True, timeout=7200,
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", done.stdout)
    return done.returncode, int(passed[1]) if passed else 0, done.stdout + done.stderr


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one file of tests in each setting")
    parser.add_argument("--only", default="", help="settings whose name holds this word")
    arguments = parser.parse_args()
    start, total, failed = time.monotonic(), 0, []
    settings = [setting for setting in SETTINGS if arguments.only in setting[0]]
    for name, flags, variables, tests in settings:
        begun = time.monotonic()
        status, passed, printed = run(flags, variables, tests, arguments.quick)
        total += passed
        print(f"{name}: status {status}, {passed} passed ({time.monotonic() - begun:.0f} s)", flush=True)
        if status != 0 or passed == 0:
            failed.append(name)
            print("\n".join(printed.splitlines()[-60:]), flush=True)
    seconds = time.monotonic() - start
    print(f"result: {len(settings)} settings, {total} tests passed, failed in {failed or 'none'}, {seconds:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
