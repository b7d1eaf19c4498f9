"""Counters of what a real game does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from machines import USUAL
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from dau_fast.config import DauConfig
from dau_fast.cost import Job, count_network
from dau_fast.engine import loop
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.steps import Build, Prepared
from dau_fast.methods.dau import difficulty, game, referee
from dau_fast.methods.dau.attacker import Attacker
from dau_fast.methods.dau.difficulty import are_pictures
from dau_fast.methods.task import Task
from dau_fast.models import Classifier

CONFIGS = {
    "usual": USUAL,
    "sampled": replace(USUAL, retain_sample=2.0, batch_size=32, beta=1e-3, departure=1.0),
    "other settings": replace(USUAL, turns=23, looks=5, attacker_steps=2, warmup_steps=7, exam_share=0.004),
    "more looks than turns": replace(USUAL, turns=7, looks=40, batch_size=64),
    "short looks and statistics": replace(USUAL, look_images=10, norm_images=37),
    "another view": replace(USUAL, label_conditioned=False, departure=1.0, sensitivity="classifier"),
    "a class as usual": replace(
        USUAL, label_conditioned=False, departure=1.0, difficulty=False, features=True, settled=0.3
    ),
    "no teacher": replace(USUAL, anchor=0.0),
}


@contextmanager
def unrehearsed() -> Iterator[None]:
    """Steps are built and not run before: what is counted is what the clock of a method sees."""

    def prepare(name: str, build: Build, *given: Any, compilable: str | None = None) -> Prepared:
        runtime: Runtime = given[-1]
        parts = runtime.count_parts(name)
        return Prepared(build(lambda function: function, parts), "eager", "", parts, 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", prepare)
        yield


class Watched(Ranks):
    """Ranks whose gradients are averaged by calls from Python, where they can be counted."""

    def parallel(self, model: nn.Module) -> nn.Module:
        called = super().parallel(model)
        called.register_comm_hook(None, allreduce_hook)
        return called


@contextmanager
def once() -> Iterator[None]:
    """Games are played to their last turn and not again, whatever becomes of so small a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(referee, "_LOSS", math.inf)
        patch.setattr(referee, "_LEFT", 0.0)
        yield


def count_game(task: Task, config: DauConfig) -> dict[str, int]:
    """What a game does, by the names of Work; of evaluation batches, those of all kinds."""
    seen: Counter[str] = Counter()
    forward, judge, look = Classifier.forward, Attacker.forward, referee.Referee.look
    defender = sum(parameter.numel() for parameter in task.original.parameters())

    def passed(self: Classifier, images: Tensor) -> Any:
        training = "training_images" if torch.is_grad_enabled() else "norm_images"
        shown = "taught_images" if self is task.original else "evaluated_images"
        seen[training if self.training else shown] += len(images)
        seen["evaluation_batches"] += not torch.is_grad_enabled()
        return forward(self, images)

    def judged(self: Attacker, u: Tensor) -> Tensor:
        seen["attacker_rows" if torch.is_grad_enabled() else "judged_rows"] += len(u)
        return judge(self, u)

    gradients = game.attacker_gradients

    def learned(attacker: Attacker, *sets: Tensor) -> list[Tensor]:
        seen["attacker_rows"] += len(sets[0]) + len(sets[1])
        return gradients(attacker, *sets)

    def looked(self: referee.Referee, *given: Any) -> bool:
        seen["looks"] += 1
        return look(self, *given)

    def stepped(optimizer: Optimizer, *_: Any) -> None:
        size = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        seen["updates"] += size * (size == defender)
        seen["turns" if size == defender else "attacker_steps"] += 1

    rate = difficulty.Rows.forward

    def rated(self: difficulty.Rows, images: Tensor) -> Tensor:
        seen["rated_images"] += len(images)
        return rate(self, images)

    with once(), unrehearsed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(difficulty.Rows, "forward", rated)
        patch.setattr(Classifier, "forward", passed)
        patch.setattr(Attacker, "forward", judged)
        patch.setattr(game, "attacker_gradients", learned)
        patch.setattr(referee.Referee, "look", looked)
        handle = register_optimizer_step_post_hook(stepped)
        try:
            game.unlearn(task, config)
        finally:
            handle.remove()
    return dict(seen)


def count_equivalents_of(work: Callable[[], object]) -> float:
    """Images that pass forward a third each, and those whose gradient comes back two thirds."""
    seen: Counter[str] = Counter()
    forward = Classifier.forward

    def passed(self: Classifier, images: Tensor) -> Any:
        seen["forward"] += len(images)
        outputs = forward(self, images)
        if outputs.features.requires_grad:
            outputs.features.register_hook(backed)
        return outputs

    def backed(gradient: Tensor) -> None:
        seen["backward"] += len(gradient)

    with unrehearsed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "forward", passed)
        work()
    return (seen["forward"] + 2 * seen["backward"]) / 3


def job_of(task: Task, config: DauConfig, processes: int = 1) -> Job:
    split = task.split
    network = count_network(task.fresh(0), task.images.batch(split.retain[:4]))
    sizes = len(split.forget), len(split.retain), len(split.validation)
    return Job(
        network, config, *sizes, 24.0, processes=processes, earlier=len(split.earlier),
        classwise=split.classwise, pictures=are_pictures(task.images.shape),
    )  # fmt: skip
