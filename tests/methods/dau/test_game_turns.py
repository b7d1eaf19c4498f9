"""A turn of the game: who learns from what, and what the defender minimises."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from games import CLASSWISE, NOTHING, SPREAD, same, weights
from torch import Tensor
from toys import ONE_CLASS, TENTH, game_of, trained

from dau_fast.methods.dau import game, schedule
from dau_fast.methods.dau.attacker import Attacker
from dau_fast.methods.dau.defender import defender_loss
from dau_fast.methods.dau.game import plan_game
from dau_fast.methods.dau.view import View, _show_others
from dau_fast.models import Classifier, Outputs
from dau_fast.ops import barlow_twins_loss

# ---- one turn


def test_the_defenders_step_gives_the_attacker_no_gradient() -> None:
    task = trained(ONE_CLASS)
    with game_of(task, replace(CLASSWISE, attacker_steps=0, warmup_steps=0), turns=1) as players:
        players.warm_up()
        attacker, before = weights(players.attacker), weights(players.defender)
        players.play()
    assert all(parameter.grad is None for parameter in players.attacker.parameters())
    assert same(weights(players.attacker), attacker)
    assert not same(weights(players.defender), before)


def test_the_defender_faces_the_attacker_as_it_is_in_that_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    faced: list[dict[str, Tensor]] = []

    def noted(*arguments: Any, **named: Any) -> Tensor:
        (attacker,) = (argument for argument in arguments if isinstance(argument, Attacker))
        faced.append(weights(attacker))
        return defender_loss(*arguments, **named)

    monkeypatch.setattr(game, "defender_loss", noted)
    turns: list[bool] = []
    with game_of(trained(ONE_CLASS), CLASSWISE, turns=3) as players:
        players.warm_up()
        players.play(lambda: turns.append(same(faced[-1], weights(players.attacker))))
    assert turns == [True] * 3
    assert not same(faced[-1], faced[-2])


def test_warming_up_moves_the_attacker_and_leaves_the_defender() -> None:
    task = trained(ONE_CLASS)
    attackers = []
    for steps in (0, CLASSWISE.warmup_steps):
        with game_of(task, replace(CLASSWISE, warmup_steps=steps)) as players:
            players.warm_up()
        assert same(weights(players.defender), weights(task.original))
        assert all(parameter.grad is None for parameter in players.defender.parameters())
        attackers.append(weights(players.attacker))
    assert same(*({name: state[name] for name in ("mean", "std")} for state in attackers))
    assert not same(*attackers)


def test_the_attackers_steps_give_the_defender_no_gradient() -> None:
    """With a learning rate of nothing for the defender, only the attacker moves in a turn."""
    task = trained(ONE_CLASS)
    with game_of(task, replace(CLASSWISE, attacker_steps=5, lr=NOTHING), turns=1) as players:
        players.warm_up()
        attacker = weights(players.attacker)
        players.play()
    assert not same(weights(players.attacker), attacker)
    pairs = zip(players.defender.named_parameters(), task.original.parameters(), strict=True)
    for (name, parameter), old in pairs:
        assert torch.equal(parameter, old), name


def test_the_attacker_sees_no_exam_image_while_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    task = trained(ONE_CLASS)
    split = task.split
    taught: list[tuple[Tensor, ...]] = []
    gradients = game.attacker_gradients

    def spy(attacker: Attacker, *seen: Tensor) -> list[Tensor]:
        taught.append(seen)
        return gradients(attacker, *seen)

    monkeypatch.setattr(game, "attacker_gradients", spy)
    with game_of(task, replace(CLASSWISE, exam_share=0.25), turns=1) as players:
        exam = players.referee._exam
        players.warm_up()
        shown = [players.referee.reveal(task.original, index) for index in (split.forget, split.validation)]
        assert len(taught) == CLASSWISE.warmup_steps
        assert all(torch.equal(one, other) for one, other in zip(taught[0][:2], shown, strict=True))
        assert torch.equal(taught[0][2], (~exam[split.forget]).float())
        counts = players.shown.departures.counts
        assert torch.equal(taught[0][3], (~exam[split.validation]).float() * counts[split.validation])
        taught.clear()
        batch = next(players._batches)
        players._batches = (b for b in [batch])
        players.play()
    assert len(taught) == 2 * CLASSWISE.attacker_steps, "in the rehearsal and in the turn"
    for seen in taught:
        for studied, index in zip(seen[2:], batch.indices.chunk(3)[1:], strict=True):
            assert torch.equal(studied, (~exam[index]).float() * counts[index])
            assert 0 < studied.sum() < len(index)
        assert not any(tensor.requires_grad for tensor in seen)


def test_of_sets_that_do_not_fit_the_attacker_warms_up_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    task, config = trained(TENTH), replace(SPREAD, exam_share=0.25)
    monkeypatch.setattr(schedule, "_LESSON_NUMBERS", 25 * (7 + 4 * SPREAD.attacker_hidden) + 3)  # u is [N, 7]
    assert plan_game(task, config)[1].lesson_images == 25
    split = task.split
    assert len(split.forget) > 25

    def lesson(seed: int) -> tuple[Tensor, ...]:
        taught: list[tuple[Tensor, ...]] = []
        gradients = game.attacker_gradients
        with monkeypatch.context() as patch, game_of(replace(task, seed=seed), config) as players:
            patch.setattr(
                game, "attacker_gradients", lambda *seen: (taught.append(seen[1:]), gradients(*seen))[1]
            )
            players.warm_up()
        return taught[0]

    first, again, other = lesson(0), lesson(0), lesson(1)
    assert [len(part) for part in first] == [25] * 4
    assert all(torch.equal(one, same) for one, same in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    whole = View().reveal_all(task.original, task.images, split.forget, task.labels)
    assert all(torch.isclose(whole, row[:6]).all(1).any() for row in first[0])
    assert 0 < first[2].sum() < 25, "a part is the exam's"


def test_every_batch_of_a_turn_comes_from_its_own_set() -> None:
    task = trained(ONE_CLASS)
    seen: list[set[int]] = [set(), set(), set()]
    with game_of(task, CLASSWISE) as players:
        turns = list(itertools.islice(players._batches, 40))
    assert list(players._batches) == [], "closed with the game"
    for turn in turns:
        assert len(turn.images) == len(turn.labels) == len(turn.indices) == 96
        assert torch.equal(turn.labels, task.labels[turn.indices])
        for one, index in zip(seen, turn.indices.chunk(3), strict=True):
            one.update(index.tolist())
    split = task.split
    assert seen == [set(s.tolist()) for s in (split.retain, split.forget, split.validation)]


def test_barlow_twins_pairs_by_the_labels_that_validation_is_shown_with() -> None:
    """By true ones a forget image with a wrong label would be held to the class that it is not of."""
    task = trained(TENTH)
    with game_of(task, replace(SPREAD, beta=0.1, wrong_labels=1.0)) as players:
        _, forget, validation = next(players._batches).indices.chunk(3)
        assert torch.equal(players.shown.labels[validation], task.labels[forget])
        assert not (task.labels[validation] == task.labels[forget]).any()


# ---- what the defender minimises


def some_outputs(rows: int, seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    return Outputs(torch.randn(rows, 4, generator=generator), torch.randn(rows, 3, generator=generator))


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    p, q = target.softmax(1), logits.softmax(1)
    return (p * (p / q).log()).nansum(1).mean()


def test_the_defenders_loss_is_the_sum_of_its_terms() -> None:
    sets = some_outputs(6, 0), some_outputs(6, 1), some_outputs(6, 2)
    retain, forget, validation = sets
    asked, held = torch.tensor([1.0, 1, 0, 1, 0, 1]), torch.tensor([0.0, 0, 1, 0, 0, 0])
    labels, u = torch.arange(6) % 3, _show_others(forget.logits, torch.zeros(6, dtype=torch.int64))
    taught, goes = torch.randn(12, 3, generator=torch.Generator().manual_seed(3)).chunk(2)
    attacker = Attacker(u, 8)
    gone = torch.tensor([True, False, False])
    config = replace(CLASSWISE, anchor=0.4, beta=0.2, lambd=0.3)
    fit = -retain.logits.log_softmax(1)[torch.arange(6), labels].mean()
    exposed = -(asked * torch.log(1 - torch.sigmoid(attacker(u)))).sum() / 6
    without = taught.clone()
    without[:, 0] = -torch.inf
    kept = divergence(without, retain.logits)
    rows = [slice(i, i + 1) for i in range(6) if asked[i]]
    left = torch.stack([divergence(goes[row], forget.logits[row]) for row in rows]).sum() / 6
    alignment = barlow_twins_loss(forget.features, validation.features, 0.3)
    common = labels, u, asked, held, attacker
    weights = {"alpha": 0.7, "departure": 0.6, "anchor_logits": 0.0}
    found = defender_loss(sets, *common, taught, gone, goes, **weights, config=config)
    expected = fit + 0.4 * kept + 0.7 * exposed + 0.6 * left + 0.2 * alignment
    torch.testing.assert_close(found, expected)
    again = torch.randn(6, 3, generator=torch.Generator().manual_seed(4))
    both = torch.cat([taught, again])
    found = defender_loss(sets, *common, both, gone, goes, **weights, config=config)
    again[:, 0] = -torch.inf
    stay = divergence(again[2:3], forget.logits[2:3]) / 6  # the third image is of an earlier request
    torch.testing.assert_close(found, expected + 0.4 * stay)
    none = torch.zeros(3, dtype=torch.bool)
    shift = (taught - retain.logits) - (taught - retain.logits).mean(1, keepdim=True)
    kept = divergence(taught, retain.logits) + 0.5 * (shift**2).sum() / 6
    found = defender_loss(
        sets, *common, taught, none, goes, **weights | {"anchor_logits": 0.5}, config=config
    )
    torch.testing.assert_close(found, fit + 0.4 * kept + 0.7 * exposed + 0.6 * left + 0.2 * alignment)
    bare, weights = replace(config, anchor=0.0, departure=0.0, beta=0.0), dict.fromkeys(weights, 0.0)
    found = defender_loss(sets, *common, None, gone, **weights, config=bare)
    torch.testing.assert_close(found, fit)


def test_the_original_is_asked_for_no_more_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    forward = Classifier.forward
    task = trained(ONE_CLASS)

    def noted(self: Classifier, images: Tensor) -> Outputs:
        if self is task.original:
            asked.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Classifier, "forward", noted)
    for config, rows in (
        (CLASSWISE, [88, 32, 32]), (replace(CLASSWISE, departure=0.0), [32, 32]),
        (replace(CLASSWISE, departure=0.0, anchor=0.0), []),
    ):  # fmt: skip
        asked.clear()
        with game_of(task, config, turns=1) as players:
            players.warm_up()
            players.play()
        assert asked == rows, "where all forget images go, in the rehearsal and in the turn"
