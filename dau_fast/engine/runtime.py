"""The device of a run: choosing it, timing on it, and keeping denormal numbers off it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dau_fast.errors import UserError


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device. Raises UserError for CUDA where there is none.

    local_rank: number of this process among those of its machine, each of which has a GPU of its own.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device '{name}': expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here: use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" or local_rank is None:
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} has no GPU, as PyTorch finds {torch.cuda.device_count()} here: start as "
            "many processes as there are GPUs, or take --device cpu"
        )
    return torch.device("cuda", local_rank)


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype a network computes in: bfloat16 under autocast, float64, or None for float32.

    auto is bf16 on CUDA. fp64 is slow: it is for comparing runs without the effects of rounding.
    """
    choices = {
        "auto": torch.bfloat16 if device.type == "cuda" else None,
        "fp32": None,
        "bf16": torch.bfloat16,
        "fp64": torch.float64,
    }
    if name not in choices:
        raise UserError(f"unknown precision '{name}': expected {', '.join(choices)}")
    return choices[name]


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
    with torch.random.fork_rng():
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8)).to(device)
        for optimizer in (torch.optim.SGD(network.parameters(), 0.1), torch.optim.Adam(network.parameters())):
            network(torch.randn(4, 1, 8, 8, device=device)).square().sum().backward()
            optimizer.step()
