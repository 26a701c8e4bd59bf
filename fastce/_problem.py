"""A call's arguments, checked and turned into numbers: what every loss over rows of logits shares."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastce import _checks, _engine
from fastce.targets import SparseTargets

AXIS = -1
# By name, so that a default is told by identity; the same objects as any such words in the code.
MEAN, SUM, NONE = "mean", "sum", "none"
IGNORE_INDEX = _checks.DEFAULT_IGNORED
NEUTRAL = {"logit_scale": 1.0, "smoothing": 0.0, "z_loss": 0.0}


@dataclass
class Problem:
    """Rows of logits and their targets, of which exactly one kind is there; arrays over the rows are flat.

    `ids` (N,) int64, -1 in rows that are ignored; `indices` and `values` (N, m); `distribution` of logits' shape, or
    `target_logits` whose softmax it is. `places` are (buffer that was given, view of it that was checked) pairs.
    The sum of the losses is divided by `divisor`, which is 1 but for a mean; gradients are multiplied by `scale`, a
    float or one factor per row.
    """

    logits: np.ndarray
    axis: int
    num_threads: int | None
    reduction: str = "none"
    divisor: float = 1.0
    scale: float | np.ndarray = 1.0
    weight: np.ndarray | None = None
    sample_weight: np.ndarray | None = None
    ids: np.ndarray | None = None
    n_live: int = 0
    indices: np.ndarray | None = None
    values: np.ndarray | None = None
    distribution: np.ndarray | None = None
    target_logits: np.ndarray | None = None
    mask: np.ndarray | None = None
    smoothing: float = 0.0
    logit_scale: float = 1.0
    cap: float = 0.0
    z_loss: float = 0.0
    places: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def __post_init__(self):
        self.row_shape = self.logits.shape[: self.axis] + self.logits.shape[self.axis + 1 :]
        self.n_rows = self.logits.size // self.logits.shape[self.axis]

    @property
    def loss_dtype(self):
        return _engine.computing_dtype(self.logits.dtype)

    def live(self):
        """Return which rows count, a bool array of the rows' shape, or None for all."""
        live = None
        if self.ids is not None and self.n_live < self.n_rows:
            live = self.ids >= 0
        if self.sample_weight is not None and not self.sample_weight.all():
            weighted = self.sample_weight != 0
            live = weighted if live is None else live & weighted
        return None if live is None else live.reshape(self.row_shape)

    def ids_that_count(self):
        """Return the ids with -1 also in rows of sample weight 0: kernels then skip them like ignored ones."""
        if self.ids is None or self.sample_weight is None or self.sample_weight.all():
            return self.ids
        ids = _engine.flat_copy(self.ids, np.int64)
        np.copyto(ids, -1, where=self.sample_weight == 0)
        return ids

    def take_gradient(self, grad_output, buffers, *, any_float=False, **arguments):
        """Take the factor of the gradient; check its `buffers` (name -> array or None), also against `arguments`."""
        self.scale = _checks.as_grad_output(grad_output, self.reduction, self.row_shape)
        given = given_arrays(logits=self.logits, grad_output=grad_output, **arguments)
        for name, buffer in buffers.items():
            if buffer is not None:
                place = _checks.check_out(buffer, self.logits, given, any_float=any_float, name=name)
                self.places.append((buffer, place))
                given.append((name, place))

    def place_of(self, gradient):
        """Return where a gradient is written: the view of a buffer that was checked; a new array or None as it is."""
        return next((place for buffer, place in self.places if buffer is gradient), gradient)

    def total_weight(self):
        """Return what a mean divides by: the weights of the rows that count, of the classes for class ids only."""
        weight = None if self.ids is None else self.weight
        if weight is None and self.sample_weight is None:
            return float(self.n_rows if self.ids is None else self.n_live)
        return _engine.kernels.sum_weights(self.ids, weight, self.sample_weight)

    def plain_options(self):
        """Return the options of class ids that are numbers to their kernels, without those that do nothing."""
        options = {"logit_scale": self.logit_scale, "smoothing": self.smoothing, "z_loss": self.z_loss}
        return {name: value for name, value in options.items() if value != NEUTRAL[name]}

    def is_plain(self):
        """Return whether the kernels for class ids will do: with the few options that are only numbers to them."""
        return self.ids is not None and _engine.kernels.takes(
            self.smoothing, self.z_loss, self.weight is not None, self.mask is not None, self.cap != 0.0
        )

    def fill(self, losses, scale=1.0, out=None, hess=None, statistics=None):
        """Fill `losses` (N,) and what else is given: gradient and Hessian times `scale`, a float or one per row."""
        logits, out, hess = (classes_last(array, self.axis) for array in (self.logits, out, hess))
        sample_weight = self.sample_weight
        if self.is_plain() and statistics is None:
            _engine.cross_entropy_rows(
                logits, self.ids_that_count(), losses, scale, out, hess, self.num_threads, self.weight, sample_weight,
                self.mask, self.plain_options(),
            )
            return
        per_row: dict[str, Any] = {
            "indices": self.indices if self.ids is None else self.ids[:, None],
            "values": self.values,
            "sample_weight": sample_weight,
            "scales": scale,
        }
        if statistics is not None:
            per_row["statistics"] = statistics
        constants = {
            "logit_scale": self.logit_scale, "cap": self.cap, "smoothing": self.smoothing, "z_loss": self.z_loss,
            "weight": self.weight, "scale": 1.0 if isinstance(scale, np.ndarray) else scale,
        }  # fmt: skip
        distribution = classes_last(self.distribution, self.axis)
        _engine.soft_rows(
            logits, losses, out, hess, distribution, self.mask, per_row, constants, self.num_threads
        )


