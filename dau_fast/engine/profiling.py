"""Where the time of training steps goes: a Chrome trace of the first steps of every loop, and a table."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function

from dau_fast.optim import MaskedOptimizer

# Steps of each loop that are looked at: a browser does not open a trace of all.
STEPS = 20
# On a CPU the time outside of all sections; on CUDA the time in which the device had nothing to do.
OUTSIDE, WAITING = "outside", "waiting"


@dataclass(frozen=True)
class LoopProfile:
    """What `steps` steps of a loop took. seconds: by section, each without the sections inside it."""

    steps: int
    seconds: dict[str, float]


class Profiler:
    """Takes a profile of a loop's first steps and writes profile-<loop>.json into `folder`; a context.

    folder: None for no profile. A loop whose trace is there is not looked at again. found: what the steps
    took, None without a profile; known once they are over, at the latest on leaving.
    """

    def __init__(self, loop: str, device: torch.device, folder: Path | None) -> None:
        self.found: LoopProfile | None = None
        self._trace = folder / f"profile-{loop.replace(' ', '-')}.json" if folder else None
        self._window: _Window | None = None
        if self._trace and not self._trace.exists():
            self._window = _Window(device)

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def run(self, step: Callable[[], None]) -> None:
        """Take `step`, the loop's next one."""
        if self._window and not self._window.begun:
            self._window.begin()
        step()
        if self._window:
            self._window.steps += 1
            if self._window.steps == STEPS:
                self._finish()

    def _finish(self) -> None:
        window, self._window = self._window, None
        if window and window.begun:
            assert self._trace
            self.found = LoopProfile(window.steps, window.end(self._trace))


@contextmanager
def section(name: str) -> Iterator[None]:
    """Count what runs inside as `name` while a profile is taken; sections may lie inside others."""
    window = _Window.active
    if window is None or torch.compiler.is_compiling():
        yield
        return
    with record_function(f"dau_fast: {name}"):
        before = window.switch(name)
        try:
            yield
        finally:
            window.switch(before)


def optimizer_section(optimizer: Optimizer) -> str:
    """The section of an optimiser's step, which with masks does more."""
    return "masked optimiser" if isinstance(optimizer, MaskedOptimizer) else "optimiser"


class _Window:
    """The profiled steps of one loop: marks in time, each with the section that begins there."""

    active: _Window | None = None

    def __init__(self, device: torch.device) -> None:
        self.steps, self.begun = 0, False
        self._cuda = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profile = profile(activities=activities)
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self) -> None:
        _Window.active, self.begun = self, True
        # Kineto writes a line to stderr whenever it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profile.start()
        self._mark(OUTSIDE)

    def switch(self, name: str) -> str:
        """Begin section `name`; returns the one that ends."""
        before = self._marks[-1][0]
        self._mark(name)
        return before

    def end(self, trace: Path) -> dict[str, float]:
        """Stop, write the trace, and return the seconds by section."""
        self._mark(OUTSIDE)
        if self._cuda:
            torch.cuda.synchronize()
        self._profile.stop()
        _Window.active = None
        self._profile.export_chrome_trace(str(trace))
        found: dict[str, float] = {}
        for (name, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            found[name] = found.get(name, 0.0) + _between(start, stop)
        if self._cuda:
            # Device time between marks is either a section's or, in all of them together, idle.
            found[WAITING] = max(0.0, sum(found.values()) - busy_seconds(trace))
        return found

    def _mark(self, name: str) -> None:
        if not self._cuda:
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))


# What occupies a device, by category of a Chrome trace: not the operators that launched it, nor marks.
_DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}


def busy_seconds(trace: Path) -> float:
    """Seconds of a Chrome trace in which a CUDA device worked: each kernel once, several at once as one."""
    events = json.loads(trace.read_text())["traceEvents"]
    work = sorted(
        (event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in _DEVICE_WORK
    )
    busy, reached = 0.0, -math.inf
    for start, stop in work:
        busy += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return busy / 1e6


def _between(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    """Seconds; both of one kind."""
    if isinstance(start, float) and isinstance(stop, float):
        return stop - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(stop, torch.cuda.Event)
    return float(start.elapsed_time(stop)) / 1e3
