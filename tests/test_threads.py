"""Threads change no bit, leave Python running, and survive forks, limits and concurrent callers."""

import os
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import fastce
from fastce import _engine

WITH_GIL = pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="this Python has no interpreter lock to release"
)
SHAPES = [
    (1, 5),
    (1, 1_000_000),
    (3, 40_000),
    (5, 1000),
    (7, 128_256),
    (50, 4099),
    (1000, 100),
    (1001, 1000),
    (70_000, 10),
]


def problem(shape, dtype):
    rng = np.random.default_rng(shape)
    logits = rng.normal(0, 4, shape).astype(dtype)
    logits[:: max(1, shape[0] // 5), shape[1] // 2] = 80
    targets = rng.integers(0, shape[1], shape[0])
    targets[1::9] = -100
    return logits, targets


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape, dtype):
    logits, targets = problem(shape, dtype)
    one = {
        reduction: fastce.cross_entropy_with_grad(logits, targets, reduction=reduction, num_threads=1)
        for reduction in ("none", "mean")
    }
    for num_threads in (2, 3, 7, 10**9, 2**100, None):
        for reduction, (loss, gradient) in one.items():
            options = {"reduction": reduction, "num_threads": num_threads}
            got_loss, got = fastce.cross_entropy_with_grad(logits, targets, **options)
            np.testing.assert_array_equal(got_loss, loss)
            np.testing.assert_array_equal(got, gradient)
            np.testing.assert_array_equal(fastce.cross_entropy(logits, targets, **options), loss)
    for num_threads in (1, 2, 3, 7):
        given = logits.copy()
        fastce.cross_entropy_with_grad(given, targets, num_threads=num_threads, out=given)
        np.testing.assert_array_equal(given, one["mean"][1])


def test_any_number_of_threads_on_a_strided_class_axis(dtype):
    logits, targets = problem((3000, 100), dtype)
    one = fastce.cross_entropy_with_grad(logits, targets)
    across = np.ascontiguousarray(logits.T)
    for num_threads in (1, 2, 3, 7):
        loss, gradient = fastce.cross_entropy_with_grad(across, targets, axis=0, num_threads=num_threads)
        assert loss == one[0]
        np.testing.assert_array_equal(gradient.T, one[1])


def test_num_threads_may_be_any_integer(dtype):
    logits, targets = problem((50, 10), dtype)
    one = fastce.cross_entropy(logits, targets)
    for num_threads in (np.int8(2), np.uint64(3), np.array(2)):
        assert fastce.cross_entropy(logits, targets, num_threads=num_threads) == one


@pytest.fixture
def ticks():
    """A list whose one number a second Python thread raises whenever it gets the interpreter to itself.

    The interpreter is never taken from a running thread here (the switch interval is far longer than the test), so
    while the main thread computes, the number can grow only if the main thread lets go of the interpreter.
    """
    count, stop = [0], threading.Event()

    def tick():
        while not stop.is_set():
            count[0] += 1
            time.sleep(1e-5)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=tick)
    thread.start()
    sys.setswitchinterval(1000)
    yield count
    sys.setswitchinterval(interval)
    stop.set()
    thread.join()


@WITH_GIL
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_python_runs_on_while_a_kernel_runs(with_gradient, num_threads, ticks):
    # One row: nothing but the kernel itself takes time. Whether the other thread is scheduled during one particular
    # call is up to the operating system, so there are many calls; if the interpreter is held, none of them counts.
    logits = np.zeros((1, 2_000_000), np.float32)
    out = np.empty_like(logits)
    targets = np.array([5])
    grown = 0
    for _ in range(300):
        before = ticks[0]
        if with_gradient:
            fastce.cross_entropy_with_grad(logits, targets, out=out, num_threads=num_threads)
        else:
            fastce.cross_entropy(logits, targets, num_threads=num_threads)
        grown += ticks[0] > before
        if grown >= 3:
            break
    assert grown >= 3


@WITH_GIL
def test_python_stands_still_while_python_computes(ticks):
    # The test above would prove nothing if the other thread could run in spite of the switch interval.
    before = ticks[0]
    total = sum(range(200_000))
    assert ticks[0] == before and total


def run_in_threads(count, work):
    """Call work(k) in `count` threads that start together; return the results, or raise what one of them raised."""
    barrier = threading.Barrier(count)
    results = [None] * count

    def run(k):
        barrier.wait()
        try:
            results[k] = work(k)
        except BaseException as problem:
            results[k] = problem

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_concurrent_callers_get_the_same_bits(dtype):
    problems = [problem(shape, dtype) for shape in ((500, 100), (3, 40_000), (9000, 10))]
    expected = [fastce.cross_entropy_with_grad(*given) for given in problems]

    def work(k):
        for repeat in range(6):
            for given, (loss, gradient) in zip(problems, expected, strict=True):
                got_loss, got = fastce.cross_entropy_with_grad(*given, num_threads=1 + (k + repeat) % 3)
                assert got_loss == loss
                np.testing.assert_array_equal(got, gradient)

    run_in_threads(8, work)


