"""The sensitivity ops as Triton kernels: logits and features are read once in each direction.

Shapes and meanings as in sensitivity.py: logits [B, C], features [B, D] with any strides, stats [5, B].
Up to `NARROW` classes a program holds whole rows. Wider rows are cut into shares of `SHARE` logits, each
held by one program; what they leave is put together a row at a time. Grids have one axis, as the others end
at 65,535. Kernels stand in the order in which they are launched.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NARROW = 4096  # classes that one program holds
SHARE = 4096  # logits of a wider row that one program holds
WIDTH = 512  # features that are read at a time
WARPS = 4
# Targets are checked by the kernel itself, as a launch of its own would cost more than the op.
CHECKS = {"debug": True, "sanitize_overflow": False}


@triton.jit
def _row_lengths(h_ptr, rows, stride_hb, stride_hd, B, D, BIAS: tl.constexpr, WIDTH: tl.constexpr):
    """sqrt(||h||^2 + 1) of `rows`."""
    squares = tl.zeros_like(rows).to(tl.float32)
    for start in range(0, D, WIDTH):
        d = start + tl.arange(0, WIDTH)
        inside = (rows < B)[:, None] & (d < D)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_hb + d.to(tl.int64)[None, :] * stride_hd
        h = tl.load(h_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(h * h, 1)
    return tl.sqrt(squares + 1.0 if BIAS else squares)


@triton.jit
def _put_together(others, squares, at_label):
    """Scale, rest and pull, from sums over exponentials and their squares without the label, and its own."""
    scale = 1.0 / (others + at_label)
    miss = others * scale
    squared = squares * scale * scale
    return scale, miss * at_label * scale - squared, tl.sqrt(squared + miss * miss)


@triton.jit
def _store_row(stats_ptr, rows, B, rest, pull, length, largest, scale):
    inside = rows < B
    tl.store(stats_ptr + rows, rest, mask=inside)
    tl.store(stats_ptr + B + rows, pull, mask=inside)
    tl.store(stats_ptr + 2 * B + rows, length, mask=inside)
    tl.store(stats_ptr + 3 * B + rows, largest, mask=inside)
    tl.store(stats_ptr + 4 * B + rows, scale, mask=inside)


@triton.jit
def _logits(z_ptr, rows, columns, stride_zb, stride_zc, B, C):
    """Tile [rows, columns] of the logits in float32, -inf outside."""
    inside = (rows < B)[:, None] & (columns < C)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_zb + columns.to(tl.int64)[None, :] * stride_zc
    return tl.load(z_ptr + offsets, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _checked_targets(targets_ptr, rows, stride_t, B, C):
    labels = tl.load(targets_ptr + rows.to(tl.int64) * stride_t, mask=rows < B, other=0)
    tl.device_assert((labels >= 0) & (labels < C), "a target is no class: expected 0 to C - 1")
    return labels


# ---- forward, rows of up to NARROW classes


@triton.jit
def forward_kernel(
    z_ptr, h_ptr, targets_ptr, shown_ptr, stats_ptr, predicted_ptr, B, C, D,
    stride_zb, stride_zc, stride_hb, stride_hd, stride_t,
    PREDICTED: tl.constexpr, BIAS: tl.constexpr, SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Everything of ROWS rows; shown [B], or [B, C + 1] with SOFTMAX."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_C)
    z = _logits(z_ptr, rows, columns, stride_zb, stride_zc, B, C)
    if PREDICTED:
        largest, labels = tl.max(z, 1, return_indices=True)
        tl.store(predicted_ptr + rows, labels.to(tl.int64), mask=rows < B)
    else:
        largest = tl.max(z, 1)
        labels = _checked_targets(targets_ptr, rows, stride_t, B, C)
    at_label = columns[None, :] == labels[:, None]
    e = tl.exp(z - largest[:, None])
    others = tl.where(at_label, 0.0, e)
    total = tl.sum(others, 1)
    own = tl.sum(tl.where(at_label, e, 0.0), 1)
    scale, rest, pull = _put_together(total, tl.sum(others * others, 1), own)
    length = _row_lengths(h_ptr, rows, stride_hb, stride_hd, B, D, BIAS, WIDTH)
    _store_row(stats_ptr, rows, B, rest, pull, length, largest, scale)
    if SOFTMAX:
        base = shown_ptr + rows.to(tl.int64) * (C + 1)
        inside = (rows < B)[:, None] & (columns < C)[None, :]
        tl.store(base[:, None] + columns[None, :], e * scale[:, None], mask=inside)
        tl.store(base + C, pull * length, mask=rows < B)
    else:
        tl.store(shown_ptr + rows, pull * length, mask=rows < B)


# ---- forward, wider rows


@triton.jit
def share_kernel(
    z_ptr, targets_ptr, parts_ptr, places_ptr, B, C, shares, stride_zb, stride_zc, stride_t,
    PREDICTED: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """One share of one row: parts [3, B, shares] are its largest logit and, over its other classes,
    the sums of e = exp(z - largest) and of e^2; "other" than the target, or than the share's own first
    largest, which places [B, shares] names.
    """
    row = tl.program_id(0) // shares + tl.arange(0, 1)
    share = tl.program_id(0) % shares
    columns = share * SHARE + tl.arange(0, SHARE)
    z = _logits(z_ptr, row, columns, stride_zb, stride_zc, B, C)
    place = row.to(tl.int64) * shares + share
    if PREDICTED:
        largest, first = tl.max(z, 1, return_indices=True)
        labels = first + share * SHARE
        tl.store(places_ptr + place, labels.to(tl.int64))
    else:
        largest = tl.max(z, 1)
        labels = tl.load(targets_ptr + row.to(tl.int64) * stride_t)
    # A share of -inf alone adds nothing; that the whole row is -inf shows when shares are put together.
    base = tl.where(largest == float("-inf"), 0.0, largest)
    e = tl.where(columns[None, :] == labels[:, None], 0.0, tl.exp(z - base[:, None]))
    size = tl.cast(B, tl.int64) * shares
    tl.store(parts_ptr + place, largest)
    tl.store(parts_ptr + size + place, tl.sum(e, 1))
    tl.store(parts_ptr + 2 * size + place, tl.sum(e * e, 1))


@triton.jit
def finish_kernel(
    z_ptr, h_ptr, targets_ptr, parts_ptr, places_ptr, shown_ptr, stats_ptr, predicted_ptr, B, C, D, shares,
    stride_zb, stride_zc, stride_hb, stride_hd, stride_t,
    PREDICTED: tl.constexpr, BIAS: tl.constexpr, SOFTMAX: tl.constexpr,
    SHARES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row from its shares; of `shown` the sensitivity alone."""
    row = tl.program_id(0) + tl.arange(0, 1)
    index = tl.arange(0, SHARES)
    place = row.to(tl.int64)[:, None] * shares + index[None, :]
    inside = (index < shares)[None, :]
    size = tl.cast(B, tl.int64) * shares
    own = tl.load(parts_ptr + place, mask=inside, other=float("-inf"))
    first = tl.load(parts_ptr + size + place, mask=inside, other=0.0)
    second = tl.load(parts_ptr + 2 * size + place, mask=inside, other=0.0)
    if PREDICTED:
        largest, winner = tl.max(own, 1, return_indices=True)
        ratio = tl.exp(own - largest[:, None])
        # A share that did not win left its own largest out of its sums; it is one of the others.
        loser = tl.where(index[None, :] == winner[:, None], 0.0, ratio)
        total = tl.sum(ratio * first + loser, 1)
        squares = tl.sum(ratio * ratio * second + loser * loser, 1)
        at_label = tl.exp(largest - largest)
        tl.store(predicted_ptr + row, tl.load(places_ptr + row.to(tl.int64) * shares + winner))
    else:
        largest = tl.max(own, 1)
        ratio = tl.exp(own - largest[:, None])
        total = tl.sum(ratio * first, 1)
        squares = tl.sum(ratio * ratio * second, 1)
        labels = _checked_targets(targets_ptr, row, stride_t, B, C)
        offsets = row.to(tl.int64) * stride_zb + labels.to(tl.int64) * stride_zc
        at_label = tl.exp(tl.load(z_ptr + offsets).to(tl.float32) - largest)
    scale, rest, pull = _put_together(total, squares, at_label)
    length = _row_lengths(h_ptr, row, stride_hb, stride_hd, B, D, BIAS, WIDTH)
    _store_row(stats_ptr, row, B, rest, pull, length, largest, scale)
    if SOFTMAX:
        tl.store(shown_ptr + row.to(tl.int64) * (C + 1) + C, pull * length)
    else:
        tl.store(shown_ptr + row, pull * length)


