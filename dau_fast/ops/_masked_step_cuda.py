"""Masks and masked optimiser steps as Triton kernels: one launch for all tensors of a model.

A table on the device holds the addresses of each tensor's arrays, how many elements it has, and how many
blocks come before it, in which every program finds its tensor. Loads and stores of masked weights are
switched off lane by lane, so that memory sectors of 8 floats that are masked as a whole do not move.
Weights and state must be 0 where they are masked.

In a CUDA graph's capture a table is made by kernels that carry its numbers as arguments, as those of torch's
own foreach operations do: gradients lie elsewhere there, a copy from the host would read host memory at
every replay, and the table is the graph's own for as long as the graph lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, compress
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
def _part(table_ptr, tensors, COLUMNS: tl.constexpr, TENSORS: tl.constexpr, BLOCK: tl.constexpr):
    """Which tensor this program works on, its entry, n of it, and its elements' offsets.

    table [tensors, COLUMNS]: the last two columns are n and the number of blocks before. TENSORS: a
    power of 2, at least as many.
    """
    places = tl.arange(0, TENSORS)
    before = tl.load(table_ptr + places * COLUMNS + COLUMNS - 1, mask=places < tensors, other=1 << 62)
    tensor = tl.sum((before <= tl.program_id(0)).to(tl.int32), 0) - 1
    entry = table_ptr + tensor * COLUMNS
    block = tl.program_id(0) - tl.load(entry + COLUMNS - 1)
    return tensor, entry, tl.load(entry + COLUMNS - 2), block * BLOCK + tl.arange(0, BLOCK)


@triton.jit(do_not_specialize=["tensors"])
def apply_kernel(table_ptr, tensors, TENSORS: tl.constexpr, BLOCK: tl.constexpr):
    """Weights that are masked become +0.0. table [K, 4]: weights, bits."""
    _, entry, n, offsets = _part(table_ptr, tensors, 4, TENSORS, BLOCK)
    weights = tl.load(entry).to(tl.pointer_type(tl.float32))
    masked = (offsets < n) & (_kept(tl.load(entry + 1), offsets, n) == 0)
    tl.store(weights + offsets, tl.zeros([BLOCK], tl.float32), mask=masked)


@triton.jit(do_not_specialize=["tensors", "first"])
def sgd_kernel(
    table_ptr, tensors, first, lr_ptr, lr, momentum, dampening, weight_decay,
    LR_IS_TENSOR: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    TENSORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of torch.optim.SGD. table [K, 6]: weights, grads, momentum, bits. first: 0 or 1."""
    _, entry, n, offsets = _part(table_ptr, tensors, 6, TENSORS, BLOCK)
    weights = tl.load(entry).to(tl.pointer_type(tl.float32))
    grads = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    kept = (offsets < n) & (_kept(tl.load(entry + 3), offsets, n) != 0)
    weight = tl.load(weights + offsets, mask=kept, other=0.0)
    grad = tl.load(grads + offsets, mask=kept, other=0.0)
    if MAXIMIZE:
        grad = -grad
    grad += weight_decay * weight
    if MOMENTUM:
        buffers = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
        buffer = tl.load(buffers + offsets, mask=kept, other=0.0)
        # Before the first step a buffer may hold anything.
        buffer = tl.where(first != 0, grad, momentum * buffer + (1.0 - dampening) * grad)
        tl.store(buffers + offsets, buffer, mask=kept)
        grad = grad + momentum * buffer if NESTEROV else buffer
    tl.store(weights + offsets, weight - _rate(lr, lr_ptr, LR_IS_TENSOR) * grad, mask=kept)


