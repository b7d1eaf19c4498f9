"""Where time goes on a GPU: kernel by kernel in some steps, and part by part in a whole game."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dau_fast.config import DauConfig
from dau_fast.methods.dau import game, referee, shown
from dau_fast.methods.running import run_timed
from dau_fast.methods.task import Task
from support.measuring import synchronise

# Kernels of a table, those that take longest.
_LISTED = 70


def write_kernels(work: Callable[[], None], steps: int, path: Path) -> dict[str, float]:
    """A table of the kernels of `work`, which takes `steps` steps; their number and milliseconds a step."""
    work()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        work()
        torch.cuda.synchronize()
    counts: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    for event in found.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            counts[event.name] += 1
            spent[event.name] += event.time_range.elapsed_us()
    with path.open("w") as file:
        for name, microseconds in spent.most_common(_LISTED):
            print(f"{microseconds / steps:9.1f} us {counts[name] / steps:7.2f}x  {name[:150]}", file=file)
    return {"kernels": counts.total() / steps, "kernels_ms": spent.total() / steps / 1e3}


# A game's own functions, by what a row calls them.
_PARTS: dict[str, tuple[Any, str]] = {
    "what is shown": (game, "prepare_shown"), "plain model": (shown, "fit_plain_model"),
    "wrong labels": (shown, "_compare"), "warm-up": (game.Game, "warm_up"), "turns": (game.Game, "play"),
    "finish": (game.Game, "finish"), "BatchNorm statistics": (game, "recompute_batchnorm"),
    "looks": (referee.Referee, "look"), "reveals": (referee.Referee, "reveal"),
}  # fmt: skip


def play_by_parts(task: Task, config: DauConfig) -> dict[str, Any]:
    """A whole game: seconds, compile_seconds, and those of its parts, of which some are inside others."""
    spent: Counter[str] = Counter()
    device = task.images.device
    with ExitStack() as stack:
        for name, (owner, attribute) in _PARTS.items():
            stack.enter_context(_clocked(owner, attribute, name, spent, device))
        made = run_timed("dau", lambda task: game.unlearn(task, config), task)
    assert made.history is not None
    told = {"turns": made.history["turns"], "engine": made.loops[0].engine, "parts": dict(spent)}
    return {"seconds": made.seconds, "compile_seconds": made.compile_seconds, **told}


@contextmanager
def _clocked(
    owner: Any, attribute: str, name: str, spent: Counter[str], device: torch.device
) -> Iterator[None]:
    """Add up in `spent` what calls of owner.attribute take inside, the device's work included."""
    function = getattr(owner, attribute)

    def timed(*given: Any, **named: Any) -> Any:
        synchronise(device)
        began = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            synchronise(device)
            spent[name] += time.perf_counter() - began

    with mock.patch.object(owner, attribute, timed):
        yield