def test_concurrent_callers_get_their_own_errors():
    logits = np.zeros((2000, 10), np.float32)

    def work(k):
        for _ in range(20):
            targets = np.zeros(2000, int)
            targets[100 + k] = 10 + k
            with pytest.raises(IndexError, match=rf"\b{100 + k}\b.*\b{10 + k}\b"):
                fastce.cross_entropy(logits, targets)

    run_in_threads(6, work)


def test_targets_that_change_during_the_call_are_memory_safe():
    # Class ids are copied and checked once: a row's loss is that of a value that was there, or the call is refused.
    logits = np.random.default_rng(0).normal(0, 3, (3000, 10)).astype(np.float32)
    targets = np.zeros(3000, np.int64)
    allowed = [fastce.cross_entropy(logits, np.full(3000, value), reduction="none") for value in (0, 7)]
    stop = threading.Event()

    def disturb():
        while not stop.is_set():
            for value in (7, 10**9, 0, -(2**60)):
                targets[:] = value

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(200):
            try:
                losses, _ = fastce.cross_entropy_with_grad(logits, targets, reduction="none")
            except IndexError:
                continue
            assert ((losses == allowed[0]) | (losses == allowed[1])).all()
    finally:
        stop.set()
        thread.join()


# In processes of their own

THREAD_COUNT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import numpy as np, fastce
    for _ in range(3):
        fastce.cross_entropy(np.zeros((50_000, 10)), np.zeros(50_000, int))
        count = fastce.build_info()["num_threads"]
        fastce.cross_entropy_with_grad(np.zeros((50_000, 10)), np.zeros(50_000, int))
print(count, len(caught), *(f"{type(w.message).__name__}: {w.message}" for w in caught))
"""


def default_threads(run_python, value):
    count, warned, *words = run_python("-c", THREAD_COUNT, FASTCE_NUM_THREADS=value).stdout.split(maxsplit=2)
    return int(count), int(warned), "".join(words)


def test_the_environment_sets_the_default_number_of_threads(run_python):
    automatic, warned, _ = default_threads(run_python, None)
    assert automatic >= 1 and not warned
    assert default_threads(run_python, "1")[:2] == (1, 0)
    assert default_threads(run_python, str(automatic))[:2] == (automatic, 0)


@pytest.mark.parametrize("value", ["0", "-2", "two", "1.5"])
def test_an_environment_that_makes_no_sense_is_ignored_with_one_warning(value, run_python):
    automatic = default_threads(run_python, None)[0]
    count, warned, words = default_threads(run_python, value)
    assert count == automatic
    assert warned == 1
    assert words.startswith("RuntimeWarning: ") and "FASTCE_NUM_THREADS" in words and value in words


def test_an_absurd_number_of_threads_is_capped(run_python):
    count, warned, _ = default_threads(run_python, "100000")
    assert 1 <= count <= 4096 and not warned


LIMITED = """
import numpy as np, fastce, threadpoolctl
automatic = fastce.build_info()["num_threads"]
logits, targets = np.random.default_rng(0).normal(size=(60_000, 10)), np.zeros(60_000, int)
free = fastce.cross_entropy_with_grad(logits, targets)
with threadpoolctl.threadpool_limits(1):
    assert fastce.build_info()["num_threads"] == 1
    limited = fastce.cross_entropy_with_grad(logits, targets)
assert fastce.build_info()["num_threads"] == automatic
assert free[0] == limited[0] and (free[1] == limited[1]).all()
"""


def test_threadpoolctl_limits_the_threads(run_python):
    run_python("-c", LIMITED, FASTCE_NUM_THREADS=None)


LIMITED_FROM_THE_FIRST_CALL = """
import os, numpy as np, fastce, threadpoolctl
logits, targets = np.zeros((200_000, 10), np.float32), np.zeros(200_000, int)
before = len(os.listdir("/proc/self/task"))
with threadpoolctl.threadpool_limits(1):
    fastce.cross_entropy_with_grad(logits, targets)
