"""Models shared out to several processes do what whole ones do, and no process holds a whole one."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import together
from test_distributed import (
    CLASSWISE,
    CLOSE,
    KINDS,
    SPREAD,
    averaged,
    carry_out,
    exact,
    first_turns,
    measured,
    same_on_every_rank,
    shared,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from toys import ONE_CLASS, TENTH, streamed

from dau_fast.api import unlearn
from dau_fast.config import DauConfig
from dau_fast.data.images import Images
from dau_fast.data.split import Forget
from dau_fast.engine.evaluation import map_batches, predict, predict_each
from dau_fast.engine.optimizers import sgd
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.sharding import check_shard, is_sharded, placed, sharded
from dau_fast.errors import UserError
from dau_fast.methods import original
from dau_fast.methods.dau import view
from dau_fast.methods.dau.shown import prepare_shown
from dau_fast.methods.dau.view import View
from dau_fast.methods.running import run_timed
from dau_fast.methods.task import Task
from dau_fast.models import Classifier, Outputs, SmallResNet
from dau_fast.prune import Masks

pytestmark = pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs gloo")

CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block: what is put together at a time. Its width is not to be shared evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(17, 17), nn.BatchNorm1d(17), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def residual(seed: int) -> Classifier:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(6, 17), Block(), Block(), nn.Linear(17, 3))
    return Classifier(network.double())


def exact_residual(forget: Forget) -> Task:
    """What `exact` makes, on a network with blocks."""
    task = replace(exact(forget), original=residual(0), fresh=residual)
    original.train(task)
    task.original.eval()
    return task


def split_up(task: Task, **options: Any) -> Task:
    """The same task for all ranks together, each with its share."""
    return replace(shared(task), runtime=Runtime(ranks=Ranks.from_group(), shard=True, **options))


def plain(model: nn.Module) -> None:
    """Nothing of `model` is sharded, and it can be copied."""
    assert not is_sharded(model)
    for name, tensor in copy.deepcopy(model).state_dict(keep_vars=True).items():
        assert type(tensor) in (Tensor, nn.Parameter), name
    assert not any("FSDP" in type(module).__name__ for module in model.modules())


# ---- the game


def sharded_turns(
    task: Task, config: DauConfig, monkeypatch: pytest.MonkeyPatch, turns: int
) -> dict[str, Any]:
    """What first_turns finds of a sharded defender, which it has whole in the end."""
    whole, shown = copy.deepcopy(task.original), prepare_shown(task, config)
    with task.teacher() as teacher, sharded(whole, CPU) as part:
        alias = replace(task, original=_Alias(part, teacher))
        found = first_turns(alias, config, monkeypatch, turns, shown)
        assert is_sharded(found["defender"])
    return {**found, "defender": whole}


class _Alias(nn.Module):
    """Stands for the original; a sharded model cannot be copied, so its copy is another one."""

    def __init__(self, twin: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.twin, self.original = twin, original

    @property
    def head(self) -> nn.Linear:
        return self.original.head

    def forward(self, images: Tensor) -> Outputs:
        return self.original(images)

    def __deepcopy__(self, _: Any) -> nn.Module:
        return self.twin


def compare_turns(rank: int, ranks: int) -> None:
    for make, (forget, config) in ((exact, KINDS[2]), (exact_residual, KINDS[0]), (exact_residual, KINDS[1])):
        task = make(forget)
        with pytest.MonkeyPatch.context() as monkeypatch:
            alone = first_turns(task, config, monkeypatch, 4)
            found = sharded_turns(split_up(task), config, monkeypatch, 4)
        weight = ranks * Ranks(rank, ranks).rows(32)[rank] / 32
        torch.testing.assert_close(
            averaged(found["defender_loss"], weight), torch.stack(alone["defender_loss"]), **CLOSE
        )
        torch.testing.assert_close(found["attacker_loss"], alone["attacker_loss"], **CLOSE)
        for player in ("defender", "attacker"):
            state = dict(found[player].state_dict())
            torch.testing.assert_close(state, dict(alone[player].state_dict()), rtol=1e-8, atol=1e-9)
            same_on_every_rank(state)


# ---- whole methods


def compare_methods(forget: Forget, config: DauConfig, *names: str) -> None:
    task = exact_residual(forget)
    short = replace(task.recipe, epochs=1)
    task = replace(task, recipe=short)
    asked = {"dau": replace(config, turns=10), "ga": short}
    before = copy.deepcopy(task.original.state_dict())
    for name in names:
        work, given = partial(carry_out, name, asked=asked.get(name)), split_up(task)
        expected, found = work(task), run_timed(name, work, given)
        plain(found.model)
        plain(given.original)
        same_on_every_rank(found.model.state_dict())
        assert_alike(found.model, expected.model)
        torch.testing.assert_close(dict(given.original.state_dict()), dict(before), rtol=0, atol=0)
        ours, theirs = (
            measured(task, found.model, Ranks.from_group()),
            measured(task, expected.model, Ranks()),
        )
        assert ours == theirs
        if name == "dau":
            assert found.history is not None
            assert expected.history is not None
            assert found.history["step"] == expected.history["step"]


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=1e-7, atol=1e-8)


def compare_savings() -> None:
    """Batches in parts, and activation checkpointing."""
    task, config = exact_residual(TENTH), replace(SPREAD, turns=12)
    for options in ({"accumulate": 2}, {"activation_checkpointing": True, "accumulate": 3}):
        whole = replace(shared(task), runtime=Runtime(ranks=Ranks.from_group(), **options))
        found, expected = (carry_out("dau", given, config) for given in (split_up(task, **options), whole))
        assert_alike(found.model, expected.model)


def call_from_python() -> None:
    config = replace(SPREAD, turns=12)
    task = exact_residual(TENTH)
    split, pixels, labels = task.split, task.images.pixels, task.labels
    names = ("forget", "retain", "validation", "test")
    sets = {name: (pixels[getattr(split, name)], labels[getattr(split, name)]) for name in names}
    network = task.original.release()
    found = unlearn(network, **sets, config=config, device="cpu", distributed=True, shard=True)
    plain(found.model)
    plain(network)
    expected = unlearn(network, **sets, config=config, device="cpu")
    assert (found.before, found.after) == (expected.before, expected.after)
    assert_alike(found.model, expected.model)
    full = replace(config, sensitivity="full")
    with pytest.raises(UserError, match="`sensitivity=full` takes gradients that `shard=True` does not"):
        unlearn(network, **sets, config=full, device="cpu", distributed=True, shard=True)


# ---- what a process holds


@contextmanager
def noting(note: Callable[[list[Tensor]], None]) -> Iterator[None]:
    """After every step of SGD tell weights, gradients and momenta."""

    def told(optimizer: Optimizer, *_: Any) -> None:
        if "momentum" in optimizer.defaults:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            state = [optimizer.state[weight]["momentum_buffer"] for weight in weights]
            note([*weights, *(weight.grad for weight in weights), *state])

    handle = register_optimizer_step_post_hook(told)
    try:
        yield
    finally:
        handle.remove()


def hold_shares(ranks: int) -> None:
    task = exact_residual(TENTH)
    whole = [weight.shape for weight in task.original.parameters()]
    largest = sum(math.ceil(shape[0] / ranks) * math.prod(shape[1:]) for shape in whole)
    seen = []

    def note(held: list[Tensor]) -> None:
        assert len(held) == 3 * len(whole)
        own = [tensor.to_local().numel() for tensor in held]  # type: ignore[attr-defined]
        for kind in range(3):
            assert sum(own[kind * len(whole) : (kind + 1) * len(whole)]) <= largest
        seen.append(sum(own))

    with noting(note):
        carry_out("dau", split_up(task, accumulate=2), replace(SPREAD, turns=12))
    assert len(seen) > 10
    every = torch.tensor(seen)
    dist.all_reduce(every)
    # Every number is held once.
    assert every.tolist() == [3 * sum(shape.numel() for shape in whole)] * len(seen)


def look() -> None:
    """Parts of sets that need different numbers of batches, and none at all."""
    pixels = torch.randint(0, 256, (40, 3, 6, 5), generator=torch.Generator().manual_seed(0))
    held = Images(pixels.to(torch.uint8), torch.arange(40) % 4, tuple("abcd"))
    torch.manual_seed(0)
    model = Classifier(SmallResNet(3, 4)).eval()
    with sharded(copy.deepcopy(model), CPU) as part:
        for count in (0, 1, 4, 7):
            index = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:count]
            for images in (held, streamed(held)):
                found = predict(part, images, index, batch_size=2, ranks=Ranks.from_group())
                torch.testing.assert_close(found, predict(model, held, index))
                logits = predict_each(part, images, index, lambda logits, _: logits, ranks=Ranks.from_group())
                torch.testing.assert_close(logits, found.logits)
                with pytest.MonkeyPatch.context() as monkeypatch:
                    monkeypatch.setattr(view, "map_batches", partial(map_batches, batch_size=2))
                    u = View().reveal_all(part, images, index, held.labels, ranks=Ranks.from_group())
                torch.testing.assert_close(u, View().reveal_all(model, held, index, held.labels))
        assert (
            sum("FSDP" in type(module).__name__ for module in part.modules()) == 4
        )  # three blocks, the rest
        # Looking leaves no weight whole.
        assert all(hasattr(weight, "to_local") for weight in part.parameters())
        assert not part.training


# ---- what cannot be shared out


def tie_and_fail() -> None:
    """What cannot be shared out costs one line; the rest is left as it was."""
    tied = nn.Sequential(nn.Linear(17, 17), Block(), nn.Linear(17, 3))
    tied[0].weight = tied[1].branch[0].weight
    with sharded(Classifier(tied), CPU) as part:
        part(torch.randn(2, 17)).logits.sum().backward()
    odd = Classifier(SmallResNet(1, 4))
    odd.network.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match="SmallResNet cannot take `shard=True`: "), sharded(odd, CPU):
        pass
    model = Classifier(SmallResNet(1, 4))
    before = copy.deepcopy(model.state_dict())
    masks = Masks({"head.weight": torch.ones(4, 64) > 0})
    with pytest.raises(UserError, match="does not share out masks"):
        fail(model, masks)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    plain(model)


def fail(model: Classifier, masks: Masks) -> None:
    with sharded(model, CPU) as part:
        with torch.no_grad():
            next(part.parameters()).zero_()
        sgd(part.network, masks, lr=0.1, momentum=0.9, weight_decay=0)


# Processes take seconds to start: those of a test do all of these.
TWO = (compare_savings, call_from_python, tie_and_fail)


def two(rank: int) -> None:
    compare_turns(rank, 2)
    for work in TWO:
        work()


def three(rank: int) -> None:
    compare_turns(rank, 3)
    compare_methods(TENTH, SPREAD, "dau", "retrain", "ga")
    compare_methods(ONE_CLASS, CLASSWISE, "dau")
    hold_shares(3)
    look()


@pytest.mark.parametrize(("ranks", "work"), [(2, two), pytest.param(3, three, marks=pytest.mark.slow)])
def test_shared_models_do_what_whole_ones_do(ranks: int, work: Callable[[int], None]) -> None:
    together(ranks, work)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(UserError, match="there is one: start them with torchrun, or leave it out"):
        Runtime(shard=True)
    with pytest.raises(UserError, match="`engine=compiled` is for one process"):
        Runtime(engine="compiled", ranks=Ranks(0, 2), shard=True)
    with pytest.raises(
        UserError, match="`sensitivity=input` takes gradients that `shard=True` does not share"
    ):
        check_shard(True, "input", pruned=False)
    check_shard(True, "classifier", pruned=False)
    check_shard(False, "input", pruned=True)


class Traveller(nn.Linear):
    """Notes where it is sent."""

    def to(self, place: Any) -> Traveller:  # type: ignore[override]
        self.been = [*getattr(self, "been", ()), str(place)]
        return self


def test_models_rest_elsewhere_and_come_back() -> None:
    model = Traveller(2, 2)
    with placed(torch.device("meta"), model, model, nn.ReLU()):
        assert model.been == ["meta"]
    assert model.been == ["meta", "cpu"]
