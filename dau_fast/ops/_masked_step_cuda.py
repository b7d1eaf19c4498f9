"""Masks and masked optimiser steps as Triton kernels: one launch for all tensors of a model.

A table on the device holds the addresses of each tensor's arrays, and `blocks` says which part of which
tensor a program works on. Loads and stores of masked weights are switched off lane by lane, so that
memory sectors of 8 floats that are masked as a whole do not move. Weights and state must be 0 where
they are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # weights of one program
WARPS = 4


@triton.jit
def _kept(bits, offsets, n):
    """1 for each of the weights `offsets` that is kept, 0 for the others; all 1 where bits are none."""
    known = tl.where(bits == 0, 0, n)
    byte = tl.load(bits.to(tl.pointer_type(tl.uint8)) + offsets // 8, mask=offsets < known, other=255)
    return (byte.to(tl.int32) >> (offsets % 8).to(tl.int32)) & 1


@triton.jit
def _rate(lr, lr_ptr, LR_IS_TENSOR: tl.constexpr):
    if LR_IS_TENSOR:
        return tl.load(lr_ptr).to(tl.float32)
    return lr


@triton.jit
def apply_kernel(table_ptr, blocks_ptr, BLOCK: tl.constexpr):
    """Weights that are masked become +0.0. table [K, 3]: weights, bits, n."""
    entry = table_ptr + tl.load(blocks_ptr + 2 * tl.program_id(0)).to(tl.int64) * 3
    start = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    weights = tl.load(entry).to(tl.pointer_type(tl.float32))
    n = tl.load(entry + 2)
    offsets = start + tl.arange(0, BLOCK)
    masked = (offsets < n) & (_kept(tl.load(entry + 1), offsets, n) == 0)
    tl.store(weights + offsets, tl.zeros([BLOCK], tl.float32), mask=masked)


@triton.jit
def sgd_kernel(
    table_ptr, blocks_ptr, lr_ptr, lr, momentum, dampening, weight_decay,
    LR_IS_TENSOR: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of torch.optim.SGD. table [K, 6]: weights, grads, momentum, bits, n, whether first."""
    entry = table_ptr + tl.load(blocks_ptr + 2 * tl.program_id(0)).to(tl.int64) * 6
    start = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    weights = tl.load(entry).to(tl.pointer_type(tl.float32))
    grads = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    n = tl.load(entry + 4)
    offsets = start + tl.arange(0, BLOCK)
    kept = (offsets < n) & (_kept(tl.load(entry + 3), offsets, n) != 0)
    weight = tl.load(weights + offsets, mask=kept, other=0.0)
    grad = tl.load(grads + offsets, mask=kept, other=0.0)
    if MAXIMIZE:
        grad = -grad
    grad += weight_decay * weight
    if MOMENTUM:
        buffers = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
        first = tl.load(entry + 5)
        buffer = tl.load(buffers + offsets, mask=kept, other=0.0)
        # Before the first step a buffer may hold anything.
        buffer = tl.where(first != 0, grad, momentum * buffer + (1.0 - dampening) * grad)
        tl.store(buffers + offsets, buffer, mask=kept)
        grad = grad + momentum * buffer if NESTEROV else buffer
    tl.store(weights + offsets, weight - _rate(lr, lr_ptr, LR_IS_TENSOR) * grad, mask=kept)