@triton.jit
def softmax_kernel(z_ptr, shown_ptr, stats_ptr, B, C, shares, stride_zb, stride_zc, SHARE: tl.constexpr):
    """One share of one row of the softmax, to shown [B, C + 1]."""
    row = tl.program_id(0) // shares + tl.arange(0, 1)
    columns = tl.program_id(0) % shares * SHARE + tl.arange(0, SHARE)
    z = _logits(z_ptr, row, columns, stride_zb, stride_zc, B, C)
    largest = tl.load(stats_ptr + 3 * B + row)
    scale = tl.load(stats_ptr + 4 * B + row)
    p = tl.exp(z - largest[:, None]) * scale[:, None]
    offsets = row.to(tl.int64)[:, None] * (C + 1) + columns[None, :]
    tl.store(shown_ptr + offsets, p, mask=(columns < C)[None, :])


# ---- backward


@triton.jit
def _probabilities(z_ptr, stats_ptr, rows, columns, stride_zb, stride_zc, B, C):
    z = _logits(z_ptr, rows, columns, stride_zb, stride_zc, B, C)
    largest = tl.load(stats_ptr + 3 * B + rows, mask=rows < B, other=0.0)
    scale = tl.load(stats_ptr + 4 * B + rows, mask=rows < B, other=0.0)
    return tl.exp(z - largest[:, None]) * scale[:, None]


