"""Every public function in plain NumPy, float64 inside: the definition that tests and benchmarks compare with.

For readers, not for speed. Arguments are trusted here; the public functions of :mod:`fastce` are the ones that check
them, and document them. The formulas, for a row of logits x:

    z_c     = softcap(logit_scale * x_c), where classes hidden by class_mask do not exist
    p_c     = exp(z_c) / sum_k exp(z_k)
    a_c     = w_c ((1 - label_smoothing) q_c + label_smoothing / K), K classes shown
    loss    = sum_c a_c (-log p_c) + z_loss lse^2
    grad_c  = p_c (sum(a) + 2 z_loss lse) - a_c
    hess_c  = p_c ((sum(a) + 2 z_loss lse) (1 - p_c) + 2 z_loss p_c)

A class id t is the distribution q_c = [c == t]. The derivatives are those with respect to z; each order has one more
factor dz/dx. All of it is written so that nothing cancels: with m the class of the largest z and
others = sum_{c != m} exp(z_c - z_m),

    -log p_c = (z_m - z_c) + log1p(others)          both terms are >= 0
    1 - p_m  = others / (1 + others)
    grad_m   = p_m (sum(a) - a_m) - a_m (1 - p_m)   the sum is taken without a_m
"""

from typing import NamedTuple

import numpy as np

__all__ = [
    "CrossEntropyStats",
    "binary_cross_entropy",
    "binary_cross_entropy_from_probs",
    "binary_cross_entropy_with_grad",
    "cross_entropy",
    "cross_entropy_from_probs",
    "cross_entropy_stats",
    "cross_entropy_with_grad",
    "cross_entropy_with_grad_hess",
    "focal_loss",
    "focal_loss_with_grad",
    "kl_divergence",
    "kl_divergence_with_grad",
    "log_softmax",
    "logsumexp",
    "poly_loss",
    "poly_loss_with_grad",
    "softmax",
]


# Softmax cross-entropy


def cross_entropy(
    logits, targets, *, axis=-1, weight=None, sample_weight=None, ignore_index=-100, label_smoothing=0.0,
    logit_scale=1.0, softcap=None, z_loss=0.0, class_mask=None, reduction="mean", denominator=None, num_threads=None
):  # fmt: skip
    """Softmax cross-entropy of `logits`; see :func:`fastce.cross_entropy`."""
    batch = _Batch(logits, axis, targets, sample_weight, weight, ignore_index, class_mask)
    formula = _cross_entropy_formula(batch, label_smoothing, logit_scale, softcap, z_loss)
    return _evaluate(formula, batch, reduction, denominator)[0]


def cross_entropy_with_grad(
    logits, targets, *, axis=-1, weight=None, sample_weight=None, ignore_index=-100, label_smoothing=0.0,
    logit_scale=1.0, softcap=None, z_loss=0.0, class_mask=None, reduction="mean", denominator=None, num_threads=None,
    grad_output=None, out=None
):  # fmt: skip
    """Softmax cross-entropy and its gradient; see :func:`fastce.cross_entropy_with_grad`."""
    batch = _Batch(logits, axis, targets, sample_weight, weight, ignore_index, class_mask)
    formula = _cross_entropy_formula(batch, label_smoothing, logit_scale, softcap, z_loss)
    return _evaluate(formula, batch, reduction, denominator, grad_output, [out])


def cross_entropy_with_grad_hess(
    logits, targets, *, axis=-1, weight=None, sample_weight=None, ignore_index=-100, label_smoothing=0.0,
    logit_scale=1.0, softcap=None, z_loss=0.0, class_mask=None, reduction="mean", denominator=None, num_threads=None,
    grad_output=None, out=None, hess_out=None
):  # fmt: skip
    """Softmax cross-entropy, its gradient and diagonal Hessian; see :func:`fastce.cross_entropy_with_grad_hess`."""
    batch = _Batch(logits, axis, targets, sample_weight, weight, ignore_index, class_mask)
    formula = _cross_entropy_formula(batch, label_smoothing, logit_scale, softcap, z_loss)
    return _evaluate(formula, batch, reduction, denominator, grad_output, [out, hess_out])


