"""Supervised training, and the statistics of BatchNorm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dau_fast.engine.batches import Batch, Load, load_each
from dau_fast.engine.chance import seeded
from dau_fast.engine.evaluation import EVALUATION_BATCH, count_batches
from dau_fast.engine.loop import Forward, Loop, LoopCost, PartLoss, run_loop
from dau_fast.engine.modes import find_batchnorms, plain_means, training
from dau_fast.engine.profiling import section
from dau_fast.engine.ranks import ALONE, MicroBatch, Ranks
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.steps import Compile
from dau_fast.errors import UserError


def train(
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    steps: int,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    on_step: Callable[[], None] = lambda: None,
    runtime: Runtime | None = None,
    name: str = "training",
    seed: int = 0,
) -> tuple[LoopCost, ...]:
    """Take `steps` optimiser steps on loss(logits, labels), in place; how they ran and what that cost.

    model: images [B, ...] -> (features, logits). batches: all of one size. loss: a mean over rows.
    scheduler: advanced once a step. runtime: None for eagerly, on a CPU and in one process. name: what
    reports call this loop. seed: of what the model itself draws, such as dropout.
    """

    def after(_: int) -> None:
        scheduler.step()
        on_step()

    loop = make_loop(model, batches, steps=steps, optimizer=optimizer, loss=loss, name=name)
    return run_loop(replace(loop, after=after, seed=seed), runtime or Runtime())


def make_loop(
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    steps: int,
    optimizer: Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    name: str = "training",
) -> Loop:
    """The loop that `train` runs, without its schedule."""

    def build_loss(compile: Compile, forward: Forward) -> PartLoss:
        objective = compile(lambda images, targets: loss(forward(images).logits, targets))

        def part_loss(_: MicroBatch, images: Tensor, targets: Tensor) -> Tensor:
            with section("forward"):
                value: Tensor = objective(images, targets)
            return value

        return part_loss

    return Loop(
        name,
        model,
        optimizer,
        batches,
        steps,
        loss=build_loss,
        inputs=lambda batch: (batch.images, batch.labels),
        after=lambda _: None,
    )


@torch.no_grad()
def recompute_batchnorm(
    model: nn.Module,
    load: Load,
    index: Tensor,
    *,
    batch_size: int = EVALUATION_BATCH,
    ranks: Ranks = ALONE,
    seed: int = 0,
) -> None:
    """Replace every BatchNorm's running statistics by their mean over `index` [N], in place.

    The running averages of training still hold what the model is to forget; these do not.
    A model without BatchNorm, and a set of one image, change nothing; nor does a pass that fails. Where a
    GPU's memory is short, smaller batches are taken, and a line says so. seed: of what the model itself
    draws, such as dropout; PyTorch's global generators are as before afterwards.
    """
    norms = [norm for norm in find_batchnorms(model) if norm.track_running_stats]
    if not norms or len(index) < 2:
        return
    # Batches of even size, because the mean over batches weighs batches and not images.
    # None has a single image, which has no variance.
    parts = index.tensor_split(min(count_batches(len(index), batch_size), len(index) // 2))
    try:
        with (
            seeded(seed + ranks.rank, index.device),
            training(model),
            _statistics_or_nothing(norms),
            plain_means(norms),
        ):
            for norm in norms:
                norm.reset_running_stats()
            for images in load_each(load, [part[ranks.own_rows(len(part))] for part in parts]):
                model(images)
        return
    except torch.OutOfMemoryError as error:
        half = len(parts[0]) // 2
        if half < 2 or not ranks.alone:
            raise UserError(
                "the GPU's memory does not hold the pass for BatchNorm statistics: start more processes, or "
                "take a device with more memory"
            ) from error
    torch.cuda.empty_cache()
    logging.getLogger("dau_fast").warning(
        "memory is short in the pass for BatchNorm statistics: %d images are taken at a time", half
    )
    recompute_batchnorm(model, load, index, batch_size=half, ranks=ranks, seed=seed)


@contextmanager
def _statistics_or_nothing(norms: list[_BatchNorm]) -> Iterator[None]:
    """What an error leaves of the statistics of `norms` is undone."""
    before = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    try:
        yield
    except BaseException:
        for norm, values in zip(norms, before, strict=True):
            for name, value in values.items():
                norm.get_buffer(name).copy_(value)
        raise
