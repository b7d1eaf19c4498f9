"""The clock of a run, free memory, and denormal numbers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dau_fast.engine.device import Stopwatch, flushed_denormals, free_memory, warm_up

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_stopwatch_reads_the_seconds_of_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([100.0, 102.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    with Stopwatch(CPU) as watch:
        assert watch.seconds == 0
    assert watch.seconds == 2.5


def test_a_stopwatch_measures_real_time() -> None:
    with Stopwatch(CPU) as watch:
        time.sleep(0.02)
    assert 0.015 < watch.seconds < 1


def test_a_stopwatch_stops_on_an_exception_and_lets_it_through() -> None:
    watch = Stopwatch(CPU)
    with pytest.raises(KeyError), watch:
        raise KeyError
    assert watch.seconds > 0


def test_a_stopwatch_waits_for_the_device_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(str(device)))

    def read() -> float:
        events.append("read")
        return 0.0

    monkeypatch.setattr(time, "perf_counter", read)
    with Stopwatch(CUDA):
        events.append("work")
    assert events == ["cuda", "read", "work", "cuda", "read"]


def flushes() -> bool:
    """Whether the smallest numbers are treated as zero on this thread."""
    return bool(torch.full((64,), 1e-30).mul(torch.full((64,), 1e-10)).sum() == 0)


@pytest.fixture
def denormals() -> Iterator[None]:
    """Denormal numbers are kept, whatever ran before; afterwards everything is as it was."""
    before = flushes()
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU cannot flush denormal numbers")
    yield
    torch.set_flush_denormal(before)


@pytest.mark.usefixtures("denormals")
def test_denormals_are_flushed_inside_the_block_alone() -> None:
    assert not flushes()
    with flushed_denormals():
        assert flushes()
    assert not flushes()


@pytest.mark.usefixtures("denormals")
def test_denormals_are_back_after_an_exception() -> None:
    with pytest.raises(KeyError), flushed_denormals():
        raise KeyError
    assert not flushes()


@pytest.mark.usefixtures("denormals")
def test_a_block_inside_a_block_changes_nothing() -> None:
    with flushed_denormals():
        with flushed_denormals():
            assert flushes()
        assert flushes()
    assert not flushes()


MEMINFO = "MemTotal:       100 kB\nMemFree: 10 kB\nMemAvailable:   60 kB\n"
GROUP = "/sys/fs/cgroup/memory."
USED = {f"{GROUP}current": "40960\n", f"{GROUP}stat": "anon 5\ninactive_file 10240\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/meminfo": MEMINFO}, 61_440),
        ({"/proc/meminfo": MEMINFO, f"{GROUP}max": "max\n", **USED}, 61_440),
        ({"/proc/meminfo": MEMINFO, f"{GROUP}max": "81920\n", **USED}, 51_200),
        ({"/proc/meminfo": MEMINFO, f"{GROUP}max": "20480\n", **USED}, 0),
        ({}, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
    ],
    ids=["no group", "no limit", "limit", "limit reached", "neither"],
)
def test_free_memory_is_what_system_and_control_group_leave(
    files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(self: Path, *_: object) -> str:
        if str(self) not in files:
            raise FileNotFoundError(self)
        return files[str(self)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert free_memory(CPU) == expected


def test_free_memory_of_this_machine_is_less_than_it_has() -> None:
    assert 0 < free_memory(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_warming_up_runs_where_there_is_no_gpu() -> None:
    warm_up(CPU)