def _cross_entropy_formula(batch, label_smoothing, logit_scale, softcap, z_loss):
    def formula(rows):
        z, slope = _scaled_and_capped(batch.logits(rows), logit_scale, softcap, batch.loss_dtype)
        shown = batch.shown(rows)
        softmax = _softmax(np.where(shown, z, -np.inf))
        a = (1 - label_smoothing) * batch.distributions(rows)
        if label_smoothing:
            a += np.where(shown, label_smoothing / shown.sum(axis=1, keepdims=True), 0.0)
        a *= batch.weight
        two_lse = 2 * z_loss * softmax.lse[:, None] if z_loss else 0.0

        loss = _product(a, softmax.minus_log_p).sum(axis=1)
        yield loss + z_loss * softmax.lse**2 if z_loss else loss
        yield (_gradient(softmax, a) + softmax.p * two_lse) * slope
        one_minus_p = 1 - softmax.p
        one_minus_p[softmax.largest] = softmax.rest
        mass = a.sum(axis=1, keepdims=True)
        yield softmax.p * ((mass + two_lse) * one_minus_p + 2 * z_loss * softmax.p) * slope**2

    return formula


def _scaled_and_capped(x, logit_scale, softcap, dtype):
    """Return z, rounded to `dtype` as its users compute with it, and dz/dx; the scale is rounded to it first."""
    if logit_scale == 1 and softcap is None:
        return x, 1.0
    if 0 < dtype.type(logit_scale) < np.inf:
        logit_scale = float(dtype.type(logit_scale))
    z, slope = logit_scale * x, logit_scale
    if softcap is not None:
        inside = z / softcap
        z = np.where(np.isfinite(x), softcap * np.tanh(inside), x)
        slope = logit_scale / np.cosh(inside) ** 2
    return z.astype(dtype).astype(np.float64), slope


# Losses of the probability of a class id: loss = w_t f(p_t), grad_c = w_t (-p_t f'(p_t)) (p_c - [c == t])


def focal_loss(
    logits, targets, *, gamma=2.0, axis=-1, weight=None, sample_weight=None, ignore_index=-100, reduction="mean",
    denominator=None, num_threads=None
):  # fmt: skip
    """Focal loss, (1 - p_t)^gamma (-log p_t); see :func:`fastce.focal_loss`."""
    batch = _Batch(logits, axis, targets, sample_weight, weight, ignore_index)
    return _evaluate(_class_formula(batch, _focal, gamma), batch, reduction, denominator)[0]


def focal_loss_with_grad(
    logits, targets, *, gamma=2.0, axis=-1, weight=None, sample_weight=None, ignore_index=-100, reduction="mean",
    denominator=None, num_threads=None, grad_output=None, out=None
):  # fmt: skip
    """Focal loss and its gradient; see :func:`fastce.focal_loss_with_grad`."""
    batch = _Batch(logits, axis, targets, sample_weight, weight, ignore_index)
    return _evaluate(_class_formula(batch, _focal, gamma), batch, reduction, denominator, grad_output, [out])


def _focal(p, one_minus_p, minus_log_p, gamma):
    """Return f and -p f' = (1-p)^gamma (1 + gamma ratio), ratio = p (-log p) / (1-p), which is 1 where p is 1."""
    damping = one_minus_p**gamma
    ratio = np.where(one_minus_p > 0, _product(p, minus_log_p) / one_minus_p, 1.0)
    return damping * minus_log_p, damping * (1 + gamma * ratio)