@triton.jit
def _grad_of_p(grad_ptr, rows, columns, stride_gb, stride_gc, B, C):
    inside = (rows < B)[:, None] & (columns < C)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_gb + columns.to(tl.int64)[None, :] * stride_gc
    return tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def mean_kernel(
    grad_ptr, z_ptr, stats_ptr, means_ptr, B, C, shares, stride_gb, stride_gc, stride_zb, stride_zc,
    SHARE: tl.constexpr,
):  # fmt: skip
    """<dL/dp, p> over one share of one wide row: means [B, shares]."""
    row = tl.program_id(0) // shares + tl.arange(0, 1)
    share = tl.program_id(0) % shares
    columns = share * SHARE + tl.arange(0, SHARE)
    p = _probabilities(z_ptr, stats_ptr, row, columns, stride_zb, stride_zc, B, C)
    grad = _grad_of_p(grad_ptr, row, columns, stride_gb, stride_gc, B, C)
    tl.store(means_ptr + row.to(tl.int64) * shares + share, tl.sum(p * grad, 1))


@triton.jit
def _sum_of_shares(means_ptr, rows, inside, shares, SHARES: tl.constexpr):
    """Of the `shares` numbers that belong to each of `rows`."""
    index = tl.arange(0, SHARES)
    offsets = rows.to(tl.int64)[:, None] * shares + index[None, :]
    within = inside[:, None] & (index < shares)[None, :]
    return tl.sum(tl.load(means_ptr + offsets, mask=within, other=0.0), 1)


