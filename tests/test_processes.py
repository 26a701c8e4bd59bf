"""Forks, worker processes, signals, other OpenMP programs, systems without threads: right results, and an end."""

import importlib.util
import os
import shlex
import sys
import sysconfig
from pathlib import Path

import pytest
from test_build import run_tool

import fastce

HERE = Path(__file__).parent
SANITIZED = "FASTCE_SANITIZED" in os.environ
COMPILER = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[:1]
WITH_OPENMP = pytest.mark.skipif(not fastce.build_info()["openmp"], reason="this build starts no threads")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, signals and limits of Linux")

# The entry points of every compiled module, with teams of threads: short, medium and split rows, columns, general rows
# and entries. check() compares their bits with those of one thread.
CALLS = """
import multiprocessing, os, resource, signal, sys, threading, time, traceback, warnings
import numpy as np, fastce

rng = np.random.default_rng(0)
BATCHES = [
    (rng.normal(0, 4, shape).astype(np.float32), rng.integers(0, shape[1], shape[0]))
    for shape in ((9000, 10), (100, 1000), (3, 40_000))
]

def results(num_threads, batches=BATCHES):
    for logits, targets in batches:
        yield from fastce.cross_entropy_with_grad(logits, targets, num_threads=num_threads)
        yield fastce.cross_entropy(np.ascontiguousarray(logits.T), targets, axis=0, num_threads=num_threads)
        yield fastce.cross_entropy_stats(logits, targets, num_threads=num_threads).entropy
        yield fastce.binary_cross_entropy(logits, logits > 0, num_threads=num_threads)

EXPECTED = list(results(1))

def check(num_threads=2):
    for got, expected in zip(results(num_threads), EXPECTED, strict=True):
        assert np.array_equal(got, expected)

def in_child(work):
    "Fork; return the child's number. It ends with status 0 if `work` does, and is killed if that hangs."
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def wait_for(pid):
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"the child ended with status {status}"

def in_threads(count, work):
    "Call work(k) in threads that start together; raise what one of them raised."
    barrier, problems = threading.Barrier(count), []

    def run(k):
        barrier.wait()
        try:
            work(k)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    if problems:
        raise problems[0]
"""


@pytest.fixture
def run_calls(run_python, tmp_path):
    """Run a script that goes on from CALLS, in a process of its own that may take a minute, six if sanitized."""
    patience = 6 if "FASTCE_SANITIZED" in os.environ else 1

    def run(script, *flags, timeout=60, **environment):
        file = tmp_path / "script.py"
        file.write_text(CALLS + script)
        return run_python(*flags, str(file), timeout=patience * timeout, **environment)

    return run


def library(folder, source, *flags):
    """Compile a file of the tests as a shared library; return its path."""
    path = folder / f"{source}.so"
    run_tool(*COMPILER, "-O1", "-shared", "-fPIC", *flags, "-o", str(path), str(HERE / f"{source}.c"), "-ldl")
    return str(path)


# Forks

FORKED_IN_A_KERNEL = """
stop, inside = threading.Event(), False

def work():
    global inside
    logits, targets = BATCHES[0][0].repeat(20, axis=0), BATCHES[0][1].repeat(20)
    out = np.empty_like(logits)
    while not stop.is_set():
        inside = True
        fastce.cross_entropy_with_grad(logits, targets, out=out, num_threads=2)
        inside = False

def check_twice():
    check(2)
    check(None)

def check_in_a_grandchild():
    check()
    wait_for(in_child(check))

check()
warnings.simplefilter("ignore", DeprecationWarning)     # Python's own, about forks of processes with threads
thread = threading.Thread(target=work)
thread.start()
forks_in_a_kernel = 0
for k in range(40):
    time.sleep(0.001 * (k % 4))
    forks_in_a_kernel += inside
    wait_for(in_child(check_in_a_grandchild if k % 10 == 0 else check_twice))
stop.set()
thread.join()
check()
assert forks_in_a_kernel > 5
"""


def test_a_fork_while_another_thread_is_in_a_kernel(run_calls):
    run_calls(FORKED_IN_A_KERNEL)


