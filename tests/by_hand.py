"""Steps of the rivals written by hand: a small task in float64, its batches, and SGD on any loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from toys import blobs, perceptron

from dau_fast.config import TrainingRecipe
from dau_fast.data.split import Forget, hold_out, make_split
from dau_fast.engine.batches import index_stream
from dau_fast.methods import original
from dau_fast.methods.registry import get_method
from dau_fast.methods.task import Task, Unlearned
from dau_fast.models import Classifier

QUARTER, ONE_CLASS = Forget("random:0.25", fraction=0.25), Forget("class:1", label=1)
# One step on all images: no batch is left to chance. The retain set holds three times the forget set.
FORGET, RETAIN = 36, 108


def flat(seed: int) -> Classifier:
    """A network without BatchNorm, in which images of a batch do not touch each other."""
    torch.manual_seed(seed)
    return Classifier(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))


@cache
def _trained(forget: Forget, network: Callable[[int], Classifier]) -> Task:
    images = blobs(240)
    images = type(images)(images.pixels.double(), images.labels, images.class_names)
    roles = hold_out(images.labels, None, 0, validation_share=0.2, test_share=0.2)
    split = make_split(roles, images.labels, forget, 0)
    with torch.random.fork_rng():
        start = network(0).double()
    task = Task(images, split, 0, start, network, TrainingRecipe(epochs=5, batch_size=32, lr=0.05))
    original.train(task)
    task.original.eval()
    return task


def exact(forget: Forget = QUARTER, network: Callable[[int], Classifier] = perceptron) -> Task:
    """A trained task in float64; with `QUARTER` of FORGET and RETAIN images."""
    return _trained(forget, network)


def run(name: str, task: Task, **asked: Any) -> Unlearned:
    """What comes of the method `name` with its own settings but those that are `asked` for."""
    method = get_method(name)
    settings = method.resolve(task, asked)
    method.check(task, settings)
    return method.run(task, settings)


def drawn(task: Task, purpose: str, batch_size: int, *sets: Tensor) -> Iterator[Tensor]:
    """The indices of the batches that a feed of this purpose gives."""
    order = task.generator(purpose)
    return map(torch.cat, zip(*(index_stream(index, batch_size, order) for index in sets), strict=True))


def take_steps(
    task: Task,
    losses: Iterable[Callable[[Classifier], Tensor]],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> Classifier:
    """A copy of the original after one step of SGD on each of `losses`."""
    model = copy.deepcopy(task.original).train()
    weights = list(model.parameters())
    velocity = [torch.zeros_like(weight) for weight in weights]
    for loss in losses:
        slopes = torch.autograd.grad(loss(model), weights)
        with torch.no_grad():
            for weight, slope, v in zip(weights, slopes, velocity, strict=True):
                v.mul_(momentum).add_(slope + weight_decay * weight)
                weight.sub_(lr * v)
    return model


def same(one: Classifier, other: Classifier) -> None:
    """Assert equal weights and statistics, but for rounding."""
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=1e-9, atol=1e-11)


def pixels_of(task: Task, index: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels of `index` [N]."""
    return task.images.batch(index), task.labels[index]
