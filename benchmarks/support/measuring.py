"""What every speed benchmark measures beside the clock: the machine's limits, memory and error."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clock:
    """began, end: by time.perf_counter(); from `end` on nothing is begun."""

    began: float
    end: float

    @classmethod
    def start(cls, minutes: float | None) -> Clock:
        """Now; None for no end."""
        now = time.perf_counter()
        return cls(now, math.inf if minutes is None else now + 60 * minutes)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.began

    @property
    def over(self) -> bool:
        return time.perf_counter() > self.end


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Of all rounds of a row: a GPU that nobody else is on varies little, and is lent for minutes.
_ROUNDS_SECONDS = {"cpu": 1.0, "cuda": 0.2}
# Of a matrix product and a copy that fill any chip: smaller ones measure launches.
_FILLING_SIZE, _FILLING_COPY = 8192, 2**28


def seconds(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """Median seconds of `work`, after one call that is not counted: wall clock, on CUDA by its events."""
    work()
    return statistics.median(_timed(work, device) for _ in range(rounds))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronise(device)
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


@cache
def flops_per_second(device: torch.device, size: int, dtype: torch.dtype = torch.float32) -> float:
    """What a matrix product of `size` cubed, on CUDA 8192 cubed, of random numbers reaches in `dtype`."""
    size = _FILLING_SIZE if device.type == "cuda" else size
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / seconds(lambda: a @ b, device)


@cache
def bytes_per_second(device: torch.device, size: int) -> float:
    """What a copy of `size` float32 numbers, on CUDA a GB, reaches: read and written bytes together."""
    size = _FILLING_COPY if device.type == "cuda" else size
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    return 8 * size / seconds(lambda: target.copy_(source), device)


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that PyTorch holds at the worst moment of `work` beyond what it held before."""
    work()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held, worst = 0, 0
    for _, change in changes:
        held += change
        worst = max(worst, held)
    return worst


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`, in float64."""
    expected = expected.double()
    norm = torch.linalg.vector_norm
    return (norm(found.to(expected) - expected) / norm(expected)).item()


def record_row(
    benchmark: Any,
    work: Callable[[], object],
    device: torch.device,
    *,
    case: str,
    implementation: str,
    flops: float = 0.0,
    moved: float = 0.0,
    size: int = 2048,
    lean: Callable[[], object] | None = None,
    gradient_bytes: int = 0,
    smoke: bool = False,
) -> None:
    """Time `work` with pytest-benchmark, the first call apart, and note what limits it.

    Floor: FLOPs over what a matrix product of `size` reaches, plus bytes over what a copy of as many
    reaches. Memory: the most that `lean`, or else `work`, holds beyond its inputs and `gradient_bytes`.
    smoke: few rounds.
    """
    first = _clock(work, device)
    rounds = 2 if smoke else max(5, min(200, int(_ROUNDS_SECONDS[device.type] / _clock(work, device))))
    benchmark.group = case
    benchmark.pedantic(_finish, args=(work, device), rounds=rounds, warmup_rounds=2)
    floor = moved / bytes_per_second(device, max(1, int(moved) // 8)) if moved else 0.0
    floor += flops / flops_per_second(device, size) if flops else 0.0
    benchmark.extra_info.update(
        case=case,
        implementation=implementation,
        flops=flops,
        bytes=moved,
        percent_of_floor=100 * floor / benchmark.stats.stats.median,
        extra_memory_bytes=max(0, peak_memory(lean or work, device) - gradient_bytes),
        first_call_seconds=first,
    )


def _clock(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    _finish(work, device)
    return time.perf_counter() - began


def _finish(work: Callable[[], object], device: torch.device) -> None:
    work()
    synchronise(device)


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """`work` as the replay of a CUDA graph, after some calls that are not captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
