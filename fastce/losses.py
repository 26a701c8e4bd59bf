"""Softmax cross-entropy with gradient and Hessian: checks, allocates, one call, returns."""

from fastce import _checks, _engine
from fastce._problem import AXIS, IGNORE_INDEX, deliver, gradient_array, may_be_plain, pose
from fastce.targets import SparseTargets

__all__ = ["cross_entropy", "cross_entropy_with_grad", "cross_entropy_with_grad_hess"]


def cross_entropy(
    logits,
    targets,
    *,
    axis=AXIS,
    weight=None,
    sample_weight=None,
    ignore_index=IGNORE_INDEX,
    label_smoothing=0.0,
    logit_scale=1.0,
    softcap=None,
    z_loss=0.0,
    class_mask=None,
    reduction="mean",
    denominator=None,
    num_threads=None,
):
    r"""Softmax cross-entropy of logits against class ids or distributions, in nats.

    With logits :math:`z` (scaled, capped and masked as below), :math:`p_j = e^{z_j} / \sum_k e^{z_k}`, class weights
    :math:`w`, smoothing :math:`\epsilon` and K classes, the loss of a row is for a class id :math:`t`

    .. math:: -(1 - \epsilon) w_t \log p_t - \frac{\epsilon}{K} \sum_c w_c \log p_c

    and for a distribution :math:`q`

    .. math:: -\sum_c w_c q'_c \log p_c, \qquad q' = (1 - \epsilon) q + \epsilon / K,

    plus :math:`\zeta (\log \sum_k e^{z_k})^2` with the factor `z_loss`, all times the row's `sample_weight`.
    :math:`-\log p_t` is computed as :math:`\log(1 + \sum_{j \ne t} e^{z_j - z_t})` wherever that is small, so that a
    confident row keeps all digits of its tiny loss.

    Parameters
    ----------
    logits : array_like of float32, float64, float16 or bfloat16, shape (..., C, ...)
        Unnormalised scores, at least one class along `axis`. Any strides, alignment and byte order; rows that lie
        contiguous in memory are used where they lie, also with a padded row stride. The half types (bfloat16 is
        ml_dtypes') are computed in float32.
    targets : array_like of int, array_like of float, or SparseTargets
        Integers of the shape of `logits` without `axis` are class ids in [0, C) or among `ignore_index`. Floats of the
        shape of `logits` are a distribution a row: finite and >= 0, the sum need not be 1. See also
        :class:`SparseTargets`.
    axis : int, default -1
        The class axis of `logits`.
    weight : array_like of float, shape (C,), optional
        Weights of the classes, finite and >= 0. A weight of 0 makes an infinite loss 0.
    sample_weight : array_like of float, the rows' shape, optional
        Weights of the rows, finite, of any sign. Rows of weight 0 count for nothing: their logits are not read.
    ignore_index : int, sequence of int or None, default -100
        Class ids whose rows count for nothing: their logits are not read, their loss is 0. None ignores nothing. Only
        for class ids.
    label_smoothing : float, default 0.0
        In [0, 1]: the part of each target that is spread over all classes evenly.
    logit_scale : float, default 1.0
        Finite and > 0: multiplies the logits (the inverse of a temperature) in their dtype, as ``logits * logit_scale``
        does.
    softcap : float, optional
        Finite and > 0: scaled logits x become ``softcap * tanh(x / softcap)``, rounded to their dtype; -inf stays.
    z_loss : float, default 0.0
        Finite and >= 0: the weight of the squared log-sum-exp, which keeps logits from drifting.
    class_mask : array_like of bool, broadcastable to `logits`, optional
        False: this class does not exist for this row, whatever its logit. Its probability is 0, smoothing goes to the
        other classes only, and a target on it has the loss inf.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides the sum of the rows' losses by `denominator`, "none" returns them row by row.
    denominator : float, optional
        Finite and > 0, only with "mean". By default the sum over the rows that count of ``sample_weight * weight[t]``
        for class ids, of ``sample_weight`` for soft targets, where what is not given is 1.
    num_threads : int, optional
        At most this many threads. By default ``FASTCE_NUM_THREADS``, else OpenMP's own limit, capped by the CPUs
        this process may use; small batches stay on the calling thread. The result has the same bits for any number.

    Returns
    -------
    float or ndarray
        "mean" and "sum": a Python float, reduced in float64. "none": an array of the rows' shape and of the logits'
        dtype (float32 for the half types). The mean over a denominator of 0 (all ignored, no rows, weights that add up
        to 0) is nan; the sum of nothing is 0.0.

    Raises
    ------
    TypeError
        A dtype or kind that cannot be right: integer logits, float class ids, a non-integer `ignore_index`.
    ValueError
        Shapes that do not fit, an axis or option out of range, a row whose classes are all masked.
    IndexError
        A class id that is neither in [0, C) nor ignored; the message names the first such row.

    Notes
    -----
    A row with a nan, a +inf or nothing but -inf has the loss nan; a target whose logit is -inf has the loss inf.
    Every finite loss is within 5e-7 (float32) or 2e-15 (float64) of the exact value for logits as scaled and capped,
    relatively, down to the smallest normal number, and never negative as long as no sample weight is. The log-sum-exp
    form is that of [1]_; the log1p form follows from leaving the target out of the sum. Weights, smoothing and means
    are PyTorch's [2]_.

    References
    ----------
    .. [1] P. Blanchard, D. J. Higham, N. J. Higham, "Accurately computing the log-sum-exp and softmax functions",
       IMA Journal of Numerical Analysis 41 (2021).
    .. [2] https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> fastce.cross_entropy(logits, [0, 2], reduction="none").round(6)
    array([0.239545, 1.098612])
    >>> print(f"{fastce.cross_entropy(logits, [0, 2]):.6f}")
    0.669079

    A confident row, where log(softmax) gives 0:

    >>> print(f"{fastce.cross_entropy(np.array([20.0, 0.0]), 0):.7e}")
    2.0611536e-09

    A distribution, and its equal by class ids and smoothing:

    >>> print(f"{fastce.cross_entropy(logits[0], np.array([0.8, 0.1, 0.1])):.6f}")
    0.639545
    >>> print(f"{fastce.cross_entropy(logits[0], 0, label_smoothing=0.3):.6f}")
    0.639545
    """
    if may_be_plain(logits, axis, reduction):
        plain = _engine.kernels.plain_cross_entropy(
            logits, targets, None, False, None, False, weight, sample_weight, ignore_index, label_smoothing,
            logit_scale, softcap, z_loss, class_mask, reduction, denominator, num_threads, None,
            _engine.SERIAL_ELEMENTS, _engine.default_threads,
        ) or _engine.soft.plain_general(
            logits, targets, *entries_of(targets), None, False, None, False, weight, sample_weight, ignore_index,
            label_smoothing, logit_scale, softcap, z_loss, class_mask, reduction, denominator, num_threads, None,
            _engine.SERIAL_ELEMENTS, _engine.default_threads,
        )
        if plain is not None:
            return plain[0]
    problem = pose(
        logits, targets, axis, num_threads, reduction=reduction, denominator=denominator, weight=weight,
        sample_weight=sample_weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
        logit_scale=logit_scale, softcap=softcap, z_loss=z_loss, class_mask=class_mask,
    )
    return deliver(problem)


