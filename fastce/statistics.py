"""What a batch's logits say row by row: the numbers that reports and metrics are built from."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastce import _engine
from fastce._problem import AXIS, IGNORE_INDEX, pose

__all__ = ["CrossEntropyStats", "cross_entropy_stats"]


class CrossEntropyStats(NamedTuple):
    """Statistics of rows of logits, each an array of the rows' shape; see :func:`cross_entropy_stats`."""

    loss: NDArray[Any]
    lse: NDArray[Any]
    predicted: NDArray[np.int64]
    correct: NDArray[np.bool_]
    probability: NDArray[Any]
    entropy: NDArray[Any]


def cross_entropy_stats(
    logits,
    targets,
    *,
    axis=AXIS,
    ignore_index=IGNORE_INDEX,
    logit_scale=1.0,
    softcap=None,
    class_mask=None,
    num_threads=None,
):
    r"""Loss, prediction and uncertainty of every row, from one pass over the logits.

    Parameters
    ----------
    logits, targets, axis, ignore_index, logit_scale, softcap, class_mask, num_threads
        As in :func:`cross_entropy`; no weights: those belong to what is made of the rows.

    Returns
    -------
    CrossEntropyStats
        A named tuple of arrays of the rows' shape, floats in the dtype of the logits (float32 for the half types):

        - ``loss``: the cross-entropy in nats, as :func:`cross_entropy` with reduction "none";
        - ``lse``: :math:`\log \sum_k e^{z_k}`;
        - ``predicted``: the lowest class with the largest logit, int64;
        - ``correct``: whether that is the target, for soft targets a class with the largest mass, bool;
        - ``probability``: :math:`p_t`, for soft targets :math:`\sum_c q_c p_c`, inf for float64 masses above 1e154;
        - ``entropy``: :math:`-\sum_c p_c \log p_c` in nats, of the prediction, whatever the target.

        An ignored row has loss 0, predicted -1, correct False, and nan for the rest; a row with a nan, a +inf or
        nothing but -inf has predicted -1, correct False, and nan for the rest.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in :func:`cross_entropy`.

    Notes
    -----
    The entropy is computed as :math:`\log(S/e_m) + \sum_c e_c (z_m - z_c)/S` with :math:`e_c = e^{z_c}`, their sum S
    and the largest logit :math:`z_m`: no term is negative, nothing cancels. Bounds as in :func:`cross_entropy`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> stats = fastce.cross_entropy_stats(np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), [0, 2])
    >>> stats.predicted, stats.correct
    (array([0, 0]), array([ True, False]))
    >>> stats.entropy.round(6)
    array([0.665573, 1.098612])
    """
    if axis is AXIS and softcap is None and class_mask is None:
        plain = _engine.soft.plain_statistics(
            logits, targets, ignore_index, logit_scale, num_threads, _engine.SERIAL_ELEMENTS, _engine.default_threads
        )
        if plain is not None:
            return CrossEntropyStats(*plain)
    problem = pose(
        logits, targets, axis, num_threads, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap,
        class_mask=class_mask,
    )
    losses, lse, probability, entropy = np.empty((4, problem.n_rows))
    predicted, correct = np.empty(problem.n_rows, np.int64), np.empty(problem.n_rows, np.bool_)
    results = [np.empty(problem.row_shape, problem.loss_dtype) for _ in range(4)]
    problem.fill(losses, statistics=(lse, probability, entropy, predicted, correct))
    for result, numbers in zip(results, (losses, lse, probability, entropy), strict=True):
        _engine.copy_in_blocks(result, numbers.reshape(problem.row_shape))
    loss, lse, probability, entropy = results
    shape = problem.row_shape
    return CrossEntropyStats(loss, lse, predicted.reshape(shape), correct.reshape(shape), probability, entropy)
