"""Soft targets that are mostly zero, by the indices and values of what is not."""

from dataclasses import dataclass

from numpy.typing import ArrayLike

__all__ = ["SparseTargets"]


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Soft targets with few classes a row: MixUp, several gold labels, distillation from the top classes.

    They stand for the distribution that has ``values[..., i]`` at class ``indices[..., i]`` and 0 elsewhere, without an
    array as large as the logits. Entries that name the same class add up; a row's sum need not be 1. The gradient of a
    row's loss is p * sum(values) with `values` subtracted where `indices` points.

    Parameters
    ----------
    indices : array_like of int, the rows' shape and one axis more of length m
        Class ids in [0, C).
    values : array_like of float, shape of `indices`
        Finite and >= 0.

    Examples
    --------
    MixUp of two samples, 7 parts of the first and 3 of the second:

    >>> import numpy as np
    >>> import fastce
    >>> logits = np.array([[2.0, 0.0, 0.0]])
    >>> mixed = fastce.SparseTargets(indices=[[0, 2]], values=[[0.7, 0.3]])
    >>> print(f"{fastce.cross_entropy(logits, mixed):.6f}")
    0.839545
    >>> print(f"{fastce.cross_entropy(logits, np.array([[0.7, 0.0, 0.3]])):.6f}")
    0.839545
    """

    indices: ArrayLike
    values: ArrayLike
