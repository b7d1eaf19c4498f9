"""Several processes do what one does: losses, players, models and measures, in float64."""

from __future__ import annotations

import copy
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import together
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR
from toys import ONE_CLASS, TENTH, batches_of, blobs, game_of, perceptron, trained

from dau_fast.api import unlearn
from dau_fast.config import SENSITIVITIES, DauConfig, PruneConfig, TrainingRecipe
from dau_fast.data.images import Images
from dau_fast.data.split import Forget, hold_out, make_split
from dau_fast.engine.losses import BrokenLoss
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.training import train
from dau_fast.errors import UserError
from dau_fast.job.assembly import network_builder
from dau_fast.methods import original
from dau_fast.methods.dau import game
from dau_fast.methods.dau.attacker import attacker_loss
from dau_fast.methods.dau.shown import Shown
from dau_fast.methods.registry import get_method
from dau_fast.methods.task import Task, Unlearned
from dau_fast.metrics.unlearning import measure
from dau_fast.models import Classifier, SmallResNet
from dau_fast.prune.registry import find_pruners

pytestmark = pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs gloo")

CLASSWISE = DauConfig(label_conditioned=False, alpha=0.5, turns=22, batch_size=32, departure=1.0, beta=1e-3)
SPREAD = DauConfig(label_conditioned=True, alpha=0.5, turns=16, batch_size=32)
ONE_SHOT = ("fisher", "influence", "ssd", "mu_mis", "head_only")
ONE_IMAGE = Forget("one image", indices=(7,))  # fewer than there are processes
KINDS = ((ONE_CLASS, CLASSWISE), (TENTH, SPREAD), (ONE_IMAGE, SPREAD))
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def exact(forget: Forget) -> Task:
    """A trained task in float64."""
    task = trained(forget)
    fresh = task.fresh
    return replace(
        task,
        images=replace(task.images, pixels=task.images.pixels.double()),
        original=copy.deepcopy(task.original).double(),
        fresh=lambda seed: fresh(seed).double(),
    )


def shared(task: Task, accumulate: int = 1) -> Task:
    """The same task for all ranks together."""
    ranks = Ranks.from_group()

    def ready(model: Classifier) -> Classifier:
        model.network = ranks.prepare(model.network)
        return model

    return replace(
        task,
        runtime=Runtime(ranks=ranks, accumulate=accumulate),
        original=ready(copy.deepcopy(task.original)),
        fresh=lambda seed: ready(task.fresh(seed)),
    )


def averaged(values: list[torch.Tensor], weight: float) -> torch.Tensor:
    """The losses of all rows, from each rank's."""
    total = torch.stack(values) * weight / dist.get_world_size()
    dist.all_reduce(total)
    return total


# ---- first steps


def first_turns(
    task: Task, config: DauConfig, monkeypatch: pytest.MonkeyPatch, turns: int, shown: Shown | None = None
) -> dict[str, Any]:
    """Losses of both players in a game's first turns, and the players after them; shown: to the attacker."""
    losses: dict[str, list[torch.Tensor]] = {"defender_loss": [], "attacker_loss": []}

    objective, gradients = game.defender_loss, game.attacker_gradients

    def defend(*arguments: Any, **named: Any) -> torch.Tensor:
        value = objective(*arguments, **named)
        losses["defender_loss"].append(value.detach())
        return value

    def attack(*seen: Any) -> list[torch.Tensor]:
        losses["attacker_loss"].append(attacker_loss(*seen).detach())
        return gradients(*seen)

    with monkeypatch.context() as monkeypatch:
        monkeypatch.setattr(game, "defender_loss", defend)
        monkeypatch.setattr(game, "attacker_gradients", attack)
        with game_of(task, config, turns, shown) as players:
            players.warm_up()
            players.play()
    return {**losses, "defender": players.defender, "attacker": players.attacker}


