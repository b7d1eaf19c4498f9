"""The processes that share one job: which rows of a batch each holds, and what they tell one another.

Every process draws the same global batches from the same seeds and works on its own rows of them, so
what a run computes does not depend on how many processes there are. Gradients are averaged by
DistributedDataParallel, which overlaps that with the backward pass, or by a sharded model itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dau_fast.engine.global_batchnorm import synchronise_batchnorm
from dau_fast.engine.sharding import is_sharded
from dau_fast.errors import UserError


@dataclass(frozen=True)
class MicroBatch:
    """Part `number` of `count` of a batch. sizes: its rows by rank.

    rows: where this rank's are among its rows of the batch. weight: what a mean over this rank's rows
    counts, so that over all parts the sum, and over all ranks the average, is the mean over the batch.
    """

    number: int
    count: int
    rows: slice
    sizes: list[int]
    weight: float


class Ranks:
    """Process `rank` of `count`, which are all of torch.distributed's default group; or this one alone.

    local_count: how many of them share this machine's cores and memory, as far as it is known.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_count: int = 1) -> None:
        self.rank = rank
        self.count = count
        self.local_count = local_count

    @classmethod
    def from_group(cls) -> Ranks:
        """Those of the default group. Raises ValueError where there is none."""
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def rows(self, count: int) -> list[int]:
        """How many of `count` rows each rank holds: as even as possible, the larger parts first."""
        return [count // self.count + (rank < count % self.count) for rank in range(self.count)]

    def own_rows(self, count: int) -> slice:
        """This rank's rows out of `count`."""
        rows = self.rows(count)
        start = sum(rows[: self.rank])
        return slice(start, start + rows[self.rank])

    def batches(self, index: Tensor, batch_size: int) -> list[Tensor]:
        """This rank's part of `index` [N] in batches of at most `batch_size` rows, as many on every rank.

        So ranks can call together what waits for all of them; where N is small, the last one may be empty.
        One process takes batches of one size, but for the last.
        """
        if self.alone:
            count = max(1, math.ceil(len(index) / batch_size))
            return list(index.split(max(1, math.ceil(len(index) / count))))
        mine = index[self.own_rows(len(index))]
        return list(mine.tensor_split(max(1, math.ceil(self.rows(len(index))[0] / batch_size))))

    def own_positions(self, count: int, parts: int, device: torch.device) -> Tensor | None:
        """Where this rank's rows are in `parts` sets of `count` rows one after the other; None for all."""
        if self.alone:
            return None
        return (
            torch.arange(parts * count, device=device).view(parts, count)[:, self.own_rows(count)].flatten()
        )

    def sizes(self, rows: int, device: torch.device) -> list[int]:
        """How many rows each rank has, where this one has `rows`. Waits for the others."""
        if self.alone:
            return [rows]
        return self.gather(torch.tensor([rows], device=device), [1] * self.count).tolist()

    def micro_batches(self, sizes: Sequence[int], parts: int) -> list[MicroBatch]:
        """A batch of which rank r holds sizes[r] rows, in `parts` parts, each shared by all ranks.

        Raises UserError where a rank would be left without a row in one of them.
        """
        if min(sizes) < parts:
            shared = "" if self.alone else f"shared by {self.count} processes, each "
            raise UserError(
                f"a batch of {sum(sizes)} images cannot be {shared}taken in {parts} parts: take a smaller "
                "`accumulate`, fewer processes or a larger batch"
            )
        found = []
        for part in range(parts):
            borders = [(part * size // parts, (part + 1) * size // parts) for size in sizes]
            begin, end = borders[self.rank]
            weight = self.count * (end - begin) / sum(sizes)
            held = [stop - start for start, stop in borders]
            found.append(MicroBatch(part, parts, slice(begin, end), held, weight))
        return found

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all ranks in their order, from this rank's `rows`; `sizes` by rank. No gradient."""
        if self.alone:
            return rows
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        every = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(every, padded)
        return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)])

    def total(self, values: Tensor) -> Tensor:
        """The sum of all ranks' `values`, which have one shape. No gradient."""
        values = values.detach().clone()
        if not self.alone:
            dist.all_reduce(values)
        return values

    def agree(self, answer: bool, device: torch.device) -> bool:
        """The first rank's answer, on all ranks: rounding must not let them part ways."""
        if self.alone:
            return answer
        told = torch.tensor(answer, device=device)
        dist.broadcast(told, src=0)
        return bool(told)

    @contextmanager
    def in_turn(self, needed: bool) -> Iterator[None]:
        """Where `needed`, let the first rank go through the block before the others do."""
        if needed and not self.alone and not self.first:
            dist.barrier()
        yield
        if needed and not self.alone and self.first:
            dist.barrier()

    def prepare(self, network: nn.Module) -> nn.Module:
        """`network` with the first rank's weights, and with BatchNorm statistics taken over all ranks.

        The same object where there is one rank; else its BatchNorm layers were replaced.
        """
        if self.alone:
            return network
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)
        return synchronise_batchnorm(network)

    def parallel(self, model: nn.Module) -> nn.Module:
        """What to call in place of `model`, so that its gradients are averaged over the ranks."""
        if self.alone or is_sharded(model):
            return model
        device = next(model.parameters()).device
        options: dict[str, Any] = {_BUFFERS: False, "gradient_as_bucket_view": True}
        if device.type == "cuda":
            options["device_ids"] = [device]
        return DistributedDataParallel(model, **options)

    @contextmanager
    def sharing(self, model: nn.Module, share: bool) -> Iterator[None]:
        """Backward passes inside average the gradients of `parallel`'s model, or leave them for later.

        Those of a sharded model are always averaged: to wait, every rank would hold all of them.
        """
        if self.alone or share or not isinstance(model, DistributedDataParallel):
            yield
            return
        with model.no_sync():
            yield


# Buffers agree by themselves: statistics are those of all ranks. PyTorch renamed the option in 2.14.
_BUFFERS = "forward_sync_buffers"
if _BUFFERS not in signature(DistributedDataParallel).parameters:
    _BUFFERS = "broadcast_buffers"

ALONE = Ranks()