@triton.jit
def backward_kernel(
    grad_ptr, z_ptr, h_ptr, labels_ptr, stats_ptr, means_ptr, grad_z_ptr, grad_h_ptr,
    B, C, D, shares, blocks, z_blocks,
    stride_gb, stride_gc, stride_zb, stride_zc, stride_hb, stride_hd, stride_l,
    SOFTMAX: tl.constexpr, SHARES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of dL/dz in the first z_blocks of the `blocks` programs of ROWS rows, of dL/dh in the others.

    SHARES: how many of `means` belong to a row, rounded up, or 0 where a program sees whole rows.
    """
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0) % blocks
    inside = rows < B
    pull = tl.load(stats_ptr + B + rows, mask=inside, other=1.0)
    length = tl.load(stats_ptr + 2 * B + rows, mask=inside, other=1.0)
    # The sensitivity is the last column of what was shown.
    last = rows.to(tl.int64) * stride_gb + (tl.cast(C, tl.int64) * stride_gc if SOFTMAX else 0)
    grad_s = tl.load(grad_ptr + last, mask=inside, other=0.0).to(tl.float32)
    if block < z_blocks:
        columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
        rest = tl.load(stats_ptr + rows, mask=inside, other=0.0)
        labels = tl.load(labels_ptr + rows.to(tl.int64) * stride_l, mask=inside, other=0)
        p = _probabilities(z_ptr, stats_ptr, rows, columns, stride_zb, stride_zc, B, C)
        factor = grad_s * length / _above_zero(pull)
        pulled = p * factor[:, None] * (p + rest[:, None])
        at_label = -(grad_s * length * pull)[:, None] * p
        grad = tl.where(columns[None, :] == labels[:, None], at_label, pulled)
        if SOFTMAX:
            grad_p = _grad_of_p(grad_ptr, rows, columns, stride_gb, stride_gc, B, C)
            if SHARES:
                mean = _sum_of_shares(means_ptr, rows, inside, shares, SHARES)
            else:
                mean = tl.sum(p * grad_p, 1)
            grad += p * (grad_p - mean[:, None])
        offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
        tl.store(grad_z_ptr + offsets, grad, mask=inside[:, None] & (columns < C)[None, :])
    else:
        d = (block - z_blocks) * WIDTH + tl.arange(0, WIDTH)
        within_h = inside[:, None] & (d < D)[None, :]
        offsets_h = rows.to(tl.int64)[:, None] * stride_hb + d.to(tl.int64)[None, :] * stride_hd
        h = tl.load(h_ptr + offsets_h, mask=within_h, other=0.0).to(tl.float32)
        grad_h = h * (grad_s * pull / _above_zero(length))[:, None]
        tl.store(grad_h_ptr + rows.to(tl.int64)[:, None] * D + d[None, :], grad_h, mask=within_h)


@triton.jit
def _above_zero(x):
    """x, but no smaller than what can be squared; NaN stays NaN."""
    return tl.where(x < 1.0842022e-19, 1.0842022e-19, x)


# ---- launchers, with the schemas of the ops


def forward(
    logits: Tensor, features: Tensor, targets: Tensor | None, bias: bool, softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See sensitivity.py; tensors that a kernel fills are left uninitialised before."""
    (batch, classes), width = logits.shape, features.shape[1]
    shape = (batch, classes + 1) if softmax else (batch,)
    shown = logits.new_empty(shape, dtype=torch.float32)
    stats = shown.new_empty((5, batch))
    predicted = logits.new_empty(batch if targets is None else 0, dtype=torch.int64)
    if batch == 0:
        return shown, stats, predicted
    given = predicted if targets is None else targets
    how = {"PREDICTED": targets is None, "num_warps": WARPS, **CHECKS}
    end = {"BIAS": bias, "SOFTMAX": softmax, "WIDTH": WIDTH}
    strides = (*logits.stride(), *features.stride(), given.stride(0))
    if classes <= NARROW:
        tile = tile_of(classes)
        forward_kernel[(triton.cdiv(batch, tile["ROWS"]),)](
            logits, features, given, shown, stats, predicted, batch, classes, width, *strides,
            **how, **end, **tile,
        )  # fmt: skip
        return shown, stats, predicted
    shares = triton.cdiv(classes, SHARE)
    parts = stats.new_empty((3, batch, shares))
    places = predicted.new_empty((batch, shares) if targets is None else 0)
    share_kernel[(shares * batch,)](
        logits, given, parts, places, batch, classes, shares, *logits.stride(), given.stride(0),
        SHARE=SHARE, **how,
    )  # fmt: skip
    finish_kernel[(batch,)](
        logits, features, given, parts, places, shown, stats, predicted, batch, classes, width, shares,
        *strides, SHARES=triton.next_power_of_2(shares), **how, **end,
    )  # fmt: skip
    if softmax:
        softmax_kernel[(shares * batch,)](
            logits, shown, stats, batch, classes, shares, *logits.stride(), SHARE=SHARE, num_warps=WARPS
        )
    return shown, stats, predicted


def backward(
    grad: Tensor,
    logits: Tensor,
    features: Tensor,
    labels: Tensor,
    stats: Tensor,
    softmax: bool,
    need_logits: bool,
    need_features: bool,
) -> tuple[Tensor, Tensor]:
    """See sensitivity.py."""
    (batch, classes), width = logits.shape, features.shape[1]
    grad_logits = logits.new_empty((batch, classes) if need_logits else 0)
    grad_features = features.new_empty((batch, width) if need_features else 0)
    if batch == 0:
        return grad_logits, grad_features
    tile = tile_of(min(classes, SHARE))
    strides = (grad.stride(0), grad.stride(1) if softmax else 0, *logits.stride())
    shares = 0
    means = stats
    if softmax and need_logits and classes > NARROW:
        shares = triton.cdiv(classes, SHARE)
        means = stats.new_empty((batch, shares))
        mean_kernel[(shares * batch,)](
            grad, logits, stats, means, batch, classes, shares, *strides, SHARE=SHARE, num_warps=WARPS
        )
    z_blocks = triton.cdiv(classes, tile["BLOCK_C"]) if need_logits else 0
    h_blocks = triton.cdiv(width, WIDTH) if need_features else 0
    blocks = z_blocks + h_blocks
    if blocks:
        backward_kernel[(blocks * triton.cdiv(batch, tile["ROWS"]),)](
            grad, logits, features, labels, stats, means, grad_logits, grad_features,
            batch, classes, width, shares, blocks, z_blocks, *strides, *features.stride(), labels.stride(0),
            SOFTMAX=softmax, SHARES=triton.next_power_of_2(shares) if shares else 0,
            WIDTH=WIDTH, num_warps=WARPS, **tile,
        )  # fmt: skip
    return grad_logits, grad_features


def tile_of(classes: int) -> dict[str, Any]:
    """Rows and columns of a program's tile: few rows, so that small batches fill many programs."""
    block = max(16, triton.next_power_of_2(classes))
    return {"ROWS": max(1, min(4, 2048 // block)), "BLOCK_C": block}
