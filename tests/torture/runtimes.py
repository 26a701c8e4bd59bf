"""fastce with torch, scikit-learn, numba and Intel's OpenMP in one process, imported in any order: right, and no hang.

    python tests/torture/runtimes.py [--quick]

Each order of imports gets a process of its own, in which all of them compute in turns on two threads, then at once in
three Python threads, then in turns again after forks and workers of joblib. fastce's results must have the bits of one
thread. A process that is not done after five minutes hangs.
"""

import argparse
import importlib
import importlib.metadata
import itertools
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from ctypes import CDLL, CFUNCTYPE, c_int
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
LIBRARIES = ("fastce", "torch", "sklearn", "numba")
TIMEOUT = 300  # seconds


class Fastce:
    """Its calls on two threads have the bits of its calls on one."""

    shapes = ((9000, 10), (100, 1000), (3, 40_000))

    def __init__(self):
        import fastce

        self.fastce = fastce
        rng = np.random.default_rng(0)
        self.batches = [
            (rng.normal(0, 4, shape).astype(np.float32), rng.integers(0, shape[1], shape[0])) for shape in self.shapes
        ]
        self.expected = list(self.results(1))

    def results(self, num_threads):
        for logits, targets in self.batches:
            yield from self.fastce.cross_entropy_with_grad(logits, targets, num_threads=num_threads)
            yield self.fastce.cross_entropy_stats(logits, targets, num_threads=num_threads).entropy
            yield self.fastce.binary_cross_entropy(logits, logits > 0, num_threads=num_threads)

    def work(self, num_threads=2):
        for got, expected in zip(self.results(num_threads), self.expected, strict=True):
            assert np.array_equal(got, expected), "fastce"


class Torch:
    """Its loss and gradient are close to their own first ones."""

    def __init__(self):
        import torch

        self.torch = torch
        torch.set_num_threads(2)
        rng = np.random.default_rng(1)
        self.logits = torch.tensor(rng.normal(size=(400, 1000)).astype(np.float32), requires_grad=True)
        self.targets = torch.tensor(rng.integers(0, 1000, 400))
        self.expected = self.gradient()

    def gradient(self):
        loss = self.torch.nn.functional.cross_entropy(self.logits, self.targets)
        return self.torch.autograd.grad(loss, self.logits)[0].numpy()

    def work(self):
        assert np.allclose(self.gradient(), self.expected, rtol=1e-4, atol=1e-8), "torch"


class ScikitLearn:
    """Its nearest neighbours are the true ones."""

    def __init__(self):
        from sklearn.metrics import pairwise_distances_argmin

        self.nearest = pairwise_distances_argmin
        rng = np.random.default_rng(2)
        self.x, self.y = rng.normal(size=(1500, 8)), rng.normal(size=(200, 8))
        self.expected = np.array([((self.y - row) ** 2).sum(axis=1).argmin() for row in self.x])

    def work(self):
        assert (self.nearest(self.x, self.y) == self.expected).all(), "scikit-learn"


class Numba:
    """Its parallel loops count right."""

    def __init__(self):
        import numba

        numba.config.THREADING_LAYER = "omp"
        numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))

        def add(n):
            total = 0
            for i in numba.prange(n):
                total += i % 7
            return total

        self.add = numba.njit(parallel=True)(add)
        self.expected = sum(i % 7 for i in range(100_003))
        self.work()

    def work(self):
        assert self.add(100_003) == self.expected, "numba"


class IntelOpenMP:
    """Every thread of its parallel regions calls fastce, which starts teams of another library."""

    def __init__(self, region, fastce):
        self.region = CDLL(region)
        self.problems = []

        @CFUNCTYPE(None, c_int)
        def call(number):
            try:
                fastce.work()
            except BaseException as problem:
                self.problems.append(problem)

        self.call = call

    def work(self):
        self.region.in_region(2, 2, self.call)
        assert not self.problems, self.problems


def in_threads(count, work):
    """Call `work` in several threads at once; raise what one of them raised."""
    problems = []

    def run():
        try:
            work()
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


