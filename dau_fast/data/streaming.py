"""Images that are not all in memory: batches are read from a source while earlier ones are trained on.

A thread draws what the next batches hold, in order and from the same generators as for images in memory,
reads their pixels and sends them to the device; there they are cropped, mirrored and normalised as those
of images in memory are. So both give the same batches, bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dau_fast.data.images import Choice, Draws, Images

# Batches that are read ahead of the one in use.
DEPTH = 3

T = TypeVar("T")


class Source(Protocol):
    """Images that are not in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each, (channels, H, W) where they are uint8."""

    def __len__(self) -> int:
        """How many images there are."""

    def read(self, index: Tensor, out: Tensor) -> None:
        """Write the pixels of images `index`, int64 [B], to `out`; no others.

        out: uint8 [B, H, W, channels], or another type [B, ...]. Both on the CPU. May be called by several
        threads. Raises UserError for an image that cannot be read.
        """


@dataclass(frozen=True)
class StreamedImages(Images):
    """Images that a `source` reads when a batch needs them.

    pixels: none of them, [0, channels, H, W], or [0, ...] in another type than uint8, on the device that
    batches are made on.
    """

    source: Source = field(kw_only=True)

    def gather(self, index: Tensor, draws: Draws | None = None) -> Tensor:
        """Normalised images [B, ...] at `index` [B], augmented by `draws`; returns when they were read."""
        return self._prepare(self._read(index), draws)

    def make_batches(self, choices: Iterable[Choice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Index [B] and normalised images [B, ...] of each of `choices`, which a thread reads ahead.

        What cannot be read raises its UserError here, in place of the batch. The thread ends with the
        iterator.
        """
        side = None
        if self.device.type == "cuda":
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
        for sent in read_ahead(self._send(iter(choices), side), DEPTH):
            _take_over(sent)
            yield sent.choice.index, self._prepare(sent.pixels, sent.choice.draws)

    def _send(self, choices: Iterator[Choice], side: torch.cuda.Stream | None) -> Iterator[_Sent]:
        """Each of `choices` with its pixels. side: the stream of all work on them, None on a CPU."""
        while True:
            with nullcontext() if side is None else torch.cuda.stream(side):
                choice = next(choices, None)
                if choice is None:
                    return
                pixels = self._read(choice.index)
                arrived = None if side is None else side.record_event()
            yield _Sent(choice, pixels, arrived)

    def _read(self, index: Tensor) -> Tensor:
        """Pixels [B, ...] of images `index` [B], on their way to the device."""
        rows = index.cpu()
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self.source):
            raise IndexError(f"index outside 0 to {len(self.source) - 1}")
        ready = self.ready
        channels_last = not ready or (self.pixels.ndim == 4 and self.pixels.stride(1) == 1)
        out = torch.empty(
            (len(rows), *self.shape),
            dtype=self.pixels.dtype,
            pin_memory=self.device.type == "cuda",
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )
        self.source.read(rows, out if ready else out.permute(0, 2, 3, 1))
        return out.to(self.device, non_blocking=True)

    def _prepare(self, pixels: Tensor, draws: Draws | None) -> Tensor:
        if self.ready:
            return pixels
        return self._normalise(pixels, torch.arange(len(pixels), device=self.device), draws)


class _Sent(NamedTuple):
    """A choice and its pixels on their way to the device. arrived: when they are there; None on a CPU."""

    choice: Choice
    pixels: Tensor
    arrived: torch.cuda.Event | None


def _take_over(sent: _Sent) -> None:
    """Let the current stream use what another one made: not before it is there, nor is it reused too soon."""
    if sent.arrived is None:
        return
    stream = torch.cuda.current_stream(sent.pixels.device)
    stream.wait_event(sent.arrived)
    for tensor in (sent.pixels, sent.choice.index, *(sent.choice.draws or ())):
        if tensor is not None:
            tensor.record_stream(stream)


def read_ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """`items` in their order, each made by a thread, up to `depth` before they are asked for.

    An error that `items` raises comes out in place of the item. The thread ends with this iterator, when
    it has finished the item it is at.
    """
    end: Any = object()
    pool = ThreadPoolExecutor(1, "dau_fast reader")
    try:
        waiting = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        # Not waiting for it: the garbage collector may be here, in a thread that the reader waits for.
        pool.shutdown(wait=False, cancel_futures=True)
