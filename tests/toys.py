"""Data and a network small enough to train in a tenth of a second: overlapping blobs and a perceptron."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dau_fast.config import DauConfig, TrainingRecipe
from dau_fast.data.images import Images
from dau_fast.data.split import Forget, hold_out, make_split
from dau_fast.data.streaming import StreamedImages
from dau_fast.engine.batches import Batch
from dau_fast.engine.loop import LoopCost
from dau_fast.engine.runtime import Runtime
from dau_fast.methods import original
from dau_fast.methods.dau.game import Game, plan_game
from dau_fast.methods.dau.shown import Shown, prepare_shown
from dau_fast.methods.task import Task
from dau_fast.models import Classifier


def blobs(count: int) -> Images:
    """Three overlapping normal distributions in six dimensions."""
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    return Images(3 * torch.eye(3, 6)[labels] + noise, labels, ("a", "b", "c"))


class MemorySource:
    """A source of streamed images, channels first in memory."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        self.shape = tuple(pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: Tensor, out: Tensor) -> None:
        out.copy_(self.pixels[index].permute(0, 2, 3, 1))


def streamed(images: Images) -> StreamedImages:
    """The same images, read batch by batch."""
    fields = {field.name: getattr(images, field.name) for field in dataclasses.fields(images)}
    pixels = images.pixels
    return StreamedImages(**fields | {"pixels": pixels[:0]}, source=MemorySource(pixels.cpu()))


def batches_of(images: Images, indices: Iterable[Tensor]) -> Iterator[Batch]:
    """The images of each index tensor, as they are."""
    return (Batch(images.batch(index), images.labels[index], index) for index in indices)


def perceptron(seed: int) -> Classifier:
    """A newly initialised network for `blobs`, with a BatchNorm to keep honest."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)]
        return Classifier(nn.Sequential(*layers))


ONE_CLASS, TENTH = Forget("class:2", label=2), Forget("random:0.1", fraction=0.1)


def trained(forget: Forget, seed: int = 0, device: torch.device | None = None) -> Task:
    """A task whose original was trained on the whole training set."""
    place = device or torch.device("cpu")
    images = blobs(480).to(place)
    keep = forget.indices or ()
    roles = hold_out(images.labels, None, seed, validation_share=0.25, test_share=0.2, keep=keep)
    split = make_split(roles, images.labels, forget, seed).to(place)
    recipe = TrainingRecipe(epochs=20, batch_size=32, lr=0.05)
    runtime = Runtime(place)
    task = Task(images, split, seed, perceptron(seed).to(place), perceptron, recipe, runtime=runtime)
    original.train(task)
    task.original.eval()
    return task


def with_earlier(task: Task, count: int) -> Task:
    """`task` as if the first `count` of its retain images had been forgotten before."""
    split = task.split
    gone, retain = split.retain[:count], split.retain[count:]
    train = torch.cat([split.forget, retain]).sort().values
    return dataclasses.replace(
        task, split=dataclasses.replace(split, train=train, retain=retain, earlier=gone)
    )


@contextmanager
def game_of(
    task: Task, config: DauConfig, turns: int | None = None, shown: Shown | None = None
) -> Iterator[Game]:
    """A game on a copy of the task's original, of `turns` turns without a look; None for its own length.

    shown: to the attacker; prepared by default.
    """
    task, schedule = plan_game(task, config)
    if turns is not None:
        schedule = dataclasses.replace(schedule, turns=turns, look_every=turns + 1)
    shown = shown or prepare_shown(task, config)
    with Game(copy.deepcopy(task.original), task.original, task, config, schedule, shown) as game:
        yield game


def engines(loops: Iterable[LoopCost]) -> dict[str, str]:
    """What ran each loop, and why where nobody asked for it."""
    return {loop.loop: ": ".join(filter(None, (loop.engine, loop.reason))) for loop in loops}