def entries_of(targets):
    """Return the indices and values of sparse targets, (None, None) of others."""
    return (targets.indices, targets.values) if type(targets) is SparseTargets else (None, None)


def cross_entropy_with_grad(
    logits,
    targets,
    *,
    axis=AXIS,
    weight=None,
    sample_weight=None,
    ignore_index=IGNORE_INDEX,
    label_smoothing=0.0,
    logit_scale=1.0,
    softcap=None,
    z_loss=0.0,
    class_mask=None,
    reduction="mean",
    denominator=None,
    num_threads=None,
    grad_output=None,
    out=None,
):
    r"""Softmax cross-entropy of logits, and its gradient with respect to the logits.

    With the target's weighted mass :math:`a` (:math:`a_c = w_t [c = t]` for a class id, :math:`w_c q_c` for a
    distribution, smoothed as in :func:`cross_entropy`), the gradient of a row's loss is

    .. math:: p_c \left(\sum_k a_k + 2 \zeta \log \sum_k e^{z_k}\right) - a_c

    times `sample_weight`, `logit_scale` and the derivative of the cap. It is computed at the target from the other
    classes, so that it keeps its digits where :math:`p_t` rounds to 1. It belongs to the loss that is returned: for
    "mean" it is divided by the denominator, for "none" it is each row's own.

    Parameters
    ----------
    logits, targets, axis, weight, sample_weight, ignore_index, label_smoothing, logit_scale, softcap, z_loss
        As in :func:`cross_entropy`.
    class_mask, reduction, denominator, num_threads
        As in :func:`cross_entropy`.
    grad_output : float or array_like of the rows' shape, optional
        Multiplies the gradient (the chain rule's incoming factor); an array goes only with reduction "none". It is
        data: it may be negative, infinite or nan.
    out : ndarray, optional
        Buffer for the gradient, of logits' shape and dtype, with any strides. It may be `logits` itself, which are
        then overwritten (any other overlap is refused). Reusing one buffer saves the system from handing out fresh
        pages at every call, which costs more than the computation.

    Returns
    -------
    loss : float or ndarray
        As in :func:`cross_entropy`, the same bits.
    grad : ndarray
        `out` if it was given, else a new array of logits' shape and dtype. Rows that do not count are exactly 0, and
        so are masked classes.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in :func:`cross_entropy`; all of them before anything is written.

    Notes
    -----
    Every entry with p >= 2^-126 (float32) is within 4.8e-7 of the exact value, relatively, also at the target; for
    soft targets, smoothing and z_loss, whose terms have both signs, relatively to the sum of their magnitudes; float64
    within 2e-15. Special rows: nan, +inf or all -inf make the whole row nan and touch no other; a logit of -inf has
    p = 0; a target at -inf has -1. The gradient of a mean over a denominator of 0 is 0.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> loss, grad = fastce.cross_entropy_with_grad(logits, [0, 2], reduction="sum")
    >>> print(f"{loss:.6f}")
    1.338157
    >>> grad.round(6)
    array([[-0.213014,  0.106507,  0.106507],
           [ 0.333333,  0.333333, -0.666667]])
    """
    if may_be_plain(logits, axis, reduction):
        plain = _engine.kernels.plain_cross_entropy(
            logits, targets, out, True, None, False, weight, sample_weight, ignore_index, label_smoothing,
            logit_scale, softcap, z_loss, class_mask, reduction, denominator, num_threads, grad_output,
            _engine.SERIAL_ELEMENTS, _engine.default_threads,
        ) or _engine.soft.plain_general(
            logits, targets, *entries_of(targets), out, True, None, False, weight, sample_weight, ignore_index,
            label_smoothing, logit_scale, softcap, z_loss, class_mask, reduction, denominator, num_threads,
            grad_output, _engine.SERIAL_ELEMENTS, _engine.default_threads,
        )
        if plain is not None:
            return plain
    problem = pose(
        logits, targets, axis, num_threads, reduction=reduction, denominator=denominator, weight=weight,
        sample_weight=sample_weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
        logit_scale=logit_scale, softcap=softcap, z_loss=z_loss, class_mask=class_mask, grad_output=grad_output,
        buffers={"out": out},
    )
    grad = gradient_array(problem, out)
    return deliver(problem, grad), grad


