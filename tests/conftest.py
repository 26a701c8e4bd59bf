"""What every test may ask for: random numbers, the two native dtypes, and Python in a process of its own."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import fastce

PACKAGE_PARENT = Path(fastce.__file__).resolve().parents[1]


def pytest_report_header():
    """Say which compiled target is tested; test_targets.py relies on this line."""
    info = fastce.build_info()
    return f"fastce: target {info['target']}, of {', '.join(info['available_targets'])}; openmp {info['openmp']}"


class RandomNumbers(threading.local):
    """A NumPy generator that gives every thread the same numbers, so that eight threads of one test repeat its run."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def __getattr__(self, name):
        return getattr(self.generator, name)


@pytest.fixture
def rng():
    return RandomNumbers(20240229)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture
def run_python():
    """Run Python in a fresh process that imports the fastce under test, under a hard time limit.

    A keyword of upper case letters sets (or with None removes) an environment variable. A process that fails, or does
    not end, fails the test with what it printed.
    """

    def run(*arguments, timeout=120, check=True, **environment):
        path = os.pathsep.join(filter(None, [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, **environment}
        env = {name: value for name, value in env.items() if value is not None}
        # -P: the working directory may hold another fastce; a script's own folder stays on the path.
        safe_path = ["-P"] if arguments[0] in ("-c", "-m") else []
        command = [sys.executable, *safe_path, *arguments]
        done = subprocess.run(command, env=env, timeout=timeout, capture_output=True, text=True)
        if check:
            assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