def poly_loss(
    logits, targets, *, epsilon=1.0, axis=-1, weight=None, sample_weight=None, ignore_index=-100, reduction="mean",
    denominator=None, num_threads=None
):  # fmt: skip
    """Poly-1 loss, -log p_t + epsilon (1 - p_t); see :func:`fastce.poly_loss`."""
    batch = _Batch(logits, axis, targets, sample_weight, weight, ignore_index)
    return _evaluate(_class_formula(batch, _poly, epsilon), batch, reduction, denominator)[0]


def poly_loss_with_grad(
    logits, targets, *, epsilon=1.0, axis=-1, weight=None, sample_weight=None, ignore_index=-100, reduction="mean",
    denominator=None, num_threads=None, grad_output=None, out=None
):  # fmt: skip
    """Poly-1 loss and its gradient; see :func:`fastce.poly_loss_with_grad`."""
    batch = _Batch(logits, axis, targets, sample_weight, weight, ignore_index)
    return _evaluate(_class_formula(batch, _poly, epsilon), batch, reduction, denominator, grad_output, [out])


def _poly(p, one_minus_p, minus_log_p, epsilon):
    """Return f and -p f'."""
    return minus_log_p + epsilon * one_minus_p, 1 + epsilon * p


def _class_formula(batch, f, parameter):
    def formula(rows):
        softmax = _softmax(batch.logits(rows))
        ids = batch.ids[rows]
        at = np.arange(len(rows)), ids
        one_minus_p = np.where(softmax.largest[1] == ids, softmax.rest, 1 - softmax.p[at])
        loss, slope = f(softmax.p[at], one_minus_p, softmax.minus_log_p[at], parameter)
        weight = batch.weight[ids]
        yield _product(weight, loss)
        yield (weight * slope)[:, None] * _gradient(softmax, batch.distributions(rows))

    return formula


# Kullback-Leibler divergence


def kl_divergence(
    logits, targets, *, axis=-1, from_logits=False, sample_weight=None, reduction="mean", denominator=None,
    num_threads=None
):  # fmt: skip
    """KL(q || p), q from `targets` and p from `logits`; see :func:`fastce.kl_divergence`."""
    batch = _Batch(logits, axis, targets, sample_weight)
    return _evaluate(_kl_formula(batch, from_logits), batch, reduction, denominator)[0]


def kl_divergence_with_grad(
    logits, targets, *, axis=-1, from_logits=False, sample_weight=None, reduction="mean", denominator=None,
    num_threads=None, grad_output=None, out=None
):  # fmt: skip
    """KL(q || p) and its gradient with respect to `logits`; see :func:`fastce.kl_divergence_with_grad`."""
    batch = _Batch(logits, axis, targets, sample_weight)
    return _evaluate(_kl_formula(batch, from_logits), batch, reduction, denominator, grad_output, [out])


def _kl_formula(batch, from_logits):
    def formula(rows):
        softmax = _softmax(batch.logits(rows))
        targets = batch.distributions(rows)
        if from_logits:
            target = _softmax(targets)
            yield _kl_of_normalised(target.p, target.minus_log_p, softmax)
            yield _gradient(softmax, target.p)
            return
        # q = s r with r of sum 1: sum q log(q / p) = s sum r log(r / p) + s log s.
        s = targets.sum(axis=1)
        divisor = np.where(s > 0, s, 1.0)
        r = targets / divisor[:, None]
        loss = s * _kl_of_normalised(r, -np.log(r), softmax) + s * np.log(divisor)
        # A row that was rounded to its dtype after being normalised has s a little beside 1; it is no less than 0.
        normalised = np.abs(s - 1) <= 16 * batch.target_eps
        yield np.where(normalised, np.maximum(loss, 0.0), loss)
        yield _gradient(softmax, targets)

    return formula


def _kl_of_normalised(q, minus_log_q, softmax):
    """Return sum q log(q/p) of rows q of sum 1 as sum (q log(q/p) - q + p), where no term is negative."""
    p = softmax.p
    d = softmax.minus_log_p - minus_log_q
    # d + exp(-d) - 1 as its series, for it cancels where p is close to q.
    small = np.clip(d, -0.5, 0.5)
    series = np.ones_like(d)
    for k in range(16, 2, -1):
        series = 1 - small / k * series
    terms = np.where(np.abs(d) <= 0.5, q * (d * d / 2) * series, (p - q) + q * d)
    return np.where(q == 0, p, terms).sum(axis=1)


