"""How fast the loss and its gradient are on this machine: fastce, the usual NumPy code, other installed libraries.

All compute the mean loss of float32 rows against class ids, and its gradient. They take turns, so that whatever else
the machine does meets all of them; a ratio is the median of those of the rounds. What a library needs before its first
call (import, compilation, conversion of the arrays) is not counted.
"""

import os
import statistics
import time
from functools import partial

import numpy as np

import fastce

SHAPES = ((1024, 10), (65536, 10), (1024, 1000), (256, 32000))
SECONDS = 20.0
MOST_ROUNDS = 15
TURN = 0.005  # short calls are repeated until a turn takes so many seconds
BUSY = 0.7  # processes that wanted to run in the last minute
PAUSE = 0.005  # idle threads of the last library keep spinning for some milliseconds


def run_fastce(logits, targets):
    """Return a call of fastce, whose gradient goes into one buffer."""
    return partial(fastce.cross_entropy_with_grad, logits, targets, out=np.empty_like(logits))


def run_numpy(logits, targets):
    """Return a call of what people write in NumPy."""
    rows = np.arange(len(targets))

    def call():
        shifted = logits - logits.max(axis=1, keepdims=True)
        grad = np.exp(shifted)
        sums = grad.sum(axis=1, keepdims=True)
        loss = np.mean(np.log(sums[:, 0]) - shifted[rows, targets])
        grad /= sums
        grad[rows, targets] -= 1
        grad /= len(targets)
        return loss, grad

    return call


def run_scipy(logits, targets):
    """Return a call of SciPy's log-softmax, with the gradient made from it."""
    from scipy.special import log_softmax

    rows = np.arange(len(targets))

    def call():
        log_p = log_softmax(logits, axis=1)
        loss = -log_p[rows, targets].mean()
        grad = np.exp(log_p, out=log_p)
        grad[rows, targets] -= 1
        grad /= len(targets)
        return loss, grad

    return call


def run_scikit_learn(logits, targets):
    """Return a call of the loss inside scikit-learn's classifiers."""
    from sklearn._loss import HalfMultinomialLoss

    loss_of, threads = HalfMultinomialLoss(n_classes=logits.shape[1]), fastce.build_info()["num_threads"]
    targets, weights = targets.astype(logits.dtype), np.full(len(targets), 1 / len(targets), logits.dtype)

    def call():
        losses, grad = loss_of.loss_gradient(targets, logits, weights, n_threads=threads)
        return losses.sum(), grad

    return call


def run_torch(logits, targets):
    """Return a call of PyTorch, eager, forward and backward."""
    import torch

    torch.set_num_threads(fastce.build_info()["num_threads"])
    leaf, ids = torch.from_numpy(logits.copy()).requires_grad_(), torch.from_numpy(targets)

    def call():
        leaf.grad = None
        loss = torch.nn.functional.cross_entropy(leaf, ids)
        loss.backward()
        return loss.item(), leaf.grad

    return call


def run_jax(logits, targets):
    """Return a call of JAX, compiled."""
    import jax

    def mean_loss(logits, targets):
        log_p = jax.nn.log_softmax(logits)
        return -jax.numpy.take_along_axis(log_p, targets[:, None], axis=1).mean()

    compiled = jax.jit(jax.value_and_grad(mean_loss))
    arrays = jax.numpy.asarray(logits), jax.numpy.asarray(targets.astype(np.int32))
    return lambda: jax.block_until_ready(compiled(*arrays))


RIVALS = {
    "NumPy": run_numpy,
    "SciPy": run_scipy,
    "scikit-learn": run_scikit_learn,
    "PyTorch": run_torch,
    "jax.jit": run_jax,
}


def installed(rivals):
    """Return those of the rivals that run here; what is not installed, or broken, cannot be compared with."""
    logits, targets = np.zeros((2, 3), np.float32), np.zeros(2, np.int64)
    found = {}
    for name, prepare in rivals.items():
        try:
            prepare(logits, targets)()
        except Exception:  # whatever an incomplete installation raises
            continue
        found[name] = prepare
    return found


def measure(shape, rivals, seconds):
    """Return (seconds of a call of fastce, rival -> its time over fastce's), measured for about so many seconds."""
    until = time.perf_counter() + seconds
    rng = np.random.default_rng(0)
    logits, targets = 2 * rng.standard_normal(shape, dtype=np.float32), rng.integers(0, shape[1], shape[0])
    calls = {"fastce": run_fastce(logits, targets)}
    calls |= {name: prepare(logits, targets) for name, prepare in rivals.items()}
    check_agreement(calls)
    repeats = {name: max(1, round(TURN / time_of(call, 1))) for name, call in calls.items()}
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    while len(rounds["fastce"]) < 3 or (len(rounds["fastce"]) < MOST_ROUNDS and time.perf_counter() < until):
        for name, call in calls.items():
            time.sleep(PAUSE)
            rounds[name].append(time_of(call, repeats[name]))
    ours = rounds.pop("fastce")
    ratios = {
        name: statistics.median(theirs / own for theirs, own in zip(times, ours, strict=True))
        for name, times in rounds.items()
    }
    return statistics.median(ours), ratios


def time_of(call, repeats):
    """Return the seconds that a call takes, as the mean of several; a short one is led by one that is not counted."""
    if repeats > 1:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def check_agreement(calls):
    """Raise unless all calls give fastce's loss and gradient, as exact as float32 is; else times say nothing."""
    loss, grad = calls["fastce"]()
    for name, call in calls.items():
        other_loss, other_grad = call()
        if not np.isclose(other_loss, loss, rtol=1e-4) or np.abs(np.asarray(other_grad) - grad).max() > 1e-6:
            raise ArithmeticError(f"{name} and fastce do not agree on a loss of {loss:.6f}: nothing was measured")


def bench(seconds=SECONDS):
    """Yield the lines of a table, each as soon as it is measured, in about so many seconds."""
    start = time.perf_counter()
    info = fastce.build_info()
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY:
        yield f"Other programs are running here (load {os.getloadavg()[0]:.1f}): these times will be off."
    yield f"Mean loss and gradient, float32. fastce {info['version']}, {info['target']}, {info['num_threads']} threads."
    yield "The time of fastce, and how many times as long the others take:"
    rivals = installed(RIVALS)
    yield in_columns("rows x classes", "fastce", *rivals)
    for done, shape in enumerate(SHAPES):
        left = seconds - (time.perf_counter() - start)
        own, ratios = measure(shape, rivals, left / (len(SHAPES) - done))
        yield in_columns(f"{shape[0]} x {shape[1]}", in_units(own), *map(in_times, ratios.values()))
    missing = [name for name in RIVALS if name not in rivals]
    if missing:
        yield f"Not installed: {', '.join(missing)}"


def in_columns(shape, *cells):
    """Return a line of the table."""
    return f"{shape:>14}" + "".join(f"{cell:>14}" for cell in cells)


def in_units(seconds):
    """Return a time as text with three digits."""
    size, unit = next(((size, unit) for size, unit in ((1, "s"), (1e-3, "ms")) if seconds >= size), (1e-6, "µs"))
    return f"{seconds / size:.3g} {unit}"


def in_times(ratio):
    """Return a ratio as text: two digits, or more where it is 10 or larger."""
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"
