"""The Barlow Twins loss over the rows of all ranks of a process group.

Statistics, correlation and loss are those of the concatenated batch, whatever number of rows each rank
holds. Collectives run in the forward pass only. The cheaper of two ways is taken, by bytes on the wire:
gathering the views, [N, D], or adding up the correlation, [D, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dau_fast.ops._barlow_twins_op import forward_op, gradients, prefers_gram, primal_loss
from dau_fast.ops._library import compute_dtype


@torch.compiler.disable  # type: ignore[untyped-decorator]
def global_loss(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float,
    eps: float,
    group: dist.ProcessGroup,
    precision: str,
    rows: Sequence[int] | None,
) -> Tensor:
    """See `barlow_twins_loss`. Without `rows` it waits for the ranks to tell what [n, D] each holds."""
    d = z_a.shape[1]
    shapes = _all_shapes(z_a, group) if rows is None else [(n, d) for n in rows]
    rows = [n for n, _ in shapes]
    if len({d for _, d in shapes}) > 1 or sum(rows) < 2:
        raise ValueError(
            f"the ranks hold views of shapes {[list(shape) for shape in shapes]}: expected one number "
            "of columns, and 2 rows in all"
        )
    if rows[dist.get_rank(group)] != len(z_a):
        raise ValueError(
            f"rows says that rank {dist.get_rank(group)} holds {rows[dist.get_rank(group)]} rows and it "
            f"holds {len(z_a)}: give the rows of every rank"
        )
    method = _Gathered if gathering_is_cheaper(sum(rows), z_a) else _Reduced
    with torch.autocast(z_a.device.type, enabled=False):
        loss: Tensor = method.apply(z_a, z_b, lambd, eps, group, precision, rows)
    return loss


def gathering_is_cheaper(rows: int, z: Tensor) -> bool:
    """Whether 2 N D elements of z's dtype are fewer bytes than twice D^2 of C (an all-reduce moves two)."""
    d = z.shape[1]
    return rows * d * z.element_size() < d * d * compute_dtype(z, z).itemsize


class _Gathered(torch.autograd.Function):
    """Every rank computes the whole loss on the whole batch and keeps its own rows' gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        z_a: Tensor,
        z_b: Tensor,
        lambd: float,
        eps: float,
        group: dist.ProcessGroup,
        precision: str,
        rows: list[int],
    ) -> Tensor:
        whole_a, whole_b = _gather(torch.stack([z_a, z_b], 1), group, rows).unbind(1)
        gram = prefers_gram(*whole_a.shape)
        loss, stats, products = forward_op(whole_a, whole_b, lambd, eps, gram, precision)
        ctx.save_for_backward(whole_a, whole_b, stats, products)
        ctx.settings = lambd, gram, precision
        rank = dist.get_rank(group)
        ctx.mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        ctx.ranks = len(rows)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        whole = gradients(ctx, ctx.ranks * grad_loss)
        return *(grad if grad is None else grad[ctx.mine] for grad in whole), *_NO_GRADIENTS


class _Reduced(torch.autograd.Function):
    """Every rank adds its rows' share of the correlation; the gradient then needs its rows alone."""

    @staticmethod
    def forward(
        ctx: Any,
        z_a: Tensor,
        z_b: Tensor,
        lambd: float,
        eps: float,
        group: dist.ProcessGroup,
        precision: str,
        rows: list[int],
    ) -> Tensor:
        dtype = compute_dtype(z_a, z_b)
        views = torch.stack([z_a, z_b]).to(dtype)
        # Means first and deviations from them second: a sum of squares would lose what they differ by.
        mean = _all_sum(views.sum(1), group) / sum(rows)
        centred = views - mean.unsqueeze(1)
        scale = (_all_sum(centred.square().sum(1), group) + sum(rows) * eps).rsqrt()
        a, b = centred * scale.unsqueeze(1)
        loss, stats, products = primal_loss(_all_sum(a.T @ b, group), mean, scale, lambd)
        ctx.save_for_backward(z_a, z_b, stats, products)
        ctx.settings = lambd, False, precision
        ctx.ranks = len(rows)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, ctx.ranks * grad_loss), *_NO_GRADIENTS


_NO_GRADIENTS = (None,) * 5


def _all_shapes(z: Tensor, group: dist.ProcessGroup) -> list[tuple[int, int]]:
    """The shape of z on every rank."""
    mine = torch.tensor(z.shape, device=z.device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group)
    return [(int(n), int(d)) for n, d in torch.stack(every).tolist()]


def _gather(mine: Tensor, group: dist.ProcessGroup, rows: list[int]) -> Tensor:
    """The rows of all ranks in their order; shorter ones travel padded."""
    padded = mine.new_zeros((max(rows), *mine.shape[1:]))
    padded[: len(mine)] = mine
    every = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(every, padded, group)
    return torch.cat([part[:count] for part, count in zip(every, rows, strict=True)])


def _all_sum(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = mine.contiguous()
    dist.all_reduce(total, group=group)
    return total
