"""The Barlow Twins ops as Triton kernels: normalisation is folded into every product.

Shapes and meanings as in barlow_twins.py: views z_a, z_b [N, D] with any strides, stats [5 or 7, D].
Kernels make tiles of A and B from z, mean and scale as they read them, so no normalised copy exists.
They stand in the order in which they are launched: three forward and one backward in the primal form, three
and two in the Gram form, as both views are in one grid. Sums over tiles go through buffers and not through
atomics, and the last program to finish adds up the loss: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dau_fast.ops._barlow_twins_gram_cuda import backward_gram, forward_gram
from dau_fast.ops._barlow_twins_large_cuda import choose_product, is_large
from dau_fast.ops._barlow_twins_op import backward_by, forward_by
from dau_fast.ops._barlow_twins_parts_cuda import FILL, TILE, add_up, choose_tiling, row, unit

# ---- both forms: statistics of the columns


@triton.jit
def statistics_kernel(
    a_ptr, b_ptr, stats_ptr, finished_ptr, N, D, eps,
    stride_an, stride_ad, stride_bn, stride_bd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows 0 to 4 of stats (mean_a, mean_b, scale_a, scale_b, c) for BLOCK_D columns, in two passes.

    finished: becomes 0, for `add_up`.
    """
    tl.store(finished_ptr, 0, mask=tl.program_id(0) == 0)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    zero = tl.zeros([BLOCK_D], tl.float32)
    one = zero + 1.0
    sum_a = zero
    sum_b = zero
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        sum_a += tl.sum(unit(a_ptr, rows, columns, stride_an, stride_ad, zero, one, N, D), 0)
        sum_b += tl.sum(unit(b_ptr, rows, columns, stride_bn, stride_bd, zero, one, N, D), 0)
    mean_a = sum_a / N
    mean_b = sum_b / N
    square_a = zero
    square_b = zero
    product = zero
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        a = unit(a_ptr, rows, columns, stride_an, stride_ad, mean_a, one, N, D)
        b = unit(b_ptr, rows, columns, stride_bn, stride_bd, mean_b, one, N, D)
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
    mean_a = row(stats_ptr, 0, i, D)
    mean_b = row(stats_ptr, 1, j, D)
    scale_a = row(stats_ptr, 2, i, D)
    scale_b = row(stats_ptr, 3, j, D)
    c = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, N, DEPTH):
        n = start + tl.arange(0, DEPTH)
        a = unit(a_ptr, n, i, stride_an, stride_ad, mean_a, scale_a, N, D)
        b = unit(b_ptr, n, j, stride_bn, stride_bd, mean_b, scale_b, N, D)
        c = tl.dot(tl.trans(a), b, c, input_precision=PRECISION)
    c = tl.where(i[:, None] == j[None, :], 0.0, c)
    inside = (i < D)[:, None] & (j < D)[None, :]
    tl.store(c_ptr + i.to(tl.int64)[:, None] * D + j[None, :], c, mask=inside)
    square = c * c
    tl.store(row_squares_ptr + tile_j.to(tl.int64) * D + i, tl.sum(square, 1), mask=i < D)
    tl.store(column_squares_ptr + tile_i.to(tl.int64) * D + j, tl.sum(square, 0), mask=j < D)