IDLE_CHILD = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    check(2)
    pid = os.fork()
    if pid == 0:
        sys.exit(7)     # all that an interpreter does at its end, handlers of other libraries included
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        os.execv(sys.executable, [sys.executable, "-c", "print('another program')"])
    os.close(write)
    with open(read) as printed:
        assert printed.read() == "another program\\n"
    assert os.waitpid(pid, 0)[1] == 0
    check(2)
warned = [(warning.category, str(warning.message)) for warning in caught]
if sys.version_info < (3, 12):
    assert not warned, warned
else:   # about every fork of a process with threads, whoever started them
    assert len(warned) == 2 and all(kind is DeprecationWarning and "fork" in text for kind, text in warned), warned
"""


@WITH_OPENMP
def test_children_that_never_call_are_left_alone_and_only_python_warns_of_forks(run_calls):
    run_calls(IDLE_CHILD)


# Worker processes

POOLS = """
import concurrent.futures

def digest(num_threads):
    check(num_threads)
    return sum(float(np.sum(result)) for result in results(num_threads))

if __name__ == "__main__":
    check(2)
    expected = digest(1)
    context = multiprocessing.get_context(sys.argv[1])
    # The server that forks the workers has made calls itself by then, since it imports this file.
    context.set_forkserver_preload(["__main__"])
    with context.Pool(2) as pool:
        assert pool.map_async(digest, [2, None, 1, 2]).get(50) == [expected] * 4
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(digest, [2, None], timeout=50)) == [expected] * 2
    check(2)
elif sys.argv[1] == "forkserver":
    check(2)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pools_of_worker_processes_work(method, run_python, tmp_path):
    script = tmp_path / "pools.py"
    script.write_text(CALLS + POOLS)
    run_python("-W", "ignore::DeprecationWarning", str(script), method, timeout=90)


JOBLIB = """
import joblib

def digest(num_threads):
    check(num_threads)
    return sum(float(np.sum(result)) for result in results(num_threads))

if __name__ == "__main__":
    check(2)
    for backend in ("loky", "threading", "multiprocessing"):
        with joblib.Parallel(n_jobs=2, backend=backend, timeout=50) as parallel:
            assert parallel(joblib.delayed(digest)(n) for n in [2, None, 1, 2]) == [digest(1)] * 4, backend
        check(2)
"""


def test_workers_of_joblib_work(run_calls):
    pytest.importorskip("joblib", reason="comes with scikit-learn")
    run_calls(JOBLIB, "-W", "ignore::DeprecationWarning", timeout=90)


# As data loaders do it: workers that live for several epochs make batches, the parent computes losses meanwhile.
LOADER = """
context = multiprocessing.get_context("fork")
logits, targets = BATCHES[0]

def work(asked, made):
    for start in iter(asked.get, None):
        made.put((start, fastce.softmax(logits[start : start + 3000], num_threads=2)))

check(2)
whole = fastce.softmax(logits)
asked, made = context.Queue(), context.Queue()
workers = [context.Process(target=work, args=(asked, made), daemon=True) for _ in range(2)]
for worker in workers: worker.start()
for epoch in range(3):
    for start in range(0, len(logits), 3000): asked.put(start)
    for _ in range(0, len(logits), 3000):
        check(2)
        start, batch = made.get(timeout=30)
        assert np.array_equal(batch, whole[start : start + 3000])
for worker in workers: asked.put(None)
for worker in workers:
    worker.join(30)
    assert worker.exitcode == 0
check(2)
"""


def test_workers_that_load_data_work(run_calls):
    run_calls(LOADER, "-W", "ignore::DeprecationWarning")


