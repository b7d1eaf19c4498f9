"""The Gram form of the Barlow Twins kernels: two products [N, N]. See _barlow_twins_cuda.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dau_fast.ops._barlow_twins_parts_cuda import FILL, TILE, WARPS, add_up, row, unit
from dau_fast.ops._tiles_cuda import upper_tile

LOSS_BLOCK = 1024  # entries of both products that one program adds up
PRODUCT_STAGES = 2  # of `gram_kernel`, whose third would spill on some chips


@triton.jit
def gram_kernel(
    a_ptr, b_ptr, stats_ptr, parts_ptr, N, D, tiles, share, stride_an, stride_ad, stride_bn, stride_bd,
    PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of A A^T or B B^T over one share of the columns: parts [shares, 2, N, N].

    Both products are symmetric: what is above the diagonal is stored below it too.
    """
    tile, other = upper_tile(tl.program_id(0), tiles)
    n = tile * TILE + tl.arange(0, TILE)
    m = other * TILE + tl.arange(0, TILE)
    first = tl.program_id(1) * share
    side = tl.program_id(2)
    z_ptr = tl.where(side == 0, a_ptr, b_ptr)
    stride_n = tl.where(side == 0, stride_an, stride_bn)
    stride_d = tl.where(side == 0, stride_ad, stride_bd)
    gram = tl.zeros([TILE, TILE], tl.float32)
    for start in range(first, tl.minimum(first + share, D), DEPTH):
        columns = start + tl.arange(0, DEPTH)
        mean = row(stats_ptr, side, columns, D)
        scale = row(stats_ptr, 2 + side, columns, D)
        left = unit(z_ptr, n, columns, stride_n, stride_d, mean, scale, N, D)
        right = unit(z_ptr, m, columns, stride_n, stride_d, mean, scale, N, D)
        gram = tl.dot(left, tl.trans(right), gram, input_precision=PRECISION)
    parts = parts_ptr + (tl.program_id(1) * 2 + side).to(tl.int64) * N * N
    inside = (n < N)[:, None] & (m < N)[None, :]
    tl.store(parts + n.to(tl.int64)[:, None] * N + m[None, :], gram, mask=inside)
    tl.store(parts + m.to(tl.int64)[None, :] * N + n[:, None], gram, mask=inside & (tile != other))


@triton.jit
def gram_loss_kernel(
    stats_ptr, shares_ptr, products_ptr, parts_ptr, finished_ptr, loss_ptr, squares, D, shares, lambd,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The products A A^T and B B^T [2, N, N] from their shares [shares, 2, N, N], and the loss.

    squares: N^2. Each program takes BLOCK entries of both products, and as many columns of C.
    """
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < squares
    of_a = tl.zeros([BLOCK], tl.float32)
    of_b = tl.zeros([BLOCK], tl.float32)
    size = tl.cast(squares, tl.int64)
    for share in range(shares):
        base = shares_ptr + 2 * share * size
        of_a += tl.load(base + entries, mask=inside, other=0.0)
        of_b += tl.load(base + size + entries, mask=inside, other=0.0)
    tl.store(products_ptr + entries, of_a, mask=inside)
    tl.store(products_ptr + size + entries, of_b, mask=inside)
    loss = lambd * of_a * of_b
    for start in range(tl.program_id(0) * BLOCK, D, tl.num_programs(0) * BLOCK):
        columns = start + tl.arange(0, BLOCK)
        c = row(stats_ptr, 4, columns, D)
        loss += tl.where(columns < D, (1.0 - c) * (1.0 - c) - lambd * c * c, 0.0)
    add_up(tl.sum(loss, 0), parts_ptr, finished_ptr, loss_ptr, BLOCK)


@triton.jit
def gram_pull_kernel(
    a_ptr, b_ptr, stats_ptr, products_ptr, pulled_a_ptr, pulled_b_ptr, squares_ptr, N, D, first,
    stride_an, stride_ad, stride_bn, stride_bd,
    PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of (B B^T) A or (A A^T) B, and what it adds to the sums of squares of C.

    z_a is in the grid's layer 0 - first, z_b in the next. squares [2, tiles, D]: for each tile of rows, the
    column sums of own * pulled.
    """
    side = tl.program_id(2) + first
    own_ptr = tl.where(side == 0, a_ptr, b_ptr)
    pulled_ptr = tl.where(side == 0, pulled_a_ptr, pulled_b_ptr)
    stride_n = tl.where(side == 0, stride_an, stride_bn)
    stride_d = tl.where(side == 0, stride_ad, stride_bd)
    product_ptr = products_ptr + (1 - side).to(tl.int64) * N * N
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mean = row(stats_ptr, side, i, D)
    scale = row(stats_ptr, 2 + side, i, D)
    pulled = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, N, DEPTH):
        m = start + tl.arange(0, DEPTH)
        offsets = n.to(tl.int64)[:, None] * N + m[None, :]
        product = tl.load(product_ptr + offsets, mask=(n < N)[:, None] & (m < N)[None, :], other=0.0)
        own = unit(own_ptr, m, i, stride_n, stride_d, mean, scale, N, D)
        pulled = tl.dot(product, own, pulled, input_precision=PRECISION)
    own = unit(own_ptr, n, i, stride_n, stride_d, mean, scale, N, D)
    inside = (n < N)[:, None] & (i < D)[None, :]
    tl.store(pulled_ptr + n.to(tl.int64)[:, None] * D + i[None, :], pulled, mask=inside)
    squares = tl.sum(tl.where(inside, own * pulled, 0.0), 0)
    place = side * tl.num_programs(1) + tl.program_id(1)
    tl.store(squares_ptr + place.to(tl.int64) * D + i, squares, mask=i < D)


