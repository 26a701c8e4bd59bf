"""Every public function in plain NumPy, float64 inside: the definition that tests and benchmarks compare with.

For readers, not for speed. Arguments are trusted here; the public functions of :mod:`fastce` are the ones that
check them. The formulas and their names are those of the public docstrings: ``z`` logits, ``t`` the row's class,

    p_j     = exp(z_j) / sum_k exp(z_k)
    loss    = -log p_t = log(1 + sum_{j != t} exp(z_j - z_t))
    grad_j  = p_j - [j == t]

written so that nothing cancels: the target's own term is left out of the sum instead of being subtracted from it.
"""

import numpy as np

__all__ = ["cross_entropy", "cross_entropy_with_grad"]


def cross_entropy(
    logits,
    targets,
    *,
    axis=-1,
    ignore_index=-100,
    reduction="mean",
    denominator=None,
    num_threads=None,
):
    """Softmax cross-entropy of `logits` against class ids; see :func:`fastce.cross_entropy`."""
    rows, ids, live, row_shape = _as_rows(logits, targets, axis, ignore_index)
    losses, _ = _row_losses_and_grads(rows, ids, live)
    return _reduce(losses, live, row_shape, np.asarray(logits).dtype, reduction, denominator)


def cross_entropy_with_grad(
    logits,
    targets,
    *,
    axis=-1,
    ignore_index=-100,
    reduction="mean",
    denominator=None,
    num_threads=None,
    grad_output=None,
    out=None,
):
    """Softmax cross-entropy and its gradient; see :func:`fastce.cross_entropy_with_grad`."""
    logits = np.asarray(logits)
    rows, ids, live, row_shape = _as_rows(logits, targets, axis, ignore_index)
    losses, grads = _row_losses_and_grads(rows, ids, live)
    loss = _reduce(losses, live, row_shape, logits.dtype, reduction, denominator)

    if grad_output is None:
        grad_output = 1.0
    scale = np.broadcast_to(np.asarray(grad_output, dtype=np.float64), row_shape).reshape(-1)
    if reduction == "mean":
        divisor = _mean_denominator(live, denominator)
        scale = scale / divisor if divisor else np.zeros_like(scale)
        if not divisor:
            live = np.zeros_like(live)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        grads *= scale[:, None]
        grads[~live] = 0.0
        grads = np.moveaxis(grads.reshape(*row_shape, rows.shape[1]), -1, axis)
        grads = grads.astype(logits.dtype.newbyteorder("="))
    if out is None:
        return loss, np.ascontiguousarray(grads)
    out[...] = grads
    return loss, out


def _as_rows(logits, targets, axis, ignore_index):
    """Return logits as float64 rows (N, C), ids (N,), which rows are live, and the shape of the rows."""
    by_class = np.moveaxis(np.asarray(logits, dtype=np.float64), axis, -1)
    row_shape = by_class.shape[:-1]
    rows = by_class.reshape(-1, by_class.shape[-1]).copy()
    ids = np.asarray(targets).reshape(-1)
    live = np.ones(ids.shape, bool) if ignore_index is None else ~np.isin(ids, ignore_index)
    return rows, ids, live, row_shape


def _row_losses_and_grads(rows, ids, live):
    """Return each row's own loss (N,) and gradient (N, C)."""
    losses = np.zeros(len(rows))
    grads = np.zeros_like(rows)
    picked = np.flatnonzero(live)
    z, t = rows[picked], ids[picked].astype(np.int64)
    at_target = np.arange(len(picked)), t
    with np.errstate(all="ignore"):
        largest = z.max(axis=1)
        z_target = z[at_target]
        p = _exp_of_difference(z, largest[:, None])
        e_target = p[at_target]
        p[at_target] = 0.0
        others = p.sum(axis=1)
        total = others + e_target
        losses[picked] = np.where(
            e_target >= others,
            np.log1p(others / e_target),
            np.log(total) + (largest - z_target),
        )
        p /= total[:, None]
        p[at_target] = -others / total
        # A row with a nan, a +inf or nothing but -inf has no softmax: total is nan there.
        losses[picked[np.isnan(total)]] = np.nan
        p[np.isnan(total)] = np.nan
    grads[picked] = p
    return losses, grads


def _exp_of_difference(z, largest):
    """Return exp(z - largest) without the relative error |z - largest| * 2^-53 that rounding the difference costs."""
    difference = z - largest
    subtracted = difference - z
    rounding = (z - (difference - subtracted)) - (largest + subtracted)
    return np.exp(difference) * (1.0 + np.where(np.isfinite(rounding), rounding, 0.0))


def _mean_denominator(live, denominator):
    return float(np.count_nonzero(live)) if denominator is None else float(denominator)


def _reduce(losses, live, row_shape, dtype, reduction, denominator):
    if reduction == "none":
        with np.errstate(over="ignore", under="ignore"):
            return losses.reshape(row_shape).astype(dtype.newbyteorder("="))
    total = float(losses.sum())
    if reduction == "sum":
        return total
    divisor = _mean_denominator(live, denominator)
    return total / divisor if divisor else float("nan")
