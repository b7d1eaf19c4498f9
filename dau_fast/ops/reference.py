"""The plain PyTorch definition of every op: what the fast ones are tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pack_mask_reference(mask: Tensor) -> Tensor:
    """Bool mask of n elements, any shape -> uint8 [ceil(n / 8)], least significant bit first."""
    n = mask.numel()
    flags = torch.nn.functional.pad(mask.flatten(), (0, -n % 8)).view(-(-n // 8), 8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flags.to(torch.uint8) << places).sum(dim=1, dtype=torch.uint8)


def unpack_mask_reference(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """uint8 [ceil(n / 8)] -> bool mask of `shape`, n elements."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    flags = ((packed[:, None] >> places) & 1).bool()
    return flags.flatten()[: math.prod(shape)].view(tuple(shape))


@torch.no_grad()
def apply_masks_reference_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set each tensor to 0 where its mask is False; masks are bool, or uint8 from `pack_mask`."""
    for tensor, mask in zip(tensors, masks, strict=True):
        keep = mask if mask.dtype == torch.bool else unpack_mask_reference(mask, tensor.shape)
        tensor.masked_fill_(~keep, 0)


@torch.no_grad()
def masked_sgd_reference_(
    weights: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    masks: Sequence[Tensor | None],
    first: Sequence[bool],
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """torch.optim.SGD's step, after which masked weights and momenta are 0; changes both in place.

    momenta, first: one a weight, or none without momentum; first: whether it is the weight's first step.
    masks: bool, uint8 from `pack_mask`, or None.
    """
    if maximize:
        grads = list(torch._foreach_neg(grads))
    if weight_decay:
        grads = list(torch._foreach_add(grads, weights, alpha=weight_decay))
    for begins in (True, False):
        chosen = [i for i, one in enumerate(first) if one == begins and momenta]
        buffers, new = [momenta[i] for i in chosen], [grads[i] for i in chosen]
        if begins and chosen:
            torch._foreach_copy_(buffers, new)
        elif chosen:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, new, alpha=1 - dampening)
    if momenta:
        grads = list(torch._foreach_add(grads, momenta, alpha=momentum)) if nesterov else momenta
    if isinstance(lr, Tensor):
        torch._foreach_sub_(weights, torch._foreach_mul(grads, lr))
    else:
        torch._foreach_add_(weights, grads, alpha=-lr)
    _apply_where_given(masks, weights, momenta)


@torch.no_grad()
def masked_adamw_reference_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masks: Sequence[Tensor | None],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """torch.optim.AdamW's step, after which masked weights and averages are 0; changes all in place.

    steps: how many steps each weight has had, scalars; raised by one. masks: as for SGD.
    """
    if maximize:
        grads = list(torch._foreach_neg(grads))
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    # In float64: 1 - 0.999 loses five digits in float32.
    counts = torch.stack(steps).double()
    roots = (1 - beta2**counts).sqrt().unbind()
    sizes = (-lr / (1 - beta1**counts)).unbind()
    divisors = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(divisors, _like(roots, divisors))
    torch._foreach_add_(divisors, eps)
    changes = torch._foreach_div(exp_avgs, divisors)
    torch._foreach_mul_(changes, _like(sizes, changes))
    torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_add_(weights, changes)
    _apply_where_given(masks, weights, exp_avgs, exp_avg_sqs)


def _like(scalars: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """`scalars` in the dtypes of `tensors`."""
    return [scalar.to(tensor.dtype) for scalar, tensor in zip(scalars, tensors, strict=True)]


def _apply_where_given(masks: Sequence[Tensor | None], *families: list[Tensor]) -> None:
    """Apply each mask that is not None to its tensor of every family that is not empty."""
    places = [place for place, mask in enumerate(masks) if mask is not None]
    families = tuple(family for family in families if family)
    shapes = [families[0][place].shape for place in places]
    dropped = _dropped([masks[place] for place in places], shapes)  # type: ignore[misc]
    for place, drop in zip(places, dropped, strict=True):
        for family in families:
            family[place].masked_fill_(drop, 0)


def _dropped(masks: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
    """Bool masks of `shapes`, True where a weight is masked; packed ones are unpacked all at once."""
    packed = [mask for mask in masks if mask.dtype == torch.uint8]
    if not packed:
        return [~mask for mask in masks]
    flags = ~unpack_mask_reference(torch.cat(packed), (8 * sum(len(mask) for mask in packed),))
    parts = iter(flags.split([8 * len(mask) for mask in packed]))
    return [
        next(parts)[: math.prod(shape)].view(shape) if mask.dtype == torch.uint8 else ~mask
        for mask, shape in zip(masks, shapes, strict=True)
    ]


def mask_smallest_reference(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """Bool masks that are False for the k smallest absolute values of all, the first of equal ones."""
    values = torch.cat([tensor.detach().flatten().abs() for tensor in tensors])
    keep = torch.ones_like(values, dtype=torch.bool)
    keep[values.sort(stable=True).indices[:k]] = False
    parts = keep.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def barlow_twins_reference(z_a: Tensor, z_b: Tensor, lambd: float, eps: float) -> Tensor:
    """sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2 of views [N, D] (Zbontar et al. 2021)."""

    def normalised(z: Tensor) -> Tensor:
        variance, mean = torch.var_mean(z, 0, correction=0)
        return (z - mean) * torch.rsqrt(variance + eps)

    correlation = normalised(z_a).T @ normalised(z_b) / len(z_a)
    wanted = torch.eye(len(correlation), dtype=correlation.dtype, device=correlation.device)
    weight = wanted + lambd * (1 - wanted)
    return (weight * (correlation - wanted).square()).sum()


def sensitivity_reference(logits: Tensor, features: Tensor, targets: Tensor, bias: bool = True) -> Tensor:
    """||p - e_y||_2 * sqrt(||h||^2 + 1) of logits [B, C], features [B, D] and targets [B]; [B]."""
    true = targets.unsqueeze(1)
    others = torch.softmax(logits, 1).scatter(1, true, 0.0)
    # 1 - p_y as the sum of the others stays exact where p_y rounds to 1.
    error = others.scatter(1, true, -others.sum(1, keepdim=True))
    pull = torch.linalg.vector_norm(error, dim=1)
    if not bias:
        return pull * torch.linalg.vector_norm(features, dim=1)
    return pull * (features.square().sum(1) + 1).sqrt()


def attack_features_reference(logits: Tensor, features: Tensor, targets: Tensor | None) -> Tensor:
    """Softmax and sensitivity [B, C + 1]; targets None means the predicted label."""
    labels = logits.argmax(1) if targets is None else targets
    s = sensitivity_reference(logits, features, labels)
    return torch.cat([torch.softmax(logits, 1), s.unsqueeze(1)], 1)


def image_batch_reference(
    pixels: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    flip: Tensor | None = None,
    pad: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """((pixels / 255) - mean) / std of the images at `index`, padded, cropped and mirrored before.

    Shapes and meanings as in `dau_fast.ops.image_batch`.
    """
    batch, device, (height, width) = len(index), pixels.device, pixels.shape[-2:]
    chosen = pixels[index]
    if rows is not None or flip is not None:
        if rows is None or columns is None:
            pad, rows, columns = 0, torch.zeros_like(index), torch.zeros_like(index)
        down = torch.arange(height, device=device) + rows.unsqueeze(1)
        across = torch.arange(width, device=device) + columns.unsqueeze(1)
        if flip is not None:
            across = torch.where(flip.bool().unsqueeze(1), across.flip(1), across)
        padded = torch.nn.functional.pad(chosen, (pad, pad, pad, pad))
        sample = torch.arange(batch, device=device).view(-1, 1, 1)
        # Advanced indices around a slice put the channels last.
        chosen = padded[sample, :, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)
    normalised = (chosen.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    return normalised.to(dtype, memory_format=torch.channels_last)


@torch.no_grad()
def batch_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    add: Tensor | None,
    relu: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """relu(BatchNorm(x) + add) as in `dau_fast.ops.batch_norm`, and [4, C] of it by channel.

    These are slope and bias of y = slope (x - mean) + bias, mean, and 1 / standard deviation.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    scale = (var + eps).rsqrt()
    if running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1]
        running_mean.lerp_(mean.to(running_mean), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var), momentum)
    if batches is not None:
        batches.add_(1)
    slope = scale * weight
    y = (wide - mean.view(-1, 1, 1)) * slope.view(-1, 1, 1) + bias.view(-1, 1, 1)
    y = y if add is None else y + add
    y = y.relu() if relu else y
    return y.to(x.dtype), torch.stack([slope, bias.to(slope), mean, scale])


@torch.no_grad()
def batch_norm_backward_reference(
    grad: Tensor, x: Tensor, y: Tensor, lines: Tensor, relu: bool, added: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and, where `added`, of what was, and sums [2, C]: the gradients of bias and weight.

    lines: from `batch_norm_reference`. y: its result, where something was added; else it is not looked at.
    """
    slope, bias, mean, scale = (line.view(-1, 1, 1) for line in lines)
    wide, pulled = x.to(lines.dtype), grad.to(lines.dtype)
    if relu:
        pulled = torch.where((y if added else (wide - mean) * slope + bias) <= 0, 0.0, pulled)
    unit = (wide - mean) * scale
    sums = torch.stack([pulled.sum((0, 2, 3)), (pulled * unit).sum((0, 2, 3))])
    shift, tilt = (sums / (x.numel() // x.shape[1])).view(2, -1, 1, 1)
    of_x = (pulled - shift - unit * tilt) * slope
    return of_x.to(x.dtype), pulled.to(x.dtype) if added else x.new_empty(0), sums