def pose(
    logits, targets, axis, num_threads, *, reduction="none", denominator=None, weight=None, sample_weight=None,
    ignore_index=IGNORE_INDEX, label_smoothing=0.0, logit_scale=1.0, softcap=None, z_loss=0.0, class_mask=None,
    from_logits=False, grad_output=None, buffers=None, any_float=False,
):
    """Return the Problem that the arguments pose, or raise; a gradient is asked for by its `buffers`."""
    _checks.check_reduction(reduction)
    from_logits = _checks.as_bool("from_logits", from_logits)
    divisor = _checks.as_denominator(denominator, reduction)
    logits = _checks.as_logits(logits)
    axis = _checks.as_axis(axis, logits.shape)
    problem = Problem(logits, axis, _checks.as_num_threads(num_threads), reduction)
    ignored = _checks.as_ignored(ignore_index)
    problem.weight = _checks.as_class_weight(weight, logits.shape[axis])
    problem.sample_weight = _checks.as_sample_weight(sample_weight, problem.row_shape)
    problem.smoothing = _checks.as_fraction("label_smoothing", label_smoothing)
    problem.logit_scale = _checks.as_positive("logit_scale", logit_scale)
    problem.cap = _checks.as_softcap(softcap)
    problem.z_loss = _checks.as_non_negative("z_loss", z_loss)
    problem.mask = _checks.as_class_mask(class_mask, logits.shape, axis)
    if from_logits:
        problem.target_logits = _checks.as_target_logits(targets, logits.shape)
    else:
        _take_targets(problem, targets, ignore_index, ignored)
    if buffers is not None:
        # Last, and against the arrays that will be read: those that targets and mask were made into. Ids are copies.
        problem.take_gradient(
            grad_output, buffers, any_float=any_float, weight=weight, sample_weight=sample_weight,
            class_mask=problem.mask, targets=targets if problem.indices is not None else problem.distribution,
        )
    live = problem.live() if problem.mask is not None or problem.distribution is not None else None
    if problem.mask is not None:
        _checks.check_classes_left(problem.mask, live)
    if problem.distribution is not None:
        _checks.check_distribution(problem.distribution, axis, live, problem.num_threads)
    if reduction == "mean":
        problem.divisor = problem.total_weight() if divisor is None else divisor
    return problem


def _take_targets(problem, targets, ignore_index, ignored):
    shape = problem.logits.shape
    if isinstance(targets, SparseTargets):
        _checks.check_no_ignore(ignore_index, IGNORE_INDEX)
        problem.indices, problem.values = _checks.as_sparse_targets(targets, shape, problem.axis)
        return
    array = _checks.as_plain_array("targets", targets)
    if _checks.is_distribution(targets, array, shape):
        _checks.check_no_ignore(ignore_index, IGNORE_INDEX)
        problem.distribution = array
        return
    problem.ids, problem.n_live = _checks.as_class_ids(targets, shape, problem.axis, ignored)


def may_be_plain(logits, axis, reduction):
    """Return whether the short ways may be tried: by identity, what only compares equal goes through the checks."""
    return is_last(axis, logits) and is_word(reduction)


def is_word(reduction):
    """Return whether `reduction` is one of the three words, by identity."""
    return reduction is MEAN or reduction is SUM or reduction is NONE


def is_last(axis, logits):
    """Return whether `axis` is certainly the last one."""
    return axis is AXIS or (type(axis) is int and type(logits) is np.ndarray and 0 < axis == logits.ndim - 1)


def classes_last(array, axis):
    """Return a plain view of `array` (or None for None) with its class axis last."""
    if array is None:
        return None
    if type(array) is not np.ndarray:
        array = array.view(np.ndarray)
    return array if axis == array.ndim - 1 else np.moveaxis(array, axis, -1)


def given_arrays(**arguments):
    """Return (name, array) pairs of what `out` must not overlap, among others that are no arrays."""
    pairs = []
    for name, value in arguments.items():
        if isinstance(value, SparseTargets):
            pairs += [(f"{name}.indices", value.indices), (f"{name}.values", value.values)]
        else:
            pairs.append((name, value))
    return pairs


def gradient_array(problem, out):
    """Return `out`, or a new array for a gradient."""
    return np.empty(problem.logits.shape, problem.logits.dtype.newbyteorder("=")) if out is None else out


def deliver(problem, *gradients, fill=Problem.fill):
    """Fill the `gradients`, arrays or None, and return the loss: an array of each row's, their sum, or their mean.

    `fill(problem, losses, scale, *gradients)` computes. The mean of nothing, whose divisor is 0, is nan and has the
    gradient 0, whatever its rows hold.
    """
    gradients = tuple(problem.place_of(gradient) for gradient in gradients)
    losses = np.empty(problem.n_rows)
    loss = np.empty(problem.row_shape, problem.loss_dtype) if problem.reduction == "none" else None
    if problem.divisor == 0.0:
        for gradient in gradients:
            if gradient is not None:
                _engine.copy_in_blocks(gradient, 0)
        return float("nan")
    scale = problem.scale / problem.divisor if problem.reduction == "mean" else problem.scale
    fill(problem, losses, scale, *gradients)
    if loss is None:
        return _engine.kernels.sum_losses(losses) / problem.divisor
    _engine.round_numbers(losses, loss)
    return loss
