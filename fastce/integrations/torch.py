"""Cross-entropy of CPU tensors: the signature and results of torch.nn.functional.cross_entropy, the speed of fastce.

One operator, ``torch.ops.fastce.cross_entropy``, computes the loss and, where one will be asked for, the gradient
in the same pass, on the tensors' own memory. What is left for backward is the factor that comes in.
"""

import operator
import re
import sys

import numpy as np

import fastce
from fastce._engine import threads_for
from fastce.integrations._library import require

require("torch", "torch", "torch", "2.4")

import torch  # noqa: E402 - only now is it known to be there
from torch.autograd import forward_ad  # noqa: E402 - only now is it known to be there

__all__ = ["CrossEntropyLoss", "cross_entropy", "replace_cross_entropy"]

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    r"""Softmax cross-entropy of CPU tensors, in nats: :func:`torch.nn.functional.cross_entropy` computed by fastce.

    The formula is that of :func:`fastce.cross_entropy`, which follows PyTorch's [1]_. Gradients, second derivatives,
    ``torch.compile`` and autocast work as with PyTorch's own function.

    Parameters
    ----------
    input : Tensor of float32, float64, float16 or bfloat16, shape (C,), (N, C) or (N, C, d1, ..., dK)
        Unnormalised scores, on the CPU, of any strides. They are not copied. The half types are computed in float32.
    target : Tensor
        Integers of the shape of `input` without its class axis are class ids in [0, C) or `ignore_index`; any integer
        dtype will do. Floats of the shape of `input` are a distribution a row, finite and >= 0.
    weight : Tensor of shape (C,), optional
        Weights of the classes, finite, of any sign.
    size_average, reduce : bool, optional
        Deprecated by PyTorch in favour of `reduction`, which they override.
    ignore_index : int, default -100
        Rows with this class id count for nothing.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides by the sum of the weights of the rows' targets; for distributions by the number of rows.
    label_smoothing : float, default 0.0
        In [0, 1]: the part of each target that is spread over all classes evenly.

    Returns
    -------
    Tensor
        The loss: of shape () or, for "none", of the rows' shape; of the dtype of `input`, under autocast float32.

    Raises
    ------
    RuntimeError
        A tensor that is not on the CPU; logits that are not floating; distributions with an `ignore_index` >= 0.
    IndexError
        A class id out of range: "Target 7 is out of bounds.", and in which row.
    ValueError
        Shapes that do not fit, an option out of range, a nan, an infinity or a negative distribution among the
        targets.
    TypeError
        Class ids or an `ignore_index` that are no integers.

    Notes
    -----
    If nothing asks for a gradient (``torch.no_grad()``, ``input.requires_grad`` False) the loss alone is computed.
    Otherwise the forward pass computes the gradient too, and a backward pass returns it. Derivatives of the gradient,
    forward-mode derivatives, and those for a `target` or `weight` that require it, are PyTorch's own. As in fastce, the
    gradient of a mean whose weights add up to 0 is 0, not nan.

    References
    ----------
    .. [1] https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html

    Examples
    --------
    >>> import torch
    >>> from fastce.integrations.torch import cross_entropy
    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([0, 2]))
    >>> loss.backward()
    >>> print(f"{loss.item():.6f}")
    0.669079
    >>> logits.grad
    tensor([[-0.1065,  0.0533,  0.0533],
            [ 0.1667,  0.1667, -0.3333]])
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    check_tensors(input=input, target=target, weight=weight)
    if input.dtype not in FLOATING:
        raise RuntimeError(
            f"input: expected a floating point dtype among {', '.join(map(str, FLOATING))}, got {input.dtype}; "
            "convert with .float()"
        )
    if target.is_floating_point() and ignore_index >= 0:
        raise RuntimeError(f"ignore_index is not supported for floating point target, got ignore_index={ignore_index}")
    if not isinstance(reduction, str):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    ignore_index, label_smoothing = operator.index(ignore_index), float(label_smoothing)
    if has_tangent(input, target, weight):
        return torch.nn.functional.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    with_grad = torch.is_grad_enabled() and input.requires_grad
    loss, _ = loss_and_gradient(input, target, weight, ignore_index, reduction, label_smoothing, with_grad)
    return loss if torch.is_autocast_enabled("cpu") else loss.to(input.dtype)


def check_tensors(**tensors):
    """Raise unless all of the arguments (but for a weight of None) are tensors on the CPU."""
    for name, tensor in tensors.items():
        if tensor is None and name == "weight":
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.device.type not in ("cpu", "meta"):
            raise RuntimeError(
                f"{name}: expected a tensor on the CPU, got one on {tensor.device}; use "
                f"torch.nn.functional.cross_entropy there, or move all tensors with .cpu()"
            )


def has_tangent(*tensors):
    """Return whether any of the tensors carries a forward-mode derivative, which an operator would drop silently."""
    return not torch.compiler.is_compiling() and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


# ---- the operator ----------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "fastce::cross_entropy",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor input, Tensor target, Tensor? weight, int ignore_index, str reduction, float label_smoothing, "
    "bool with_grad) -> (Tensor, Tensor)",
)
def loss_and_gradient(input, target, weight, ignore_index, reduction, label_smoothing, with_grad):
    """Return (loss, gradient of the loss, or an empty tensor unless `with_grad`); the loss of half types in float32.

    For "none" the gradient of each row is that of its own loss.
    """
    grad = torch.empty_like(input) if with_grad else input.new_empty(0)
    options = {
        "axis": -1 if input.dim() <= 2 else 1,
        "label_smoothing": label_smoothing,
        "num_threads": min(threads_for(input.numel(), None), torch.get_num_threads()),
    }
    if not target.is_floating_point():
        options["ignore_index"] = ignore_index
    try:
        loss = compute(
            as_array(input), as_array(target), None if weight is None else as_array(weight).astype(np.float64),
            sys.intern(reduction), as_array(grad) if with_grad else None, options,  # fastce tells defaults by identity
        )
    except IndexError as error:
        value = re.search(r" = (-?\d+) ", str(error))
        raise IndexError(f"Target {value[1] if value else ''} is out of bounds. {error}") from None
    return torch.as_tensor(loss, dtype=loss_dtype(input)), grad


@loss_and_gradient.register_fake
def _(input, target, weight, ignore_index, reduction, label_smoothing, with_grad):
    shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
    loss = input.new_empty(shape if reduction == "none" else (), dtype=loss_dtype(input))
    return loss, torch.empty_like(input) if with_grad else input.new_empty(0)


def loss_dtype(input):
    return torch.float32 if input.dtype in HALF else input.dtype


def as_array(tensor):
    """Return a NumPy array on the tensor's memory."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy(force=True)
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError("bfloat16 tensors need the package ml_dtypes: pip install 'fastce[torch]'") from error
    return tensor.view(torch.int16).numpy(force=True).view(bfloat16)


