"""The Barlow Twins ops as Triton kernels: normalisation is folded into every product.

Shapes and meanings as in barlow_twins.py: views z_a, z_b [N, D] with any strides, stats [5 or 7, D].
Kernels make tiles of A and B from z, mean and scale as they read them, so no normalised copy exists.
They stand in the order in which they are launched. Sums over tiles go through buffers and not through
atomics: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # rows and columns of an output tile
WARPS = 8
# What a product takes at a time, and how many of these are on their way: no kernel spills.
TILING = {
    "ieee": {"DEPTH": 16, "num_stages": 2},
    "tf32x3": {"DEPTH": 32, "num_stages": 3},
    "tf32": {"DEPTH": 32, "num_stages": 3},
}
# Programs that keep every multiprocessor of a large GPU busy.
_FILL = 264


@triton.jit
def _unit(z_ptr, rows, columns, stride_n, stride_d, mean, scale, N, D):
    """Tile [rows, columns] of A or B in float32, 0 outside; mean, scale: of `columns`."""
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, (z - mean[None, :]) * scale[None, :], 0.0)


@triton.jit
def _row(stats_ptr, row, columns, D):
    """Row `row` of stats at `columns`, 0 outside."""
    return tl.load(stats_ptr + row * D + columns, mask=columns < D, other=0.0)


# ---- both forms: statistics of the columns


@triton.jit
def statistics_kernel(
    a_ptr, b_ptr, stats_ptr, N, D, eps,
    stride_an, stride_ad, stride_bn, stride_bd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows 0 to 4 of stats (mean_a, mean_b, scale_a, scale_b, c) for BLOCK_D columns, in two passes."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    zero = tl.zeros([BLOCK_D], tl.float32)
    one = zero + 1.0
    sum_a = zero
    sum_b = zero
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        sum_a += tl.sum(_unit(a_ptr, rows, columns, stride_an, stride_ad, zero, one, N, D), 0)
        sum_b += tl.sum(_unit(b_ptr, rows, columns, stride_bn, stride_bd, zero, one, N, D), 0)
    mean_a = sum_a / N
    mean_b = sum_b / N
    square_a = zero
    square_b = zero
    product = zero
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        a = _unit(a_ptr, rows, columns, stride_an, stride_ad, mean_a, one, N, D)
        b = _unit(b_ptr, rows, columns, stride_bn, stride_bd, mean_b, one, N, D)
        square_a += tl.sum(a * a, 0)
        square_b += tl.sum(b * b, 0)
        product += tl.sum(a * b, 0)
    scale_a = 1.0 / tl.sqrt(square_a + N * eps)
    scale_b = 1.0 / tl.sqrt(square_b + N * eps)
    inside = columns < D
    tl.store(stats_ptr + columns, mean_a, mask=inside)
    tl.store(stats_ptr + D + columns, mean_b, mask=inside)
    tl.store(stats_ptr + 2 * D + columns, scale_a, mask=inside)
    tl.store(stats_ptr + 3 * D + columns, scale_b, mask=inside)
    tl.store(stats_ptr + 4 * D + columns, product * scale_a * scale_b, mask=inside)


# ---- primal form


@triton.jit
def correlation_kernel(
    a_ptr, b_ptr, stats_ptr, c_ptr, row_squares_ptr, column_squares_ptr, N, D,
    stride_an, stride_ad, stride_bn, stride_bd,
    PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of C with a zero diagonal, and its sums of squares by row and by column.

    row_squares [tiles, D]: for tile column t, over its columns; column_squares [tiles, D] alike.
    """
    tile_i = tl.program_id(1)
    tile_j = tl.program_id(0)
    i = tile_i * TILE + tl.arange(0, TILE)
    j = tile_j * TILE + tl.arange(0, TILE)
    mean_a = _row(stats_ptr, 0, i, D)
    mean_b = _row(stats_ptr, 1, j, D)
    scale_a = _row(stats_ptr, 2, i, D)
    scale_b = _row(stats_ptr, 3, j, D)
    c = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, N, DEPTH):
        n = start + tl.arange(0, DEPTH)
        a = _unit(a_ptr, n, i, stride_an, stride_ad, mean_a, scale_a, N, D)
        b = _unit(b_ptr, n, j, stride_bn, stride_bd, mean_b, scale_b, N, D)
        c = tl.dot(tl.trans(a), b, c, input_precision=PRECISION)
    c = tl.where(i[:, None] == j[None, :], 0.0, c)
    inside = (i < D)[:, None] & (j < D)[None, :]
    tl.store(c_ptr + i.to(tl.int64)[:, None] * D + j[None, :], c, mask=inside)
    square = c * c
    tl.store(row_squares_ptr + tile_j.to(tl.int64) * D + i, tl.sum(square, 1), mask=i < D)
    tl.store(column_squares_ptr + tile_i.to(tl.int64) * D + j, tl.sum(square, 0), mask=j < D)


