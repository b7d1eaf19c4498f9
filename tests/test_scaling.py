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
from dau_fast.data.split import Forget
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.steps import Engine, Step
from dau_fast.methods.dau import game, referee
from dau_fast.methods.dau.attacker import Attacker
from dau_fast.methods.dau.game import lesson_size
from dau_fast.methods.task import Task
from dau_fast.models import Classifier
from dau_fast.scaling import Job, Machine, Network, Work

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
    forward, judge, look = Classifier.forward, Attacker.forward, referee.Referee.look
    defender = sum(parameter.numel() for parameter in task.original.parameters())

    def passed(self: Classifier, images: Tensor) -> Any:
        training = "training_images" if torch.is_grad_enabled() else "norm_images"
        seen[training if self.training else "evaluated_images"] += len(images)
        seen["evaluation_batches"] += not torch.is_grad_enabled()
        return forward(self, images)

    def judged(self: Attacker, u: Tensor) -> Tensor:
        seen["attacker_rows" if torch.is_grad_enabled() else "judged_rows"] += len(u)
        return judge(self, u)

    def looked(self: referee.Referee, *given: Any) -> bool:
        seen["looks"] += 1
        return look(self, *given)

    def stepped(optimizer: Optimizer, *_: Any) -> None:
        size = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        seen["updates"] += size * (size == defender)
        seen["steps" if size == defender else "attacker_steps"] += 1

    patch.setattr(referee, "_LOOKS_IN_A_ROW", math.inf)
    patch.setattr(Classifier, "forward", passed)
    patch.setattr(Attacker, "forward", judged)
    patch.setattr(referee.Referee, "look", looked)
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
    assert [predicted.pop(name) for name in ("collectives", "hops", "wire_bytes")] == [0, 0, 0]
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
    hops = {"all_reduce": 2 * (ranks - 1), "all_gather": ranks - 1, "broadcast": 1}
    found |= {"collectives": len(sent), "hops": sum(hops[name] for name, _ in sent)}
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


# ---- a machine


NETWORK = Network(1e8, 50, 100_000, 64, 10, 5e5, 6e4, 9, 300, 1e5)
JOB = Job(NETWORK, replace(USUAL, batch_size=64), 200, 1000, 200, 3072.0)
MACHINE = Machine(
    training=2e-11, evaluation=1e-11, operation=1e-5, update=3e-10, attacker_step=1e-3, attacker=4e-11,
    logit=2e-8, normed=1e-9, hop=1e-4, byte=1e-9, start=0.1, processors=2,
)  # fmt: skip


def various() -> list[Job]:
    """Jobs that differ in everything that has a constant of its own."""
    jobs = [
        replace(JOB, forget=forget, validation=validation, retain=retain)
        for forget in (20, 500, 3000) for validation in (100, 2000) for retain in (500, 4000)
    ]  # fmt: skip
    jobs += [replace(JOB, processes=ranks, forget=forget) for ranks in (2, 3, 4) for forget in (20, 900)]
    jobs += [replace(JOB, config=replace(JOB.config, batch_size=batch, warmup_steps=w))
             for batch in (16, 256) for w in (5, 500)]  # fmt: skip
    changes: list[dict[str, Any]] = [
        {"classes": 1000}, {"flops": 1e9}, {"parameters": 10_000_000}, {"operations": 400}, {"norms": 50},
        {"normed": 1e6},
    ]  # fmt: skip
    networks = [replace(NETWORK, **change) for change in changes]
    return jobs + [replace(JOB, network=one, processes=ranks) for ranks in (1, 2) for one in networks]


def test_a_fit_finds_the_constants_behind_the_measurements() -> None:
    truth = [(job, scaling.predict(job, MACHINE).total_seconds) for job in various()]
    found = scaling.fit(truth, processors=2)
    assert scaling.constants(found) == pytest.approx(scaling.constants(MACHINE), rel=1e-3)
    unseen = replace(JOB, forget=77, retain=2222, processes=3)
    cost = scaling.predict(unseen, found)
    assert cost.total_seconds == pytest.approx(scaling.predict(unseen, MACHINE).total_seconds, rel=1e-4)