# Sigmoid cross-entropy, entry by entry: y' (softplus(-z)) pos_weight + (1 - y') softplus(z)


def binary_cross_entropy(
    logits, targets, *, pos_weight=None, sample_weight=None, label_smoothing=0.0, reduction="mean", denominator=None,
    num_threads=None
):  # fmt: skip
    """Sigmoid cross-entropy of `logits`; see :func:`fastce.binary_cross_entropy`."""
    batch = _Entries(logits, targets, sample_weight)
    return _evaluate(_binary_formula(batch, pos_weight, label_smoothing), batch, reduction, denominator)[0]


def binary_cross_entropy_with_grad(
    logits, targets, *, pos_weight=None, sample_weight=None, label_smoothing=0.0, reduction="mean", denominator=None,
    num_threads=None, grad_output=None, out=None
):  # fmt: skip
    """Sigmoid cross-entropy and its gradient; see :func:`fastce.binary_cross_entropy_with_grad`."""
    batch = _Entries(logits, targets, sample_weight)
    formula = _binary_formula(batch, pos_weight, label_smoothing)
    return _evaluate(formula, batch, reduction, denominator, grad_output, [out])


def _binary_formula(batch, pos_weight, label_smoothing):
    pos_weight = batch.per_row(1.0 if pos_weight is None else pos_weight)

    def formula(rows):
        z = batch.logits(rows)[:, 0]
        y = (1 - label_smoothing) * batch.labels[rows] + label_smoothing / 2
        yes, no = pos_weight[rows] * y, 1 - y
        yield _product(yes, _softplus(-z)) + _product(no, _softplus(z))
        yield (no * _sigmoid(z) - yes * _sigmoid(-z))[:, None]

    return formula


def _softplus(z):
    """Return log(1 + exp(z))."""
    return np.maximum(z, 0.0) + np.log1p(np.exp(-np.abs(z)))


def _sigmoid(z):
    """Return 1 / (1 + exp(-z)), with all digits also where it is tiny."""
    e = np.exp(-np.abs(z))
    return np.where(z < 0, e, 1.0) / (1 + e)


# From probabilities


def cross_entropy_from_probs(
    probs, targets, *, axis=-1, weight=None, sample_weight=None, ignore_index=-100, reduction="mean",
    denominator=None, num_threads=None
):  # fmt: skip
    """Cross-entropy of probabilities, sum w q (-log p); see :func:`fastce.cross_entropy_from_probs`."""
    batch = _Batch(probs, axis, targets, sample_weight, weight, ignore_index)

    def formula(rows):
        yield _product(batch.weight * batch.distributions(rows), 0.0 - np.log(batch.logits(rows))).sum(axis=1)

    return _evaluate(formula, batch, reduction, denominator)[0]


def binary_cross_entropy_from_probs(
    probs, targets, *, sample_weight=None, reduction="mean", denominator=None, num_threads=None
):  # fmt: skip
    """Binary cross-entropy of probabilities; see :func:`fastce.binary_cross_entropy_from_probs`."""
    batch = _Entries(probs, targets, sample_weight)

    def formula(rows):
        p, y = batch.logits(rows)[:, 0], batch.labels[rows]
        yield _product(y, 0.0 - np.log(p)) + _product(1 - y, 0.0 - np.log1p(-p))

    return _evaluate(formula, batch, reduction, denominator)[0]


# Activations


def softmax(logits, axis=-1, *, out=None, num_threads=None):
    """Return exp(z_c) / sum_k exp(z_k); see :func:`fastce.softmax`."""
    batch = _Batch(logits, axis)
    return batch.in_shape_of_logits(_of_all_rows(batch, lambda softmax: softmax.p), out)