@triton.jit
def _gram_gradient(
    grad_loss_ptr, own_ptr, other_ptr, stats_ptr, pulled_ptr, squares_ptr, grad_ptr, N, D, tiles, lambd,
    stride_own_n, stride_own_d, stride_other_n, stride_other_d,
    SIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of the gradient with respect to view SIDE from what `gram_pull_kernel` left."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    squares = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(tiles):
        squares += tl.load(squares_ptr + tl.cast(tile, tl.int64) * D + i, mask=i < D, other=0.0)
    own_mean = row(stats_ptr, SIDE, i, D)
    own_scale = row(stats_ptr, 2 + SIDE, i, D)
    other_mean = row(stats_ptr, 1 - SIDE, i, D)
    other_scale = row(stats_ptr, 3 - SIDE, i, D)
    own = unit(own_ptr, n, i, stride_own_n, stride_own_d, own_mean, own_scale, N, D)
    other = unit(other_ptr, n, i, stride_other_n, stride_other_d, other_mean, other_scale, N, D)
    c = row(stats_ptr, 4, i, D)
    g = 2.0 * (c - 1.0) - 2.0 * lambd * c
    s = 2.0 * lambd * squares + g * c
    inside = (n < N)[:, None] & (i < D)[None, :]
    offsets = n.to(tl.int64)[:, None] * D + i[None, :]
    pulled = tl.load(pulled_ptr + offsets, mask=inside, other=0.0)
    factor = own_scale * tl.load(grad_loss_ptr).to(tl.float32)
    grad = (2.0 * lambd * pulled + other * g[None, :] - own * s[None, :]) * factor[None, :]
    tl.store(grad_ptr + offsets, grad, mask=inside)


@triton.jit
def gram_backward_kernel(
    grad_loss_ptr, a_ptr, b_ptr, stats_ptr, pulled_a_ptr, pulled_b_ptr, squares_ptr, grad_a_ptr, grad_b_ptr,
    N, D, tiles, lambd, first, stride_an, stride_ad, stride_bn, stride_bd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of the gradient of z_a in the grid's layer 0 - first, of z_b in the next."""
    if tl.program_id(2) + first == 0:
        _gram_gradient(
            grad_loss_ptr, a_ptr, b_ptr, stats_ptr, pulled_a_ptr, squares_ptr, grad_a_ptr, N, D, tiles, lambd,
            stride_an, stride_ad, stride_bn, stride_bd, 0, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        squares = squares_ptr + tl.cast(tiles, tl.int64) * D
        _gram_gradient(
            grad_loss_ptr, b_ptr, a_ptr, stats_ptr, pulled_b_ptr, squares, grad_b_ptr, N, D, tiles, lambd,
            stride_bn, stride_bd, stride_an, stride_ad, 1, BLOCK_N, BLOCK_D,
        )  # fmt: skip


# ---- launchers of both passes, after the statistics of the columns


def forward_gram(
    z_a: Tensor,
    z_b: Tensor,
    stats: Tensor,
    products: Tensor,
    finished: Tensor,
    loss: Tensor,
    lambd: float,
    tiling: dict[str, Any],
) -> None:
    """Fill products [2, N, N] and the loss. finished: a 0, int32 [1]."""
    (n, d), tiles, depth = z_a.shape, triton.cdiv(len(z_a), TILE), tiling["DEPTH"]
    halves = tiles * (tiles + 1) // 2
    shares = max(1, min(triton.cdiv(d, 4 * depth), FILL // (2 * halves)))
    share = depth * triton.cdiv(d, depth * shares)
    shares = triton.cdiv(d, share)
    of_shares = stats.new_empty((shares, 2, n, n))
    z_a, z_b = _of_one_dtype(z_a, z_b)
    gram_kernel[(halves, shares, 2)](
        z_a, z_b, stats, of_shares, n, d, tiles, share, *z_a.stride(), *z_b.stride(),
        **tiling | {"num_stages": PRODUCT_STAGES},
    )  # fmt: skip
    programs = triton.cdiv(n * n, LOSS_BLOCK)
    gram_loss_kernel[(programs,)](
        stats, of_shares, products, stats.new_empty(programs), finished, loss, n * n, d, shares, lambd,
        BLOCK=LOSS_BLOCK, num_warps=WARPS,
    )  # fmt: skip


def backward_gram(
    grid: tuple[int, int, int],
    grad_loss: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    stats: Tensor,
    products: Tensor,
    grads: tuple[Tensor, ...],
    lambd: float,
    first: int,
    tiling: dict[str, Any],
) -> None:
    """Fill the gradients of the views that `grid` has a layer for, from view `first` on."""
    (n, d), strides, tiles = z_a.shape, (*z_a.stride(), *z_b.stride()), grid[1]
    # In float32 a gradient's own memory holds what it is made of.
    pulled = tuple(grad if grad.dtype == torch.float32 else stats.new_empty(grad.shape) for grad in grads)
    squares = stats.new_empty((2, tiles, d))
    a, b = _of_one_dtype(z_a, z_b)
    gram_pull_kernel[grid](
        a, b, stats, products, *pulled, squares, n, d, first, *a.stride(), *b.stride(), **tiling
    )
    gram_backward_kernel[grid](
        grad_loss, z_a, z_b, stats, *pulled, squares, *grads, n, d, tiles, lambd, first, *strides,
        BLOCK_N=TILE, BLOCK_D=TILE, num_warps=WARPS,
    )  # fmt: skip


def _of_one_dtype(z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor]:
    """Views that one pointer can stand for: where their dtypes differ, float32 copies."""
    return (z_a, z_b) if z_a.dtype == z_b.dtype else (z_a.float(), z_b.float())
