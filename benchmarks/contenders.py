"""One function per contender: given a Job it imports what it needs and returns the Step to be timed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from .cases import FRESH, IN_PLACE, LOSS, MODES, OUT


@dataclass(frozen=True)
class Job:
    """What every contender is asked: the mean loss of a batch, and its gradient unless the mode is LOSS.

    `threads` is for those that take it as an argument; fastce and JAX know it from their process.
    """

    logits: np.ndarray
    targets: np.ndarray
    out: np.ndarray
    mode: str
    threads: int | None = None


@dataclass(frozen=True)
class Step:
    """`call(load(logits))` gives the loss, or (loss, grad). Only `call` is timed."""

    call: Callable[[Any], Any]
    load: Callable[[np.ndarray], Any] = lambda logits: logits


@dataclass(frozen=True)
class Contender:
    """A name, the packages it needs, and the modes it has; in the other modes it runs as FRESH."""

    name: str
    packages: tuple[str, ...]
    prepare: Callable[[Job], Step]
    modes: tuple[str, ...] = MODES
    limit: bool = False  # not a rival: work that does no cross-entropy, to compare with

    def missing(self):
        return [package for package in self.packages if installed_version(package) is None]

    def runs_as(self, mode):
        return mode if mode in self.modes else FRESH


def installed_version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def fastce(job):
    import fastce

    return _numpy_style(fastce, job)


def numpy_reference(job):
    from fastce import reference

    return _numpy_style(reference, job)


def _numpy_style(module, job):
    def loss(logits):
        return module.cross_entropy(logits, job.targets)

    def loss_and_grad(logits, out=None):
        return module.cross_entropy_with_grad(logits, job.targets, out=out)

    return _by_mode(job, loss, loss_and_grad)


def _by_mode(job, loss, loss_and_grad):
    calls = {
        LOSS: loss,
        FRESH: loss_and_grad,
        OUT: lambda logits: loss_and_grad(logits, job.out),
        IN_PLACE: lambda logits: loss_and_grad(logits, logits),
    }
    return Step(calls[job.mode])


def scipy_idiom(job):
    """log_softmax and a gather; the gradient is the softmax minus the one-hot targets."""
    from scipy.special import log_softmax

    at_target = np.arange(len(job.targets)), job.targets

    def loss(logits):
        return -log_softmax(logits, axis=1)[at_target].mean()

    def loss_and_grad(logits, out=None):
        log_p = log_softmax(logits, axis=1)
        loss = -log_p[at_target].mean()
        grad = np.exp(log_p, out=out)
        grad[at_target] -= 1
        grad /= len(grad)
        return loss, grad

    return _by_mode(job, loss, loss_and_grad)


def scikit_learn(job):
    """The loss inside LogisticRegression and gradient boosting; sample weights of 1/N make it the mean."""
    from sklearn._loss import HalfMultinomialLoss

    rows, classes = job.logits.shape
    dtype, threads = job.logits.dtype, job.threads
    multinomial = HalfMultinomialLoss(n_classes=classes)
    targets = job.targets.astype(dtype)
    weights = np.full(rows, 1 / rows, dtype)
    losses = np.empty(rows, dtype)

    def loss(logits):
        return multinomial.loss(targets, logits, weights, losses, n_threads=threads).sum()

    def loss_and_grad(logits, out=None):
        row_losses, grad = multinomial.loss_gradient(targets, logits, weights, losses, out, n_threads=threads)
        return row_losses.sum(), grad

    return _by_mode(job, loss, loss_and_grad)


def torch_eager(job):
    from torch.nn.functional import cross_entropy

    return _torch_style(cross_entropy, job)


def torch_compile(job):
    import torch

    torch.compiler.reset()  # each shape is compiled for itself, never for "any shape" after the second one
    torch.set_num_threads(job.threads)  # compiled in as a constant
    return _torch_style(torch.compile(torch.nn.functional.cross_entropy, dynamic=False), job)


def _torch_style(cross_entropy, job):
    import torch

    torch.set_num_threads(job.threads)
    targets = torch.from_numpy(job.targets)

    def loss(logits):
        with torch.no_grad():
            return cross_entropy(logits, targets)

    def loss_and_grad(logits):
        logits.grad = None  # what an optimizer's zero_grad() does
        loss = cross_entropy(logits, targets)
        loss.backward()
        return loss.detach(), logits.grad

    return Step(
        loss if job.mode == LOSS else loss_and_grad,
        load=lambda logits: torch.from_numpy(logits).requires_grad_(),
    )


def jax_jit(job):
    """In place is JAX's own way of it: the logits are donated to the compiled function."""
    import jax
    import optax

    targets = jax.numpy.asarray(job.targets.astype(np.int32))

    def mean_loss(logits, targets):
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    # The number of threads was settled before JAX started, by the CPUs that this process may run on.
    if job.mode == LOSS:
        compiled = jax.jit(mean_loss)
    else:
        compiled = jax.jit(jax.value_and_grad(mean_loss), donate_argnums=0 if job.mode == IN_PLACE else ())
    return Step(lambda logits: jax.block_until_ready(compiled(logits, targets)), load=jax.numpy.array)


def copy_of_logits(job):
    """Reads and writes what a gradient must; one thread where a second one would cost more than it brings."""
    out, threads = job.out.reshape(-1), job.threads
    if threads == 1 or out.nbytes < 1 << 20:
        return Step(lambda logits: np.copyto(job.out, logits))
    pool, share = _thread_pool(threads), -(-out.size // threads)

    def copy_share(logits, first):
        # By blocks of half a megabyte, which out of cache measured faster than a whole share at once.
        for start in range(first, min(first + share, out.size), 1 << 17):
            part = slice(start, min(start + (1 << 17), first + share))
            np.copyto(out[part], logits[part])

    return Step(lambda logits: list(pool.map(partial(copy_share, logits.reshape(-1)), range(0, out.size, share))))


_thread_pool = cache(ThreadPoolExecutor)


def exp_pass(job):
    """The exponentials alone, by NumPy, on one thread whatever the others use."""
    return Step(lambda logits: np.exp(logits, out=job.out))


def row_maximum(job):
    """What a NumPy user pays for merely looking at the logits, on one thread."""
    return Step(lambda logits: logits.max(axis=1))


CONTENDERS = (
    Contender("fastce", ("fastce",), fastce),
    Contender("NumPy reference", ("fastce",), numpy_reference),
    Contender("SciPy", ("scipy",), scipy_idiom),
    Contender("scikit-learn", ("scikit-learn",), scikit_learn),
    Contender("PyTorch", ("torch",), torch_eager, modes=(LOSS, FRESH)),
    Contender("torch.compile", ("torch",), torch_compile, modes=(LOSS, FRESH)),
    Contender("jax.jit", ("jax", "optax"), jax_jit, modes=(LOSS, FRESH, IN_PLACE)),
    Contender("copy", ("numpy",), copy_of_logits, limit=True),
    Contender("np.exp", ("numpy",), exp_pass, limit=True),
    Contender("max", ("numpy",), row_maximum, limit=True),
)
OURS = CONTENDERS[0].name
RIVALS = tuple(contender.name for contender in CONTENDERS[1:] if not contender.limit)
LIMITS = tuple(contender.name for contender in CONTENDERS if contender.limit)