TORCH = """
check(2)
import torch
from torch.utils.data import DataLoader

torch.set_num_threads(2)
logits, targets = BATCHES[1]

class Softened:
    def __len__(self):
        return 4

    def __getitem__(self, k):
        return torch.from_numpy(fastce.softmax(np.ascontiguousarray(logits[: 40 + k]), num_threads=2))

def torch_loss():
    scores = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(scores, torch.tensor(targets))
    loss.backward()
    return float(loss.detach()), scores.grad.numpy()

loss, grad = fastce.cross_entropy_with_grad(logits, targets)
for _ in range(10):
    check(2)
    its_loss, its_grad = torch_loss()
    assert abs(its_loss / loss - 1) < 1e-5 and np.allclose(its_grad, grad, rtol=1e-4, atol=1e-7)
loader = DataLoader(Softened(), batch_size=None, num_workers=2, persistent_workers=True, timeout=30)
for _ in range(2):
    for k, rows in enumerate(loader):
        check(2)
        assert np.array_equal(rows.numpy(), fastce.softmax(logits[: 40 + k]))
del loader
torch_loss()
check(2)
"""


def test_torch_and_its_data_loader_in_one_process(run_calls):
    # Other orders of import, and more libraries: torture/runtimes.py.
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch, an optional peer, is not installed")
    run_calls(TORCH, "-W", "ignore::DeprecationWarning", timeout=120)


# Threads

EIGHT_TIMES_TWO = """
def tasks():
    return len(os.listdir("/proc/self/task"))

check(2)
before = tasks()

def work(k):
    for _ in range(3):
        check(2)

in_threads(8, work)
# A thread's own team ends with it, a moment later.
deadline = time.monotonic() + 20
while tasks() > before and time.monotonic() < deadline:
    time.sleep(0.01)
assert tasks() == before, (before, tasks())
"""


def test_eight_callers_of_two_threads_each_and_none_is_left(run_calls):
    run_calls(EIGHT_TIMES_TWO)


# Python's callbacks take the interpreter lock by themselves, whatever thread they are called in.
REGIONS = """
import ctypes
library = ctypes.CDLL(sys.argv[1])
called, problems = [], []

@ctypes.CFUNCTYPE(None, ctypes.c_int)
def work(number):
    try:
        for num_threads in (2, None, 1):
            check(num_threads)
        called.append(number)
    except BaseException as problem:
        problems.append(problem)

for repeat in range(2):
    for threads, levels in ((1, 1), (2, 1), (4, 1), (4, 3)):
        called.clear()
        library.in_region(threads, levels, work)
        assert not problems and sorted(called) == list(range(threads)), (problems, called)
    check(2)
"""


@WITH_OPENMP
def test_calls_from_within_a_parallel_region_of_another_library(run_python, tmp_path):
    region = library(tmp_path, "openmp_region", "-fopenmp")
    script = tmp_path / "script.py"
    script.write_text(CALLS + REGIONS)
    run_python(str(script), region, timeout=60)


FOREIGN_THREADS = """
import ctypes
libc = ctypes.CDLL(None)
libc.pthread_create.argtypes = [ctypes.c_void_p] * 4
libc.pthread_join.argtypes = [ctypes.c_ulong, ctypes.c_void_p]
called, problems = [], []

@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
def work(number):
    try:
        for _ in range(3):
            check(2)
        called.append(number or 0)
    except BaseException as problem:
        problems.append(problem)

threads = [ctypes.c_ulong() for _ in range(6)]
for number, thread in enumerate(threads):
    assert libc.pthread_create(ctypes.byref(thread), None, work, number) == 0
for thread in threads:
    assert libc.pthread_join(thread, None) == 0
assert not problems and sorted(called) == list(range(6)), problems
check(2)
"""


def test_calls_in_threads_that_python_did_not_start(run_calls):
    run_calls(FOREIGN_THREADS)


# scikit-learn's wheels bring an OpenMP library of their own, a second one beside the system's.
BESIDE_SCIKIT_LEARN = """
from sklearn.metrics import pairwise_distances_argmin

x, y = rng.normal(size=(1500, 8)), rng.normal(size=(200, 8))
nearest = np.array([((y - row) ** 2).sum(axis=1).argmin() for row in x])
check(2)

def work(k):
    for _ in range(3):
        assert (pairwise_distances_argmin(x, y) == nearest).all()
        check(2)

work(0)
in_threads(3, work)
wait_for(in_child(check))
work(0)
with open("/proc/self/maps") as maps:
    print(len({line.split()[-1] for line in maps if "gomp" in line or "libomp" in line or "iomp" in line}))
"""


