"""The Gram form of per-sample gradient norms as a Triton kernel: no T x T array in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dau_fast.ops._tiles_cuda import upper_tile

TILE = 64  # positions along each side of a tile
DEPTH = 32  # what a product takes at a time
WARPS = 8


@triton.jit
def _gram_tile(
    z_ptr, t, u, T, depth, stride_d, stride_t, PRECISION: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Tile [t, u] of Z^T Z for Z [depth, T] at z_ptr."""
    gram = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, depth, DEPTH):
        d = start + tl.arange(0, DEPTH)
        at_d = d.to(tl.int64)[:, None] * stride_d
        inside = (d < depth)[:, None]
        left = tl.load(
            z_ptr + at_d + t.to(tl.int64)[None, :] * stride_t, mask=inside & (t < T)[None, :], other=0.0
        )
        right = tl.load(
            z_ptr + at_d + u.to(tl.int64)[None, :] * stride_t, mask=inside & (u < T)[None, :], other=0.0
        )
        gram = tl.dot(tl.trans(left.to(tl.float32)), right.to(tl.float32), gram, input_precision=PRECISION)
    return gram


@triton.jit
def gram_kernel(
    x_ptr, g_ptr, parts_ptr, T, d, p, groups, tiles, halves,
    stride_xb, stride_xg, stride_xd, stride_xt, stride_gb, stride_gg, stride_gp, stride_gt,
    PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """What one tile of positions [t, u] adds to sum_tu (x_t . x_u)(g_t . g_u): parts [B groups, halves].

    Both products are symmetric: tiles above the diagonal add twice, and the `halves` on and above it are all.
    """
    unit = tl.program_id(0) // halves
    row, column = upper_tile(tl.program_id(0) % halves, tiles)
    sample = (unit // groups).to(tl.int64)
    group = (unit % groups).to(tl.int64)
    t = row * TILE + tl.arange(0, TILE)
    u = column * TILE + tl.arange(0, TILE)
    x = x_ptr + sample * stride_xb + group * stride_xg
    g = g_ptr + sample * stride_gb + group * stride_gg
    of_x = _gram_tile(x, t, u, T, d, stride_xd, stride_xt, PRECISION, TILE, DEPTH)
    of_g = _gram_tile(g, t, u, T, p, stride_gp, stride_gt, PRECISION, TILE, DEPTH)
    total = tl.sum(of_x * of_g)
    tl.store(parts_ptr + tl.program_id(0), tl.where(column > row, 2.0 * total, total))


def gram_squares(x: Tensor, g: Tensor) -> Tensor:
    """sum_tu (x_t . x_u)(g_t . g_u), summed over groups, [B]; x [B, G, d, T], g [B, G, p, T]."""
    batch, groups, d, positions = x.shape
    tiles = triton.cdiv(positions, TILE)
    halves = tiles * (tiles + 1) // 2
    parts = x.new_empty((batch, groups * halves), dtype=torch.float32)
    if parts.numel():
        # Half-precision numbers are exact in TF32; float32 takes three such products.
        half = all(z.dtype in (torch.float16, torch.bfloat16) for z in (x, g))
        # On one axis: the others end at 65,535.
        gram_kernel[(batch * groups * halves,)](
            x, g, parts, positions, d, g.shape[2], groups, tiles, halves, *x.stride(), *g.stride(),
            PRECISION="tf32" if half else "tf32x3", TILE=TILE, DEPTH=DEPTH, num_warps=WARPS,
        )  # fmt: skip
    return parts.sum(1)
