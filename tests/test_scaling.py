"""The cost model: what it counts against what a real game does, and constants found again from results."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import together
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from toys import TENTH, trained

from dau_fast import scaling
from dau_fast.config import DauConfig
from dau_fast.dau import game, referee
from dau_fast.dau.attacker import Attacker
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.steps import Engine, Step
from dau_fast.models import Classifier
from dau_fast.scaling import Job, Work
from dau_fast.split import Forget
from dau_fast.task import Task

USUAL = DauConfig(label_conditioned=True, alpha=0.5, game_epochs=2, batch_size=16)
CONFIGS = {
    "usual": USUAL,
    "sampled": replace(USUAL, retain_sample=2.0, batch_size=32, recovery_epochs=3),
    "parts of epochs": replace(USUAL, game_epochs=1.3, looks_per_epoch=5, attacker_steps=2, warmup_steps=7),
    "more looks than turns": replace(USUAL, looks_per_epoch=40, batch_size=64),
    "nearly no exam": replace(USUAL, exam_share=0.004),
}


# ---- counters of a real game


class Unrehearsed(Engine):
    """Steps are built and not run: what is counted is what the clock of a method sees."""

    def prepare(self, loop: str, build: Callable[..., Step], *_: Any, **__: Any) -> Step:
        return build(lambda function: function)


class Watched(Ranks):
    """Ranks whose gradients are averaged by calls from Python, where they can be counted."""

    def parallel(self, model: nn.Module) -> nn.Module:
        called = super().parallel(model)
        called.register_comm_hook(None, allreduce_hook)
        return called


def counted(task: Task, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """What a game without end does, by the names of Work; of evaluation batches, those of all kinds."""
    seen: Counter[str] = Counter()
    forward, judge, compare = Classifier.forward, Attacker.forward, referee.auc
    defender = sum(parameter.numel() for parameter in task.original.parameters())

    def passed(self: Classifier, images: Tensor) -> Any:
        training = "training_images" if torch.is_grad_enabled() else "norm_images"
        seen[training if self.training else "evaluated_images"] += len(images)
        seen["evaluation_batches"] += not torch.is_grad_enabled()
        return forward(self, images)

    def judged(self: Attacker, u: Tensor) -> Tensor:
        seen["attacker_rows"] += len(u) * torch.is_grad_enabled()
        return judge(self, u)

    def compared(members: Tensor, others: Tensor) -> float:
        seen["looks"] += 1
        seen["exam_pairs"] += len(members) * len(others)
        return compare(members, others)

    def stepped(optimizer: Optimizer, *_: Any) -> None:
        size = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        seen["updates"] += size * (size == defender)
        seen["steps" if size == defender else "attacker_steps"] += 1

    patch.setattr(referee, "_LOOKS_IN_A_ROW", math.inf)
    patch.setattr(Classifier, "forward", passed)
    patch.setattr(Attacker, "forward", judged)
    patch.setattr(referee, "auc", compared)
    handle = register_optimizer_step_post_hook(stepped)
    try:
        game.unlearn(task)
    finally:
        handle.remove()
    return dict(seen)


def a_job(task: Task, config: DauConfig, processes: int = 1) -> Job:
    split = task.split
    network = scaling.count(task.fresh(0), task.images.batch(split.retain[:4]))
    return Job(
        network,
        config,
        len(split.forget),
        len(split.retain),
        len(split.validation),
        24.0,
        processes=processes,
    )


def expected(work: Work) -> dict[str, float]:
    """By the names of `counted`."""
    found = asdict(work)
    found["steps"] = found.pop("turns") + found.pop("recovery_steps")
    return found


# ---- the formulas against a real game


@pytest.mark.parametrize("forget", [TENTH, Forget("random:0.5", fraction=0.5)], ids=["tenth", "half"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_work_is_that_of_a_real_game(name: str, forget: Forget, monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(trained(forget, CONFIGS[name]), engine=Unrehearsed())
    job = a_job(task, CONFIGS[name])
    with monkeypatch.context() as patch:
        found = counted(task, patch)
    predicted = expected(scaling.work(job))
    assert (predicted.pop("collectives"), predicted.pop("wire_bytes")) == (0, 0)
    assert found == predicted


def test_without_batchnorm_there_is_no_pass_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    task = trained(TENTH, USUAL)
    bare = Classifier(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    task = replace(task, original=bare, fresh=lambda _: bare, engine=Unrehearsed())
    with monkeypatch.context() as patch:
        found = counted(task, patch)
    predicted = scaling.work(a_job(task, USUAL))
    assert predicted.norm_images == 0
    assert "norm_images" not in found
    assert found["evaluation_batches"] == predicted.evaluation_batches


def compare_processes(rank: int, ranks: int, config: DauConfig) -> None:
    task = trained(TENTH, config)
    job = a_job(task, config, ranks)
    sent: list[tuple[str, int]] = []
    shared = Watched(rank, ranks)
    task.original.network = shared.prepare(task.original.network)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "broadcast"):
            given = getattr(dist, name)

            def noted(first: Any, *rest: Any, name: str = name, given: Any = given, **more: Any) -> Any:
                mine = rest[0] if name == "all_gather" else first
                sent.append((name, mine.numel() * mine.element_size()))
                return given(first, *rest, **more)

            patch.setattr(dist, name, noted)
        found = counted(replace(task, engine=Unrehearsed(ranks=shared)), patch)
    # By rings: each part travels to all but one, twice where it is also added up.
    travels = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1, "broadcast": 1}
    found["collectives"] = len(sent)
    wire = sum(travels[name] * size for name, size in sent)
    if rank:
        return
    predicted = expected(scaling.work(job))
    assert predicted.pop("wire_bytes") == pytest.approx(wire, rel=1e-9)
    assert found == predicted


@pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs gloo")
@pytest.mark.parametrize(
    ("ranks", "config"), [(2, USUAL), (3, CONFIGS["sampled"])], ids=["gathered views", "reduced correlation"]
)
def test_the_work_of_several_processes_and_what_they_tell_each_other(ranks: int, config: DauConfig) -> None:
    together(ranks, compare_processes, ranks, config)
