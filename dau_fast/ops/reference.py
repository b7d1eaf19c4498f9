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