@triton.jit
def primal_loss_kernel(
    stats_ptr, row_squares_ptr, column_squares_ptr, losses_ptr, D, tiles, lambd,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows 5 and 6 of stats (row and column sums of squares), and each block's part of the loss."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    row_squares = tl.zeros([BLOCK_D], tl.float32)
    column_squares = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(tiles):
        offsets = tl.cast(tile, tl.int64) * D + columns
        row_squares += tl.load(row_squares_ptr + offsets, mask=inside, other=0.0)
        column_squares += tl.load(column_squares_ptr + offsets, mask=inside, other=0.0)
    tl.store(stats_ptr + 5 * D + columns, row_squares, mask=inside)
    tl.store(stats_ptr + 6 * D + columns, column_squares, mask=inside)
    missing = tl.where(inside, 1.0 - _row(stats_ptr, 4, columns, D), 0.0)
    tl.store(losses_ptr + tl.program_id(0), tl.sum(missing * missing + lambd * row_squares, 0))


@triton.jit
def primal_backward_kernel(
    grad_loss_ptr, own_ptr, other_ptr, stats_ptr, c_ptr, grad_ptr, N, D, lambd,
    stride_own_n, stride_own_d, stride_other_n, stride_other_d, stride_ci, stride_cj,
    SIDE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient with respect to view SIDE (0: z_a, 1: z_b with C transposed)."""
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    pulled = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, D, DEPTH):
        j = start + tl.arange(0, DEPTH)
        mean = _row(stats_ptr, 1 - SIDE, j, D)
        scale = _row(stats_ptr, 3 - SIDE, j, D)
        other = _unit(other_ptr, n, j, stride_other_n, stride_other_d, mean, scale, N, D)
        offsets = i.to(tl.int64)[None, :] * stride_ci + j.to(tl.int64)[:, None] * stride_cj
        c = tl.load(c_ptr + offsets, mask=(i < D)[None, :] & (j < D)[:, None], other=0.0)
        pulled = tl.dot(other, c, pulled, input_precision=PRECISION)
    own_mean = _row(stats_ptr, SIDE, i, D)
    own_scale = _row(stats_ptr, 2 + SIDE, i, D)
    other_mean = _row(stats_ptr, 1 - SIDE, i, D)
    other_scale = _row(stats_ptr, 3 - SIDE, i, D)
    own = _unit(own_ptr, n, i, stride_own_n, stride_own_d, own_mean, own_scale, N, D)
    other = _unit(other_ptr, n, i, stride_other_n, stride_other_d, other_mean, other_scale, N, D)
    c = _row(stats_ptr, 4, i, D)
    g = 2.0 * (c - 1.0)
    s = 2.0 * lambd * _row(stats_ptr, 5 + SIDE, i, D) + g * c
    factor = own_scale * tl.load(grad_loss_ptr).to(tl.float32)
    grad = (2.0 * lambd * pulled + other * g[None, :] - own * s[None, :]) * factor[None, :]
    inside = (n < N)[:, None] & (i < D)[None, :]
    tl.store(grad_ptr + n.to(tl.int64)[:, None] * D + i[None, :], grad, mask=inside)


# ---- Gram form


@triton.jit
def gram_kernel(
    z_ptr, stats_ptr, parts_ptr, N, D, share, stride_n, stride_d,
    SIDE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of A A^T (SIDE 0) or B B^T over one share of the columns: parts [shares, 2, N, N]."""
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    first = tl.program_id(2) * share
    gram = tl.zeros([TILE, TILE], tl.float32)
    for start in range(first, tl.minimum(first + share, D), DEPTH):
        columns = start + tl.arange(0, DEPTH)
        mean = _row(stats_ptr, SIDE, columns, D)
        scale = _row(stats_ptr, 2 + SIDE, columns, D)
        left = _unit(z_ptr, n, columns, stride_n, stride_d, mean, scale, N, D)
        right = _unit(z_ptr, m, columns, stride_n, stride_d, mean, scale, N, D)
        gram = tl.dot(left, tl.trans(right), gram, input_precision=PRECISION)
    base = (tl.program_id(2) * 2 + SIDE).to(tl.int64) * N * N
    offsets = base + n.to(tl.int64)[:, None] * N + m[None, :]
    tl.store(parts_ptr + offsets, gram, mask=(n < N)[:, None] & (m < N)[None, :])


@triton.jit
def gram_pull_kernel(
    own_ptr, stats_ptr, product_ptr, pulled_ptr, squares_ptr, N, D,
    stride_own_n, stride_own_d,
    SIDE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of (B B^T) A (SIDE 0) or (A A^T) B, and what it adds to the sums of squares of C.

    squares [tiles, D]: for each tile of rows, the column sums of own * pulled.
    """
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mean = _row(stats_ptr, SIDE, i, D)
    scale = _row(stats_ptr, 2 + SIDE, i, D)
    pulled = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, N, DEPTH):
        m = start + tl.arange(0, DEPTH)
        offsets = n.to(tl.int64)[:, None] * N + m[None, :]
        product = tl.load(product_ptr + offsets, mask=(n < N)[:, None] & (m < N)[None, :], other=0.0)
        own = _unit(own_ptr, m, i, stride_own_n, stride_own_d, mean, scale, N, D)
        pulled = tl.dot(product, own, pulled, input_precision=PRECISION)
    own = _unit(own_ptr, n, i, stride_own_n, stride_own_d, mean, scale, N, D)
    inside = (n < N)[:, None] & (i < D)[None, :]
    tl.store(pulled_ptr + n.to(tl.int64)[:, None] * D + i[None, :], pulled, mask=inside)
    squares = tl.sum(tl.where(inside, own * pulled, 0.0), 0)
    tl.store(squares_ptr + tl.program_id(1).to(tl.int64) * D + i, squares, mask=i < D)


@triton.jit
def gram_backward_kernel(
    grad_loss_ptr, own_ptr, other_ptr, stats_ptr, pulled_ptr, squares_ptr, grad_ptr, N, D, tiles, lambd,
    stride_own_n, stride_own_d, stride_other_n, stride_other_d,
    SIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of the gradient with respect to view SIDE from what gram_pull_kernel left."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    squares = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(tiles):
        squares += tl.load(squares_ptr + tl.cast(tile, tl.int64) * D + i, mask=i < D, other=0.0)
    own_mean = _row(stats_ptr, SIDE, i, D)
    own_scale = _row(stats_ptr, 2 + SIDE, i, D)
    other_mean = _row(stats_ptr, 1 - SIDE, i, D)
    other_scale = _row(stats_ptr, 3 - SIDE, i, D)
    own = _unit(own_ptr, n, i, stride_own_n, stride_own_d, own_mean, own_scale, N, D)
    other = _unit(other_ptr, n, i, stride_other_n, stride_other_d, other_mean, other_scale, N, D)
    c = _row(stats_ptr, 4, i, D)
    g = 2.0 * (c - 1.0) - 2.0 * lambd * c
    s = 2.0 * lambd * squares + g * c
    inside = (n < N)[:, None] & (i < D)[None, :]
    offsets = n.to(tl.int64)[:, None] * D + i[None, :]
    pulled = tl.load(pulled_ptr + offsets, mask=inside, other=0.0)
    factor = own_scale * tl.load(grad_loss_ptr).to(tl.float32)
    grad = (2.0 * lambd * pulled + other * g[None, :] - own * s[None, :]) * factor[None, :]
    tl.store(grad_ptr + offsets, grad, mask=inside)


# ---- launchers, with the schemas of the ops


def forward(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, gram: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See barlow_twins.py; tensors that a kernel fills are left uninitialised before."""
    n, d = z_a.shape
    strides = (*z_a.stride(), *z_b.stride())
    tiling = _tiling(precision, z_a, z_b)
    stats = z_a.new_empty((5 if gram else 7, d), dtype=torch.float32)
    if d == 0:
        return stats.new_zeros(()), stats, stats.new_empty((2, n, n) if gram else (1, d, d))
    block_d = min(TILE, max(16, triton.next_power_of_2(d // _FILL)))
    statistics_kernel[(triton.cdiv(d, block_d),)](
        z_a, z_b, stats, n, d, eps, *strides, BLOCK_N=4096 // block_d, BLOCK_D=block_d
    )
    if gram:
        tiles, depth = triton.cdiv(n, TILE), tiling["DEPTH"]
        shares = max(1, min(triton.cdiv(d, 4 * depth), _FILL // (tiles * tiles)))
        share = depth * triton.cdiv(d, depth * shares)
        shares = triton.cdiv(d, share)
        parts = stats.new_empty((shares, 2, n, n))
        for side, z in enumerate((z_a, z_b)):
            gram_kernel[(tiles, tiles, shares)](
                z, stats, parts, n, d, share, *z.stride(), SIDE=side, **tiling
            )
        products = parts.sum(0) if shares > 1 else parts[0]
        c = stats[4]
        off_diagonal = torch.dot(products[0].flatten(), products[1].flatten()) - torch.dot(c, c)
        return (1 - c).square().sum() + lambd * off_diagonal, stats, products
    tiles = triton.cdiv(d, TILE)
    products = stats.new_empty((1, d, d))
    row_squares, column_squares = stats.new_empty((2, tiles, d))
    correlation_kernel[(tiles, tiles)](
        z_a, z_b, stats, products, row_squares, column_squares, n, d, *strides, **tiling
    )
    losses = stats.new_empty(tiles)
    primal_loss_kernel[(tiles,)](stats, row_squares, column_squares, losses, d, tiles, lambd, BLOCK_D=TILE)
    return losses.sum(), stats, products


def backward(
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
    """See barlow_twins.py."""
    one_side = _gram_gradient if gram else _primal_gradient
    tiling = _tiling(precision, z_a, z_b)
    return (
        one_side(0, grad_loss, z_a, z_b, stats, products, lambd, tiling) if need_a else z_a.new_empty(0),
        one_side(1, grad_loss, z_b, z_a, stats, products, lambd, tiling) if need_b else z_b.new_empty(0),
    )


def _primal_gradient(
    side: int,
    grad_loss: Tensor,
    own: Tensor,
    other: Tensor,
    stats: Tensor,
    products: Tensor,
    lambd: float,
    tiling: dict[str, Any],
) -> Tensor:
    n, d = own.shape
    grad = own.new_empty((n, d))
    if grad.numel() == 0:
        return grad
    stride_ci, stride_cj = (1, d) if side else (d, 1)
    primal_backward_kernel[(triton.cdiv(d, TILE), triton.cdiv(n, TILE))](
        grad_loss, own, other, stats, products, grad, n, d, lambd,
        *own.stride(), *other.stride(), stride_ci, stride_cj, SIDE=side, **tiling,
    )  # fmt: skip
    return grad


def _gram_gradient(
    side: int,
    grad_loss: Tensor,
    own: Tensor,
    other: Tensor,
    stats: Tensor,
    products: Tensor,
    lambd: float,
    tiling: dict[str, Any],
) -> Tensor:
    n, d = own.shape
    grad = own.new_empty((n, d))
    if grad.numel() == 0:
        return grad
    tiles = triton.cdiv(n, TILE)
    pulled = grad if grad.dtype == torch.float32 else stats.new_empty((n, d))
    squares = stats.new_empty((tiles, d))
    grid = (triton.cdiv(d, TILE), tiles)
    gram_pull_kernel[grid](
        own, stats, products[1 - side], pulled, squares, n, d, *own.stride(), SIDE=side, **tiling
    )
    gram_backward_kernel[grid](
        grad_loss, own, other, stats, pulled, squares, grad, n, d, tiles, lambd,
        *own.stride(), *other.stride(), SIDE=side, BLOCK_N=TILE, BLOCK_D=TILE, num_warps=WARPS,
    )  # fmt: skip
    return grad


def _tiling(precision: str, *views: Tensor) -> dict[str, Any]:
    """Launch settings; TF32 is finer than the rounding of float16 and bfloat16 views themselves."""
    if all(z.dtype in (torch.float16, torch.bfloat16) for z in views):
        precision = "tf32"
    return {"PRECISION": precision, "TILE": TILE, "num_warps": WARPS, **TILING[precision]}
