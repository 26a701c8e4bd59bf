"""What the targets alone say: the bias that a network's last layer should start with."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce import _checks
from fastce._problem import IGNORE_INDEX, pose
from fastce.targets import SparseTargets

__all__ = ["init_bias"]


def init_bias(
    targets: ArrayLike | SparseTargets,
    n_classes: int,
    sample_weight: ArrayLike | None = None,
    *,
    ignore_index=IGNORE_INDEX,
) -> NDArray[np.float64]:
    r"""Initial bias of the last layer: the logarithm of the classes' frequencies.

    A network that starts with this bias, and with weights so small that its other terms are about 0, predicts
    :math:`p_c = n_c / n` for every row. Its first loss is the entropy of the class frequencies instead of
    :math:`\log C`, and the first steps of training need not be spent on learning them [1]_. Gradient boosting starts
    from the same scores.

    Parameters
    ----------
    targets : array_like of int, array_like of float, or SparseTargets
        Class ids of any shape, or soft targets with the class axis last, as in :func:`cross_entropy`.
    n_classes : int
        The number of classes C, at least 1.
    sample_weight : array_like of float, the rows' shape, optional
        Weights of the rows, finite and >= 0.
    ignore_index : int, sequence of int or None, default -100
        Class ids that do not count.

    Returns
    -------
    ndarray of float64, shape (C,)
        :math:`\log(n_c / n)`, in nats, where :math:`n_c` is the weight of the rows of class c, and n that of all. A
        class that is never seen counts as half a row (of mean weight), because :math:`\log 0` would never learn.

    Raises
    ------
    TypeError, ValueError, IndexError
        As in :func:`cross_entropy`; ValueError also where no row counts or a weight is negative.

    References
    ----------
    .. [1] A. Karpathy, "A Recipe for Training Neural Networks" (2019).

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> targets = np.array([0] * 90 + [1] * 10)
    >>> bias = fastce.init_bias(targets, 2)
    >>> bias.round(4)
    array([-0.1054, -2.3026])

    The loss at the first step, with it and without:

    >>> print(f"{fastce.cross_entropy(np.tile(bias, (100, 1)), targets):.4f}")
    0.3251
    >>> print(f"{fastce.cross_entropy(np.zeros((100, 2)), targets):.4f}")
    0.6931
    """
    n_classes = _checks.as_count("n_classes", n_classes)
    row_shape = _checks.rows_shape_of(targets, n_classes)
    no_logits = np.broadcast_to(np.float32(0), (*row_shape, n_classes))
    problem = pose(no_logits, targets, -1, None, sample_weight=sample_weight, ignore_index=ignore_index)
    _checks.check_no_negative_weight(problem.sample_weight)
    weights = np.ones(problem.n_rows) if problem.sample_weight is None else problem.sample_weight
    if problem.ids is not None:
        live = problem.ids >= 0
        weights = np.where(live, weights, 0.0)
        mass = np.bincount(problem.ids[live], weights[live], n_classes)
    elif problem.indices is not None:
        entries = problem.values * weights[:, None]
        mass = np.bincount(problem.indices.reshape(-1), entries.reshape(-1), n_classes)
    else:
        rows = weights != 0
        mass = weights[rows] @ problem.distribution.reshape(-1, n_classes)[rows].astype(np.float64)
    _checks.check_any_mass(mass.sum())
    unseen = 0.5 * mass.sum() / np.count_nonzero(weights)
    return np.log(np.where(mass > 0, mass, unseen) / mass.sum())
