"""The rest of the surface beside what PyTorch's users write for it: every option and further function that has such."""

import numpy as np

from .contenders import Step
from .lines import Line, at_least, half, ours


def torch_line(name, compute, *, load=None, with_grad=True, dtypes=("float32", "float64")):
    """Return PyTorch's line beside fastce's line `name`.

    `compute(F, batch, tensor)` is given torch.nn.functional, the batch, and what makes a tensor of an array; it returns
    the function of the logits that is timed, and differentiated `with_grad`.
    """

    def prepare(batch, module):
        import torch
        import torch.nn.functional as functional

        torch.set_num_threads(batch.threads)
        function = compute(functional, batch, torch.from_numpy)

        def tensor_of(logits):
            logits = logits if load is None else load(logits)
            if logits.dtype.name == "bfloat16":
                tensor = torch.from_numpy(logits.astype(np.float32)).to(torch.bfloat16)
            else:
                tensor = torch.from_numpy(logits.copy())
            return tensor.requires_grad_(with_grad)

        def loss_and_grad(logits):
            logits.grad = None
            loss = function(logits)
            loss.backward()
            return loss.detach().float().numpy(), logits.grad if load is None else logits.grad.float()

        def values(logits):
            with torch.no_grad():
                return function(logits)

        return Step(loss_and_grad if with_grad else values, tensor_of)

    return Line(f"PyTorch: {name}", prepare, name, at_least(1), like=name, packages=("torch",), dtypes=dtypes)


def pair(name, compute, *, load=None, with_grad=True, dtypes=("float32", "float64"), packages=(), **arguments):
    """Return fastce's line of this name and PyTorch's, whose `compute` is that of torch_line."""
    if not with_grad:
        arguments = {"out": None} | arguments
    return (
        ours(name, against=name, load=load, dtypes=dtypes, packages=packages, **arguments),
        torch_line(name, compute, load=load, with_grad=with_grad, dtypes=dtypes),
    )


# ---- what PyTorch computes: each takes (F, batch, tensor) and returns the function of the logits -------------------


def weighted_smoothing(F, batch, tensor):
    targets, weight = tensor(batch.targets), tensor(batch.class_weight)
    return lambda z: F.cross_entropy(z, targets, weight=weight, label_smoothing=0.1)


def capped(F, batch, tensor):
    targets = tensor(batch.targets)
    return lambda z: F.cross_entropy(30.0 * (z / 30.0).tanh(), targets)


def masked(F, batch, tensor):
    targets, hidden = tensor(batch.targets), tensor(~batch.entry_mask)
    return lambda z: F.cross_entropy(z.masked_fill(hidden, -np.inf), targets)


def distributions(F, batch, tensor):
    targets = tensor(batch.distributions)
    return lambda z: F.cross_entropy(z, targets)


def sparse(F, batch, tensor):
    indices, values = tensor(batch.sparse_targets.indices), tensor(batch.sparse_targets.values)
    return lambda z: -(F.log_softmax(z, 1).gather(1, indices) * values).sum(1).mean()


def focal(F, batch, tensor):
    targets = tensor(batch.targets)

    def loss(z):
        cross_entropies = F.cross_entropy(z, targets, reduction="none")
        return ((1 - (-cross_entropies).exp()) ** 2 * cross_entropies).mean()

    return loss


def poly(F, batch, tensor):
    targets = tensor(batch.targets)

    def loss(z):
        cross_entropies = F.cross_entropy(z, targets, reduction="none")
        return (cross_entropies + 1 - (-cross_entropies).exp()).mean()

    return loss


def divergence(F, batch, tensor):
    targets = tensor(batch.distributions)
    return lambda z: F.kl_div(F.log_softmax(z, 1), targets, reduction="batchmean")


def teachers_logits(batch):
    return batch.logits[::-1].copy()


def divergence_from_logits(F, batch, tensor):
    targets = tensor(teachers_logits(batch))
    return lambda z: F.kl_div(
        F.log_softmax(z, 1), F.log_softmax(targets, 1), reduction="batchmean", log_target=True
    )  # fmt: skip


def plain(F, batch, tensor):
    targets = tensor(batch.targets)
    return lambda z: F.cross_entropy(z, targets)


def along(name, axis):
    """Return what PyTorch computes for a function of its own along an axis."""

    def compute(F, batch, tensor):
        import torch

        function = getattr(torch, name)
        return lambda z: function(z, axis)

    return compute


def log_of_probs(F, batch, tensor):
    targets = tensor(batch.targets)
    return lambda p: F.nll_loss(p.log(), targets)


def log_of_probs_by_distributions(F, batch, tensor):
    targets = tensor(batch.distributions)
    return lambda p: F.cross_entropy(p.log(), targets)  # whose log-softmax leaves logarithms of probabilities alone


def log_of_entries(F, batch, tensor):
    targets = tensor(batch.numbers(batch.dtype))
    return lambda p: F.binary_cross_entropy(p, targets)


def as_probs(logits):
    """Return probabilities made of logits, none of them 0 or 1."""
    terms = np.exp(logits / 4)
    return (terms / terms.sum(axis=-1, keepdims=True)).astype(logits.dtype)


HALF = ("float32",)  # the dtype of the data that half types are made of
COUNTERPARTS = (
    *pair(
        "weight, label_smoothing", weighted_smoothing, weight=lambda b: b.class_weight, label_smoothing=0.1
    ),
    *pair("softcap", capped, softcap=30.0),
    *pair("class_mask (N, C)", masked, class_mask=lambda b: b.entry_mask),
    *pair("distributions", distributions, targets=lambda b: b.distributions),
    *pair("SparseTargets, 2 a row", sparse, targets=lambda b: b.sparse_targets),
    *pair("focal_loss_with_grad", focal, function="focal_loss_with_grad"),
    *pair("poly_loss_with_grad", poly, function="poly_loss_with_grad"),
    *pair(
        "kl_divergence_with_grad", divergence, function="kl_divergence_with_grad", targets=lambda b: b.distributions
    ),
    *pair(
        "kl_divergence_with_grad, from_logits", divergence_from_logits, function="kl_divergence_with_grad",
        targets=teachers_logits, from_logits=True,
    ),
    *pair(
        "kl_divergence", divergence, function="kl_divergence", targets=lambda b: b.distributions, with_grad=False
    ),
    *pair("float16 logits", plain, load=half("float16"), out=lambda b: b.out.astype("float16"), dtypes=HALF),
    *pair(
        "bfloat16 logits", plain, load=half("bfloat16"), out=lambda b: half("bfloat16")(b.out), dtypes=HALF,
        packages=("ml_dtypes",),
    ),
    *pair("logsumexp", along("logsumexp", -1), function="logsumexp", targets=None, with_grad=False),
    *(
        line
        for name in ("logsumexp", "softmax", "log_softmax")
        for line in pair(f"{name}, axis 0", along(name, 0), function=name, targets=None, axis=0, with_grad=False)
    ),
    *pair(
        "cross_entropy_from_probs", log_of_probs, load=as_probs, function="cross_entropy_from_probs", with_grad=False
    ),
    *pair(
        "cross_entropy_from_probs, distributions", log_of_probs_by_distributions, load=as_probs,
        function="cross_entropy_from_probs", targets=lambda b: b.distributions, with_grad=False,
    ),
    *pair(
        "binary_cross_entropy_from_probs", log_of_entries, load=as_probs, function="binary_cross_entropy_from_probs",
        targets=lambda b: b.numbers(b.dtype), with_grad=False,
    ),
)  # fmt: skip