def log_softmax(logits, axis=-1, *, out=None, num_threads=None):
    """Return log(softmax(z)); see :func:`fastce.log_softmax`."""
    batch = _Batch(logits, axis)
    return batch.in_shape_of_logits(_of_all_rows(batch, lambda softmax: 0.0 - softmax.minus_log_p), out)


def logsumexp(logits, axis=-1, *, keepdims=False, num_threads=None):
    """Return log(sum_c exp(z_c)), of all -inf -inf, and inf if one is inf; see :func:`fastce.logsumexp`."""
    batch = _Batch(logits, axis)
    values = _of_all_rows(batch, lambda softmax: np.where(np.isnan(softmax.lse), softmax.maximum, softmax.lse))
    values = batch.in_shape_of_rows(values)
    return np.expand_dims(values, axis) if keepdims else values


def _of_all_rows(batch, pick):
    with np.errstate(all="ignore"):
        parts = [pick(_softmax(batch.logits(rows))) for rows in _blocks(np.arange(batch.n_rows), batch.classes)]
    return np.concatenate(parts) if parts else np.empty(0)


# Statistics


class CrossEntropyStats(NamedTuple):
    """What :func:`cross_entropy_stats` returns: six arrays of the rows' shape."""

    loss: np.ndarray
    lse: np.ndarray
    predicted: np.ndarray
    correct: np.ndarray
    probability: np.ndarray
    entropy: np.ndarray


def cross_entropy_stats(
    logits, targets, *, axis=-1, ignore_index=-100, logit_scale=1.0, softcap=None, class_mask=None, num_threads=None
):  # fmt: skip
    """Loss, lse, predicted class, whether it is right, p of the target and entropy of each row, in nats.

    An ignored row has the loss 0, the prediction -1 and nan elsewhere; one without a softmax has the loss nan too. For
    distributions, right is the class of the largest mass, and p of the target is sum q p.
    """
    batch = _Batch(logits, axis, targets, ignore_index=ignore_index, class_mask=class_mask)
    n = batch.n_rows
    loss, predicted, correct = np.zeros(n), np.full(n, -1, np.int64), np.zeros(n, bool)
    lse, probability, entropy = np.full(n, np.nan), np.full(n, np.nan), np.full(n, np.nan)
    with np.errstate(all="ignore"):
        for rows in _blocks(np.flatnonzero(batch.live), batch.classes):
            z, _ = _scaled_and_capped(batch.logits(rows), logit_scale, softcap, batch.loss_dtype)
            softmax, q = _softmax(np.where(batch.shown(rows), z, -np.inf)), batch.distributions(rows)
            has_softmax = ~np.isnan(softmax.lse)
            loss[rows] = _product(q, softmax.minus_log_p).sum(axis=1)
            lse[rows] = softmax.lse
            predicted[rows] = np.where(has_softmax, softmax.largest[1], -1)
            mass = q[softmax.largest]
            correct[rows] = has_softmax & (mass > 0) & (mass == q.max(axis=1))
            probability[rows] = (q * softmax.p).sum(axis=1)
            entropy[rows] = _product(softmax.p, softmax.minus_log_p).sum(axis=1)
        loss, lse, probability, entropy = map(batch.in_shape_of_rows, (loss, lse, probability, entropy))
    shape = batch.row_shape
    return CrossEntropyStats(loss, lse, predicted.reshape(shape), correct.reshape(shape), probability, entropy)


# Rows


class _Softmax(NamedTuple):
    """Rows (n, C) of probabilities and what goes with them; all of it nan for a row that has no softmax."""

    p: np.ndarray
    minus_log_p: np.ndarray
    largest: tuple  # the index of each row's largest logit, the lowest of equals
    rest: np.ndarray  # 1 - p there
    maximum: np.ndarray  # that logit itself, never turned into nan
    lse: np.ndarray


