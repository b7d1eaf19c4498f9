"""Batches in parts: the gradient of the whole batch, and parts that grow in number where memory is short."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR
from toys import ONE_CLASS, batches_of, blobs, trained

from dau_fast.config import DauConfig
from dau_fast.engine.evaluation import predict
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.steps import Engine
from dau_fast.engine.training import train
from dau_fast.errors import UserError
from dau_fast.methods.dau import game
from dau_fast.methods.dau.game import Game
from dau_fast.metrics.accuracy import accuracy
from dau_fast.models import Classifier

CLASSWISE = DauConfig(label_conditioned=False, alpha=1.0, game_epochs=12, batch_size=32, lr=0.05)


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


def taught(engine: Engine, most: int = 1000) -> Classifier:
    images = replace(blobs(96), pixels=blobs(96).pixels.double())
    model = Classifier(Small(most))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(
        model,
        batches_of(images, torch.arange(96).split(32)),
        steps=3,
        optimizer=optimizer,
        scheduler=ConstantLR(optimizer, 1.0),
        engine=engine,
    )
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [2, 3, 5, 32])
def test_parts_of_any_size_add_up_to_the_gradient_of_the_batch(parts: int) -> None:
    assert_same(taught(Engine(accumulate=parts)), taught(Engine()))


def test_parts_are_doubled_until_they_fit_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    assert_same(taught(engine, most=10), taught(Engine()))
    assert engine.accumulate == 4
    assert [record.message for record in caplog.records] == [
        f"memory is short in training: batches are taken in {parts} parts from here on" for parts in (2, 4)
    ]


def test_one_image_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(UserError, match="a batch of 32 images cannot be taken in 64 parts"):
        taught(Engine(), most=0)


def test_several_processes_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot find out alone: the others wait for one that ran out of memory."""
    ranks = Ranks(0, 2)
    monkeypatch.setattr(Ranks, "parallel", lambda self, model: model)
    monkeypatch.setattr(Ranks, "sizes", lambda self, rows, device: [rows, rows])
    with pytest.raises(UserError, match="does not hold a batch of training: add --accumulate 2, or start"):
        taught(Engine(ranks=ranks), most=3)


# ---- the game


def test_a_game_in_parts_forgets_as_well() -> None:
    task = trained(ONE_CLASS, CLASSWISE)
    model = game.unlearn(replace(task, engine=Engine(accumulate=3))).model

    def right(index: Tensor) -> float:
        return accuracy(predict(model, task.images.batch, index).logits, task.labels[index])

    assert right(task.split.forget) <= 2
    assert right(task.split.retain) >= 95


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_attacker_takes_as_many_steps_a_turn_in_any_number_of_parts(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    loss = game.attacker_loss
    monkeypatch.setattr(game, "attacker_loss", lambda *seen: (taken.append(len(seen[1])), loss(*seen))[1])
    task = replace(trained(ONE_CLASS, CLASSWISE), engine=Engine(accumulate=parts))
    players = Game(copy.deepcopy(task.original), task, replace(CLASSWISE, attacker_steps=4))
    players.turn()
    taken.clear()
    players.turn()
    assert len(taken) == 4
    assert all(32 // parts <= rows <= 32 // parts + 1 for rows in taken)


def test_parts_of_a_turn_hold_as_many_images_of_each_set() -> None:
    whole = torch.arange(96)
    rows = [game._rows(whole, slice(begin, begin + 8)) for begin in range(0, 32, 8)]
    assert all([(index // 32 == part).sum() for part in range(3)] == [8] * 3 for index in rows)
    assert sorted(torch.cat(rows).tolist()) == whole.tolist()
    assert game._rows(whole, slice(0, 32)) is whole
