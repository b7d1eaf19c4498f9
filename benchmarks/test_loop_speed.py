"""Training steps and turns of the game, by every engine and as research code writes them.

    pytest benchmarks/test_loop_speed.py                 on the CPU: digits and the small network
    pytest benchmarks/test_loop_speed.py --device cuda   ResNet-18 on images of CIFAR's shape

Each row is a number of steps with everything they need: index batches, images, augmentation, both players'
updates. `extra_info`: case, implementation, images_per_second, first_call_seconds (compiling, capturing),
percent_of_peak (model FLOPs over what a matrix product reaches here in the same precision).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import plain
import pytest
import torch
from jobs import experiment, untrained
from measuring import flops_per_second, synchronise
from torch import nn
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.flop_counter import FlopCounterMode

from dau_fast.config import DauConfig
from dau_fast.engine.optimizers import sgd
from dau_fast.engine.steps import Engine
from dau_fast.engine.training import train
from dau_fast.methods.dau.game import Game
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
    return replace(task, original=job.fresh(0), engine=job.engine)


class PreparedOnce(Engine):
    """`engine`, for a loop that runs many times on the same players: what rows hold is steps alone."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.name)
        self._engine, self._step = engine, None

    def prepare(self, *arguments: Any, **named: Any) -> Any:
        self._step = self._step or self._engine.prepare(*arguments, **named)
        return self._step


# ---- a number of steps, by way


def training(task: Task, batch_size: int, steps: int) -> Callable[[], None]:
    model = task.original
    optimizer = sgd(model, None, lr=0.01, momentum=0.9, weight_decay=5e-4)
    batches = task.feed("speed", batch_size, task.split.train)
    engine = PreparedOnce(task.engine)

    def work() -> None:
        train(
            model, batches, steps=steps, optimizer=optimizer,
            scheduler=ConstantLR(optimizer, 1.0), engine=engine,
        )  # fmt: skip

    return work


def training_by_loader(task: Task, batch_size: int, steps: int) -> Callable[[], None]:
    network = _plain_network(task)
    pictures = plain.Pictures(task.images, augmented=True)
    batches = plain._for_ever(plain.loader(pictures, task.split.train, batch_size))
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    device = task.images.device

    def work() -> None:
        network.train()
        for images, labels in itertools.islice(batches, steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images.to(device)), labels.to(device)).backward()
            optimizer.step()

    return work


def playing(task: Task, config: DauConfig, steps: int) -> Callable[[], None]:
    game = Game(task.original, task, config, turns=steps)
    game.warm_up()

    def work() -> None:
        for _ in range(steps):
            game.turn()

    return work


def playing_by_loader(task: Task, config: DauConfig, steps: int) -> Callable[[], None]:
    network = _plain_network(task)
    pictures = plain.Pictures(task.images, augmented=True)
    job = plain.Job(task.images, task.split, network, task.original.head_name, task.recipe, config)
    game = plain.Game(network, job, plain._shown_by_all(network, pictures, job))
    sets = (task.split.retain, task.split.forget, task.split.validation)
    batches = [plain._endless(pictures, index, config.batch_size) for index in sets]
    device = task.images.device

    def work() -> None:
        for _, *parts in zip(range(steps), *batches, strict=False):
            game.turn(*((images.to(device), labels.to(device)) for images, labels in parts))

    return work


def _plain_network(task: Task) -> nn.Module:
    """The same architecture in PyTorch's usual memory format."""
    return task.fresh(0).release().to(memory_format=torch.contiguous_format)


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
    peak = flops_per_second(device, 256 if smoke else 4096 if device.type == "cuda" else 1024, dtype)
    benchmark.extra_info.update(
        case=case,
        implementation=implementation,
        images_per_second=rate,
        percent_of_peak=100 * rate * flops_an_image(model, task) / peak,
        first_call_seconds=first,
    )


def flops_an_image(model: Classifier, task: Task) -> float:
    """FLOPs of the forward and backward pass, by PyTorch's own count of convolutions and products."""
    images = task.images.batch(task.split.train[:8])
    with FlopCounterMode(display=False) as counter:
        model(images).logits.sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(images)


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
    config: DauConfig = task.settings["dau"]
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
