"""Supervised training, and the statistics of BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dau_fast.engine.batches import Batch, Load, load_each
from dau_fast.engine.profiling import optimizer_section, section
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.steps import Compile, Engine, Players, Step


def train(
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    steps: int,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    on_step: Callable[[], None] = lambda: None,
    engine: Engine | None = None,
    name: str = "training",
) -> None:
    """Take `steps` optimiser steps on loss(logits, labels), in place.

    model: images [B, ...] -> (features, logits). batches: all of one size. loss: a mean over rows.
    scheduler: advanced once a step. engine: how the steps run, and on how many processes; None for
    eagerly and on one. name: what it calls this loop.
    """
    engine = engine or Engine()
    ranks = engine.ranks
    model.train()
    if steps == 0:
        return
    called = ranks.parallel(model)
    forward = engine.forward(called, model)
    sizes: list[int] = []

    def build(compile: Compile) -> Step:
        objective = compile(lambda images, targets: loss(forward(images).logits, targets))

        def step(images: Tensor, targets: Tensor) -> None:
            optimizer.zero_grad(set_to_none=True)
            parts = ranks.micro_batches(sizes, engine.accumulate)
            for part in parts:
                with ranks.sharing(called, part is parts[-1]):
                    with section("forward"):
                        value = objective(images[part.rows], targets[part.rows])
                    with section("backward"):
                        (value if part.weight == 1 else part.weight * value).backward()
            with section(optimizer_section(optimizer)):
                optimizer.step()

        return step

    step: Step | None = None
    waiting = engine.waiting_of(name)
    for _ in range(steps):
        images, targets, _index = waiting.batch(batches)
        if step is None:
            sizes += ranks.sizes(len(images), images.device)
            players = Players((model,), (optimizer,))
            step = engine.prepare(name, build, (images, targets), players, steps)
        step(images, targets)
        scheduler.step()
        on_step()
        waiting.done(images.device)


@torch.no_grad()
def recompute_batchnorm(
    model: nn.Module,
    load: Load,
    index: Tensor,
    *,
    batch_size: int = 512,
    ranks: Ranks = ALONE,
) -> None:
    """Replace every BatchNorm's running statistics by their mean over `index` [N], in place.

    The running averages of training still hold what the model is to forget; these do not.
    A model without BatchNorm, and a set of one image, change nothing.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms or len(index) < 2:
        return
    momenta = [norm.momentum for norm in norms]
    mode = model.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's way to ask for the plain mean over batches
    model.train()
    # Batches of even size, because that mean weighs batches and not images.
    parts = index.tensor_split(math.ceil(len(index) / batch_size))
    for images in load_each(load, [part[ranks.mine(len(part))] for part in parts]):
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(mode)
