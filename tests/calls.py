"""A valid call of every public function, with all arguments that are arrays: tests of faults spoil one at a time."""

from dataclasses import dataclass

import numpy as np

import fastce
from fastce import SparseTargets


@dataclass
class Call:
    """A function with its arguments by name, and the names of the `buffers` that it can write to."""

    function: callable
    arguments: dict
    buffers: tuple = ()

    def __call__(self, **changed):
        """Return all that comes back as a list of arrays; `changed` arguments take the place of the valid ones."""
        results = self.function(**{**self.arguments, **changed})
        return [np.array(result) for result in (results if isinstance(results, tuple) else (results,))]

    def arrays(self):
        """Yield (name, array) of the arguments that are arrays."""
        yield from ((name, value) for name, value in self.arguments.items() if isinstance(value, np.ndarray))

    def new_buffers(self, value=12345.0):
        """Return a buffer full of `value` for every name."""
        return {name: np.full_like(self.arguments["logits"], value) for name in self.buffers}


def with_sparse_targets(logits, indices, values, **options):
    return fastce.cross_entropy_with_grad(logits, SparseTargets(indices, values), **options)


def calls(dtype, shape=(6, 5)):
    """Return name -> Call for rows of this shape, all arrays different and apart from each other."""
    rng = np.random.default_rng(shape)
    rows, classes = shape
    logits = rng.normal(0, 3, shape).astype(dtype)
    ids = rng.integers(0, classes, rows)
    soft = fastce.softmax(rng.normal(0, 2, shape).astype(dtype))
    weight, of_rows, factors = rng.random(classes) + 0.1, rng.random(rows) + 0.1, rng.normal(size=rows)
    mask = rng.random(shape) < 0.7
    mask[np.arange(rows), ids] = True
    plain = {"logits": logits, "targets": ids}
    row_factors = {"grad_output": factors, "reduction": "none"}
    weights = {"weight": weight, "sample_weight": of_rows}
    general = {"class_mask": mask, "label_smoothing": 0.1, "logit_scale": 0.75, "z_loss": 0.01}
    gradient, both = ("out",), ("out", "hess_out")
    return {
        "loss": Call(fastce.cross_entropy, plain),
        "loss and gradient": Call(fastce.cross_entropy_with_grad, plain, gradient),
        "weights": Call(fastce.cross_entropy_with_grad, {**plain, **weights, **row_factors}, gradient),
        "all options": Call(
            fastce.cross_entropy_with_grad, {**plain, **weights, **general, **row_factors, "softcap": 20.0}, gradient
        ),
        "distributions": Call(
            fastce.cross_entropy_with_grad, {**plain, **weights, **row_factors, "targets": soft}, gradient
        ),
        "sparse targets": Call(
            with_sparse_targets,
            {"logits": logits, "indices": rng.integers(0, classes, (rows, 3)), "values": rng.random((rows, 3))},
            gradient,
        ),
        "hessian": Call(fastce.cross_entropy_with_grad_hess, {**plain, **weights, **row_factors}, both),
        "hessian, all options": Call(
            fastce.cross_entropy_with_grad_hess, {**plain, **weights, **general, **row_factors}, both
        ),
        "statistics": Call(fastce.cross_entropy_stats, {**plain, "class_mask": mask}),
        "focal": Call(fastce.focal_loss_with_grad, {**plain, **weights, **row_factors}, gradient),
        "poly": Call(fastce.poly_loss_with_grad, {**plain, **weights, **row_factors}, gradient),
        "divergence": Call(
            fastce.kl_divergence_with_grad,
            {"logits": logits, "targets": soft, "sample_weight": of_rows, **row_factors},
            gradient,
        ),
        "divergence of logits": Call(
            fastce.kl_divergence_with_grad,
            {"logits": logits, "targets": rng.normal(0, 3, shape).astype(dtype), "from_logits": True},
            gradient,
        ),
        "probabilities": Call(fastce.cross_entropy_from_probs, {"probs": soft, "targets": ids, **weights}),
        "distributions against probabilities": Call(
            fastce.cross_entropy_from_probs, {"probs": soft, "targets": soft.copy(), **weights}
        ),
        "binary probabilities": Call(
            fastce.binary_cross_entropy_from_probs,
            {"probs": soft, "targets": mask, "sample_weight": rng.random(shape)},
        ),
        "binary": Call(fastce.binary_cross_entropy_with_grad, {"logits": logits, "targets": soft}, gradient),
        "binary, all options": Call(
            fastce.binary_cross_entropy_with_grad,
            {
                "logits": logits, "targets": soft, "pos_weight": weight, "sample_weight": rng.random(shape),
                "grad_output": rng.normal(size=shape), "reduction": "none", "label_smoothing": 0.1,
            },
            gradient,
        ),
        "softmax": Call(fastce.softmax, {"logits": logits}, gradient),
        "log_softmax": Call(fastce.log_softmax, {"logits": logits}, gradient),
        "logsumexp": Call(fastce.logsumexp, {"logits": logits}),
    }  # fmt: skip


NAMES = list(calls(np.float32))
WITH_BUFFERS = [name for name, call in calls(np.float32).items() if call.buffers]
