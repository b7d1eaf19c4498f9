"""The Barlow Twins loss (Zbontar et al. 2021, arXiv 2103.03230, equations 1 and 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def barlow_twins_loss(z_a: Tensor, z_b: Tensor, lambd: float = 5e-3, eps: float = 1e-5) -> Tensor:
    """sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2, a scalar; C is the cross-correlation [D, D].

    z_a, z_b: [N, D], row i of one paired with row i of the other. Columns are normalised over the
    batch with population variance + eps. Raises ValueError where the shapes differ or N < 2.
    """
    if z_a.shape != z_b.shape or z_a.ndim != 2 or len(z_a) < 2:
        raise ValueError(
            f"z_a has shape {list(z_a.shape)}, z_b {list(z_b.shape)}: expected one shape [N, D] "
            "with N of at least 2; pair the rows of both"
        )
    correlation = _normalised(z_a, eps).T @ _normalised(z_b, eps) / len(z_a)
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + lambd * off_diagonal


def _normalised(z: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(z, 0, correction=0)
    return (z - mean) * torch.rsqrt(variance + eps)
