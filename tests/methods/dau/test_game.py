"""The game on a task small enough to play in a tenth of a second: overlapping blobs and a perceptron."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import ONE_CLASS, TENTH, game_of, trained

from dau_fast.config import DauConfig, PruneConfig
from dau_fast.data.split import Forget
from dau_fast.engine.batches import Batch, steps_for
from dau_fast.engine.evaluation import predict
from dau_fast.engine.training import recompute_batchnorm
from dau_fast.methods.dau import game, schedule
from dau_fast.methods.dau.attacker import Attacker
from dau_fast.methods.dau.defender import defender_loss
from dau_fast.methods.dau.game import Game, plan_game
from dau_fast.methods.dau.referee import Referee
from dau_fast.methods.dau.view import View
from dau_fast.methods.registry import get_method
from dau_fast.methods.task import Task
from dau_fast.metrics.accuracy import accuracy
from dau_fast.models import Classifier, Outputs
from dau_fast.ops import attack_features, barlow_twins_loss
from dau_fast.prune import Masks

CLASSWISE = DauConfig(label_conditioned=False, alpha=1.0, game_epochs=12, batch_size=32, lr=0.05)
SPREAD = DauConfig(label_conditioned=True, alpha=0.5, game_epochs=3, batch_size=32)
NOTHING = 1e-60  # a learning rate of which float32 sees nothing; 0 is none


def percent_right(task: Task, model: Classifier, index: Tensor) -> float:
    return accuracy(predict(model, task.images.batch, index).logits, task.labels[index])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- the whole game


@pytest.mark.parametrize("seed", range(3))
def test_a_forgotten_class_is_no_longer_recognised_and_the_others_are(seed: int) -> None:
    task = trained(ONE_CLASS, seed)
    assert percent_right(task, task.original, task.split.forget) > 90
    model = game.unlearn(task, CLASSWISE).model
    assert percent_right(task, model, task.split.forget) <= 2
    assert percent_right(task, model, task.split.retain) >= 95
    assert percent_right(task, model, task.split.test) >= 90


def test_forgetting_images_spread_over_classes_keeps_the_others() -> None:
    task = trained(TENTH)
    result = game.unlearn(task, SPREAD)
    assert not same(weights(result.model), weights(task.original))
    assert percent_right(task, result.model, task.split.retain) >= 95
    assert percent_right(task, result.model, task.split.test) >= 90


@pytest.mark.parametrize("forget", [ONE_CLASS, TENTH], ids=["class", "spread"])
def test_without_settings_the_usual_ones_are_played(forget: Forget, monkeypatch: pytest.MonkeyPatch) -> None:
    task = trained(forget)
    seen: list[DauConfig] = []

    class Watched(Game):
        def __init__(self, defender: Classifier, task: Task, config: DauConfig, *rest: Any) -> None:
            seen.append(config)
            super().__init__(defender, task, config, *rest)

    monkeypatch.setattr(game, "Game", Watched)
    dau = get_method("dau")
    model = dau.run(task, dau.resolve(task)).model
    assert seen[0].label_conditioned == (forget is TENTH)
    assert percent_right(task, model, task.split.retain) >= 90


def test_a_pruned_model_is_pushed_harder_unless_told_otherwise() -> None:
    dense, dau = trained(TENTH), get_method("dau")
    pruned = replace(dense, masks=Masks({"0.weight": torch.ones(32, 6) > 0}))
    to_be_pruned = replace(dense, pruning=PruneConfig("omp"))
    tasks = (dense, None), (pruned, None), (to_be_pruned, None), (pruned, SPREAD), (pruned, {"lr": 0.02})
    assert [dau.resolve(*asked).alpha for asked in tasks] == [0.5, 1.0, 1.0, SPREAD.alpha, 1.0]


@pytest.mark.parametrize("retain", [1, 10, 24, 25, 1000, 45000])
@pytest.mark.parametrize("classwise", [True, False])
def test_the_usual_settings_exist_for_every_size_of_the_retain_set(retain: int, classwise: bool) -> None:
    config = DauConfig.default(classwise=classwise, retain_images=retain)
    assert 2 <= config.batch_size <= 256
    assert config.label_conditioned != classwise


def test_the_history_has_one_entry_a_look_and_begins_at_the_original() -> None:
    task = trained(ONE_CLASS)
    before = percent_right(task, task.original, task.split.forget)
    history = game.unlearn(task, CLASSWISE).history
    assert history is not None
    assert set(history) == {"step", "auc", "forget_accuracy", "validation_accuracy", "stopped"}
    assert len({len(history[key]) for key in set(history) - {"stopped"}}) == 1
    assert history["step"][0] == 0
    assert history["step"] == sorted(set(history["step"]))
    assert history["forget_accuracy"][0] == pytest.approx(before)
    assert "still recognised" in history["stopped"]
    assert history["forget_accuracy"][-1] <= 1


def test_warming_up_teaches_the_attacker_to_tell_the_sets_apart() -> None:
    """On a class that validation does not hold, which is easy to tell."""
    history = game.unlearn(trained(ONE_CLASS), CLASSWISE).history
    assert history is not None
    assert history["auc"][0] > 0.9


@pytest.mark.parametrize("forget", [ONE_CLASS, TENTH], ids=["class", "spread"])
def test_the_original_stays_as_it_was(forget: Forget) -> None:
    task = trained(forget)
    task.original.train()
    before = weights(task.original)
    hooks = [dict(module._forward_pre_hooks) for module in task.original.modules()]
    result = game.unlearn(task, CLASSWISE)
    assert same(weights(task.original), before)
    assert all(module.training for module in task.original.modules())
    assert hooks == [dict(module._forward_pre_hooks) for module in task.original.modules()]
    assert not any(module._forward_hooks for module in task.original.modules())
    assert not set(task.original.parameters()) & set(result.model.parameters())


def test_the_global_random_state_stays_as_it_was() -> None:
    task = trained(ONE_CLASS)
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    game.unlearn(task, CLASSWISE)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_the_same_seed_gives_the_same_weights_whatever_ran_before() -> None:
    task = trained(ONE_CLASS)
    torch.manual_seed(1)
    first = game.unlearn(task, CLASSWISE)
    torch.manual_seed(2)
    second = game.unlearn(task, CLASSWISE)
    assert same(weights(first.model), weights(second.model))
    assert first.history == second.history


def test_another_seed_plays_another_game() -> None:
    task = trained(ONE_CLASS)
    first, other = (game.unlearn(replace(task, seed=seed), CLASSWISE) for seed in (0, 1))
    assert not same(weights(first.model), weights(other.model))


def test_another_seed_plays_on_other_batches() -> None:
    task = trained(ONE_CLASS)

    def first_batch(seed: int) -> Tensor:
        with game_of(replace(task, seed=seed), CLASSWISE) as players:
            return next(players._batches).indices

    first, again, other = (first_batch(seed) for seed in (0, 0, 1))
    for one, same, another in zip(first.chunk(3), again.chunk(3), other.chunk(3), strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, another)


@pytest.mark.parametrize("config", [CLASSWISE, SPREAD], ids=["predicted", "true"])
def test_one_image_can_be_forgotten(config: DauConfig) -> None:
    task = trained(Forget("i", indices=(7,)))
    result = game.unlearn(task, config)
    assert task.split.forget.tolist() == [7]
    assert all(tensor.isfinite().all() for tensor in weights(result.model).values())
    assert percent_right(task, result.model, task.split.retain) >= 90
    assert all(math.isfinite(value) for value in result.history["auc"])


def test_frozen_parameters_stay_as_they_were() -> None:
    task = trained(ONE_CLASS)
    task.original.network[0].requires_grad_(False)
    before = weights(task.original)
    model = game.unlearn(task, CLASSWISE).model
    assert torch.equal(model.network[0].weight, before["network.0.weight"])
    assert torch.equal(model.network[0].bias, before["network.0.bias"])
    assert not torch.equal(model.head.weight, before["network.3.weight"])
    assert not model.network[0].weight.requires_grad


# ---- a sample of the retain set


def played_with(task: Task, config: DauConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[set[int], int]:
    """The retain images that a game and its recovery use, and the turns and steps they take."""
    seen: set[int] = set()
    steps: list[int] = []
    feed = Task.feed

    def noted(self: Task, purpose: str, batch_size: int, *sets: Tensor) -> Iterator[Batch]:
        seen.update(sets[0].tolist())
        return feed(self, purpose, batch_size, *sets)

    monkeypatch.setattr(Task, "feed", noted)
    game.unlearn(replace(task, progress=lambda _, count: lambda: steps.append(count)), config)
    return seen, steps[0]


def test_a_sample_of_the_retain_set_costs_what_the_forget_set_does(monkeypatch: pytest.MonkeyPatch) -> None:
    task, config = trained(TENTH), replace(SPREAD, retain_sample=2.0)
    retain = set(task.split.retain.tolist())
    seen, steps = played_with(task, config, monkeypatch)
    assert seen < retain
    assert len(seen) == 2 * len(task.split.forget)
    assert steps == steps_for(3, len(seen), 32) + steps_for(4, len(seen), 32)
    other, _ = played_with(replace(task, seed=1), config, monkeypatch)
    assert other != seen


def test_a_sample_larger_than_the_retain_set_is_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    task, config = trained(TENTH), replace(SPREAD, retain_sample=1000.0)
    assert played_with(task, config, monkeypatch)[0] == set(task.split.retain.tolist())


def test_the_batch_follows_the_sample() -> None:
    whole = DauConfig.default(classwise=False, retain_images=45_000)
    sampled = DauConfig.default(classwise=False, retain_images=45_000, forget_images=90, retain_sample=10.0)
    assert (whole.batch_size, sampled.batch_size) == (256, 64)


@pytest.mark.parametrize("classwise", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_steps_are_smaller_where_most_of_the_retain_set_is_not_seen(classwise: bool, pruned: bool) -> None:
    usual, all_of_it, some = (
        DauConfig.default(
            classwise=classwise, pruned=pruned, retain_images=900, forget_images=90, retain_sample=times
        )
        for times in (None, 10.0, 9.0)
    )
    assert all_of_it == replace(usual, retain_sample=10.0)
    assert some.lr < usual.lr
    assert some.recovery_lr < usual.recovery_lr


def test_a_pruned_model_forgets_a_class_in_smaller_steps() -> None:
    dense, pruned = (DauConfig.default(classwise=True, retain_images=800, pruned=p) for p in (False, True))
    assert pruned.lr < dense.lr
    assert pruned.recovery_epochs > dense.recovery_epochs


# ---- its course


def test_the_longest_game_has_the_steps_of_its_epochs_and_as_many_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    announced: list[tuple[str, int]] = []
    advanced: list[int] = []
    looks: list[int] = []

    def progress(description: str, steps: int) -> Callable[[], None]:
        announced.append((description, steps))
        return lambda: advanced.append(1)

    def look(self: Referee, defender: Classifier, attacker: Attacker, step: int) -> bool:
        looks.append(step)
        return False

    monkeypatch.setattr(Referee, "look", look)
    config = replace(CLASSWISE, game_epochs=4, recovery_epochs=2, looks_per_epoch=2)
    task = replace(trained(ONE_CLASS), progress=progress)
    game.unlearn(task, config)
    size = len(task.split.retain)
    steps, recovery = steps_for(4, size, 32), steps_for(2, size, 32)
    assert announced == [("dau", steps + recovery)]
    assert len(advanced) == steps + recovery
    every = round(steps / 8)
    assert looks == [0, *range(every, steps + 1, every)]


def test_the_game_ends_when_the_referee_has_seen_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    turns: list[int] = []

    def look(self: Referee, defender: Classifier, attacker: Attacker, step: int) -> bool:
        looks.append(step)
        return len(looks) == 3

    monkeypatch.setattr(Referee, "look", look)
    with game_of(trained(ONE_CLASS), CLASSWISE) as players:
        players.warm_up()
        players.play(lambda: turns.append(1))
    assert len(looks) == 3
    assert len(turns) == looks[-1] < players.schedule.turns


def test_recovery_and_batchnorm_see_the_retain_set_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    task = trained(ONE_CLASS)
    retain = set(task.split.retain.tolist())
    recovered: set[int] = set()
    normalised: list[nn.Module] = []
    train = game.train

    def spy_train(model: nn.Module, batches: Iterator[Batch], *rest: Any, **named: Any) -> Any:
        def noted() -> Iterator[Batch]:
            for batch in batches:
                recovered.update(batch.indices.tolist())
                yield batch

        return train(model, noted(), *rest, **named)

    def spy_batchnorm(model: nn.Module, load: Any, index: Tensor, **named: Any) -> None:
        assert recovered == retain, "statistics come last"
        normalised.append(model)
        assert set(index.tolist()) == retain
        recompute_batchnorm(model, load, index, **named)

    monkeypatch.setattr(game, "train", spy_train)
    monkeypatch.setattr(game, "recompute_batchnorm", spy_batchnorm)
    assert game.unlearn(task, CLASSWISE).model is normalised[0]
    assert len(normalised) == 1


def test_the_learning_rate_of_the_recovery_falls_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def spy(*_: Any, steps: int, optimizer: torch.optim.SGD, scheduler: Any, **_named: Any) -> tuple[()]:
        for _step in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return ()

    monkeypatch.setattr(game, "train", spy)
    game.unlearn(trained(ONE_CLASS), replace(CLASSWISE, recovery_lr=0.3))
    assert rates[0] == pytest.approx(0.3)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] <= 2 * 0.3 / len(rates)


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
    loss = game.attacker_loss

    def spy(attacker: Attacker, *seen: Tensor) -> Tensor:
        taught.append(seen)
        return loss(attacker, *seen)

    monkeypatch.setattr(game, "attacker_loss", spy)
    with game_of(task, CLASSWISE, turns=1) as players:
        exam = players.referee._exam
        players.warm_up()
        shown = [players.referee.reveal(task.original, index) for index in (split.forget, split.validation)]
        assert len(taught) == CLASSWISE.warmup_steps
        assert all(torch.equal(one, other) for one, other in zip(taught[0][:2], shown, strict=True))
        assert torch.equal(taught[0][2], (~exam[split.forget]).float())
        assert torch.equal(taught[0][3], (~exam[split.validation]).float())
        taught.clear()
        batch = next(players._batches)
        players._batches = (b for b in [batch])
        players.play()
    assert len(taught) == 2 * CLASSWISE.attacker_steps, "in the rehearsal and in the turn"
    for seen in taught:
        for weights, index in zip(seen[2:], batch.indices.chunk(3)[1:], strict=True):
            assert torch.equal(weights, (~exam[index]).float())
            assert 0 < weights.sum() < len(index)
        assert not any(tensor.requires_grad for tensor in seen)


def test_of_sets_that_do_not_fit_the_attacker_warms_up_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    task = trained(TENTH)
    monkeypatch.setattr(schedule, "_LESSON_NUMBERS", 25 * (4 + 4 * SPREAD.attacker_hidden) + 3)  # u is [N, 4]
    assert plan_game(task, SPREAD)[1].lesson_images == 25
    split = task.split
    assert len(split.forget) > 25

    def lesson(seed: int) -> tuple[Tensor, ...]:
        taught: list[tuple[Tensor, ...]] = []
        loss = game.attacker_loss
        with monkeypatch.context() as patch, game_of(replace(task, seed=seed), SPREAD) as players:
            patch.setattr(game, "attacker_loss", lambda *seen: (taught.append(seen[1:]), loss(*seen))[1])
            players.warm_up()
        return taught[0]

    first, again, other = lesson(0), lesson(0), lesson(1)
    assert [len(part) for part in first] == [25] * 4
    assert all(torch.equal(one, same) for one, same in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    whole = View().reveal_all(task.original, task.images, split.forget, task.labels)
    assert all(torch.isclose(whole, row).all(1).any() for row in first[0])
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


# ---- what the defender minimises


def some_outputs(rows: int, seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    return Outputs(torch.randn(rows, 4, generator=generator), torch.randn(rows, 3, generator=generator))


def test_the_defenders_loss_is_the_sum_of_its_three_terms() -> None:
    retain, forget, validation = some_outputs(6, 0), some_outputs(5, 1), some_outputs(5, 2)
    labels, u = torch.arange(6) % 3, attack_features(forget.logits, forget.features, None)
    attacker = Attacker(u, 8)
    fit = -retain.logits.log_softmax(1)[torch.arange(6), labels].mean()
    exposed = -torch.log(1 - torch.sigmoid(attacker(u))).mean()
    alignment = barlow_twins_loss(forget.features, validation.features, 0.3)
    found = defender_loss(retain, forget, validation, labels, u, attacker, alpha=0.7, beta=0.2, lambd=0.3)
    torch.testing.assert_close(found, fit + 0.7 * exposed + 0.2 * alignment)