@WITH_OPENMP
def test_two_openmp_libraries_in_one_process(run_calls):
    copies = int(run_calls(BESIDE_SCIKIT_LEARN, "-W", "ignore::DeprecationWarning", timeout=90).stdout)
    if copies < 2:
        pytest.skip("scikit-learn uses the same OpenMP library here")


AT_EXIT = """
begun = threading.Semaphore(0)

def work():
    logits, targets = BATCHES[0][0].repeat(20, axis=0), BATCHES[0][1].repeat(20)
    while True:
        begun.release()
        fastce.cross_entropy_with_grad(logits, targets, num_threads=2)

for _ in range(3): threading.Thread(target=work, daemon=True).start()
for _ in range(9): begun.acquire()
print("leaving")
"""


def test_an_interpreter_ends_while_daemon_threads_are_in_kernels(run_calls):
    for _ in range(3):
        done = run_calls(AT_EXIT)
        assert done.stdout == "leaving\n" and done.stderr == ""


# Signals

# What passes through buffers is written block by block: a buffer that holds both new and old rows shows that the signal
# was noticed between two blocks, not when the call was over.
INTERRUPTED = """
from random import Random
from calls import calls

random = Random(0)
signal.signal(signal.SIGINT, signal.default_int_handler)

def interrupt(call, delay):
    "Call until SIGINT, `delay` seconds from now, raises KeyboardInterrupt."
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        while True:
            call()
    except KeyboardInterrupt:
        timer.join()

for name, call in calls(np.float32, (1 << 15, 16)).items():
    before = call()
    if not call.buffers:
        interrupt(call, 0.01)
    else:
        key = call.buffers[0]
        out = np.empty((16, 1 << 15), np.float32).T

        def call_with_buffer():
            out[...] = 12345.0
            call(**{key: out})

        start = time.monotonic()
        call_with_buffer()
        whole = time.monotonic() - start
        for _ in range(300):
            # Beside other programs a call may take several times as long as the one that was measured.
            interrupt(call_with_buffer, random.uniform(0, 4 * whole))
            old = (out == 12345.0).all(axis=1)
            if old[-1] and not old[0]:
                break
        else:
            raise AssertionError(f"{name}: no call was interrupted half-way")
    for one, other in zip(call(), before, strict=True):
        assert np.array_equal(one, other, equal_nan=True), name
check(2)
"""


def test_every_call_can_be_interrupted(run_calls):
    # How soon is measured by torture/interrupts.py.
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    run_calls(INTERRUPTED, PYTHONPATH=path)


BESIDE_A_WORKER = """
signal.signal(signal.SIGINT, signal.default_int_handler)
stop, done = threading.Event(), []

def work():
    while not stop.is_set():
        check(2)
        done.append(True)

thread = threading.Thread(target=work)
thread.start()
for _ in range(5):
    timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        # Not long in one lock: it sleeps on where the system hands the signal to another thread, whatever that does.
        for _ in range(6000):
            threading.Event().wait(0.01)
        raise AssertionError("no KeyboardInterrupt")
    except KeyboardInterrupt:
        timer.join()
        assert thread.is_alive()
before = len(done)
while len(done) == before:      # the worker has noticed nothing
    time.sleep(0.001)
stop.set()
thread.join()
check(2)
"""


def test_an_interrupt_reaches_the_main_thread_while_another_computes(run_calls):
    run_calls(BESIDE_A_WORKER)


STORM = """
counts = {signal.SIGALRM: 0, signal.SIGCHLD: 0}

def count(number, frame):
    counts[number] += 1

for number in counts: signal.signal(number, count)
stop = threading.Event()

def storm():
    while not stop.is_set():
        os.kill(os.getpid(), signal.SIGCHLD)
        time.sleep(0.0005)

signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
thread = threading.Thread(target=storm)
thread.start()
rounds = 0
while rounds < 10 or min(counts.values()) < 100:
    check(2)
    rounds += 1
signal.setitimer(signal.ITIMER_REAL, 0)
stop.set()
thread.join()
"""


def test_storms_of_signals_change_nothing(run_calls):
    run_calls(STORM)


