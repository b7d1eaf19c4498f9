"""BatchNorm of a batch by its own statistics as Triton kernels, with what follows it: an addition, a ReLU.

Images in channels_last are a matrix of R rows, one a pixel, and C columns, one a channel. A column's sums
are taken by programs that each add up some of its rows and leave a part; one small launch joins the parts
and writes what the last launch then needs of every column. So x is read twice and y written once, and back x
and the gradient are read twice and a gradient written once, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, SUMMED = 128, 64  # of a tile, where it is written and where it is added up
COLUMNS = 64  # of a tile, at most
WARPS = 8
FILL = 264  # programs that keep every multiprocessor of a large GPU busy
# What joins parts takes so many columns: their number is small where there are many parts.
JOINED, JOIN_WARPS = 8, 4


@triton.jit
def _tile(first, R, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets in a matrix [R, C] from row `first` on in the columns of this program, and which are inside."""
    rows = first + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
    return offsets, (rows < R)[:, None] & (columns < C)[None, :]


@triton.jit
def _column(values_ptr, row, C, COLUMNS: tl.constexpr):
    """Row `row` of a matrix [..., C] in the columns of this program, as [1, COLUMNS]."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return tl.load(values_ptr + row * C + columns, mask=columns < C, other=0.0)[None, :]


@triton.jit
def _line(x, lines_ptr, C, COLUMNS: tl.constexpr):
    """What BatchNorm makes of a tile x."""
    away = x - _column(lines_ptr, 2, C, COLUMNS)
    return away * _column(lines_ptr, 0, C, COLUMNS) + _column(lines_ptr, 1, C, COLUMNS)


@triton.jit
def _gradient(
    grad_ptr, x, y_ptr, offsets, inside, lines_ptr, C, relu, added, COLUMNS: tl.constexpr
):  # fmt: skip
    """What comes back to the normalised numbers of a tile: nothing where the ReLU let nothing through.

    That is seen in y where something was added before it, and else in the numbers that it was given.
    """
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    through = _line(x, lines_ptr, C, COLUMNS)
    seen = tl.load(y_ptr + offsets, mask=inside & (added != 0), other=0.0).to(tl.float32)
    through = tl.where(added != 0, seen, through)
    # Written so that NaN lets through, as it does in PyTorch.
    return tl.where((relu != 0) & (through <= 0), 0.0, grad)


@triton.jit(do_not_specialize=["share"])
def moments_kernel(
    x_ptr, parts_ptr, R, C, share, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """parts [2, P, C]: of `share` rows each, their mean and the sum of squares of what they differ from it.

    Numbers are added up less the part's first one: a sum of squares would lose what they differ by.
    """
    part = tl.program_id(0)
    first = part * share
    last = tl.minimum(first + share, R)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    pivot = tl.load(x_ptr + first.to(tl.int64) * C + columns, mask=columns < C, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        offsets, inside = _tile(start, last, C, ROWS, COLUMNS)
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(inside, x - pivot[None, :], 0.0)
        total += apart
        squares += apart * apart
    count = (last - first).to(tl.float32)
    away = tl.sum(total, 0) / count
    spread = tl.maximum(tl.sum(squares, 0) - count * away * away, 0.0)
    place = parts_ptr + part * C + columns
    tl.store(place, pivot + away, mask=columns < C)
    tl.store(place + tl.num_programs(0) * C, spread, mask=columns < C)


@triton.jit(do_not_specialize=["share", "parts", "momentum", "eps", "tracked", "counted"])
def batch_statistics_kernel(
    parts_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, count_ptr, lines_ptr, R, C, share,
    parts, momentum, eps, tracked, counted, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """lines [4, C]: slope, bias, mean and 1 / standard deviation; running ones move, and count goes up."""
    part = tl.arange(0, PARTS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = columns < C
    inside = (part < parts)[:, None] & known[None, :]
    place = parts_ptr + part[:, None] * C + columns[None, :]
    means = tl.load(place, mask=inside, other=0.0)
    spreads = tl.load(place + parts * C, mask=inside, other=0.0)
    counts = tl.maximum(tl.minimum(R - part * share, share), 0).to(tl.float32)[:, None]
    # As parts are nearly as large as one another, the mean of their means is near the mean.
    middle = tl.sum(means, 0) / parts
    mean = middle + tl.sum(tl.where(inside, counts * (means - middle[None, :]), 0.0), 0) / R
    apart = tl.where(inside, means - mean[None, :], 0.0)
    squares = tl.sum(spreads + counts * apart * apart, 0)
    scale = 1.0 / tl.sqrt_rn(squares / R + eps)
    slope = scale * tl.load(weight_ptr + columns, mask=known, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=known, other=0.0)
    tl.store(lines_ptr + columns, slope, mask=known)
    tl.store(lines_ptr + C + columns, bias, mask=known)
    tl.store(lines_ptr + 2 * C + columns, mean, mask=known)
    tl.store(lines_ptr + 3 * C + columns, scale, mask=known)
    kept = known & (tracked != 0)
    before = tl.load(running_mean_ptr + columns, mask=kept, other=0.0)
    tl.store(running_mean_ptr + columns, before + momentum * (mean - before), mask=kept)
    before = tl.load(running_var_ptr + columns, mask=kept, other=0.0)
    first = (tl.program_id(0) == 0) & (counted != 0)
    tl.store(count_ptr, tl.load(count_ptr, mask=first, other=0) + 1, mask=first)
    unbiased = squares / tl.maximum(R - 1, 1)
    tl.store(running_var_ptr + columns, before + momentum * (unbiased - before), mask=kept)


@triton.jit(do_not_specialize=["relu", "added"])
def normalise_kernel(
    x_ptr, more_ptr, y_ptr, lines_ptr, R, C, relu, added, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """y [R, C] = slope (x - mean) + bias, plus `more` where `added`; 0 where that is negative with `relu`."""
    offsets, inside = _tile(tl.program_id(0) * ROWS, R, C, ROWS, COLUMNS)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = _line(x, lines_ptr, C, COLUMNS)
    y += tl.load(more_ptr + offsets, mask=inside & (added != 0), other=0.0).to(tl.float32)
    # Written so that NaN stays.
    y = tl.where((relu != 0) & (y < 0), 0.0, y)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["share", "relu", "added"])
def sums_kernel(
    grad_ptr, x_ptr, y_ptr, lines_ptr, parts_ptr, R, C, share, relu, added, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """parts [2, P, C]: of `share` rows each, sums of the gradient and of it times the normalised x."""
    part = tl.program_id(0)
    first = part * share
    last = tl.minimum(first + share, R)
    mean = _column(lines_ptr, 2, C, COLUMNS)
    scale = _column(lines_ptr, 3, C, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    weighed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        offsets, inside = _tile(start, last, C, ROWS, COLUMNS)
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = _gradient(grad_ptr, x, y_ptr, offsets, inside, lines_ptr, C, relu, added, COLUMNS)
        total += grad
        weighed += tl.where(inside, grad * ((x - mean) * scale), 0.0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = parts_ptr + part * C + columns
    tl.store(place, tl.sum(total, 0), mask=columns < C)
    tl.store(place + tl.num_programs(0) * C, tl.sum(weighed, 0), mask=columns < C)


@triton.jit(do_not_specialize=["parts"])
def join_kernel(parts_ptr, sums_ptr, C, parts, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums [2, C] of parts [2, P, C]."""
    part = tl.arange(0, PARTS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (part < parts)[:, None] & (columns < C)[None, :]
    for which in range(2):
        place = parts_ptr + (which * parts + part[:, None]) * C + columns[None, :]
        total = tl.sum(tl.load(place, mask=inside, other=0.0), 0)
        tl.store(sums_ptr + which * C + columns, total, mask=columns < C)


@triton.jit(do_not_specialize=["relu", "added"])
def gradients_kernel(
    grad_ptr, x_ptr, y_ptr, lines_ptr, sums_ptr, of_x_ptr, of_more_ptr, R, C, relu, added,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of x and, where `added`, of what was."""
    offsets, inside = _tile(tl.program_id(0) * ROWS, R, C, ROWS, COLUMNS)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = _gradient(grad_ptr, x, y_ptr, offsets, inside, lines_ptr, C, relu, added, COLUMNS)
    tl.store(of_more_ptr + offsets, grad.to(of_more_ptr.dtype.element_ty), mask=inside & (added != 0))
    unit = (x - _column(lines_ptr, 2, C, COLUMNS)) * _column(lines_ptr, 3, C, COLUMNS)
    shift = _column(sums_ptr, 0, C, COLUMNS) / R
    tilt = _column(sums_ptr, 1, C, COLUMNS) / R
    of_x = (grad - shift - unit * tilt) * _column(lines_ptr, 0, C, COLUMNS)
    tl.store(of_x_ptr + offsets, of_x.to(of_x_ptr.dtype.element_ty), mask=inside)


# ---- launchers; see batch_norm.py


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    more: Tensor | None,
    relu: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y like x, and lines [4, C]."""
    rows, columns = _sizes(x)
    y, lines = _like(x), x.new_empty((4, columns), dtype=torch.float32)
    width, parts, share = _share(rows, columns)
    found = x.new_empty((2, parts, columns), dtype=torch.float32)
    moments_kernel[parts, triton.cdiv(columns, width)](
        x, found, rows, columns, share, ROWS=SUMMED, COLUMNS=width, num_warps=WARPS
    )
    kept = [lines if one is None else one for one in (running_mean, running_var, batches)]
    batch_statistics_kernel[(triton.cdiv(columns, JOINED),)](
        found, weight, bias, *kept,
        lines, rows, columns, share, parts, momentum, eps, int(running_mean is not None),
        int(batches is not None), PARTS=_room(parts), COLUMNS=JOINED, num_warps=JOIN_WARPS,
    )  # fmt: skip
    normalise_kernel[triton.cdiv(rows, ROWS), triton.cdiv(columns, width)](
        x, x if more is None else more, y, lines, rows, columns, int(relu), int(more is not None), ROWS=ROWS,
        COLUMNS=width, num_warps=WARPS,
    )  # fmt: skip
    return y, lines


def batch_norm_backward(
    grad: Tensor, x: Tensor, y: Tensor, lines: Tensor, relu: bool, added: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of what was added, like x, and sums [2, C]: gradients of bias and weight."""
    rows, columns = _sizes(x)
    of_x, sums = _like(x), lines.new_empty((2, columns))
    of_more = _like(x) if added else x.new_empty(0)
    width, parts, share = _share(rows, columns)
    found = lines.new_empty((2, parts, columns))
    how = int(relu), int(added)
    sums_kernel[parts, triton.cdiv(columns, width)](
        grad, x, y, lines, found, rows, columns, share, *how, ROWS=SUMMED, COLUMNS=width, num_warps=WARPS
    )
    join_kernel[(triton.cdiv(columns, JOINED),)](
        found, sums, columns, parts, PARTS=_room(parts), COLUMNS=JOINED, num_warps=JOIN_WARPS
    )
    gradients_kernel[triton.cdiv(rows, ROWS), triton.cdiv(columns, width)](
        grad, x, y, lines, sums, of_x, of_more if added else of_x, rows, columns, *how, ROWS=ROWS,
        COLUMNS=width, num_warps=WARPS,
    )  # fmt: skip
    return of_x, of_more, sums


def _like(x: Tensor) -> Tensor:
    """Memory for [B, C, H, W] in channels_last."""
    _, channels, height, width = x.shape
    # Of its own, and no view of what is: autograd lets nobody change such a result in place.
    return x.new_empty_strided(x.shape, (channels * height * width, 1, channels * width, channels))


def _sizes(x: Tensor) -> tuple[int, int]:
    """Rows and columns of x [B, C, H, W] in channels_last."""
    return x.numel() // x.shape[1], x.shape[1]


def _share(rows: int, columns: int) -> tuple[int, int, int]:
    """Columns of a tile, programs that share the rows of these, and the rows of each, none of them 0."""
    width = min(COLUMNS, max(16, triton.next_power_of_2(columns)))
    tiles = triton.cdiv(rows, SUMMED)
    programs = max(1, min(tiles, FILL // triton.cdiv(columns, width)))
    share = SUMMED * triton.cdiv(tiles, programs)
    return width, triton.cdiv(rows, share), share


def _room(parts: int) -> int:
    """A power of 2 that holds `parts`: few values, as each is a build."""
    return 64 if parts <= 64 else 512
