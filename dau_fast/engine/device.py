"""What a run asks of its device: time, free memory, no denormal numbers, and nothing lazy left to load."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from dau_fast.engine.chance import seeded


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on `device`; of a CPU's, no more than the control group allows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), free)
    with suppress(OSError, ValueError):
        # Linux, control groups version 2; "max" stands for no limit, and files in the cache can go.
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        usage = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(usage.get("inactive_file", 0)))
    return max(0, free)


class Stopwatch:
    """`seconds` of wall clock inside the `with` block, all work queued on `device` finished."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._synchronise()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._synchronise()
        self.seconds = time.perf_counter() - self._start

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Treat denormal numbers as zero on this thread: some CPU steps run 50 times slower with them."""
    # PyTorch can set the mode but not tell it; a product of normal numbers does.
    before = bool(torch.tensor(1e-30) * torch.tensor(1e-10) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def warm_up(device: torch.device) -> None:
    """Pay PyTorch's one-time costs (lazy imports, thread pools, libraries) before anything is timed."""
    with seeded(0, device):
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8)).to(device)
        for optimizer in (torch.optim.SGD(network.parameters(), 0.1), torch.optim.Adam(network.parameters())):
            network(torch.randn(4, 1, 8, 8, device=device)).square().sum().backward()
            optimizer.step()
