"""Batches: streams of indices, and what a step is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Batch(NamedTuple):
    """What a step trains on, or this process's part of it: images [B, ...], labels and indices int64 [B]."""

    images: Tensor
    labels: Tensor
    indices: Tensor


@runtime_checkable
class HasBatches(Protocol):
    """Knows best how to make many batches one after the other."""

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """Images [B, ...] at each of `indices`, int64 [B]."""


# Images by their indices: a function from int64 [B] to images [B, ...], or what makes many such batches.
Load = Callable[[Tensor], Tensor] | HasBatches


def load_each(load: Load, indices: Iterable[Tensor]) -> Iterator[Tensor]:
    """What `load` gives for each of `indices`."""
    return load.batches(indices) if isinstance(load, HasBatches) else map(load, indices)


def index_stream(index: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches [batch_size] of `index` [N] for ever, each pass over it in a fresh order.

    A batch may end one pass and begin the next, so every batch is full, also of a set that is
    smaller than a batch, and no image is seen more often than another within a pass.
    """
    pool = index[:0]
    while True:
        while len(pool) < batch_size:
            order = torch.randperm(len(index), generator=generator, device=index.device)
            pool = torch.cat([pool, index[order]])
        yield pool[:batch_size]
        pool = pool[batch_size:]


def match_labels(wanted: Tensor, index: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Of `index` [N] an image for each label of `wanted` [B] that has it, drawn; any, where none has it. [B].

    labels: of all images. Nothing waits for the host.
    """
    own = labels[index]
    sorted_index, sorted_labels = index[own.argsort(stable=True)], own.sort().values
    first = torch.searchsorted(sorted_labels, wanted)
    count = torch.searchsorted(sorted_labels, wanted, right=True) - first
    first, count = first.where(count > 0, 0), count.where(count > 0, len(index))
    chance = torch.rand(len(wanted), device=index.device, generator=generator)
    return sorted_index[first + (chance * count).long().minimum(count - 1)]


def steps_for(epochs: float, count: int, batch_size: int) -> int:
    """Steps of `batch_size` images that make `epochs` passes over `count` images, at least one."""
    return max(1, round(epochs * count / batch_size))