def compute(logits, targets, weight, reduction, out, options):
    """Return the loss of arrays and write its gradient into `out`, unless that is None."""
    if weight is not None and (weight < 0).any():
        return compute_signed(logits, targets, weight, reduction, out, options)
    options = {"weight": weight, "reduction": reduction, **options}
    if out is None:
        return fastce.cross_entropy(logits, targets, **options)
    return fastce.cross_entropy_with_grad(logits, targets, out=out, **options)[0]


def compute_signed(logits, targets, weight, reduction, out, options):
    """Do the same for class weights of any sign: loss and gradient are linear in them."""
    parts = "none" if reduction == "none" else "sum"
    negative = None if out is None else np.empty_like(out)
    loss = compute(logits, targets, np.maximum(weight, 0), parts, out, options)
    loss -= compute(logits, targets, np.maximum(-weight, 0), parts, negative, options)
    if out is not None:
        out -= negative
    if reduction != "mean":
        return loss
    if "ignore_index" in options:
        divisor = weight[targets[targets != options["ignore_index"]]].sum()
    else:
        divisor = logits.size / len(weight)
    with np.errstate(divide="ignore", invalid="ignore"):
        if out is not None and divisor == 0:
            out[...] = 0
        elif out is not None:
            out /= divisor
        return loss / divisor


# ---- its derivative --------------------------------------------------------------------------------------------------


def keep_for_backward(ctx, inputs, output):
    input, target, weight, ctx.ignore_index, ctx.reduction, ctx.label_smoothing, ctx.with_grad = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros of the logits' size come in for the output without derivative
    ctx.save_for_backward(input, target, weight, output[1])


def backward(ctx, factor, _):
    """Return the gradients of (input, target, weight) times `factor`, which has the shape of the loss."""
    if factor is None:  # nothing comes in
        return (None,) * 7
    *arguments, grad = ctx.saved_tensors
    if not ctx.with_grad or torch.is_grad_enabled() or any(ctx.needs_input_grad[1:3]):
        return *gradients_by_pytorch(ctx, arguments, factor), None, None, None, None
    if not is_one(factor):
        grad = grad * (factor if ctx.reduction != "none" else factor.unsqueeze(min(1, grad.dim() - 1))).to(grad.dtype)
    return grad, None, None, None, None, None, None


def is_one(factor):
    """Return whether `factor` is the 1 of ``loss.backward()``, which saves a pass; a traced one is not looked at."""
    return type(factor) is torch.Tensor and factor.dim() == 0 and factor.item() == 1


def gradients_by_pytorch(ctx, arguments, factor):
    """Return the same gradients by PyTorch's own function, whose derivatives have derivatives."""
    with torch.enable_grad():
        loss = torch.nn.functional.cross_entropy(
            *arguments, ignore_index=ctx.ignore_index, reduction=ctx.reduction, label_smoothing=ctx.label_smoothing
        )
    wanted = [tensor for tensor, needed in zip(arguments, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(loss, wanted, factor.to(loss.dtype), create_graph=torch.is_grad_enabled()))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad[:3])


loss_and_gradient.register_autograd(backward, setup_context=keep_for_backward)


# ---- in models -------------------------------------------------------------------------------------------------------


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss`, its arguments and its results, computed by :func:`cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from fastce.integrations.torch import CrossEntropyLoss
    >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
    >>> criterion(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
    tensor(1.0986)
    """

    def forward(self, input, target):
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


def replace_cross_entropy(model):
    """Let every :class:`torch.nn.CrossEntropyLoss` in a model compute by fastce, in place.

    Parameters
    ----------
    model : torch.nn.Module
        A model that holds its loss, or the loss itself. Modules stay the objects they are, with their options, hooks
        and state; only their class changes, to :class:`CrossEntropyLoss`. Subclasses of PyTorch's are left alone.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    ValueError
        There is no such module in the model: its loss is computed elsewhere.

    Examples
    --------
    >>> import torch
    >>> from fastce.integrations.torch import replace_cross_entropy
    >>> criterion = replace_cross_entropy(torch.nn.CrossEntropyLoss())
    >>> type(criterion).__module__
    'fastce.integrations.torch'
    """
    found = [module for module in model.modules() if type(module) in (torch.nn.CrossEntropyLoss, CrossEntropyLoss)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no torch.nn.CrossEntropyLoss among its modules; pass the loss module, or call "
            "fastce.integrations.torch.cross_entropy where torch.nn.functional.cross_entropy is called"
        )
    for module in found:
        module.__class__ = CrossEntropyLoss
    return model
