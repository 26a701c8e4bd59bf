"""Types of fastce.losses: which reduction returns what."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce.targets import SparseTargets

Floating = TypeVar("Floating", np.float32, np.float64)

__all__ = ["cross_entropy", "cross_entropy_with_grad", "cross_entropy_with_grad_hess"]

@overload
def cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | Sequence[int] | NDArray[np.integer[Any]] | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    class_mask: ArrayLike | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    denominator: float | None = None,
    num_threads: int | None = None,
) -> float: ...
@overload
def cross_entropy(
    logits: NDArray[Floating],
    targets: ArrayLike | SparseTargets,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | Sequence[int] | NDArray[np.integer[Any]] | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    class_mask: ArrayLike | None = None,
    reduction: Literal["none"],
    denominator: None = None,
    num_threads: int | None = None,
) -> NDArray[Floating]: ...
@overload
def cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | Sequence[int] | NDArray[np.integer[Any]] | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    class_mask: ArrayLike | None = None,
    reduction: Literal["none"],
    denominator: None = None,
    num_threads: int | None = None,
) -> NDArray[Any]: ...
@overload
def cross_entropy_with_grad(
    logits: NDArray[Floating],
    targets: ArrayLike | SparseTargets,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | Sequence[int] | NDArray[np.integer[Any]] | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    class_mask: ArrayLike | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    denominator: float | None = None,
    num_threads: int | None = None,
    grad_output: float | None = None,
    out: NDArray[Floating] | None = None,
) -> tuple[float, NDArray[Floating]]: ...
@overload
def cross_entropy_with_grad(
    logits: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | Sequence[int] | NDArray[np.integer[Any]] | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    class_mask: ArrayLike | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    denominator: float | None = None,
    num_threads: int | None = None,
    grad_output: float | None = None,
    out: NDArray[Any] | None = None,
) -> tuple[float, NDArray[Any]]: ...
@overload
def cross_entropy_with_grad(
    logits: NDArray[Floating],
    targets: ArrayLike | SparseTargets,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | Sequence[int] | NDArray[np.integer[Any]] | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    class_mask: ArrayLike | None = None,
    reduction: Literal["none"],
    denominator: None = None,
    num_threads: int | None = None,
    grad_output: ArrayLike | None = None,
    out: NDArray[Floating] | None = None,
) -> tuple[NDArray[Floating], NDArray[Floating]]: ...
@overload
def cross_entropy_with_grad(
    logits: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | Sequence[int] | NDArray[np.integer[Any]] | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    class_mask: ArrayLike | None = None,
    reduction: Literal["none"],
    denominator: None = None,
    num_threads: int | None = None,
    grad_output: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def cross_entropy_with_grad_hess(
    logits: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | Sequence[int] | NDArray[np.integer[Any]] | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    class_mask: ArrayLike | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    denominator: float | None = None,
    num_threads: int | None = None,
    grad_output: float | None = None,
    out: NDArray[Any] | None = None,
    hess_out: NDArray[Any] | None = None,
) -> tuple[float, NDArray[Any], NDArray[Any]]: ...
@overload
def cross_entropy_with_grad_hess(
    logits: NDArray[Floating],
    targets: ArrayLike | SparseTargets,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | Sequence[int] | NDArray[np.integer[Any]] | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    class_mask: ArrayLike | None = None,
    reduction: Literal["none"],
    denominator: None = None,
    num_threads: int | None = None,
    grad_output: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    hess_out: NDArray[Any] | None = None,
) -> tuple[NDArray[Floating], NDArray[Any], NDArray[Any]]: ...
@overload
def cross_entropy_with_grad_hess(
    logits: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    axis: int = -1,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int | Sequence[int] | NDArray[np.integer[Any]] | None = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    class_mask: ArrayLike | None = None,
    reduction: Literal["none"],
    denominator: None = None,
    num_threads: int | None = None,
    grad_output: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    hess_out: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]: ...
