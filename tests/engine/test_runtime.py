"""The device of a run, its clock, and denormal numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from dau_fast.engine.runtime import (
    Stopwatch,
    choose_device,
    choose_precision,
    flushed_denormals,
    warm_up,
)
from dau_fast.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "available", "expected"),
    [
        ("cpu", False, "cpu"),
        ("cpu", True, "cpu"),
        ("auto", False, "cpu"),
        ("auto", True, "cuda"),
        ("cuda", True, "cuda"),
    ],
)
def test_a_device_is_chosen_by_name_and_by_what_is_there(
    name: str, available: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device(name) == torch.device(expected)


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no CUDA device here: use --device cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "cuda:7", "mps"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown device '{name}': expected auto, cpu or cuda"):
        choose_device(name)


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", CPU, None),
        ("auto", CUDA, torch.bfloat16),
        ("fp32", CUDA, None),
        ("bf16", CPU, torch.bfloat16),
    ],
)
def test_a_precision_is_chosen_by_name_and_device(
    name: str, device: torch.device, expected: torch.dtype | None
) -> None:
    assert choose_precision(name, device) is expected


@pytest.mark.parametrize("name", ["fp16", "", "BF16"])
def test_an_unknown_precision_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown precision '{name}': expected auto, fp32, bf16"):
        choose_precision(name, CPU)


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


def test_warming_up_runs_where_there_is_no_gpu() -> None:
    warm_up(CPU)