def in_child(work):
    """Call `work` in a forked child, which is killed if it hangs."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"a child ended with status {status}"


def compute_in_a_worker(num_threads):
    Fastce().work(num_threads)
    return True


def compute(order, region, rounds):
    """Import in this order; let all compute. Print the number of rounds and of OpenMP libraries."""
    import joblib

    for name in order:
        importlib.import_module(name)
    makers = {"fastce": Fastce, "torch": Torch, "sklearn": ScikitLearn, "numba": Numba}
    workers = [makers[name]() for name in order]
    fastce = workers[order.index("fastce")]
    if region:
        workers.append(IntelOpenMP(region, fastce))

    def all_work():
        for _ in range(rounds):
            for worker in workers:
                worker.work()

    all_work()
    in_threads(3, all_work)
    for _ in range(rounds):
        in_child(fastce.work)
        in_child(lambda: in_child(fastce.work))
        fastce.work()
    for backend in ("loky", "threading"):
        with joblib.Parallel(n_jobs=2, backend=backend, timeout=TIMEOUT) as parallel:
            assert all(parallel(joblib.delayed(compute_in_a_worker)(n) for n in (2, None, 1, 2)))
    all_work()
    maps = Path("/proc/self/maps").read_text().splitlines()
    libraries = {line.split()[-1] for line in maps if any(name in line for name in ("libgomp", "libiomp", "libomp"))}
    print(rounds * 5 * len(workers), len(libraries))


def intel_region(folder):
    """Return the path of a library whose parallel regions are Intel's, or None if intel-openmp is not installed."""
    try:
        files = importlib.metadata.files("intel-openmp") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    runtime = next(file.locate().resolve() for file in files if file.name == "libiomp5.so")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
    compiled, shared = str(folder / "region.o"), str(folder / "region.so")
    source = str(TESTS / "openmp_region.c")
    subprocess.run([*compiler, "-O1", "-fPIC", "-fopenmp", "-c", source, "-o", compiled], check=True)
    # Without -fopenmp, which would link gcc's own library: Intel's has the entry points that gcc calls, too.
    subprocess.run(
        [*compiler, "-shared", compiled, str(runtime), f"-Wl,-rpath,{runtime.parent}", "-o", shared], check=True
    )
    return shared


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two orders of imports, few rounds")
    parser.add_argument("--order", nargs="+", choices=LIBRARIES, help="this order alone, in this process")
    parser.add_argument("--region", help="the library with Intel's regions, for --order")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.order:
        compute(arguments.order, arguments.region, arguments.rounds)
        return
    orders = list(itertools.permutations(LIBRARIES))
    rounds = arguments.rounds
    if arguments.quick:
        orders, rounds = [LIBRARIES, LIBRARIES[::-1]], 2
    begun, calls, most, failed = time.monotonic(), 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        region = intel_region(Path(folder))
        path = os.pathsep.join(filter(None, [str(TESTS.parent), os.environ.get("PYTHONPATH")]))
        for order in orders:
            command = [sys.executable, "-W", "ignore", __file__, "--rounds", str(rounds), "--order", *order]
            command += ["--region", region] if region else []
            start = time.monotonic()
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | {"PYTHONPATH": path}
                )
                problem = done.stdout + done.stderr if done.returncode else ""
            except subprocess.TimeoutExpired as error:
                problem = f"not done after {TIMEOUT} s\n{(error.stderr or b'').decode()}"
            if problem:
                failed.append(" ".join(order))
                print(f"{' '.join(order)}: {problem}", flush=True)
                continue
            made, libraries = map(int, done.stdout.split())
            calls, most = calls + made, max(most, libraries)
            print(f"{' '.join(order)}: {libraries} OpenMP libraries, {time.monotonic() - start:.0f} s", flush=True)
    print(
        f"result: {len(orders)} orders of imports, {calls} rounds of calls of fastce, torch, scikit-learn and numba"
        f"{' and from regions of Intel OpenMP' if region else ''}, up to {most} OpenMP libraries in one process; "
        f"failed: {', '.join(failed) or 'none'}; {time.monotonic() - begun:.0f} s"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
