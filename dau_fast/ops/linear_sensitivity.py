"""The sensitivity of a Linear layer's samples without its logits: for heads of very many classes.

With z = W h + b as in sensitivity.py, but W is taken some classes at a time. Forward keeps a running
largest logit and, below it, the sum and the norm of e = exp(z_i - largest) over the classes that are
not the target; backward takes the logits again piece by piece. Where they are few they are kept until then;
else no array of B x C numbers exists, and the product with W is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dau_fast.ops._library import check_devices, compute_dtype, define, differentiable_once
from dau_fast.ops._native import array
from dau_fast.ops.sensitivity import (
    check_targets,
    feature_gradient,
    feature_lengths,
    logits_gradient,
    no_such_class,
)

# Logits that exist at a time: what a cache holds, or what fills a GPU.
_PIECE = {"cpu": 1 << 18, "cuda": 1 << 22}
_FEWEST_CLASSES = 1024
# Logits of all classes up to which they are kept from forward to backward: 16 MB.
_KEPT = 1 << 22


def linear_sensitivity(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """sensitivity(features @ weight.T + bias, features, targets, bias is not None), [B].

    features: [B, D]. weight: [C, D]. bias: [C] or None. targets: int64 [B]. The first three share one
    floating-point dtype, in which logits are computed (under autocast: its dtype) and which their
    gradients have; the result and all sums are float32 (float64 for float64 input). Differentiable
    once, in all three; torch.func transforms are refused.
    Keeps the logits from forward to backward where there are at most 4 million; else holds B x C / k of them
    at a time, at most 4 million or 1,024 classes of them, and computes them twice.
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
        s, *kept = forward_op(features, weight, bias, targets)
        ctx.save_for_backward(features, weight, bias, targets, *kept)
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
    logits: Tensor,
    *_: bool,
) -> None:
    _check_forward(features, weight, bias, targets)
    check_devices(features=features, grad=grad, stats=stats, logits=logits)
    batch, dtype, of_logits = len(features), compute_dtype(features), _kept_shape(features, weight)
    fit = grad.shape == (batch,) and stats.shape == (5, batch) and logits.shape == of_logits
    if not fit or stats.dtype != dtype or logits.dtype != dtype:
        raise ValueError(
            f"grad has shape {list(grad.shape)}, stats {list(stats.shape)}, logits {list(logits.shape)}: "
            f"expected [{batch}], [5, {batch}] and {list(of_logits)}, as from the forward op"
        )


# ---- the ops: PyTorch's matrix products, which take nearly all the time, and plain PyTorch between them
# stats [5, B]: rest, pull, length, largest logit, 1 / sum_i exp(z_i - largest)
# logits: [B, C] where they are kept, else [0, 0].


def _kept_shape(features: Tensor, weight: Tensor) -> tuple[int, int]:
    batch, classes = len(features), len(weight)
    return (batch, classes) if batch * classes <= _KEPT else (0, 0)


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, C] of the classes of `weight` [C, D] and `bias` [C]."""
    z = features @ weight.T if bias is None else torch.addmm(bias, features, weight.T)
    return z.to(compute_dtype(features))


def _kept_logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kept = _kept_shape(features, weight)
    if kept != (0, 0):
        return _logits(features, weight, bias)
    return features.new_empty(kept, dtype=compute_dtype(features))


def _forward(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, logits = compute_dtype(features), _kept_logits(features, weight, bias)
    first, second, at_label = torch.zeros((3, len(features)), dtype=dtype, device=features.device)
    largest = torch.full_like(first, -torch.inf)
    targets = _known(targets, len(weight))
    for part, z in _pieces(features, weight, bias, logits):
        labels, here = _places(targets, part)
        before, largest = largest, torch.maximum(largest, z.amax(1))
        # While all logits are -inf there is nothing to add up, and NaN must not come of it.
        base = largest.masked_fill(largest == -torch.inf, 0)
        at_label = torch.where(here, z.gather(1, labels), at_label.unsqueeze(1)).squeeze(1)
        e = (z - base.unsqueeze(1)).exp_()
        e.scatter_(1, labels, e.gather(1, labels).masked_fill_(here, 0))
        ratio = (before - base).exp_()
        first = first * ratio + e.sum(1)
        second = (second * ratio).hypot_(torch.linalg.vector_norm(e, dim=1))
    return *_put_together(features, bias, first, second, at_label, largest), logits


def _put_together(
    features: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, at_label: Tensor, largest: Tensor
) -> tuple[Tensor, Tensor]:
    """s and stats from the sum and the norm of exp(z - largest) over the other classes, and the label's z."""
    own = (at_label - largest).exp_()
    scale = 1 / (first + own)
    miss, norm, p = torch.stack([first, second, own]).mul_(scale)
    rest = (miss * p).addcmul_(norm, norm, value=-1)
    pull = torch.hypot(norm, miss)
    length = feature_lengths(features.to(pull.dtype), bias is not None)
    dtype = compute_dtype(features)
    return (pull * length).to(dtype), torch.stack([rest, pull, length, largest, scale]).to(dtype)


