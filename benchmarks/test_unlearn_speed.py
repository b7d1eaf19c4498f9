"""The whole job (original, retrained, unlearned, all measured) against research code, and how its cost grows.

    pytest benchmarks/test_unlearn_speed.py                 on the CPU: digits and the small network
    pytest benchmarks/test_unlearn_speed.py --device cuda   ResNet-18 on images of CIFAR's shape, few epochs

`extra_info`: case, implementation, parts (seconds by method, and of evaluation), evaluation_percent.
Denormal numbers count as zero on both sides, which research code does not see to and profits from.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch
from support import plain, plain_data
from support.jobs import experiment, settings, untrained

from dau_fast.engine.device import run_flushed
from dau_fast.job import assembly
from dau_fast.job.experiment import run_seed
from dau_fast.methods.dau import game
from dau_fast.methods.running import run_timed
from dau_fast.metrics.unlearning import measure

FORGET = ("random:0.01", "random:0.05", "random:0.1", "random:0.25", "random:0.5")
ROUNDS = 3


def rounds(device: torch.device, smoke: bool) -> int:
    """One on CUDA: of research code's exact machines, on the CPU and slow, once is enough of a lease."""
    return 1 if smoke or device.type == "cuda" else ROUNDS


@pytest.fixture
def parts_of_ours(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds spent measuring, added up."""
    spent = {"evaluation": 0.0}

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return measure(*arguments, **named)
        finally:
            spent["evaluation"] += time.perf_counter() - began

    monkeypatch.setattr(assembly, "measure", timed)
    return spent


def ours(device: torch.device, smoke: bool, forget: str = "random:0.1") -> dict[str, float]:
    """One seed of the main job; seconds by part, preparation included."""
    job = experiment(device, smoke=smoke, forget=forget)
    finished = run_flushed(lambda: run_seed(job, 0), device).outcome.finished
    return {name: made.seconds + made.compile_seconds for name, made in finished.items()}


def theirs(device: torch.device, smoke: bool) -> dict[str, float]:
    task = untrained(experiment(device, smoke=smoke))
    config = settings(task)
    network = task.original.release().to(memory_format=torch.contiguous_format)
    job = plain_data.Job(task.images, task.split, network, task.original.head_name, task.recipe, config)
    return run_flushed(lambda: plain.run(job), device)


@pytest.mark.parametrize("way", ["dau_fast", "DataLoader"])
def test_whole_job(
    benchmark: Any, way: str, device: torch.device, smoke: bool, parts_of_ours: dict[str, float]
) -> None:
    found: list[dict[str, float]] = []

    def work() -> None:
        parts_of_ours["evaluation"] = 0.0
        if way == "dau_fast":
            found.append(ours(device, smoke) | parts_of_ours)
        else:
            found.append(theirs(device, smoke))

    benchmark.group = "whole job"
    benchmark.pedantic(work, rounds=rounds(device, smoke))
    parts = min(found, key=lambda one: sum(one.values()))
    benchmark.extra_info.update(
        case="whole job, random:0.1",
        implementation=way,
        parts=parts,
        evaluation_percent=100 * parts["evaluation"] / benchmark.stats.stats.median,
    )


@pytest.mark.parametrize("forget", FORGET)
def test_cost_of_unlearning_by_forget_set(
    benchmark: Any, forget: str, device: torch.device, smoke: bool
) -> None:
    """Unlearning alone, on an original that was never trained: the cost does not depend on it."""
    task = untrained(experiment(device, smoke=smoke, forget=forget))
    play = partial(game.unlearn, config=settings(task))

    def work() -> None:
        run_flushed(lambda: run_timed("dau", play, task), device)

    benchmark.group = "unlearning"
    benchmark.pedantic(work, rounds=rounds(device, smoke))
    benchmark.extra_info.update(
        case=f"unlearning {forget}", implementation="dau_fast", forget_images=len(task.split.forget)
    )
