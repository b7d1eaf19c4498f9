"""Profiles: every section's time, once, and nothing while none is taken."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dau_fast.engine.profiling import OUTSIDE, STEPS, Profiler, section

CPU = torch.device("cpu")


def steps_of(profiler: Profiler, loop: str, expected: int, taken: int) -> None:
    def work(_: Tensor) -> None:
        with section("forward"):
            time.sleep(0.002)
            with section("Barlow Twins"):
                time.sleep(0.004)
            time.sleep(0.001)

    step = profiler.watch(loop, work, expected, CPU)
    for _ in range(taken):
        step(torch.ones(2))


def test_time_inside_a_section_is_not_counted_twice(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path)
    steps_of(profiler, "game", 5, 5)
    found = profiler.loops["game"]
    assert found.steps == 5
    assert set(found.seconds) == {OUTSIDE, "forward", "Barlow Twins"}
    assert found.seconds["Barlow Twins"] >= 5 * 0.004
    assert found.seconds["forward"] >= 5 * 0.003
    assert found.seconds["forward"] < found.seconds["Barlow Twins"] + 5 * 0.002


@pytest.mark.parametrize(("expected", "taken", "seen"), [(100, 60, STEPS), (3, 3, 3), (100, 4, 4)])
def test_the_first_steps_of_a_loop_are_looked_at(
    expected: int, taken: int, seen: int, tmp_path: Path
) -> None:
    profiler = Profiler(tmp_path)
    steps_of(profiler, "retrain fast", expected, taken)
    profiler.finish()
    assert profiler.loops["retrain fast"].steps == seen
    trace = json.loads((tmp_path / "profile-retrain-fast.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("dau_fast: Barlow Twins") == seen


def test_a_loop_that_ended_early_does_not_reach_into_the_next(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path)
    steps_of(profiler, "game", 100, 2)
    steps_of(profiler, "recovery", 3, 3)
    assert {loop: found.steps for loop, found in profiler.loops.items()} == {"game": 2, "recovery": 3}


def test_a_loop_is_looked_at_once(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path)
    steps_of(profiler, "game", 2, 2)
    first = profiler.loops["game"]
    steps_of(profiler, "game", 2, 2)
    assert profiler.loops["game"] is first


def test_without_a_profile_sections_leave_no_mark() -> None:
    with torch.profiler.profile() as profile, section("forward"):
        torch.ones(2).sum()
    assert not any(event.key.startswith("dau_fast") for event in profile.key_averages())
