"""BatchNorm by the statistics of the batch, and in the same pass what often follows: an addition, a ReLU.

Ioffe and Szegedy 2015 (arXiv 1502.03167), with PyTorch's conventions. On CUDA PyTorch's kernels for bfloat16
in channels_last read x more often than they must and reach a fifth of the memory's rate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.ops._library import check_devices, define, differentiable_once
from dau_fast.ops.reference import batch_norm_backward_reference, batch_norm_reference


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    batches: Tensor | None = None,
    *,
    add: Tensor | None = None,
    relu: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(BatchNorm(x) + add), of x's shape and dtype, with the statistics of x: as in training.

    x: [B, C, H, W], B H W above 1. weight, bias, running_mean, running_var: [C]; the last two, both or
    neither, move by `momentum` toward the batch's mean and unbiased variance, in place. batches: int64 [],
    goes up by one in place. add: like x. relu: whether negative results become 0. eps: added to the biased
    variance. Differentiable once in x, weight, bias and add. Fused on CUDA, for x in float32, float16 or
    bfloat16, in channels_last, and all [C] in float32; elsewhere PyTorch's own operations run one after the
    other. Raises ValueError where arguments do not fit.
    """
    given = (x, weight, bias, running_mean, running_var, batches, add)
    if not (x.is_cuda and _takes(*given)):
        _check(*given)
        return _one_by_one(*given, relu, momentum, eps)
    y: Tensor = FusedBatchNorm.apply(*given, relu, momentum, eps)
    return y


def _one_by_one(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    batches: Tensor | None, add: Tensor | None, relu: bool, momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    if batches is not None:
        batches.add_(1)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    # In place: what BatchNorm gave is nobody else's, and its backward pass does not look at it.
    y = y if add is None else y.add_(add)
    return y.relu_() if relu else y


class FusedBatchNorm(torch.autograd.Function):
    """The arguments of `batch_norm` in their order -> y, by the ops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        add, relu = given[5], given[6]
        y, lines = batch_norm_op(x, *given)
        ctx.relu, ctx.added = relu, add is not None
        # What came through a ReLU is told by x, but where something was added before it.
        ctx.save_for_backward(x, y if relu and ctx.added else x, lines)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, lines = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        of_x, of_add, sums = _backward(grad, x, y, lines, ctx.relu, ctx.relu and ctx.added)
        if ctx.added and not ctx.relu:
            of_add = grad
        return of_x, sums[1], sums[0], None, None, None, of_add if ctx.added else None, None, None, None


# ---- what is refused


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    add: Tensor | None,
    *_: Any,
) -> None:
    _check_images(x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("of running_mean and running_var one is None: expected both or neither")
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, values in named.items():
        if values is not None and values.shape != x.shape[1:2]:
            raise ValueError(f"{name} is {_said(values)}: expected shape [{x.shape[1]}]")
    if batches is not None and (batches.dtype != torch.int64 or batches.ndim):
        raise ValueError(f"batches is {_said(batches)}: expected int64 of shape []")
    if add is not None and (add.shape, add.dtype) != (x.shape, x.dtype):
        raise ValueError(f"add is {_said(add)}: expected {_said(x)}, like x")
    check_devices(x=x, add=add, batches=batches, **named)


def _check_back(grad: Tensor, x: Tensor, y: Tensor, lines: Tensor, *_: Any) -> None:
    _check_images(x)
    for name, other in (("grad", grad), ("y", y)):
        if other.shape != x.shape or not other.is_floating_point():
            raise ValueError(f"{name} is {_said(other)}: expected floating point, shaped like x")
    if lines.shape != (4, x.shape[1]) or not lines.is_floating_point():
        raise ValueError(f"lines is {_said(lines)}: expected floating point of shape [4, {x.shape[1]}]")
    check_devices(x=x, grad=grad, y=y, lines=lines)


def _check_images(x: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x is {_said(x)}: expected floating point of shape [B, C, H, W]")
    if x.numel() <= x.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)}: expected two numbers or more of each channel")


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"


# ---- the ops, and their paths

_NUMBERS = (torch.float32, torch.float16, torch.bfloat16)


def _takes(x: Tensor, *rest: Any) -> bool:
    *lines, _, add = rest[:6]
    return (
        x.dtype in _NUMBERS
        and all(
            values is None or (values.dtype == torch.float32 and values.is_contiguous()) for values in lines
        )
        and all(y is None or _is_channels_last(y) for y in (x, add))
    )


def _takes_back(grad: Tensor, x: Tensor, y: Tensor, lines: Tensor, *_: Any) -> bool:
    known = lines.dtype == torch.float32 and lines.is_contiguous()
    return known and all(z.dtype in _NUMBERS and _is_channels_last(z) for z in (grad, x, y))


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((4, x.shape[1]), dtype=_wide(x))


def _fake_back(
    grad: Tensor, x: Tensor, y: Tensor, lines: Tensor, relu: bool, added: bool
) -> tuple[Tensor, Tensor, Tensor]:
    of_add = torch.empty_like(x) if added else x.new_empty(0)
    return torch.empty_like(x), of_add, lines.new_empty((2, x.shape[1]))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


batch_norm_op = define(
    "batch_norm(Tensor x, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? batches, Tensor? add, bool relu, float momentum, float eps) -> (Tensor, Tensor)",
    batch_norm_reference,
    _fake,
    check=_check,
    triton=("_batch_norm_cuda", "batch_norm"),
    takes=_takes,
)
batch_norm_backward_op = define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor y, Tensor lines, bool relu, bool added)"
    " -> (Tensor, Tensor, Tensor)",
    batch_norm_backward_reference,
    _fake_back,
    check=_check_back,
    triton=("_batch_norm_cuda", "batch_norm_backward"),
    takes=_takes_back,
)
_backward = differentiable_once(
    batch_norm_backward_op,
    "batch_norm has no second derivative: use torch.nn.functional.batch_norm for one",
)
