"""The Barlow Twins loss (Zbontar et al. 2021, arXiv 2103.03230, equations 1 and 2), exact, in two forms.

With A and B the two views, their columns centred and scaled so that C = A^T B is the cross-correlation,

    L = sum_i (1 - c_i)^2 + lambd * sum_{i != j} C_ij^2,        c_i = C_ii

primal: C itself, [D, D]; 6 N D^2 FLOPs forward and backward.
Gram:   sum_ij C_ij^2 = <A A^T, B B^T>, two [N, N] products and c; 8 N^2 D FLOPs and no [D, D] array.

Backward, with G = dL/dC (2 lambd C off the diagonal, g_i on it) and s = row sums of G * C,

    dZ_a = scale_a * (B G^T - A diag(s))        and dZ_b alike with G^T and column sums:

the mean that normalisation takes off a gradient is 0 here, because B's columns are centred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dau_fast.ops._barlow_twins_op import check_views, forward_op, gradients, prefers_gram


def barlow_twins_loss(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float = 5e-3,
    eps: float = 1e-5,
    group: Any = None,
    precision: str = "tf32x3",
    rows: Sequence[int] | None = None,
) -> Tensor:
    """sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2, a scalar; C is the cross-correlation [D, D].

    z_a, z_b: [N, D], row i of one paired with row i of the other, any floating-point dtype and
    strides. Columns are normalised over the batch with population variance + eps, and sums are kept
    in float32 (float64 for float64 input), which is also the loss's dtype.
    group: a torch.distributed process group whose ranks each hold some of the rows; the loss is then
    that of the rows of all ranks, on every rank, and its gradient is scaled by the number of ranks,
    which averaging over ranks (as DistributedDataParallel does) takes away again.
    rows: how many rows each rank of `group` holds, where that is known; without it the ranks tell one
    another, for which the host waits.
    precision: of float32 matrix products in the CUDA kernels. "tf32x3": three TF32 products, close to
    float32. "ieee": float32. "tf32": one TF32 product, 10 bits of mantissa; bfloat16 and float16 views
    always take it, because their own rounding is coarser. The CPU always uses float32.
    A constant column has correlation 0 and costs 1. NaN or infinity anywhere makes the loss NaN.
    Differentiable once; torch.func transforms are refused. Raises ValueError where the shapes differ or
    the batch has fewer than 2 rows.
    """
    check_views(z_a, z_b, precision)
    if group is not None:
        # Not above: it loads PyTorch's compiler, to keep it out, which takes a second.
        from dau_fast.ops._barlow_twins_distributed import global_loss

        return global_loss(z_a, z_b, lambd, eps, group, precision, rows)
    if len(z_a) < 2:
        raise ValueError(f"z_a and z_b are {list(z_a.shape)}: expected one shape [N, D] with N of at least 2")
    gram = prefers_gram(*z_a.shape)
    loss: Tensor = _BarlowTwins.apply(z_a, z_b, lambd, eps, gram, precision)
    return loss


class _BarlowTwins(torch.autograd.Function):
    """(z_a, z_b, lambd, eps, gram, precision) -> loss.

    PyTorch binds a signature at every call of a Function that has a setup_context, which takes as long
    as the loss of a small batch: hence the older style, which torch.func's transforms refuse.
    """

    @staticmethod
    def forward(
        ctx: Any, z_a: Tensor, z_b: Tensor, lambd: float, eps: float, gram: bool, precision: str
    ) -> Tensor:
        loss, stats, products = forward_op(z_a, z_b, lambd, eps, gram, precision)
        ctx.save_for_backward(z_a, z_b, stats, products)
        ctx.settings = lambd, gram, precision
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, grad_loss), None, None, None, None