def cross_entropy_with_grad_hess(
    logits,
    targets,
    *,
    axis=AXIS,
    weight=None,
    sample_weight=None,
    ignore_index=IGNORE_INDEX,
    label_smoothing=0.0,
    logit_scale=1.0,
    softcap=None,
    z_loss=0.0,
    class_mask=None,
    reduction="mean",
    denominator=None,
    num_threads=None,
    grad_output=None,
    out=None,
    hess_out=None,
):
    r"""Softmax cross-entropy of logits, its gradient, and the diagonal of its Hessian: what boosting libraries ask for.

    With A the sum of the target's weighted mass (1 without options), the second derivative of a row's loss with respect
    to its own logit c is

    .. math:: A p_c (1 - p_c) + 2 \zeta p_c (p_c + (1 - p_c) \log \sum_k e^{z_k})

    times `sample_weight`, `grad_output` and the square of `logit_scale`, scaled like the gradient.

    Parameters
    ----------
    logits, targets, axis, weight, sample_weight, ignore_index, label_smoothing, logit_scale
        As in :func:`cross_entropy`.
    softcap : None
        Must be None: a cap has a second derivative of its own.
    z_loss, class_mask, reduction, denominator, num_threads, grad_output
        As in :func:`cross_entropy_with_grad`.
    out, hess_out : ndarray, optional
        Buffers for gradient and Hessian, of logits' shape, with any strides and in any floating dtype: float32 in
        Fortran order, as boosting libraries want it, goes with float64 scores; the numbers are rounded once more.
        One of them may be `logits` itself.

    Returns
    -------
    loss : float or ndarray
        As in :func:`cross_entropy`, the same bits.
    grad, hess : ndarray
        `out` and `hess_out` if they were given, else new arrays of logits' shape and dtype.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in :func:`cross_entropy`; all of them before anything is written.

    Notes
    -----
    The formula is the derivative of the softmax, dp_c/dz_c = p_c (1 - p_c). Every entry is within 4.8e-7 (float32) or
    2e-15 (float64) of the exact value relatively to A p_c.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> loss, grad, hess = fastce.cross_entropy_with_grad_hess(logits, [0, 2], reduction="sum")
    >>> hess.round(6)
    array([[0.167639, 0.095163, 0.095163],
           [0.222222, 0.222222, 0.222222]])
    """
    _checks.check_no_softcap(softcap)
    if may_be_plain(logits, axis, reduction):
        plain = _engine.kernels.plain_cross_entropy(
            logits, targets, out, True, hess_out, True, weight, sample_weight, ignore_index, label_smoothing,
            logit_scale, softcap, z_loss, class_mask, reduction, denominator, num_threads, grad_output,
            _engine.SERIAL_ELEMENTS, _engine.default_threads,
        ) or _engine.soft.plain_general(
            logits, targets, *entries_of(targets), out, True, hess_out, True, weight, sample_weight, ignore_index,
            label_smoothing, logit_scale, softcap, z_loss, class_mask, reduction, denominator, num_threads,
            grad_output, _engine.SERIAL_ELEMENTS, _engine.default_threads,
        )
        if plain is not None:
            return plain
    problem = pose(
        logits, targets, axis, num_threads, reduction=reduction, denominator=denominator, weight=weight,
        sample_weight=sample_weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
        logit_scale=logit_scale, z_loss=z_loss, class_mask=class_mask, grad_output=grad_output,
        buffers={"out": out, "hess_out": hess_out}, any_float=True,
    )
    grad, hess = gradient_array(problem, out), gradient_array(problem, hess_out)
    return deliver(problem, grad, hess), grad, hess
