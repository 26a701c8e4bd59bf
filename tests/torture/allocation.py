"""Have every allocation of every kind of call fail in turn, without and with those of Python's own small objects."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def run(allocator, library, arguments):
    """Run tests/allocation_failures.py with this allocator for Python's objects; return the number of failures."""
    environment = {"LD_PRELOAD": library, "FAILING_MALLOC": library, "PYTHONMALLOC": allocator}
    command = [sys.executable, str(TESTS / "allocation_failures.py"), *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "safe"
    return int(lines[-2].split()[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller calls")
    arguments = ["--quick"] if parser.parse_args().quick else []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "failing_malloc.so"))
        compiler = os.environ.get("CC", "cc")
        subprocess.run(
            [compiler, "-O1", "-shared", "-fPIC", "-o", library, str(TESTS / "failing_malloc.c")], check=True
        )
        failures = {allocator: run(allocator, library, arguments) for allocator in ("default", "malloc")}
    print(
        f"result: {failures['default']:,} failed allocations, and {failures['malloc']:,} with those of small objects: "
        f"all a MemoryError, no array changed; {time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
