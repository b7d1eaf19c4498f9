"""Training steps and turns of the game, some at once, on our engine and as research code has them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.flop_counter import FlopCounterMode

from dau_fast.config import DauConfig
from dau_fast.data.images import Images
from dau_fast.engine.batches import Batch, index_stream
from dau_fast.engine.chance import generator_for
from dau_fast.engine.device import Stopwatch, fastest_convolutions
from dau_fast.engine.loop import Loop, prepare_loop
from dau_fast.engine.optimizers import sgd
from dau_fast.engine.runtime import Runtime, choose_precision
from dau_fast.engine.training import make_loop, train
from dau_fast.job.assembly import network_builder
from dau_fast.methods.dau.game import Game, plan_game
from dau_fast.methods.dau.shown import prepare_shown
from dau_fast.methods.task import Task
from dau_fast.models import Classifier
from support import plain_data, plain_game


def stepping(loop: Loop, runtime: Runtime) -> Callable[[], None]:
    """The loop's steps, as often as they are called for: prepared once, so that rows hold steps alone."""
    loop.model.train()
    step = prepare_loop(loop, loop.inputs(next(loop.batches)), runtime).step

    def work() -> None:
        for _ in range(loop.steps):
            inputs = loop.inputs(next(loop.batches))
            with fastest_convolutions(runtime.device):
                step(*inputs)

    return work


def training(task: Task, batch_size: int, steps: int) -> Callable[[], None]:
    model = task.original
    optimizer = sgd(model, None, lr=0.01, momentum=0.9, weight_decay=5e-4)
    batches = task.feed("speed", batch_size, task.split.train)
    loop = make_loop(model, batches, steps=steps, optimizer=optimizer)
    return stepping(loop, task.runtime)


def training_by_loader(task: Task, batch_size: int, steps: int) -> Callable[[], None]:
    network = _plain_network(task)
    pictures = plain_data.Pictures(task.images, augmented=True)
    batches = plain_data.for_ever(plain_data.loader(pictures, task.split.train, batch_size))
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
    task, schedule = plan_game(task, config)
    shown = prepare_shown(task, config)
    game = Game(copy.deepcopy(task.original), task.original.eval(), task, config, schedule, shown)
    game.warm_up()
    return stepping(replace(game.make_loop(), steps=steps), task.runtime)


def playing_by_loader(task: Task, config: DauConfig, steps: int) -> Callable[[], None]:
    network = _plain_network(task)
    pictures = plain_data.Pictures(task.images, augmented=True)
    job = plain_data.Job(task.images, task.split, network, task.original.head_name, task.recipe, config)
    original = copy.deepcopy(network)
    rated = plain_game.Rated(pictures, job, original)
    game = plain_game.Game(network, original, job, plain_game.show_all(network, rated, job))
    sets = (task.split.retain, task.split.forget, task.split.validation)
    batches = [plain_game.endless(rated, index, config.batch_size) for index in sets]
    device = task.images.device

    def work() -> None:
        for _, *parts in zip(range(steps), *batches, strict=False):
            game.turn(*(tuple(column.to(device) for column in part) for part in parts))

    return work


def _plain_network(task: Task) -> nn.Module:
    """The same architecture in PyTorch's usual memory format."""
    return task.fresh(0).release().to(memory_format=torch.contiguous_format)


def flops_an_image(model: Classifier, task: Task) -> float:
    """FLOPs of the forward and backward pass, by PyTorch's own count of convolutions and products."""
    images = task.images.batch(task.split.train[:8])
    # A copy: the counter holds on to nodes of this stream's graph, and a capture has a stream of its own.
    counted = copy.deepcopy(model)
    with FlopCounterMode(display=False) as counter:
        counted(images).logits.sum().backward()
    return counter.get_total_flops() / len(images)


def fit_epochs(most: int, passes: float, seconds: float, rate: float) -> int:
    """As many epochs as fit into `seconds`, from 1 to `most`.

    passes: images that one epoch of all trainings passes. rate: images a second.
    """
    return max(1, min(most, int(seconds * rate / passes)))


def measure_training_rate(
    device: torch.device, arch: str = "resnet18", image_size: int = 32, batch_size: int = 256
) -> float:
    """Images a second in training `arch` as this engine runs it, warm-up left out.

    image_size: pixels a side.
    """
    pixels = torch.randint(0, 256, (4096, 3, image_size, image_size), dtype=torch.uint8)
    labels = torch.randint(0, 10, (4096,))
    images = Images(pixels, labels, tuple("0123456789")).to(device)
    # On CUDA so many that the capture before them counts little.
    steps = 300 if device.type == "cuda" else 60
    engine = "graphed" if device.type == "cuda" else "eager"
    runtime = Runtime(device, choose_precision("auto", device), engine)
    model = network_builder(arch, images, runtime)(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = ConstantLR(optimizer)
    order = index_stream(torch.arange(4096, device=device), batch_size, generator_for(0, "speed", device))
    batches = (Batch(images.batch(index), images.labels[index], index) for index in order)
    for count in (20, steps):
        with Stopwatch(device) as watch:
            train(model, batches, steps=count, optimizer=optimizer, scheduler=scheduler, runtime=runtime)
    return steps * batch_size / watch.seconds
