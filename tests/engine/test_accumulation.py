"""Batches in parts: the gradient of the whole batch, and parts that grow in number where memory is short."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR
from toys import ONE_CLASS, batches_of, blobs, game_of, perceptron, trained

from dau_fast.config import DauConfig
from dau_fast.engine.evaluation import predict
from dau_fast.engine.loop import Loop, LoopCost, run_loop
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.training import train
from dau_fast.errors import UserError
from dau_fast.methods.dau import game
from dau_fast.metrics.accuracy import accuracy
from dau_fast.models import Classifier

CLASSWISE = DauConfig(label_conditioned=False, alpha=0.5, turns=64, batch_size=32, departure=1.0)


class Small(nn.Module):
    """Refuses more than `most` rows, as a GPU does whose memory is short; no BatchNorm."""

    def __init__(self, most: int = 1000) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.most = most
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.layers(x)


def taught(runtime: Runtime, most: int = 1000) -> tuple[Classifier, LoopCost]:
    images = replace(blobs(96), pixels=blobs(96).pixels.double())
    model = Classifier(Small(most))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    (cost,) = train(
        model,
        batches_of(images, torch.arange(96).split(32)),
        steps=3,
        optimizer=optimizer,
        scheduler=ConstantLR(optimizer, 1.0),
        runtime=runtime,
    )
    return model, cost


def assert_same(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [2, 3, 5, 32])
def test_parts_of_any_size_add_up_to_the_gradient_of_the_batch(parts: int) -> None:
    (whole, once), (found, cost) = taught(Runtime()), taught(Runtime(accumulate=parts))
    assert_same(found, whole)
    assert (once.parts, cost.parts) == (1, parts)


def test_a_loop_may_have_parts_of_its_own() -> None:
    assert taught(Runtime(accumulate=2, loop_parts={"training": 3, "game": 5}))[1].parts == 3


def test_parts_are_doubled_until_they_fit_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    found, cost = taught(Runtime(), most=10)
    assert_same(found, taught(Runtime())[0])
    assert cost.parts == 4
    assert [record.message for record in caplog.records] == [
        f"memory is short in training: its batches are taken in {parts} parts" for parts in (2, 4)
    ]


def test_one_image_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(
        UserError, match="does not hold a step of training, not even with 32 parts of its batch"
    ):
        taught(Runtime(), most=0)


def test_several_processes_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot find out alone: the others wait for one that ran out of memory."""
    ranks = Ranks(0, 2)
    monkeypatch.setattr(Ranks, "parallel", lambda self, model: model)
    monkeypatch.setattr(Ranks, "sizes", lambda self, rows, device: [rows, rows])
    with pytest.raises(UserError, match="does not hold a batch of training: add `accumulate=2`, or start"):
        taught(Runtime(ranks=ranks), most=3)


# ---- the game


def test_a_game_in_parts_forgets_as_well() -> None:
    task = trained(ONE_CLASS)
    model = game.unlearn(replace(task, runtime=Runtime(accumulate=3)), CLASSWISE).model

    def right(index: Tensor) -> float:
        return accuracy(predict(model, task.images.batch, index).logits, task.labels[index])

    assert right(task.split.forget) <= 2
    assert right(task.split.retain) >= 95


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_attacker_takes_as_many_steps_a_turn_in_any_number_of_parts(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    gradients = game.attacker_gradients
    monkeypatch.setattr(
        game, "attacker_gradients", lambda *seen: (taken.append(len(seen[1])), gradients(*seen))[1]
    )
    task = replace(trained(ONE_CLASS), runtime=Runtime(accumulate=parts))
    with game_of(task, replace(CLASSWISE, attacker_steps=4, warmup_steps=0), turns=3) as players:
        players.warm_up()
        after: list[int] = []
        players.play(lambda: after.append(len(taken)))
    assert after == [8, 12, 16], "a rehearsal goes before the first turn"
    assert all(32 // parts <= rows <= 32 // parts + 1 for rows in taken)


def test_parts_of_a_turn_hold_as_many_images_of_each_set() -> None:
    whole, rows = torch.arange(96), taken_rows(torch.arange(96), 4)
    assert all([(index // 32 == part).sum() for part in range(3)] == [8] * 3 for index in rows)
    assert sorted(torch.cat(rows).tolist()) == whole.tolist()
    (only,) = taken_rows(whole, 1)
    assert only is whole


def taken_rows(index: Tensor, parts: int) -> list[Tensor]:
    """What each part of a step on three sets is given of `index`, which lies in a batch of them."""
    given: list[Tensor] = []

    def loss(_: object, rows: Tensor) -> Tensor:
        given.append(rows)
        return sum(parameter.sum() for parameter in model.parameters())

    model, images = perceptron(0), blobs(96)
    loop = Loop(
        "turns", model, SGD(model.parameters(), lr=0.1), batches_of(images, [index]), 1,
        loss=lambda compile, forward: loss, inputs=lambda batch: (batch.indices,),
        after=lambda number: None, sets=3,
    )  # fmt: skip
    run_loop(loop, Runtime(accumulate=parts))
    return given[parts:]  # after the rehearsal