def compare_first_turns(rank: int, ranks: int, forget: Forget, config: DauConfig) -> None:
    task = exact(forget)
    with pytest.MonkeyPatch.context() as monkeypatch:
        alone = first_turns(task, config, monkeypatch, 5)
        together = first_turns(shared(task), config, monkeypatch, 5)
    weight = ranks * len(range(32)[Ranks(rank, ranks).own_rows(32)]) / 32
    torch.testing.assert_close(
        averaged(together["defender_loss"], weight), torch.stack(alone["defender_loss"]), **CLOSE
    )
    torch.testing.assert_close(together["attacker_loss"], alone["attacker_loss"], **CLOSE)
    for player in ("defender", "attacker"):
        found, expected = together[player].state_dict(), alone[player].state_dict()
        torch.testing.assert_close(dict(found), dict(expected), rtol=1e-8, atol=1e-9)
        same_on_every_rank(found)


def same_on_every_rank(state: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        first = tensor.clone()
        dist.broadcast(first, 0)
        assert torch.equal(tensor, first), name


def compare_all_first_turns(rank: int, ranks: int) -> None:
    for forget, config in KINDS:
        for sensitivity in SENSITIVITIES:
            compare_first_turns(rank, ranks, forget, replace(config, sensitivity=sensitivity))


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_first_turns_of_the_game(ranks: int) -> None:
    together(ranks, compare_all_first_turns, ranks)


# ---- whole methods


def compare_methods(forget: Forget, config: DauConfig) -> None:
    alone = exact(forget)
    asked = {"dau": config, "retrain_fast": replace(alone.recipe, epochs=3, label_smoothing=0.1)}
    for name in ("retrain", "retrain_fast", "dau", "ft", "ga", *ONE_SHOT):
        expected, found = (carry_out(name, task, asked.get(name)) for task in (alone, shared(alone)))
        same_on_every_rank(found.model.state_dict())
        torch.testing.assert_close(
            dict(found.model.state_dict()), dict(expected.model.state_dict()), rtol=1e-5, atol=1e-6
        )
        ours, theirs = (
            measured(alone, found.model, Ranks.from_group()),
            measured(alone, expected.model, Ranks()),
        )
        assert ours == theirs
        if name == "dau":
            assert found.history["step"] == expected.history["step"]


def carry_out(name: str, task: Task, asked: Any = None) -> Unlearned:
    """What comes of the method `name`; asked: its settings, None for its own."""
    method = get_method(name)
    return method.run(task, method.resolve(task, asked))


def measured(task: Task, model: Classifier, ranks: Ranks) -> Any:
    return measure(model, task.images.batch, task.labels, task.split, task.generator("measures"), ranks=ranks)


def compare_all_methods(rank: int) -> None:
    for forget, config in KINDS:
        compare_methods(forget, config)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_methods_and_measures(ranks: int) -> None:
    together(ranks, compare_all_methods)


# ---- from Python, and pruned


def call_from_python(rank: int) -> None:
    task = exact(TENTH)
    split, pixels, labels = task.split, task.images.pixels, task.labels
    names = ("forget", "retain", "validation", "test")
    sets = {name: (pixels[getattr(split, name)], labels[getattr(split, name)]) for name in names}
    network = task.original.release()
    if rank == 1:
        network[0].weight.data.zero_()  # what counts is the first process's model
    before = copy.deepcopy(network.state_dict())
    found = unlearn(network, **sets, config=SPREAD, device="cpu", distributed=True)
    torch.testing.assert_close(dict(network.state_dict()), dict(before), rtol=0, atol=0)
    assert [type(layer) for layer in found.model] == [type(layer) for layer in network]
    same_on_every_rank(found.model.state_dict())
    if rank == 0:
        expected = unlearn(network, **sets, config=SPREAD, device="cpu")
        assert found.after == expected.after
        torch.testing.assert_close(
            dict(found.model.state_dict()), dict(expected.model.state_dict()), rtol=1e-5, atol=1e-6
        )


def prune_together(rank: int) -> None:
    """Every process finds the same masks, and those of one."""
    images = Images(torch.randn(60, 1, 8, 8).double(), torch.arange(60) % 4, tuple("abcd"))
    dist.broadcast(images.pixels, 0)
    roles = hold_out(images.labels, None, 0, validation_share=0.2, test_share=0.2)
    split = make_split(roles, images.labels, TENTH, 0)
    recipe = TrainingRecipe(epochs=4, batch_size=12, lr=0.05)
    fresh = network_builder("small", images, Runtime(precision=torch.float64))
    for method in find_pruners():
        alone = Task(
            images, split, 0, fresh(1), fresh, recipe, pruning=PruneConfig(method, 0.7, iterations=5)
        )  # fmt: skip
        expected, found = original.train(alone), original.train(shared(replace(alone, original=fresh(1))))
        assert found.masks == expected.masks, method
        same_on_every_rank(found.model.state_dict())


def test_a_call_from_python_gives_every_process_the_result() -> None:
    together(2, call_from_python)


def test_masks_are_the_same_everywhere() -> None:
    together(2, prune_together)


def test_a_call_for_all_processes_needs_a_process_group() -> None:
    task = trained(TENTH)
    some = task.images.pixels[:40], task.labels[:40]
    with pytest.raises(UserError, match="`distributed=True` without a process group"):
        unlearn(task.original.network, forget=some, retain=some, validation=some, distributed=True)


# ---- agreeing and taking turns


def agree(rank: int, folder: Path) -> None:
    ranks, cpu = Ranks.from_group(), torch.device("cpu")
    assert ranks.agree(rank == 0, cpu) is True
    assert ranks.agree(rank == 1, cpu) is False
    with ranks.in_turn(True):
        if rank == 0:
            time.sleep(0.5)
            (folder / "fetched").touch()
        assert (folder / "fetched").exists()


def test_the_first_process_decides_and_goes_first(tmp_path: Path) -> None:
    together(2, agree, tmp_path)


# ---- activation checkpointing


def checkpointed_training(rank: int) -> None:
    """Layers that wait for the other rank are passed once more on the way back."""
    images = Images(torch.randn(48, 1, 8, 8).double(), torch.arange(48) % 4, tuple("abcd"))
    dist.broadcast(images.pixels, 0)
    ranks = Ranks.from_group()
    found = []
    for runtime in (Runtime(), Runtime(ranks=ranks, activation_checkpointing=True)):
        torch.manual_seed(0)
        model = Classifier(runtime.ranks.prepare(SmallResNet(1, 4).double()))
        optimizer = SGD(model.parameters(), lr=0.1)
        mine = runtime.ranks.own_rows(16)
        train(
            model,
            batches_of(images, [index[mine] for index in torch.arange(48).split(16)]),
            steps=3,
            optimizer=optimizer,
            scheduler=ConstantLR(optimizer, 1.0),
            runtime=runtime,
        )
        found.append(dict(model.state_dict()))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def test_activation_checkpointing() -> None:
    together(2, checkpointed_training)


# ---- a broken loss


def break_on_one(rank: int) -> None:
    ranks = Ranks.from_group()
    images, model = blobs(96), perceptron(0)
    model.network = ranks.prepare(model.network)
    pixels = images.pixels.clone()
    pixels[5 * 8 + 6] = float("nan")  # the second process's
    rows = [part[ranks.own_rows(8)] for part in torch.arange(len(pixels)).split(8)]
    optimizer = SGD(model.network.parameters(), lr=0.05)
    with pytest.raises(BrokenLoss, match=r"the loss of lesson is NaN or infinite in step 6 of 12$"):
        train(
            model,
            batches_of(replace(images, pixels=pixels), rows),
            steps=12,
            optimizer=optimizer,
            scheduler=ConstantLR(optimizer, 1.0),
            runtime=Runtime(ranks=ranks),
            name="lesson",
        )


def test_all_processes_end_where_one_has_a_broken_loss() -> None:
    together(2, break_on_one)