def _known(targets: Tensor, classes: int) -> Tensor:
    """The same targets; ValueError, or an assertion on the device, for one that is no class."""
    try:
        return torch.arange(classes, device=targets.device).gather(0, targets)
    except RuntimeError as error:
        raise no_such_class(targets, classes) from error


def _pieces(
    features: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Some classes at a time, and their logits [B, c]: of those that are kept, else computed."""
    for part in pieces(len(features), len(weight), features.device.type):
        if len(logits):
            yield part, logits[:, part]
        else:
            yield part, _logits(features, weight[part], None if bias is None else bias[part])


def _places(targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Labels [B, 1] among the classes of `part`, and which of them are there."""
    local = (targets - part.start).unsqueeze(1)
    last = part.stop - part.start - 1
    return local.clamp(0, last), (local >= 0) & (local <= last)


def pieces(batch: int, classes: int, device: str) -> list[slice]:
    """Which classes are worked on at a time."""
    step = max(_FEWEST_CLASSES, _PIECE.get(device, _PIECE["cuda"]) // max(batch, 1))
    return [slice(start, min(start + step, classes)) for start in range(0, classes, step)]


# Of some classes, their logits, targets, dL/ds [B] and stats: dL/dz.
Pull = Callable[[slice, Tensor, Tensor, Tensor, Tensor], Tensor]


def _pull(part: slice, z: Tensor, targets: Tensor, grad: Tensor, stats: Tensor) -> Tensor:
    largest, scale = stats[3:].unsqueeze(2)
    labels, here = _places(targets, part)
    return logits_gradient((z - largest).exp_().mul_(scale), labels, grad, stats, here)


def _backward_by(
    pull: Pull,
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Tensor,
    logits: Tensor,
    need_features: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op, whose logits become their gradients by `pull`."""
    grad_features = feature_gradient(features.to(stats.dtype), grad, stats)
    grad_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    grad_bias = weight.new_empty(len(weight) if need_bias else 0)
    for part, z in _pieces(features, weight, bias, logits):
        pulled = pull(part, z, targets, grad, stats)
        if need_bias:
            grad_bias[part] = pulled.sum(0)
        pulled = pulled.to(weight.dtype)
        if need_features:
            grad_features += pulled @ weight[part]
        if need_weight:
            torch.mm(pulled.T, features, out=grad_weight[part])
    grad_features = grad_features.to(features.dtype) if need_features else features.new_empty(0)
    return grad_features, grad_weight, grad_bias


# ---- C++ between the products, in float32


def _takes_forward(features: Tensor, *_: Any) -> bool:
    return compute_dtype(features) == torch.float32


def _takes_backward(grad: Tensor, features: Tensor, *_: Any) -> bool:
    return compute_dtype(features) == torch.float32


def _forward_cpp(
    extension: ModuleType, features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets = _kept_logits(features, weight, bias), _known(targets, len(weight))
    sums = features.new_zeros((4, len(features)), dtype=torch.float64)
    sums[3] = -torch.inf
    for part, z in _pieces(features, weight, bias, logits):
        extension.add_logits(sums=array(sums), **_described(part, z, targets))
    first, squares, at_label, largest = sums
    return *_put_together(features, bias, first, squares.sqrt(), at_label, largest), logits


def _backward_cpp(extension: ModuleType, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    def pull(part: slice, z: Tensor, targets: Tensor, grad: Tensor, stats: Tensor) -> Tensor:
        pulled = z.new_empty(z.shape)
        given = {"stats": array(stats), "grad": array(grad), "grad_logits": array(pulled)}
        extension.pull_logits(**given, **_described(part, z, targets))
        return pulled

    grad, features, weight, bias, *kept = arguments
    targets, stats, logits = (x.contiguous() for x in kept[:3])
    needs = kept[3:]
    grad = grad.float().contiguous()
    return _backward_by(pull, grad, features, weight, bias, targets, stats, logits, *needs)


def _described(part: slice, z: Tensor, targets: Tensor) -> dict[str, Any]:
    """What C++ is told of the logits of some classes, [B, c]."""
    batch, classes = z.shape
    apart = max(z.stride(0), classes)
    return {
        "logits": (z.data_ptr(), max(0, batch * apart - (apart - classes))), "targets": array(targets),
        "batch": batch, "classes": classes, "stride": apart, "first": part.start,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


# ---- registration


def _forward_fake(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    s = features.new_empty(len(features), dtype=compute_dtype(features))
    return s, s.new_empty((5, len(features))), s.new_empty(_kept_shape(features, weight))


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
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    check=_check_forward,
    cpp=_forward_cpp,
    takes=_takes_forward,
)
backward_op = define(
    "linear_sensitivity_backward(Tensor grad, Tensor features, Tensor weight, Tensor? bias, Tensor targets,"
    " Tensor stats, Tensor logits, bool need_features, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
    partial(_backward_by, _pull),
    _backward_fake,
    check=_check_backward,
    cpp=_backward_cpp,
    takes=_takes_backward,
)
_backward_once = differentiable_once(
    backward_op,
    "linear_sensitivity is differentiable once: for a second derivative use "
    "dau_fast.ops.reference.sensitivity_reference on the layer's logits",
)