@triton.jit
def adamw_kernel(
    table_ptr, blocks_ptr, biases_ptr, lr_ptr, lr, fresh1, beta2, fresh2, eps, weight_decay,
    LR_IS_TENSOR: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of torch.optim.AdamW. table [K, 6]: weights, grads, exp_avg, exp_avg_sq, bits, n.

    biases [K, 2]: 1 - beta1^step and sqrt(1 - beta2^step). fresh1, fresh2: 1 - beta1 and 1 - beta2.
    """
    tensor = tl.load(blocks_ptr + 2 * tl.program_id(0)).to(tl.int64)
    entry = table_ptr + tensor * 6
    start = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    weights = tl.load(entry).to(tl.pointer_type(tl.float32))
    grads = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    averages = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    squares = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    n = tl.load(entry + 5)
    rate = _rate(lr, lr_ptr, LR_IS_TENSOR)
    offsets = start + tl.arange(0, BLOCK)
    kept = (offsets < n) & (_kept(tl.load(entry + 4), offsets, n) != 0)
    weight = tl.load(weights + offsets, mask=kept, other=0.0)
    grad = tl.load(grads + offsets, mask=kept, other=0.0)
    if MAXIMIZE:
        grad = -grad
    weight *= 1.0 - rate * weight_decay
    average = tl.load(averages + offsets, mask=kept, other=0.0)
    square = tl.load(squares + offsets, mask=kept, other=0.0)
    average += fresh1 * (grad - average)
    square = beta2 * square + fresh2 * grad * grad
    tl.store(averages + offsets, average, mask=kept)
    tl.store(squares + offsets, square, mask=kept)
    root = tl.sqrt(square) / tl.load(biases_ptr + 2 * tensor + 1) + eps
    change = rate / tl.load(biases_ptr + 2 * tensor) * average / root
    tl.store(weights + offsets, weight - change, mask=kept)


# ---- launchers: lists of contiguous float32 tensors of one device; bits: packed masks or None


def apply(weights: Sequence[Tensor], bits: Sequence[Tensor]) -> None:
    """Set masked weights to 0."""
    rows = [(w.data_ptr(), b.data_ptr(), w.numel()) for w, b in zip(weights, bits, strict=True)]
    _launch(apply_kernel, weights, rows)


def sgd(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor | None],
    bits: Sequence[Tensor | None],
    first: Sequence[bool],
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """One step in place; first: whether a tensor's momentum holds nothing yet."""
    rows = [
        (w.data_ptr(), g.data_ptr(), _address(m), _address(b), w.numel(), int(f))
        for w, g, m, b, f in zip(weights, grads, momenta, bits, first, strict=True)
    ]
    tensor = isinstance(lr, Tensor)
    _launch(
        sgd_kernel, weights, rows, lr if tensor else weights[0], 0.0 if tensor else lr, momentum, dampening,
        weight_decay, LR_IS_TENSOR=tensor, MOMENTUM=momentum != 0, NESTEROV=nesterov, MAXIMIZE=maximize,
    )  # fmt: skip


def adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    bits: Sequence[Tensor | None],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step in place; steps: float32 scalars, raised by one."""
    torch._foreach_add_(list(steps), 1)
    # On the device, for a captured graph, and in float64: a GPU's logarithm near 1 has few digits.
    count = torch.stack(list(steps)).double()
    biases = torch.stack([1 - beta1**count, (1 - beta2**count).sqrt()], 1).float()
    rows = [
        (w.data_ptr(), g.data_ptr(), a.data_ptr(), s.data_ptr(), _address(b), w.numel())
        for w, g, a, s, b in zip(weights, grads, averages, squares, bits, strict=True)
    ]
    tensor = isinstance(lr, Tensor)
    _launch(
        adamw_kernel, weights, rows, biases, lr if tensor else weights[0], 0.0 if tensor else lr,
        1 - beta1, beta2, 1 - beta2, eps, weight_decay, LR_IS_TENSOR=tensor, MAXIMIZE=maximize,
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _launch(
    kernel: Any, weights: Sequence[Tensor], rows: Sequence[tuple[int, ...]], *rest: Any, **constants: Any
) -> None:
    device = weights[0].device if weights else torch.device("cpu")
    blocks = _blocks(tuple(w.numel() for w in weights), device)
    if len(blocks):
        table = _table(tuple(rows), device)
        kernel[(len(blocks),)](table, blocks, *rest, **constants, BLOCK=BLOCK, num_warps=WARPS)


# Gradients come back at the same addresses step after step, so the tables do too.
@lru_cache(maxsize=64)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The rows on the device, int64."""
    return torch.tensor(rows, dtype=torch.int64).to(device)


@lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[M, 2]: tensor, and which block of it."""
    counts = torch.tensor([triton.cdiv(n, BLOCK) for n in sizes])
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return torch.stack([tensors, torch.arange(len(tensors)) - before], 1).int().to(device)
