"""Supervised training on images that live on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dau_fast.engine.profiling import optimizer_section, section
from dau_fast.engine.steps import Compile, Engine, Players, Step


def train(
    model: nn.Module,
    batches: Iterator[Tensor],
    load: Callable[[Tensor], Tensor],
    labels: Tensor,
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

    model: images [B, ...] -> (features, logits). batches: index tensors [B], all of one size. load:
    index -> images. labels: int64 [N], looked up by index. scheduler: advanced once a step.
    engine: how the steps run, None for eagerly; name: what it calls this loop.
    """
    model.train()

    def build(compile: Compile) -> Step:
        objective = compile(lambda images, targets: loss(model(images).logits, targets))

        def step(images: Tensor, targets: Tensor) -> None:
            optimizer.zero_grad(set_to_none=True)
            with section("forward"):
                value = objective(images, targets)
            with section("backward"):
                value.backward()
            with section(optimizer_section(optimizer)):
                optimizer.step()

        return step

    step: Step | None = None
    for _, index in zip(range(steps), batches, strict=False):
        with section("data"):
            inputs = load(index), labels[index]
        if step is None:
            players = Players((model,), (optimizer,))
            step = (engine or Engine()).prepare(name, build, inputs, players, steps)
        step(*inputs)
        scheduler.step()
        on_step()


@torch.no_grad()
def recompute_batchnorm(
    model: nn.Module, load: Callable[[Tensor], Tensor], index: Tensor, *, batch_size: int = 512
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
    for batch in index.tensor_split(math.ceil(len(index) / batch_size)):
        model(load(batch))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(mode)
