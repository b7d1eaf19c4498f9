"""The sensitivity of a Linear layer's samples without its logits: for heads of very many classes.

With z = W h + b as in sensitivity.py, but W is taken some classes at a time. Forward keeps a running
largest logit and, below it, the sum and the norm of e = exp(z_i - largest) over the classes that are
not the target; backward computes each piece of the logits again. No array of B x C numbers exists; the
product with W is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dau_fast.ops._library import check_devices, compute_dtype, define, differentiable_once
from dau_fast.ops.sensitivity import (
    check_targets,
    feature_gradient,
    feature_lengths,
    logits_gradient,
    no_such_class,
)

# Logits that exist at a time: what a cache holds, or what fills a GPU.
_PIECE = {"cpu": 1 << 20, "cuda": 1 << 22}
_FEWEST_CLASSES = 1024


def linear_sensitivity(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """sensitivity(features @ weight.T + bias, features, targets, bias is not None), [B].

    features: [B, D]. weight: [C, D]. bias: [C] or None. targets: int64 [B]. The first three share one
    floating-point dtype, in which logits are computed (under autocast: its dtype) and which their
    gradients have; the result and all sums are float32 (float64 for float64 input). Differentiable
    once, in all three; torch.func transforms are refused.
    Holds B x C / k logits at a time, at most 4 million or 1,024 classes of them.
    Raises ValueError where shapes or dtypes do not fit, or for a target outside 0 to C - 1; on CUDA
    that one is a device-side assertion.
    """
    device = features.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        features, weight = features.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    s: Tensor = _LinearSensitivity.apply(features, weight, bias, targets)
    return s


class _LinearSensitivity(torch.autograd.Function):
    """(features, weight, bias, targets) -> s [B]; see _Sensitivity for the style."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        s, stats = forward_op(features, weight, bias, targets)
        ctx.save_for_backward(features, weight, bias, targets, stats)
        return s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        grads = _backward_once(grad, *ctx.saved_tensors, *wanted)
        return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None


# ---- what the ops refuse


def _check_forward(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    fit = features.ndim == weight.ndim == 2 and features.shape[1] == weight.shape[1] and len(weight) > 0
    if not fit or (bias is not None and bias.shape != weight.shape[:1]):
        shown = None if bias is None else list(bias.shape)
        raise ValueError(
            f"features have shape {list(features.shape)}, weight {list(weight.shape)}, bias {shown}: "
            "expected [B, D], [C, D] and [C] with at least one class"
        )
    kinds = {x.dtype for x in (features, weight, bias) if x is not None}
    if len(kinds) > 1 or not features.is_floating_point():
        raise ValueError(
            f"features, weight and bias are {', '.join(sorted(map(str, kinds)))}: expected one "
            "floating-point dtype; convert them"
        )
    check_targets(targets, len(features))
    check_devices(features=features, weight=weight, bias=bias, targets=targets)


def _check_backward(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Tensor,
    *_: bool,
) -> None:
    _check_forward(features, weight, bias, targets)
    check_devices(features=features, grad=grad, stats=stats)
    batch = len(features)
    if grad.shape != (batch,) or stats.shape != (5, batch):
        raise ValueError(
            f"grad has shape {list(grad.shape)}, stats {list(stats.shape)}: expected [{batch}] and "
            f"[5, {batch}], as from the forward op"
        )


# ---- the ops: plain PyTorch, in which matrix products take nearly all the time
# stats [5, B]: miss, pull, length, largest logit, 1 / sum_i exp(z_i - largest)


def _forward(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(features)
    first, second, at_label = torch.zeros((3, len(features)), dtype=dtype, device=features.device)
    largest = torch.full_like(first, -torch.inf)
    for z, labels, here in _pieces(features, weight, bias, _known(targets, len(weight))):
        before, largest = largest, torch.maximum(largest, z.amax(1))
        # While all logits are -inf there is nothing to add up, and NaN must not come of it.
        base = largest.masked_fill(largest == -torch.inf, 0)
        at_label = torch.where(here, z.gather(1, labels), at_label.unsqueeze(1)).squeeze(1)
        e = z.sub_(base.unsqueeze(1)).exp_()
        e.scatter_(1, labels, e.gather(1, labels).masked_fill_(here, 0))
        ratio = (before - base).exp_()
        first = first * ratio + e.sum(1)
        second = (second * ratio).hypot_(torch.linalg.vector_norm(e, dim=1))
    scale = 1 / (first + (at_label - largest).exp_())
    miss = first * scale
    pull = (second * scale).hypot_(miss)
    length = feature_lengths(features.to(dtype), bias is not None)
    return pull * length, torch.stack([miss, pull, length, largest, scale])


def _known(targets: Tensor, classes: int) -> Tensor:
    """The same targets; ValueError, or an assertion on the device, for one that is no class."""
    try:
        return torch.arange(classes, device=targets.device).gather(0, targets)
    except RuntimeError as error:
        raise no_such_class(targets, classes) from error


def _pieces(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits [B, c] of some classes at a time, labels [B, 1] among them, and which of them hold."""
    dtype = compute_dtype(features)
    for part in pieces(len(features), len(weight), features.device.type):
        w = weight[part].T
        z = features @ w if bias is None else torch.addmm(bias[part], features, w)
        local = (targets - part.start).unsqueeze(1)
        here = (local >= 0) & (local < z.shape[1])
        yield z.to(dtype), local.clamp_(0, z.shape[1] - 1), here


def pieces(batch: int, classes: int, device: str) -> list[slice]:
    """Which classes are worked on at a time."""
    step = max(_FEWEST_CLASSES, _PIECE.get(device, _PIECE["cuda"]) // max(batch, 1))
    return [slice(start, min(start + step, classes)) for start in range(0, classes, step)]


def _backward(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Tensor,
    need_features: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_features = feature_gradient(features.to(stats.dtype), grad, stats)
    grad_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    grad_bias = weight.new_empty(len(weight) if need_bias else 0)
    largest, scale = stats[3:].unsqueeze(2)
    parts = pieces(len(features), len(weight), features.device.type)
    for part, (z, labels, here) in zip(parts, _pieces(features, weight, bias, targets), strict=True):
        p = z.sub_(largest).exp_().mul_(scale)
        pulled = logits_gradient(p, labels, grad, stats, here)
        if need_bias:
            grad_bias[part] = pulled.sum(0)
        pulled = pulled.to(weight.dtype)
        if need_features:
            grad_features += pulled @ weight[part]
        if need_weight:
            torch.mm(pulled.T, features, out=grad_weight[part])
    grad_features = grad_features.to(features.dtype) if need_features else features.new_empty(0)
    return grad_features, grad_weight, grad_bias


# ---- registration


def _forward_fake(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    s = features.new_empty(len(features), dtype=compute_dtype(features))
    return s, s.new_empty((5, len(features)))


def _backward_fake(
    grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_features, need_weight, need_bias = saved[-3:]
    return (
        features.new_empty(features.shape if need_features else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(len(weight) if need_bias else 0),
    )


forward_op = define(
    "linear_sensitivity_forward(Tensor features, Tensor weight, Tensor? bias, Tensor targets)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    check=_check_forward,
)
backward_op = define(
    "linear_sensitivity_backward(Tensor grad, Tensor features, Tensor weight, Tensor? bias, Tensor targets,"
    " Tensor stats, bool need_features, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    check=_check_backward,
)
_backward_once = differentiable_once(
    backward_op,
    "linear_sensitivity is differentiable once: for a second derivative use "
    "dau_fast.ops.reference.sensitivity_reference on the layer's logits",
)