fastce.cross_entropy_with_grad(logits, targets, num_threads=1)
assert len(os.listdir("/proc/self/task")) == before
fastce.cross_entropy_with_grad(logits, targets, num_threads=2)
after = len(os.listdir("/proc/self/task"))
print(after - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in Linux's /proc")
def test_threads_are_started_only_where_they_are_allowed(run_python):
    started = int(run_python("-c", LIMITED_FROM_THE_FIRST_CALL, FASTCE_NUM_THREADS=None).stdout)
    assert started == (1 if fastce.build_info()["openmp"] else 0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="sets the CPU affinity")
def test_one_processor_means_one_thread(run_python):
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import fastce
print(fastce.build_info()["num_threads"])
"""
    assert run_python("-c", code, FASTCE_NUM_THREADS=None).stdout.split() == ["1"]


@pytest.mark.parametrize(
    ("quotas", "cpus"),
    [
        ([("50000", "100000")], 1),
        ([("150000", "100000")], 2),
        ([("400000", "100000"), ("100000", "50000"), ("max", "100000")], 2),
        ([("-1", "100000\n"), ("0", "100000")], 1 << 20),
    ],
)
def test_the_least_quota_of_the_control_groups_bounds_the_threads(quotas, cpus, monkeypatch):
    monkeypatch.setattr(_engine, "cgroup_quotas", lambda: iter(quotas))
    assert _engine.cgroup_cpus() == cpus


FORKED = """
import os, signal, sys, warnings
import numpy as np, fastce
warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, about forks of processes with threads
rng = np.random.default_rng(0)
problems = [(rng.normal(size=shape), rng.integers(0, shape[1], shape[0])) for shape in ((60_000, 10), (3, 100_000))]

def results(num_threads):
    return [fastce.cross_entropy_with_grad(*given, num_threads=num_threads) for given in problems]

expected = results(2)

def check():
    for num_threads in (2, None, 1):
        for (loss, gradient), (wanted, wanted_gradient) in zip(results(num_threads), expected):
            assert loss == wanted and (gradient == wanted_gradient).all()

def in_child(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # a child that hangs is killed
        try:
            work()
        except BaseException as problem:
            print(repr(problem), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"the child ended with status {status}"

def check_then_fork_again():
    check()
    in_child(check)

for _ in range(5):
    in_child(check)
in_child(check_then_fork_again)
check()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_children_of_a_fork_work(run_python):
    run_python("-c", FORKED, timeout=60)


MULTIPROCESSING = """
import multiprocessing, sys
import numpy as np, fastce

def loss(seed):
    rng = np.random.default_rng(seed)
    return fastce.cross_entropy(rng.normal(size=(50_000, 10)), rng.integers(0, 10, 50_000), num_threads=2)

if __name__ == "__main__":
    expected = [loss(seed) for seed in range(4)]
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        assert pool.map_async(loss, range(4)).get(60) == expected
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_work(method, run_python, tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(MULTIPROCESSING)
    run_python("-W", "ignore::DeprecationWarning", str(script), method, timeout=90)


def test_few_rows_of_many_classes_are_shared_by_many_threads_with_equal_bits(dtype, rng):
    # More rows than one block of the kernels holds, few enough for each thread that their columns might be split.
    logits = rng.normal(size=(130, 16_384)).astype(dtype)
    targets = rng.integers(0, 16_384, 130)
    alone = fastce.cross_entropy_with_grad(logits, targets, reduction="none", num_threads=1)
    for num_threads in (2, 17, 40):
        shared = fastce.cross_entropy_with_grad(logits, targets, reduction="none", num_threads=num_threads)
        np.testing.assert_array_equal(shared[0], alone[0])
        np.testing.assert_array_equal(shared[1], alone[1])


def test_a_thread_count_of_thousands_of_digits_in_the_environment_is_capped(run_python):
    code = "import fastce; print(fastce.build_info()['num_threads'])"
    assert 1 <= int(run_python("-c", code, FASTCE_NUM_THREADS="9" * 5000).stdout) <= 1024


SEARCHED = """
import threading, time
import numpy as np, fastce
logits, targets = np.zeros(1 << 20), np.zeros(1 << 20)
out, stop = np.empty_like(logits), threading.Event()

def disturb():
    while not stop.is_set():
        for value in (7.0, 0.0):
            targets[0] = value
            time.sleep(0.0005)

thread = threading.Thread(target=disturb)
thread.start()
refused = 0
for _ in range(150):
    try:
        fastce.binary_cross_entropy_with_grad(logits, targets, out=out, num_threads=1)
    except ValueError:
        refused += 1
stop.set()
thread.join()
assert refused
"""


def test_a_bad_target_that_another_thread_mends_is_not_searched_for_without_end(run_python):
    # Bad targets are counted first and searched for afterwards; if none is left by then, the search has to end.
    run_python("-c", SEARCHED, timeout=60)


class SlowText(str):
    """A text in whose every look-up other threads get their turn."""

    def __hash__(self):
        time.sleep(0.01)
        return super().__hash__()


@pytest.mark.thread_unsafe(reason="replaces what fastce warns with")
def test_a_warning_is_given_once_even_if_many_threads_cause_it_at_once(monkeypatch):
    message, given = SlowText(f"only once, {time.monotonic()}"), []
    warn = SimpleNamespace(warn=lambda message, kind, stacklevel: given.append(message))
    monkeypatch.setattr(fastce._engine, "warnings", warn)
    run_in_threads(8, lambda k: fastce._engine.warn_once(message))
    assert len(given) == 1
