"""What the Barlow Twins kernels of both forms share; see _barlow_twins_cuda.py."""

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
FILL = 264


@triton.jit
def unit(z_ptr, rows, columns, stride_n, stride_d, mean, scale, N, D):
    """Tile [rows, columns] of A or B in float32, 0 outside; mean, scale: of `columns`."""
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, (z - mean[None, :]) * scale[None, :], 0.0)


@triton.jit
def row(stats_ptr, row, columns, D):
    """Row `row` of stats at `columns`, 0 outside."""
    return tl.load(stats_ptr + row * D + columns, mask=columns < D, other=0.0)


@triton.jit
def add_up(part, parts_ptr, finished_ptr, loss_ptr, BLOCK: tl.constexpr):
    """The last program to come here writes the sum of all programs' `part` to loss, in one order always.

    parts [programs]; finished: how many programs have been here, 0 before.
    """
    programs = tl.num_programs(0)
    tl.store(parts_ptr + tl.program_id(0), part)
    # All threads' stores come before the count goes up, and the count before what is read below.
    tl.debug_barrier()
    before = tl.atomic_add(finished_ptr, 1, sem="acq_rel", scope="gpu")
    if before == programs - 1:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, programs, BLOCK):
            places = start + tl.arange(0, BLOCK)
            # Past the first cache, where other multiprocessors' stores do not show.
            total += tl.load(parts_ptr + places, mask=places < programs, other=0.0, cache_modifier=".cg")
        tl.store(loss_ptr, tl.sum(total, 0))


def choose_tiling(precision: str, *views: Tensor) -> dict[str, Any]:
    """Launch settings; TF32 is finer than the rounding of float16 and bfloat16 views themselves."""
    if all(z.dtype in (torch.float16, torch.bfloat16) for z in views):
        precision = "tf32"
    return {"PRECISION": precision, "TILE": TILE, "num_warps": WARPS, **TILING[precision]}
