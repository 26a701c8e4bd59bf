"""Memory that cannot be had is a MemoryError: nothing is written, nothing lost, and the next call is right."""

import os
import shlex
import sys
import sysconfig
from pathlib import Path

import pytest
from test_build import run_tool

HERE = Path(__file__).parent
# "malloc": memory of Python's own objects too, which free-threaded Python has from nowhere but its own allocator.
ALLOCATORS = ["default"] if sysconfig.get_config_var("Py_GIL_DISABLED") else ["default", "malloc"]
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes the place of glibc's malloc"),
    pytest.mark.skipif(
        "FASTCE_SANITIZED" in os.environ, reason="a sanitizer has a malloc of its own, of which there can be one only"
    ),
]


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = tmp_path_factory.mktemp("malloc") / "failing_malloc.so"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
    run_tool(*compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "failing_malloc.c"))
    return str(library)


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_any_allocation_may_fail(allocator, shim, run_python):
    done = run_python(
        str(HERE / "allocation_failures.py"), "--quick", LD_PRELOAD=shim, FAILING_MALLOC=shim, PYTHONMALLOC=allocator,
        timeout=300,
    )  # fmt: skip
    *_, failures, safe = done.stdout.split("\n")[:-1]
    assert safe == "safe" and int(failures.split()[0]) > 1000