def _softmax(z):
    """Return the _Softmax of rows z (n, C). A row with a nan, a +inf or nothing but -inf has none."""
    largest = np.arange(len(z)), z.argmax(axis=1)
    maximum = z.max(axis=1)
    p = _exp_of_difference(z, maximum[:, None])
    p[largest] = 0.0
    others = np.where(np.isfinite(maximum), p.sum(axis=1), np.nan)
    p[largest] = 1.0
    p /= (1 + others)[:, None]
    log1p = np.log1p(others)
    minus_log_p = (maximum[:, None] - z) + log1p[:, None]
    return _Softmax(p, minus_log_p, largest, others / (1 + others), maximum, maximum + log1p)


def _exp_of_difference(z, largest):
    """Return exp(z - largest) without the relative error |z - largest| * 2^-53 that rounding the difference costs."""
    difference = z - largest
    subtracted = difference - z
    rounding = (z - (difference - subtracted)) - (largest + subtracted)
    return np.exp(difference) * (1.0 + np.where(np.isfinite(rounding), rounding, 0.0))


def _gradient(softmax, a):
    """Return p * sum(a) - a of rows, without cancellation at the largest logit."""
    a_largest = a[softmax.largest]
    without = a.copy()
    without[softmax.largest] = 0.0
    without = without.sum(axis=1)
    gradient = softmax.p * (without + a_largest)[:, None] - a
    gradient[softmax.largest] = softmax.p[softmax.largest] * without - a_largest * softmax.rest
    return gradient


def _product(factor, value):
    """Return factor * value, with 0 * inf = 0."""
    return np.where((factor == 0) & np.isinf(value), 0.0, factor * value)


class _Batch:
    """Logits of any shape and dtype as rows, the targets and weights of those rows, and the way back to that shape."""

    def __init__(self, logits, axis, targets=None, sample_weight=None, weight=None, ignore_index=None, class_mask=None):
        logits = np.asarray(logits)
        self.shape = logits.shape
        self.axis = axis % logits.ndim
        self.classes = logits.shape[axis]
        self.row_shape = self.shape[: self.axis] + self.shape[self.axis + 1 :]
        self.n_rows = logits.size // self.classes
        self.dtype = logits.dtype.newbyteorder("=")
        self.loss_dtype = np.dtype(np.float32) if logits.dtype.itemsize == 2 else self.dtype
        self._logits = self.as_rows(logits)
        self._mask = None if class_mask is None else self.as_rows(np.broadcast_to(class_mask, self.shape))
        self.weight = np.ones(self.classes) if weight is None else np.asarray(weight, np.float64)
        self.sample_weight = self.per_row(1.0 if sample_weight is None else sample_weight)
        # What a row counts for in the mean. A row that counts for nothing is not live: it is never read.
        self.counts, self.live, self.ids = self.sample_weight, self.sample_weight != 0, None
        if targets is not None:
            self._take_targets(targets, ignore_index)

    def _take_targets(self, targets, ignore_index):
        """Keep distributions as rows, sparse ones as indices and values (N, m); a class id is sparse, with value 1."""
        self._dense = None
        if hasattr(targets, "indices") and hasattr(targets, "values"):
            indices, values = np.asarray(targets.indices), np.asarray(targets.values)
            self.target_eps = float(np.spacing(np.ones((), values.dtype)))
            self._indices = indices.reshape(self.n_rows, indices.shape[-1])
            self._values = values.reshape(self._indices.shape)
            return
        targets = np.asarray(targets)
        if targets.dtype.kind not in "iu" and targets.shape == self.shape:
            self.target_eps = float(np.spacing(np.ones((), targets.dtype)))
            self._dense = self.as_rows(targets)
            return
        self.ids = targets.reshape(-1).astype(np.int64)
        if ignore_index is not None:
            self.live = self.live & ~np.isin(self.ids, ignore_index)
        self._indices, self._values = self.ids[:, None], np.ones((self.n_rows, 1))
        self.counts = np.zeros(self.n_rows)
        self.counts[self.live] = self.sample_weight[self.live] * self.weight[self.ids[self.live]]

    def as_rows(self, array):
        """Return an array of the logits' shape as rows (N, C), in its own dtype."""
        return np.moveaxis(array, self.axis, -1).reshape(self.n_rows, self.classes)

    def per_row(self, value):
        """Return a scalar, or an array of the rows' shape, as float64 (N,)."""
        return np.broadcast_to(np.asarray(value, np.float64), self.row_shape).reshape(-1)

    def logits(self, rows):
        return self._logits[rows].astype(np.float64)

    def shown(self, rows):
        """Which classes exist in each of the rows."""
        return np.ones((len(rows), self.classes), bool) if self._mask is None else self._mask[rows]

    def distributions(self, rows):
        """Return the targets of the rows as distributions (n, C), whatever way they were given."""
        if self._dense is not None:
            return self._dense[rows].astype(np.float64)
        dense = np.zeros((len(rows), self.classes))
        np.add.at(dense, (np.arange(len(rows))[:, None], self._indices[rows]), self._values[rows].astype(np.float64))
        return dense

    def in_shape_of_rows(self, values):
        """Return values (N,) in the rows' shape, rounded to the logits' dtype (float32 for half types)."""
        with np.errstate(all="ignore"):
            return values.reshape(self.row_shape).astype(self.loss_dtype)

    def in_shape_of_logits(self, rows, out=None):
        """Return rows (N, C) in the shape of the logits, in `out`, or as a new array of their dtype."""
        out = np.empty(self.shape, self.dtype) if out is None else out
        with np.errstate(all="ignore"):
            out[...] = np.moveaxis(rows.reshape(*self.row_shape, self.classes), -1, self.axis)
        return out


