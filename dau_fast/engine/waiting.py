"""How much of a training loop's time its steps wait for data."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from dau_fast.engine.batches import Batch
from dau_fast.engine.profiling import section

# A CPU that queues steps faster than the GPU takes them is held up after so many, so that batches do not
# pile up and the clock counts what holds up the GPU.
_QUEUED = 4


class Waiting:
    """The clock of one loop: `take` begins each step, `finish` ends it. seconds: of all steps, data: waiting.

    The first step is left out: there compilers are waited for, and reading only begins.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = self.data = 0.0
        self._steps = 0
        self._queued: torch.cuda.Event | None = None

    def take(self, batches: Iterator[Batch]) -> Batch:
        """The next of `batches`."""
        self._began = time.perf_counter()
        with section("data"):
            batch = next(batches)
        self._ready = time.perf_counter()
        return batch

    def finish(self) -> None:
        """The step is over, or queued on a CUDA device."""
        if self.device.type == "cuda" and self._steps % _QUEUED == 0:
            before, self._queued = self._queued, torch.cuda.current_stream(self.device).record_event()
            if before is not None:
                before.synchronize()
        if self._steps:
            self.seconds += time.perf_counter() - self._began
            self.data += self._ready - self._began
        self._steps += 1
