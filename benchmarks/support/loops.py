"""Training steps and turns of the game, some at once, on our engine and as research code has them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.flop_counter import FlopCounterMode

from dau_fast.config import DauConfig
from dau_fast.data.images import Images
from dau_fast.engine.batches import Batch, generator_for, index_stream
from dau_fast.engine.optimizers import sgd
from dau_fast.engine.runtime import Stopwatch, choose_precision
from dau_fast.engine.steps import Engine
from dau_fast.engine.training import train
from dau_fast.job.experiment import builder
from dau_fast.methods.dau.game import Game
from dau_fast.methods.task import Task
from dau_fast.models import Classifier
from support import plain


class PreparedOnce(Engine):
    """`engine`, for a loop that runs many times on the same players: what rows hold is steps alone."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.name)
        self._engine, self._step = engine, None

    def prepare(self, *arguments: Any, **named: Any) -> Any:
        self._step = self._step or self._engine.prepare(*arguments, **named)
        return self._step


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


def flops_an_image(model: Classifier, task: Task) -> float:
    """FLOPs of the forward and backward pass, by PyTorch's own count of convolutions and products."""
    images = task.images.batch(task.split.train[:8])
    with FlopCounterMode(display=False) as counter:
        model(images).logits.sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(images)


def measure_training_rate(device: torch.device, steps: int = 60) -> float:
    """Images a second in training ResNet-18 at 32x32, batch 256, as this engine runs it, warm-up left out."""
    pixels = torch.randint(0, 256, (4096, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (4096,))
    images = Images(pixels, labels, tuple("0123456789")).to(device)
    model = builder("resnet18", images, choose_precision("auto", device))(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = ConstantLR(optimizer)
    order = index_stream(torch.arange(4096, device=device), 256, generator_for(0, "speed", device))
    batches = (Batch(images.batch(index), images.labels[index], index) for index in order)
    for count in (20, steps):
        with Stopwatch(device) as watch:
            train(model, batches, steps=count, optimizer=optimizer, scheduler=scheduler)
    return steps * 256 / watch.seconds
