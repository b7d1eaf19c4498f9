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

from dau_fast.ops._library import define, differentiable_once, kernels

PRECISIONS = ("ieee", "tf32x3", "tf32")

# Gram runs where N is below this many times D: by FLOPs 0.75, measured on 2 CPU cores at D = 1024 0.72.
_GRAM_BELOW = 0.75


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
    if z_a.shape != z_b.shape or z_a.ndim != 2 or (group is None and len(z_a) < 2):
        raise ValueError(
            f"z_a has shape {list(z_a.shape)}, z_b {list(z_b.shape)}: expected one shape [N, D] "
            "with N of at least 2; pair the rows of both"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown: expected one of {', '.join(PRECISIONS)}")
    if not (z_a.is_floating_point() and z_b.is_floating_point()):
        raise ValueError(f"z_a is {z_a.dtype}, z_b {z_b.dtype}: expected floating point; convert them")
    if group is not None:
        from dau_fast.ops._barlow_twins_distributed import global_loss

        return global_loss(z_a, z_b, lambd, eps, group, precision, rows)
    gram = prefers_gram(*z_a.shape)
    loss: Tensor = _BarlowTwins.apply(z_a, z_b, lambd, eps, gram, precision)
    return loss


def prefers_gram(n: int, d: int) -> bool:
    """Whether the Gram form is the cheaper one for views [N, D]."""
    return n < _GRAM_BELOW * d


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


def gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """With respect to both views, None where not wanted, from what a forward pass left in `ctx`."""
    wanted = ctx.needs_input_grad[:2]
    grads = _backward_once(grad_loss, *ctx.saved_tensors, *ctx.settings, *wanted)
    return grads[0] if wanted[0] else None, grads[1] if wanted[1] else None


# ---- the ops: plain PyTorch
# stats [5, D]: mean_a, mean_b, scale_a, scale_b, c; in the primal form also the sums of squares of C
# off its diagonal by row and by column, [7, D].
# products: C with a zero diagonal [1, D, D], or A A^T and B B^T [2, N, N].


def _forward(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, gram: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    # Both views in one array: half as many calls, which is what small views cost.
    views = torch.stack([z_a, z_b]).to(compute_dtype(z_a, z_b))
    mean = views.mean(1)
    views.sub_(mean.unsqueeze(1))
    scale = views.square().sum(1).add_(len(z_a) * eps).rsqrt_()
    a, b = views.mul_(scale.unsqueeze(1))
    if not gram:
        return primal_loss(a.T @ b, mean, scale, lambd)
    products = torch.stack([a @ a.T, b @ b.T])
    c = torch.linalg.vecdot(a, b, dim=0)
    off_diagonal = torch.dot(products[0].view(-1), products[1].view(-1)) - torch.dot(c, c)
    missing = 1 - c
    loss = torch.dot(missing, missing) + lambd * off_diagonal
    return loss, torch.cat([mean, scale, c.unsqueeze(0)]), products


def primal_loss(
    correlation: Tensor, mean: Tensor, scale: Tensor, lambd: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op returns, from C [D, D], which is changed, and means and scales [2, D]."""
    c = correlation.diagonal().clone()
    squares = correlation.fill_diagonal_(0).square()
    rows, columns = squares.sum(1), squares.sum(0)
    missing = 1 - c
    loss = torch.dot(missing, missing) + lambd * rows.sum()
    return loss, torch.cat([mean, scale, torch.stack([c, rows, columns])]), correlation.unsqueeze(0)


def _backward(
    grad_loss: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    stats: Tensor,
    products: Tensor,
    lambd: float,
    gram: bool,
    precision: str,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    mean, scale, c = stats[:2].unsqueeze(1), stats[2:4].unsqueeze(1), stats[4]
    views = torch.stack([z_a, z_b]).to(stats.dtype).sub_(mean).mul_(scale).unbind()
    # The diagonal of G; the Gram form's squares still hold C's diagonal.
    g = torch.sub(c, 1).mul_(2)
    if gram:
        g.sub_(c, alpha=2 * lambd)

    def gradient(side: int) -> Tensor:
        own, other = views[side], views[1 - side]
        if gram:
            pulled = products[1 - side] @ own
            squares = torch.linalg.vecdot(own, pulled, dim=0)
            grad = pulled.mul_(2 * lambd).addcmul_(other, g)
        else:
            squares = stats[5 + side]
            grad = (other * g).addmm_(other, products[0] if side else products[0].T, alpha=2 * lambd)
        s = torch.add(g * c, squares, alpha=2 * lambd)
        return grad.addcmul_(own, s, value=-1).mul_(stats[2 + side] * grad_loss)

    return (
        gradient(0).to(z_a.dtype) if need_a else z_a.new_empty(0),
        gradient(1).to(z_b.dtype) if need_b else z_b.new_empty(0),
    )


def compute_dtype(z_a: Tensor, z_b: Tensor) -> torch.dtype:
    """What sums and products are kept in: float64 where a view is, else float32."""
    return torch.float64 if torch.float64 in (z_a.dtype, z_b.dtype) else torch.float32


# ---- registration


def _forward_cuda(z_a: Tensor, z_b: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    fused = _fused(z_a, z_b)
    return (fused.forward if fused else _forward)(z_a, z_b, *settings)


def _backward_cuda(grad_loss: Tensor, z_a: Tensor, z_b: Tensor, *saved: Any) -> tuple[Tensor, Tensor]:
    fused = _fused(z_a, z_b)
    return (fused.backward if fused else _backward)(grad_loss, z_a, z_b, *saved)


def _fused(z_a: Tensor, z_b: Tensor) -> Any:
    """The Triton kernels, which compute in float32, or None for float64 and without Triton."""
    return kernels("_barlow_twins_cuda") if compute_dtype(z_a, z_b) == torch.float32 else None


def _forward_fake(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, gram: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = z_a.shape
    loss = z_a.new_empty((), dtype=compute_dtype(z_a, z_b))
    products = loss.new_empty((2, n, n) if gram else (1, d, d))
    return loss, loss.new_empty((5 if gram else 7, d)), products


def _backward_fake(grad_loss: Tensor, z_a: Tensor, z_b: Tensor, *saved: Any) -> tuple[Tensor, Tensor]:
    need_a, need_b = saved[-2:]
    return (
        z_a.new_empty(z_a.shape if need_a else (0,)),
        z_b.new_empty(z_b.shape if need_b else (0,)),
    )


forward_op = define(
    "barlow_twins_forward(Tensor z_a, Tensor z_b, float lambd, float eps, bool gram, str precision)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    cuda=_forward_cuda,
)
backward_op = define(
    "barlow_twins_backward(Tensor grad_loss, Tensor z_a, Tensor z_b, Tensor stats, Tensor products,"
    " float lambd, bool gram, str precision, bool need_a, bool need_b) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    cuda=_backward_cuda,
)
_backward_once = differentiable_once(
    backward_op,
    "barlow_twins_loss is differentiable once: for a second derivative use "
    "dau_fast.ops.reference.barlow_twins_reference",
)
