"""Profiles: every section's time, once, and nothing while none is taken."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from dau_fast.engine.profiling import OUTSIDE, STEPS, LoopProfile, Profiler, busy_seconds, section

CPU = torch.device("cpu")


def work() -> None:
    with section("forward"):
        time.sleep(0.002)
        with section("Barlow Twins"):
            time.sleep(0.004)
        time.sleep(0.001)


def profiled(folder: Path | None, loop: str, taken: int) -> LoopProfile | None:
    with Profiler(loop, CPU, folder) as profiler:
        for _ in range(taken):
            profiler.run(work)
        assert (profiler.found is not None) == (folder is not None and taken >= STEPS), "not before the end"
    return profiler.found


def test_time_inside_a_section_is_not_counted_twice(tmp_path: Path) -> None:
    found = profiled(tmp_path, "game", 5)
    assert found is not None
    assert found.steps == 5
    assert set(found.seconds) == {OUTSIDE, "forward", "Barlow Twins"}
    assert found.seconds["Barlow Twins"] >= 5 * 0.004
    assert found.seconds["forward"] >= 5 * 0.003
    assert found.seconds["forward"] < found.seconds["Barlow Twins"] + 5 * 0.002


@pytest.mark.parametrize(("taken", "seen"), [(60, STEPS), (STEPS, STEPS), (3, 3), (1, 1)])
def test_the_first_steps_of_a_loop_are_looked_at(taken: int, seen: int, tmp_path: Path) -> None:
    found = profiled(tmp_path, "retrain fast", taken)
    assert found is not None
    assert found.steps == seen
    trace = json.loads((tmp_path / "profile-retrain-fast.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("dau_fast: Barlow Twins") == seen


def test_a_loop_that_ended_early_does_not_reach_into_the_next(tmp_path: Path) -> None:
    found = [profiled(tmp_path, loop, taken) for loop, taken in (("game", 2), ("retrain", 3))]
    assert [profile and profile.steps for profile in found] == [2, 3]


def test_a_loop_that_fails_is_no_longer_looked_at(tmp_path: Path) -> None:
    def fail() -> None:
        work()
        raise KeyError

    profiler = Profiler("game", CPU, tmp_path)
    with pytest.raises(KeyError), profiler:
        profiler.run(fail)
    assert profiler.found is not None
    with torch.profiler.profile() as profile, section("forward"):
        torch.ones(2).sum()
    assert not any(event.key.startswith("dau_fast") for event in profile.key_averages())


def test_a_loop_without_a_step_leaves_no_trace(tmp_path: Path) -> None:
    assert profiled(tmp_path, "game", 0) is None
    assert list(tmp_path.iterdir()) == []


def test_a_loop_is_looked_at_once(tmp_path: Path) -> None:
    assert profiled(tmp_path, "game", 2) is not None
    (trace,) = tmp_path.iterdir()
    first = trace.read_bytes()
    assert profiled(tmp_path, "game", 2) is None
    assert trace.read_bytes() == first


def test_busy_time_counts_every_kernel_once_and_nothing_that_is_none(tmp_path: Path) -> None:
    """In microseconds; one kernel and a copy run at once."""
    events = [
        {"cat": "kernel", "ts": 100.0, "dur": 50.0},
        {"cat": "cpu_op", "ts": 90.0, "dur": 5.0},
        {"cat": "gpu_user_annotation", "ts": 100.0, "dur": 900.0},
        {"cat": "kernel", "ts": 200.0, "dur": 100.0},
        {"cat": "gpu_memcpy", "ts": 250.0, "dur": 100.0},
        {"cat": "gpu_memset", "ts": 400.0, "dur": 10.0},
        {"cat": "cuda_runtime", "ts": 410.0, "dur": 500.0},
        {"ph": "M", "name": "process_name"},
    ]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    assert busy_seconds(trace) == pytest.approx((50 + 150 + 10) / 1e6)


def test_without_a_folder_no_profile_is_taken() -> None:
    assert profiled(None, "game", STEPS) is None


def test_without_a_profile_sections_leave_no_mark() -> None:
    with torch.profiler.profile() as profile, section("forward"):
        torch.ones(2).sum()
    assert not any(event.key.startswith("dau_fast") for event in profile.key_averages())