@triton.jit(do_not_specialize=["tensors"])
def adamw_kernel(
    table_ptr, tensors, biases_ptr, lr_ptr, lr, fresh1, beta2, fresh2, eps, weight_decay,
    LR_IS_TENSOR: tl.constexpr, MAXIMIZE: tl.constexpr, TENSORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of torch.optim.AdamW. table [K, 7]: weights, grads, exp_avg, exp_avg_sq, bits.

    biases [K, 2]: 1 - beta1^step and sqrt(1 - beta2^step). fresh1, fresh2: 1 - beta1 and 1 - beta2.
    """
    tensor, entry, n, offsets = _part(table_ptr, tensors, 7, TENSORS, BLOCK)
    weights = tl.load(entry).to(tl.pointer_type(tl.float32))
    grads = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    averages = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    squares = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    rate = _rate(lr, lr_ptr, LR_IS_TENSOR)
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


# ---- launchers: lists of contiguous float32 tensors of one device; bits: packed masks or None. The steps
# take the arguments of their definitions in reference.py.


def apply(weights: Sequence[Tensor], bits: Sequence[Tensor]) -> None:
    """Set masked weights to 0."""
    _launch(apply_kernel, [weights, bits])


def sgd(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    bits: Sequence[Tensor | None],
    first: Sequence[bool],
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """One step in place."""
    none: list[Tensor | None] = [None] * len(weights)
    families = [weights, grads, momenta or none, bits]
    rate = _on(lr, weights)
    kinds = sorted(set(first)) or [False]
    for begins in kinds:
        chosen = families
        if len(kinds) > 1:
            chosen = [list(compress(family, [one == begins for one in first])) for family in families]
        _launch(
            sgd_kernel, chosen, int(begins), *rate, momentum, dampening, weight_decay,
            LR_IS_TENSOR=isinstance(lr, Tensor), MOMENTUM=momentum != 0, NESTEROV=nesterov, MAXIMIZE=maximize,
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
    _launch(
        adamw_kernel, [weights, grads, averages, squares, bits], biases, *_on(lr, weights), 1 - beta1, beta2,
        1 - beta2, eps, weight_decay, LR_IS_TENSOR=isinstance(lr, Tensor), MAXIMIZE=maximize,
    )  # fmt: skip


def _on(lr: float | Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Learning rate as lr_ptr and lr, of which a kernel reads one."""
    device = weights[0].device
    if not isinstance(lr, Tensor):
        return weights[0], lr
    if lr.device != device and _capturing(device):
        raise RuntimeError(
            f"lr is a tensor on {lr.device}, which a captured CUDA graph could not follow: expected one on "
            f"{device}; make it with torch.tensor(lr, device='{device}')"
        )
    return lr.to(device, non_blocking=True), 0.0


def _launch(kernel: Any, families: Sequence[Sequence[Tensor | None]], *rest: Any, **constants: Any) -> None:
    """families: a column of addresses each; the first one's tensors are those that have the sizes."""
    weights = families[0]
    columns = tuple(map(_addresses, families))
    counts = tuple(map(Tensor.numel, weights))  # type: ignore[arg-type]
    blocks = _count_blocks(counts)
    if not blocks:
        return
    table = _table(columns, counts, weights[0].device)  # type: ignore[union-attr]
    size = triton.next_power_of_2(len(weights))
    kernel[(blocks,)](table, len(weights), *rest, **constants, TENSORS=size, BLOCK=BLOCK, num_warps=WARPS)


# ---- tables. What follows runs once a step over many small tensors, and is most of what an eager step costs
# the host: no more of Python than it needs.


def _addresses(family: Sequence[Tensor | None]) -> tuple[int, ...]:
    try:
        return tuple(map(Tensor.data_ptr, family))  # type: ignore[arg-type]
    except TypeError:  # some of them are None
        return tuple([0 if one is None else one.data_ptr() for one in family])


@lru_cache(maxsize=64)
def _count_blocks(counts: tuple[int, ...]) -> int:
    """Programs that work on so many elements of each tensor."""
    return sum(-(-n // BLOCK) for n in counts)


def _rows(columns: tuple[tuple[int, ...], ...], counts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """What a table holds of each tensor: addresses, elements, and the blocks before."""
    # One without elements has the place of the one after it, and no program comes to it.
    before = accumulate((-(-n // BLOCK) for n in counts[:-1]), initial=0)
    return tuple(zip(*columns, counts, before, strict=True))


def _table(columns: tuple[tuple[int, ...], ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """The rows on the device, int64, for what runs next on this stream."""
    if _capturing(device):
        return _written_by_kernels(_rows(columns, counts), device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _copied(columns, counts, device, stream)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _written_by_kernels(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """A table whose numbers are arguments of the kernels that write it."""
    table = torch.zeros(len(rows), len(rows[0]), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.view(-1).unbind()), [number for row in rows for number in row])
    return table


# Gradients come back at the same addresses step after step, so the tables do too. A table that is dropped
# here may still be read: its memory goes to what the same stream does later.
@lru_cache(maxsize=64)
def _copied(
    columns: tuple[tuple[int, ...], ...], counts: tuple[int, ...], device: torch.device, stream: int
) -> Tensor:
    table = torch.tensor(_rows(columns, counts), dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
