"""Training steps and turns of the game, by every engine and as research code writes them.

    pytest benchmarks/test_loop_speed.py                 on the CPU: digits and the small network
    pytest benchmarks/test_loop_speed.py --device cuda   ResNet-18 on images of CIFAR's shape

Each row is a number of steps with everything they need: index batches, images, augmentation, both players'
updates. `extra_info`: case, implementation, images_per_second, first_call_seconds (compiling, capturing),
percent_of_peak (model FLOPs over what a matrix product reaches here in the same precision).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.jobs import experiment, settings, untrained
from support.loops import flops_an_image, playing, playing_by_loader, training, training_by_loader
from support.measuring import flops_per_second, synchronise

from dau_fast.methods.task import Task
from dau_fast.models import Classifier

BATCHES = (32, 64, 128, 256, 512)
# engine, precision; the first is what a user gets.
WAYS = {
    "cpu": {"dau_fast": ("auto", "auto"), "compiled": ("compiled", "auto")},
    "cuda": {
        "dau_fast": ("captured", "auto"),
        "compiled": ("compiled", "auto"),
        "eager bf16": ("eager", "bf16"),
        "eager fp32": ("eager", "fp32"),
    },
}


@pytest.fixture
def task(smoke: bool, device: torch.device) -> Task:
    return untrained(experiment(device, smoke=smoke))


def fitted(task: Task, precision: str, engine: str) -> Task:
    """The task with a model of `precision` and steps by `engine`."""
    job = experiment(task.images.device, smoke=True, engine=engine, precision=precision)
    return replace(task, original=job.fresh(0), runtime=job.runtime)


# ---- rows


def record(
    benchmark: Any,
    make: Callable[[], Callable[[], None]],
    model: Classifier,
    task: Task,
    images: int,
    case: str,
    implementation: str,
    smoke: bool,
) -> None:
    device = task.images.device
    began = time.perf_counter()
    work = make()
    work()
    synchronise(device)
    first = time.perf_counter() - began

    def timed() -> None:
        work()
        synchronise(device)

    benchmark.group = case
    benchmark.pedantic(timed, rounds=2 if smoke else 7, warmup_rounds=0 if smoke else 1)
    rate = images / benchmark.stats.stats.median
    dtype = model.precision or torch.float32
    peak = flops_per_second(device, 256 if smoke else 1024, dtype)
    benchmark.extra_info.update(
        case=case,
        implementation=implementation,
        images_per_second=rate,
        percent_of_peak=100 * rate * flops_an_image(model, task) / peak,
        first_call_seconds=first,
    )


def ways(device_type: str) -> list[str]:
    return [*WAYS[device_type], "DataLoader"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "way" in metafunc.fixturenames:
        metafunc.parametrize("way", ways(metafunc.config.getoption("--device")))


@pytest.mark.parametrize("batch_size", BATCHES)
def test_training_steps(benchmark: Any, task: Task, way: str, batch_size: int, smoke: bool) -> None:
    device = task.images.device.type
    if batch_size != 256 and way in ("compiled", "eager fp32"):
        pytest.skip("compared at the recipe's batch size alone")
    if smoke and batch_size != 256:
        pytest.skip("toy sizes: one batch size")
    batch_size = 32 if smoke else batch_size
    steps = 2 if smoke else max(2, 2048 // batch_size)
    if way == "DataLoader":
        chosen, make = fitted(task, "fp32", "eager"), training_by_loader
    else:
        engine, precision = WAYS[device][way]
        chosen, make = fitted(task, precision, engine), training
    case = f"training step, batch {batch_size}"
    record(
        benchmark, lambda: make(chosen, batch_size, steps), chosen.original, chosen,
        batch_size * steps, case, way, smoke,
    )  # fmt: skip


def test_turns_of_the_game(benchmark: Any, task: Task, way: str, smoke: bool) -> None:
    device = task.images.device.type
    config = settings(task)
    steps = 2 if smoke else 12
    if way == "DataLoader":
        chosen, make = fitted(task, "fp32", "eager"), playing_by_loader
    else:
        engine, precision = WAYS[device][way]
        chosen, make = fitted(task, precision, engine), playing
    case = f"turn of the game, batch 3 x {config.batch_size}"
    record(
        benchmark, lambda: make(chosen, config, steps), chosen.original, chosen,
        3 * config.batch_size * steps, case, way, smoke,
    )  # fmt: skip
