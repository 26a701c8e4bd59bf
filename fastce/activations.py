"""softmax, log_softmax and logsumexp along any axis: checks, allocates, one call, returns."""

import numpy as np

from fastce import _checks, _engine
from fastce._problem import AXIS, classes_last

__all__ = ["log_softmax", "logsumexp", "softmax"]


def softmax(logits, axis=AXIS, *, out=None, num_threads=None):
    r"""Softmax: :math:`p_j = e^{z_j} / \sum_k e^{z_k}` along an axis.

    Parameters
    ----------
    logits : array_like of float32, float64, float16 or bfloat16, shape (..., C, ...)
        Unnormalised scores, at least one class along `axis`, in any layout.
    axis : int, default -1
        The class axis.
    out : ndarray, optional
        Where the result goes, of logits' shape and dtype; it may be `logits` itself.
    num_threads : int, optional
        As in :func:`cross_entropy`.

    Returns
    -------
    ndarray
        `out` if it was given, else a new array of logits' shape and dtype. A row with a nan, a +inf or nothing but -inf
        is nan.

    Raises
    ------
    TypeError, ValueError
        Logits that are not floating or have no class; an axis out of range; an `out` that does not fit.

    Notes
    -----
    Every entry p >= 2^-126 (float32) is within 4.8e-7 of the exact value, relatively; float64 within 2e-15. See
    Blanchard, Higham and Higham (2021), cited in :func:`cross_entropy`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> fastce.softmax(np.array([2.0, 0.0, 0.0])).round(6)
    array([0.786986, 0.106507, 0.106507])
    """
    return _activation(logits, axis, out, num_threads, logarithm=False)


def log_softmax(logits, axis=AXIS, *, out=None, num_threads=None):
    r"""Logarithm of the softmax: :math:`z_j - \log \sum_k e^{z_k}` along an axis, in nats.

    Computed as :math:`(z_j - z_m) - \log(1 + \sum_{k \ne m} e^{z_k - z_m})` with the largest logit :math:`z_m` left out
    of the sum, so that the largest entry keeps its digits where its probability rounds to 1.

    Parameters
    ----------
    logits, axis, out, num_threads
        As in :func:`softmax`.

    Returns
    -------
    ndarray
        As in :func:`softmax`.

    Raises
    ------
    TypeError, ValueError
        As in :func:`softmax`.

    Notes
    -----
    Every entry is within 5e-7 (float32) or 2e-15 (float64) of the exact value, relatively.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> fastce.log_softmax(np.array([20.0, 0.0]))
    array([-2.06115362e-09, -2.00000000e+01])
    """
    return _activation(logits, axis, out, num_threads, logarithm=True)


def logsumexp(logits, axis=AXIS, *, keepdims=False, num_threads=None):
    r"""Logarithm of a sum of exponentials: :math:`\log \sum_k e^{z_k}` along an axis, in nats.

    Parameters
    ----------
    logits, axis
        As in :func:`softmax`.
    keepdims : bool, default False
        Whether the class axis stays, with length 1.
    num_threads : int, optional
        As in :func:`cross_entropy`.

    Returns
    -------
    ndarray
        Without the class axis (0-d for one row), in the dtype of the logits, float32 for the half types. All -inf gives
        -inf, a +inf gives +inf, a nan nan.

    Raises
    ------
    TypeError, ValueError
        As in :func:`softmax`.

    Notes
    -----
    Computed as :math:`z_m + \log(1 + \sum_{k \ne m} e^{z_k - z_m})`; see the reference in :func:`cross_entropy`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> fastce.logsumexp(np.array([[0.0, 0.0], [100.0, 100.0]])).round(6)
    array([  0.693147, 100.693147])
    """
    plain = _engine.soft.plain_logsumexp(
        logits, axis, keepdims, num_threads, _engine.SERIAL_ELEMENTS, _engine.default_threads
    )
    if plain is not None:
        return plain
    logits = _checks.as_logits(logits)
    axis = _checks.as_axis(axis, logits.shape)
    keepdims = _checks.as_bool("keepdims", keepdims)
    num_threads = _checks.as_num_threads(num_threads)
    shape = tuple(1 if i == axis else n for i, n in enumerate(logits.shape) if keepdims or i != axis)
    result = np.empty(shape, _engine.computing_dtype(logits.dtype))
    lse = np.empty(result.size)
    _engine.log_softmax_rows(classes_last(logits, axis), None, lse, num_threads)
    _engine.copy_in_blocks(result, lse.reshape(shape))
    return result


def _activation(logits, axis, out, num_threads, *, logarithm):
    short = _engine.soft.plain_log_softmax if logarithm else _engine.kernels.plain_softmax
    plain = short(logits, axis, out, num_threads, _engine.SERIAL_ELEMENTS, _engine.default_threads)
    if plain is not None:
        return plain
    logits = _checks.as_logits(logits)
    axis = _checks.as_axis(axis, logits.shape)
    num_threads = _checks.as_num_threads(num_threads)
    if out is None:
        result = out = np.empty(logits.shape, logits.dtype.newbyteorder("="))
    else:
        result = _checks.check_out(out, logits, [("logits", logits)])
    rows, values = classes_last(logits, axis), classes_last(result, axis)
    if logarithm:
        _engine.log_softmax_rows(rows, values, None, num_threads)
    else:
        _engine.softmax_rows(rows, values, num_threads)
    return out