def test_no_constant_is_negative_and_one_that_nothing_needs_is_none() -> None:
    alone = [job for job in various() if job.processes == 1]
    noise = torch.linspace(0.7, 1.4, len(alone)).tolist()
    found = scaling.fit(
        [(job, n * scaling.predict(job, MACHINE).total_seconds) for job, n in zip(alone, noise, strict=True)]
    )
    values = scaling.constants(found)
    assert min(values.values()) >= 0
    assert values["hop"] == values["byte"] == 0


def test_nothing_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="no measurements"):
        scaling.fit([])


def test_processes_that_share_processors_take_longer_and_fewer_do_not() -> None:
    def seconds(processes: int, processors: int | None) -> float:
        machine = replace(MACHINE, processors=processors)
        return scaling.predict(replace(JOB, processes=processes), machine).total_seconds

    assert seconds(4, 2) == pytest.approx(2 * seconds(4, None))
    assert seconds(2, 2) == seconds(2, None) == seconds(2, 8)


def test_the_cost_of_a_sample_does_not_follow_the_retain_set() -> None:
    sampled = replace(JOB, config=replace(JOB.config, retain_sample=2.0))
    few, many = (scaling.predict(replace(sampled, retain=n), MACHINE) for n in (1000, 100_000))
    assert few.total_seconds == many.total_seconds
    assert many.memory["images"] > few.memory["images"]


# ---- memory


def test_what_breaks_first_is_what_grows_first() -> None:
    wide = replace(JOB, network=replace(NETWORK, classes=100_000))
    large = replace(JOB, image_bytes=1e6)
    cases = {
        "images": (large, 8e9),
        "labels and indices": (replace(large, streamed=True), 8e9),
        "attacker": (replace(wide, streamed=True), 2e9),
    }
    for part, (job, memory) in cases.items():
        found = scaling.what_breaks_first(job, memory)
        assert found.part == part
        fits, fails = (scaling.predict_memory(scaling._grown(job, f * found.growth))[1] for f in (0.95, 1.05))
        assert fits <= memory < fails, part


def test_however_many_classes_the_attackers_lesson_has_a_limit() -> None:
    wide = replace(JOB, network=replace(NETWORK, classes=100_000), streamed=True)
    many = scaling._grown(wide, 1000)
    warm_up = scaling.memory(many)["warm-up of the attacker"]
    assert scaling.lesson(many) == [lesson_size(100_000, wide.config)] * 2
    assert warm_up["u of the lesson"] <= 2 * 2**29
    assert scaling.work(many).attacker_rows < 2 * scaling.work(wide).attacker_rows * 1000


def test_a_model_that_does_not_fit_cannot_be_helped_by_fewer_images() -> None:
    found = scaling.what_breaks_first(replace(JOB, network=replace(NETWORK, parameters=10**10)), 8e9)
    assert (found.part, found.growth) == ("weights", 0.0)


def test_more_processes_than_images_in_a_batch_break_before_memory_does() -> None:
    assert scaling.what_breaks_first(replace(JOB, processes=65), 8e9).part.startswith("batch")


# ---- counting


def test_a_network_is_counted_as_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    model = Classifier(nn.Sequential(*network, nn.Linear(4 * 8 * 8, 5)))
    found = scaling.count(model, torch.zeros(6, 3, 8, 8))
    assert found.flops == 2 * (8 * 8 * 4 * 3 * 9 + 4 * 8 * 8 * 5)
    assert found.parameters == 4 * 3 * 9 + 4 + 8 + 4 * 8 * 8 * 5 + 5
    assert (found.features, found.classes, found.norms, found.channels) == (256, 5, 1, 4)
    assert found.normed == 4 * 8 * 8
    # Images, and what goes into the norm and comes out of the ReLU, which the last layer keeps too.
    assert found.activations == 4 * 8 * 8 * (3 + 4 + 4)
    assert found.largest == 4 * 4 * 8 * 8