@triton.jit
def primal_loss_kernel(
    stats_ptr, row_squares_ptr, column_squares_ptr, parts_ptr, finished_ptr, loss_ptr, D, tiles, lambd,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows 5 and 6 of stats (row and column sums of squares), and the loss."""
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
    missing = tl.where(inside, 1.0 - row(stats_ptr, 4, columns, D), 0.0)
    part = tl.sum(missing * missing + lambd * row_squares, 0)
    add_up(part, parts_ptr, finished_ptr, loss_ptr, BLOCK_D)


@triton.jit
def _primal_gradient(
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
        mean = row(stats_ptr, 1 - SIDE, j, D)
        scale = row(stats_ptr, 3 - SIDE, j, D)
        other = unit(other_ptr, n, j, stride_other_n, stride_other_d, mean, scale, N, D)
        offsets = i.to(tl.int64)[None, :] * stride_ci + j.to(tl.int64)[:, None] * stride_cj
        c = tl.load(c_ptr + offsets, mask=(i < D)[None, :] & (j < D)[:, None], other=0.0)
        pulled = tl.dot(other, c, pulled, input_precision=PRECISION)
    own_mean = row(stats_ptr, SIDE, i, D)
    own_scale = row(stats_ptr, 2 + SIDE, i, D)
    other_mean = row(stats_ptr, 1 - SIDE, i, D)
    other_scale = row(stats_ptr, 3 - SIDE, i, D)
    own = unit(own_ptr, n, i, stride_own_n, stride_own_d, own_mean, own_scale, N, D)
    other = unit(other_ptr, n, i, stride_other_n, stride_other_d, other_mean, other_scale, N, D)
    c = row(stats_ptr, 4, i, D)
    g = 2.0 * (c - 1.0)
    s = 2.0 * lambd * row(stats_ptr, 5 + SIDE, i, D) + g * c
    factor = own_scale * tl.load(grad_loss_ptr).to(tl.float32)
    grad = (2.0 * lambd * pulled + other * g[None, :] - own * s[None, :]) * factor[None, :]
    inside = (n < N)[:, None] & (i < D)[None, :]
    tl.store(grad_ptr + n.to(tl.int64)[:, None] * D + i[None, :], grad, mask=inside)


@triton.jit
def primal_backward_kernel(
    grad_loss_ptr, a_ptr, b_ptr, stats_ptr, c_ptr, grad_a_ptr, grad_b_ptr, N, D, lambd, first,
    stride_an, stride_ad, stride_bn, stride_bd,
    PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of a view: that of z_a in the grid's layer 0 - first, of z_b in the next."""
    if tl.program_id(2) + first == 0:
        _primal_gradient(
            grad_loss_ptr, a_ptr, b_ptr, stats_ptr, c_ptr, grad_a_ptr, N, D, lambd,
            stride_an, stride_ad, stride_bn, stride_bd, D, 1, 0, PRECISION, TILE, DEPTH,
        )  # fmt: skip
    else:
        _primal_gradient(
            grad_loss_ptr, b_ptr, a_ptr, stats_ptr, c_ptr, grad_b_ptr, N, D, lambd,
            stride_bn, stride_bd, stride_an, stride_ad, 1, D, 1, PRECISION, TILE, DEPTH,
        )  # fmt: skip


# ---- launchers, with the schemas of the ops


def forward(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, gram: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See barlow_twins.py; tensors that a kernel fills are left uninitialised before."""
    n, d = z_a.shape
    if is_large(n, d, gram):
        return forward_by(choose_product(precision, z_a, z_b), z_a, z_b, lambd, eps, gram, precision)
    strides = (*z_a.stride(), *z_b.stride())
    tiling = choose_tiling(precision, z_a, z_b)
    stats = z_a.new_empty((5 if gram else 7, d), dtype=torch.float32)
    products = stats.new_empty((2, n, n) if gram else (1, d, d))
    if d == 0:
        return stats.new_zeros(()), stats, products
    loss, finished = stats.new_empty(()), stats.new_empty(1, dtype=torch.int32)
    block_d = min(TILE, max(16, triton.next_power_of_2(d // FILL)))
    statistics_kernel[(triton.cdiv(d, block_d),)](
        z_a, z_b, stats, finished, n, d, eps, *strides, BLOCK_N=4096 // block_d, BLOCK_D=block_d
    )
    if gram:
        forward_gram(z_a, z_b, stats, products, finished, loss, lambd, tiling)
        return loss, stats, products
    tiles = triton.cdiv(d, TILE)
    row_squares, column_squares = stats.new_empty((2, tiles, d))
    correlation_kernel[(tiles, tiles)](
        z_a, z_b, stats, products, row_squares, column_squares, n, d, *strides, **tiling
    )
    primal_loss_kernel[(tiles,)](
        stats, row_squares, column_squares, stats.new_empty(tiles), finished, loss, d, tiles, lambd,
        BLOCK_D=TILE,
    )  # fmt: skip
    return loss, stats, products


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
    n, d = z_a.shape
    if is_large(n, d, gram):
        return backward_by(
            choose_product(precision, z_a, z_b), grad_loss, z_a, z_b, stats, products, lambd, gram, precision,
            need_a, need_b,
        )  # fmt: skip
    # Layers of the grid: a view each, the first of which is z_a or, where that needs none, z_b.
    sides, first = need_a + need_b, int(not need_a)
    grads = z_a.new_empty((n, d) if need_a else 0), z_b.new_empty((n, d) if need_b else 0)
    if not sides or n * d == 0:
        return grads
    tiling = choose_tiling(precision, z_a, z_b)
    grid = (triton.cdiv(d, TILE), triton.cdiv(n, TILE), sides)
    if gram:
        backward_gram(grid, grad_loss, z_a, z_b, stats, products, grads, lambd, first, tiling)
        return grads
    primal_backward_kernel[grid](
        grad_loss, z_a, z_b, stats, products, *grads, n, d, lambd, first, *z_a.stride(), *z_b.stride(),
        **tiling,
    )  # fmt: skip
    return grads
