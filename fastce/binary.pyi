"""Types of fastce.binary: which reduction returns what."""

from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floating = TypeVar("Floating", np.float32, np.float64)

__all__ = ["binary_cross_entropy", "binary_cross_entropy_with_grad"]

@overload
def binary_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    pos_weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    denominator: float | None = None,
    num_threads: int | None = None,
) -> float: ...
@overload
def binary_cross_entropy(
    logits: NDArray[Floating],
    targets: ArrayLike,
    *,
    pos_weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: Literal["none"],
    denominator: None = None,
    num_threads: int | None = None,
) -> NDArray[Floating]: ...
@overload
def binary_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    pos_weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: Literal["none"],
    denominator: None = None,
    num_threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def binary_cross_entropy_with_grad(
    logits: NDArray[Floating],
    targets: ArrayLike,
    *,
    pos_weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    denominator: float | None = None,
    num_threads: int | None = None,
    grad_output: float | None = None,
    out: NDArray[Floating] | None = None,
) -> tuple[float, NDArray[Floating]]: ...
@overload
def binary_cross_entropy_with_grad(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    pos_weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    denominator: float | None = None,
    num_threads: int | None = None,
    grad_output: float | None = None,
    out: NDArray[Any] | None = None,
) -> tuple[float, NDArray[Any]]: ...
@overload
def binary_cross_entropy_with_grad(
    logits: NDArray[Floating],
    targets: ArrayLike,
    *,
    pos_weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: Literal["none"],
    denominator: None = None,
    num_threads: int | None = None,
    grad_output: ArrayLike | None = None,
    out: NDArray[Floating] | None = None,
) -> tuple[NDArray[Floating], NDArray[Floating]]: ...
@overload
def binary_cross_entropy_with_grad(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    pos_weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: Literal["none"],
    denominator: None = None,
    num_threads: int | None = None,
    grad_output: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