class _Entries(_Batch):
    """Logits of sigmoids, each of them a row of one logit, with the target in `labels`."""

    def __init__(self, logits, targets, sample_weight):
        super().__init__(np.asarray(logits)[..., None], -1, sample_weight=sample_weight)
        self.labels = self.per_row(targets)

    def in_shape_of_logits(self, rows, out=None):
        out = np.empty(self.row_shape, self.dtype) if out is None else out
        super().in_shape_of_logits(rows, out[..., None])
        return out


def _evaluate(formula, batch, reduction, denominator, grad_output=None, outs=()):
    """Return the loss, reduced, and as many derivatives of it as there are `outs` (None: a new array).

    ``formula(rows)`` yields the rows' losses (n,), then their gradients (n, C), then Hessians, each when asked for.
    """
    live, divisor = batch.live, 1.0
    if reduction == "mean":
        divisor = float(batch.counts.sum()) if denominator is None else float(denominator)
    if not divisor:  # a mean over nothing is nan, and does not depend on any logit
        live, divisor = np.zeros_like(live), np.nan
    with np.errstate(all="ignore"):
        factor = batch.sample_weight * batch.per_row(1.0 if grad_output is None else grad_output) / divisor
        losses = np.zeros(batch.n_rows)
        derivatives = [np.zeros((batch.n_rows, batch.classes)) for _ in outs]
        for rows in _blocks(np.flatnonzero(live), batch.classes):
            parts = formula(rows)
            losses[rows] = next(parts) * batch.sample_weight[rows]
            for derivative in derivatives:
                derivative[rows] = np.where(batch.shown(rows), next(parts) * factor[rows, None], 0.0)
        total = float(losses.sum())
    loss = batch.in_shape_of_rows(losses) if reduction == "none" else total / divisor
    return loss, *(batch.in_shape_of_logits(*pair) for pair in zip(derivatives, outs, strict=True))


def _blocks(rows, classes):
    """Yield `rows` (numbers of rows) in blocks small enough for the arrays of a block to stay in cache."""
    size = max(1, 2**16 // classes)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