# No threads to be had

WARNED = """
def warnings_of(call, *arguments):
    "Return how many warnings a call gives, all of them about threads that could not be started."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)     # of Python, where a process with threads forks
        call(*arguments)
    for warning in caught:
        assert warning.category is RuntimeWarning and "start" in str(warning.message), warning
        assert "thread" in str(warning.message), warning
    return len(caught)
"""

REFUSING = """
import ctypes
allow = ctypes.CDLL(None).allow_threads
"""

REFUSALS = {
    "from the first call on": """
allow(0)
assert warnings_of(check, 1) == 0
assert warnings_of(check, 4) == 1       # of many calls that wanted threads
assert warnings_of(check, 4) == 0
""",
    "from the second call on": """
assert warnings_of(check, 2) == 0
allow(0)
assert warnings_of(check, 2) == 0       # the thread that there is can be used
assert warnings_of(check, 4) == 1
assert warnings_of(check, 3) <= 1       # one for each number of threads
assert warnings_of(check, 2) + warnings_of(check, 4) + warnings_of(check, 1) == 0
""",
    "half-way": """
allow(1)
assert warnings_of(check, 4) == 1
""",
    "for a while": """
allow(0)
assert warnings_of(check, 4) == 1
allow(-1)
assert warnings_of(check, 4) == 0
assert len(os.listdir("/proc/self/task")) > 1  # as many as the last of the calls had work for
""",
    "in threads that exist": """
go = threading.Event()

def work(k):
    go.wait()
    check(4)

def refuse_then_go():
    time.sleep(0.1)
    allow(0)
    go.set()

starter = threading.Thread(target=refuse_then_go)
starter.start()
assert warnings_of(in_threads, 3, work) == 1
""",
    "in a child": """
check(2)
allow(0)
assert warnings_of(lambda: wait_for(in_child(check))) == 0
""",
}


@WITH_OPENMP
@pytest.mark.parametrize("when", REFUSALS)
def test_threads_that_cannot_be_started_are_done_without(when, run_calls, tmp_path):
    refusing = library(tmp_path, "refused_threads")
    preloaded = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), refusing]))
    run_calls(WARNED + REFUSING + REFUSALS[when], "-W", "ignore::DeprecationWarning", LD_PRELOAD=preloaded)


# The system's own refusal. Root is never refused, and becomes somebody else first.
LIMITED_TASKS = """
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
try:
    threading.Thread(target=check).start()
    raise AssertionError("a thread was started")
except RuntimeError:
    pass
assert warnings_of(check, 1) == 0
assert warnings_of(check, 4) == 1
assert warnings_of(check, 4) == 0
"""


@WITH_OPENMP
def test_a_limit_of_tasks_means_one_thread(run_calls):
    run_calls(WARNED + LIMITED_TASKS)


# A thread's stack is address space, of which nothing is left for it here; small arrays still find room.
LIMITED_SPACE = """
small = BATCHES[:1]
expected = list(results(1, small))

def check_small(num_threads):
    for got, wanted in zip(results(num_threads, small), expected, strict=True):
        assert np.array_equal(got, wanted)

logits = np.zeros((1, 1 << 22))
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), resource.RLIM_INFINITY))
for function in (fastce.cross_entropy_with_grad, fastce.binary_cross_entropy_with_grad):
    for num_threads in (1, 2):
        try:
            function(logits, [0] if function is fastce.cross_entropy_with_grad else logits, num_threads=num_threads)
            raise AssertionError("32 MiB were had")
        except MemoryError:
            pass
assert warnings_of(check_small, 1) == 0
assert warnings_of(check_small, 2) == int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
check(1)
"""


@WITH_OPENMP
@pytest.mark.skipif(SANITIZED, reason="a sanitizer reserves terabytes of address space")
@pytest.mark.parametrize(("stack", "warned"), [("64m", 1), ("256k", 0)])
def test_little_address_space_means_a_memory_error_and_one_thread(stack, warned, run_python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(CALLS + WARNED + LIMITED_SPACE)
    run_python(str(script), str(warned), OMP_STACKSIZE=stack, timeout=60)
