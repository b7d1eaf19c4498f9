"""The last turns of a game, in which BatchNorm normalises as it will afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from games import CLASSWISE, same, weights
from torch import Tensor, nn
from toys import ONE_CLASS, game_of, trained

from dau_fast.engine import loop
from dau_fast.engine.evaluation import predict
from dau_fast.engine.loop import Loop
from dau_fast.engine.training import recompute_batchnorm
from dau_fast.methods.dau import game
from dau_fast.methods.dau.game import plan_game
from dau_fast.models import Classifier

SETTLED = replace(CLASSWISE, settled=0.4)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of every loop its steps, and whether it was settled."""
    seen: list[tuple[int, bool]] = []
    run_in_turns = loop.run_in_turns

    def noted(loops: Sequence[Loop], *given: Any) -> Any:
        seen.extend((one.steps, one.settled) for one in loops if one.name == "game")
        return run_in_turns(loops, *given)

    monkeypatch.setattr(loop, "run_in_turns", noted)
    return seen


def statistics(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for name, tensor in model.named_buffers() if "running" in name]


def test_the_last_turns_leave_statistics_as_they_were_taken(
    played: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, taken = trained(ONE_CLASS), list[list[Tensor]]()

    def taking(model: nn.Module, *given: Any, **named: Any) -> None:
        recompute_batchnorm(model, *given, **named)
        taken.append(statistics(model))

    monkeypatch.setattr(game, "recompute_batchnorm", taking)
    result = game.unlearn(task, SETTLED)
    assert played == [(36, False), (24, True)]
    assert len(taken) == 1
    torch.testing.assert_close(statistics(result.model), taken[0], rtol=0, atol=0)
    assert [cost.loop for cost in result.loops] == ["game", "game"]
    assert result.history is not None
    assert result.history["step"][-1] == CLASSWISE.turns


def test_settled_turns_train_through_running_statistics() -> None:
    task = trained(ONE_CLASS)
    with game_of(task, replace(SETTLED, turns=1, settled=0.0), turns=1) as players:
        players.warm_up()
        loop.run_loop(players.make_loop(turns=1, settled=True), task.runtime)
        norm = players.defender.network[1]
        assert players.defender.training
        assert not norm.training
        torch.testing.assert_close(statistics(players.defender), statistics(task.original), rtol=0, atol=0)
        assert not torch.equal(norm.weight, task.original.network[1].weight)


def test_what_it_says_in_the_last_turns_is_what_it_says_afterwards() -> None:
    """Forget images are a third of each batch: normalised with them, they go elsewhere than without."""
    task = trained(ONE_CLASS)
    _, schedule = plan_game(task, SETTLED)
    assert schedule.settled_turns == 24
    distance = {}
    for share in (0.0, 0.4):
        config = replace(SETTLED, settled=share, alpha=0.0)
        model = game.unlearn(task, config).model
        with game_of(task, config) as players:
            departures = players.shown.departures
        assert departures is not None
        found = predict(model, task.images, task.split.forget).logits[:, :2].softmax(1)
        distance[share] = (found - departures.targets.exp()[:, :2]).abs().mean().item()
    assert distance[0.4] < distance[0.0]


def test_a_network_without_batchnorm_plays_in_one_piece(played: list[tuple[int, bool]]) -> None:
    task = trained(ONE_CLASS)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    game.unlearn(replace(task, original=Classifier(network).eval()), replace(SETTLED, turns=20, lr=0.001))
    assert played
    assert not any(settled for _, settled in played)


def test_a_lost_game_is_not_settled(played: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    def end(self: Any, *_: Any) -> bool:
        self.ended = True
        return True

    task = trained(ONE_CLASS)
    with game_of(task, SETTLED) as players:
        players.warm_up()
        before = weights(players.defender)
        monkeypatch.setattr(type(players.referee), "look", end)
        players.play()
    assert played == [(36, False)]
    assert not same(weights(players.defender), before)
