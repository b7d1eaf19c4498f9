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
from toys import ONE_CLASS, TENTH, game_of, perceptron, trained

from dau_fast.config import DauConfig
from dau_fast.data.split import Forget
from dau_fast.engine.batches import Batch
from dau_fast.engine.evaluation import predict
from dau_fast.engine.training import recompute_batchnorm
from dau_fast.errors import UserError
from dau_fast.methods import original
from dau_fast.methods.dau import game, schedule
from dau_fast.methods.dau.attacker import Attacker
from dau_fast.methods.dau.defender import defender_loss
from dau_fast.methods.dau.game import Game, plan_game
from dau_fast.methods.dau.referee import Referee
from dau_fast.methods.dau.view import View, _show_others
from dau_fast.methods.registry import get_method
from dau_fast.methods.task import Task
from dau_fast.metrics.accuracy import accuracy
from dau_fast.models import Classifier, Outputs
from dau_fast.ops import barlow_twins_loss

CLASSWISE = DauConfig(label_conditioned=False, alpha=0.5, departure=1.0, turns=60, batch_size=32, lr=0.05)
SPREAD = DauConfig(label_conditioned=True, alpha=1.0, turns=30, batch_size=32)
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
        def __init__(self, *given: Any) -> None:
            seen.extend(part for part in given if isinstance(part, DauConfig))
            super().__init__(*given)

    monkeypatch.setattr(game, "Game", Watched)
    dau = get_method("dau")
    model = dau.run(task, dau.resolve(task)).model
    assert seen[0].label_conditioned == (forget is TENTH)
    assert percent_right(task, model, task.split.retain) >= 90


@pytest.mark.parametrize("retain", [1, 10, 24, 25, 1000, 45000])
@pytest.mark.parametrize("classwise", [True, False])
def test_the_usual_settings_exist_for_every_size_of_the_retain_set(retain: int, classwise: bool) -> None:
    config = DauConfig.default(classwise=classwise, retain_images=retain, forget_images=9)
    assert config.label_conditioned != classwise
    assert (config.departure > 0) == classwise


def test_the_usual_game_makes_six_passes_over_a_middling_set_and_part_of_one_over_a_large_one() -> None:
    small, middle, large = (
        DauConfig.default(classwise=False, retain_images=count, forget_images=400)
        for count in (200, 2400, 1_000_000)
    )
    assert (small.turns, middle.turns) == (128, 6 * 2400 // 64)
    assert middle.turns < large.turns < 1_000_000 // 64
    half = DauConfig.default(classwise=False, retain_images=1200, forget_images=1200)
    assert half.turns == middle.turns


def test_the_history_has_one_entry_a_look_from_the_original_to_the_finished_model() -> None:
    task = trained(ONE_CLASS)
    sets = {"forget": task.split.forget, "validation": task.split.validation, "retain": task.split.retain}
    result = game.unlearn(task, replace(CLASSWISE, looks=3))
    history = result.history
    assert history is not None
    assert history["step"] == [0, 20, 40, 60]
    assert history["lr"] == CLASSWISE.lr
    for name, index in sets.items():
        seen = history[f"{name}_accuracy"]
        assert len(seen) == len(history["auc"]) == 4
        assert seen[0] == pytest.approx(percent_right(task, task.original, index))
        assert seen[-1] == pytest.approx(percent_right(task, result.model, index))


def test_warming_up_teaches_the_attacker_to_tell_the_sets_apart() -> None:
    """On images whose labels are wrong, which the original did not learn: easy to tell."""
    task = trained(TENTH)
    labels = task.labels.clone()
    labels[task.split.forget] = (labels[task.split.forget] + 1) % 3
    task = replace(task, images=replace(task.images, labels=labels))
    before, after = (
        game.unlearn(task, replace(SPREAD, warmup_steps=steps, turns=1, lr=NOTHING)).history["auc"][0]
        for steps in (0, 100)
    )
    assert abs(before - 0.5) < after - 0.5
    assert after > 0.9


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


def played_with(task: Task, config: DauConfig, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The retain images that a game uses."""
    seen: set[int] = set()
    feed = Task.feed

    def noted(self: Task, purpose: str, batch_size: int, *sets: Tensor, **named: Any) -> Iterator[Batch]:
        seen.update(sets[0].tolist())
        return feed(self, purpose, batch_size, *sets, **named)

    monkeypatch.setattr(Task, "feed", noted)
    game.unlearn(task, config)
    return seen


def test_a_sample_of_the_retain_set_follows_the_forget_set(monkeypatch: pytest.MonkeyPatch) -> None:
    task, config = trained(TENTH), replace(SPREAD, retain_sample=2.0)
    retain = set(task.split.retain.tolist())
    seen = played_with(task, config, monkeypatch)
    assert seen < retain
    assert len(seen) == 2 * len(task.split.forget)
    assert played_with(replace(task, seed=1), config, monkeypatch) != seen


def test_a_sample_larger_than_the_retain_set_is_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    task, config = trained(TENTH), replace(SPREAD, retain_sample=1000.0)
    assert played_with(task, config, monkeypatch) == set(task.split.retain.tolist())


def test_the_length_follows_the_sample() -> None:
    whole, sampled = (
        DauConfig.default(classwise=False, retain_images=45_000, forget_images=320, retain_sample=times)
        for times in (None, 10.0)
    )
    assert sampled.turns == 6 * 3200 // 64 < whole.turns


# ---- its course


def test_a_game_has_its_turns_and_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[tuple[str, int]] = []
    advanced: list[int] = []
    looks: list[int] = []
    look = Referee.look

    def progress(description: str, steps: int) -> Callable[[], None]:
        announced.append((description, steps))
        return lambda: advanced.append(1)

    def noted(self: Referee, defender: Classifier, attacker: Attacker, step: int) -> bool:
        looks.append(step)
        return look(self, defender, attacker, step)

    monkeypatch.setattr(Referee, "look", noted)
    task = replace(trained(ONE_CLASS), progress=progress)
    game.unlearn(task, replace(CLASSWISE, turns=50, looks=4))
    assert announced == [("dau", 50)]
    assert len(advanced) == 50
    assert looks == [0, 13, 26, 39, 50]


def test_the_learning_rate_falls_to_nothing_over_the_whole_game() -> None:
    rates: list[float] = []
    with game_of(trained(ONE_CLASS), CLASSWISE) as players:
        players.warm_up()
        rate = players._defend.param_groups[0]
        players.play(lambda: rates.append(float(rate["lr"])))
    steps = [1 - turn / CLASSWISE.turns for turn in range(1, CLASSWISE.turns)]
    assert rates[:-1] == pytest.approx([CLASSWISE.lr * s for s in steps], rel=0.03, abs=CLASSWISE.lr / 50)
    assert rates[-1] <= 2 * CLASSWISE.lr / CLASSWISE.turns


def test_batchnorm_sees_the_retain_set_alone_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    task = trained(ONE_CLASS)
    retain = set(task.split.retain.tolist())
    normalised: list[nn.Module] = []
    seen: list[set[int]] = []
    purposes: list[str] = []
    augmented = Task.load_augmented

    def spy(model: nn.Module, load: Any, index: Tensor, **named: Any) -> None:
        normalised.append(model)
        seen.append(set(index.tolist()))
        recompute_batchnorm(model, load, index, **named)

    def noted(self: Task, purpose: str) -> Any:
        purposes.append(purpose)
        return augmented(self, purpose)

    monkeypatch.setattr(game, "recompute_batchnorm", spy)
    monkeypatch.setattr(Task, "load_augmented", noted)
    assert game.unlearn(task, CLASSWISE).model is normalised[0]
    assert seen == [retain]
    assert purposes == ["statistics"]
    game.unlearn(task, replace(CLASSWISE, norm_images=50))
    assert len(seen[1]) == 50
    assert seen[1] < retain


# ---- a model is never ruined


def test_a_game_that_leaves_little_is_played_again_with_smaller_steps(
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = trained(ONE_CLASS)
    result = game.unlearn(task, replace(CLASSWISE, lr=3.0, alpha=4.0, turns=20))
    assert result.history is not None
    assert result.history["lr"] < 3.0
    assert percent_right(task, result.model, task.split.retain) >= 90
    assert len(result.loops) == len(caplog.messages) + 1 > 1
    assert caplog.messages[0].startswith("a game of 20 turns with lr 3 ruined the model: it knew ")


def test_a_game_that_costs_some_points_is_played_again_with_more_turns(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Referee.finds_ruin
    verdicts = iter([True, True, False])
    monkeypatch.setattr(Referee, "finds_ruin", lambda self: found(self) or next(verdicts))
    result = game.unlearn(trained(TENTH), SPREAD)
    assert result.history is not None
    assert (result.history["turns"], result.history["lr"]) == ([30, 60, 120], SPREAD.lr)
    assert result.history["step"][-1] == 4 * SPREAD.turns
    assert [message.split(" ruined")[0] for message in caplog.messages] == [
        f"a game of {turns} turns with lr {SPREAD.lr:g}" for turns in (SPREAD.turns, 2 * SPREAD.turns)
    ]


def test_a_model_that_every_game_ruins_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Referee, "finds_ruin", lambda self: True)
    with pytest.raises(
        UserError, match=r"every game ruined the model, the last of 240 turns with `lr=0.02`: take a smaller"
    ):
        game.unlearn(trained(TENTH), SPREAD)


def without_batchnorm(seed: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)]
        return Classifier(nn.Sequential(*layers))


@pytest.mark.parametrize("batchnorm", [True, False], ids=["batchnorm", "none"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_few_images_are_forgotten_without_harm_by_the_usual_settings(count: int, batchnorm: bool) -> None:
    task = trained(Forget("i", indices=tuple(range(count))))
    apart = task.images.pixels + 3 * torch.eye(3, 6)[task.labels]  # all are known: what is lost is harm
    fresh = perceptron if batchnorm else without_batchnorm
    task = replace(task, images=replace(task.images, pixels=apart), original=fresh(0), fresh=fresh)
    original.train(task)
    dau = get_method("dau")
    model = dau.run(task, dau.resolve(task)).model
    before, after = (percent_right(task, m, task.split.retain) for m in (task.original, model))
    assert after >= before - 1


def test_a_small_forget_set_is_filled_up_with_retain_images_that_nobody_learns_from() -> None:
    task = trained(Forget("i", indices=(3, 7)))
    retain = set(task.split.retain.tolist())
    with game_of(task, SPREAD) as players:
        for batch in itertools.islice(players._batches, 3):
            *_, study, asked = players._show(batch)
            middle = batch.indices.chunk(3)[1].tolist()
            assert sorted(set(middle) - retain) == [3, 7]
            assert len(set(middle)) == 32
            expected = [float(index in (3, 7)) for index in middle]
            assert study.chunk(3)[1].tolist() == asked.chunk(3)[1].tolist() == expected
            assert study.chunk(3)[2].sum() == 32


def test_in_a_turn_the_attacker_is_shown_the_labels_and_difficulties_that_were_prepared() -> None:
    task = trained(TENTH)
    with game_of(task, replace(SPREAD, wrong_labels=1.0)) as players:
        batch = next(players._batches)
        _, labels, rated, *_ = players._show(batch)
    shown, validation = players.shown, batch.indices.chunk(3)[2]
    assert (labels.chunk(3)[2] != task.labels[validation]).float().mean() > 0.9
    assert torch.equal(labels.chunk(3)[1], task.labels[batch.indices.chunk(3)[1]])
    assert shown.difficulty is not None
    assert torch.equal(rated, shown.difficulty[batch.indices])


def test_the_pull_follows_how_far_the_originals_margins_tell_the_sets_apart() -> None:
    task = trained(TENTH)
    same_images = replace(task, split=replace(task.split, validation=task.split.forget))
    with game_of(same_images, SPREAD) as players:
        players.warm_up()
        assert players.history.exposure == 0.05
        assert players.alpha == pytest.approx(0.05**2 * SPREAD.alpha)
    with game_of(trained(ONE_CLASS), CLASSWISE) as players:
        players.warm_up()
        assert players.alpha == CLASSWISE.alpha


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
    with game_of(task, replace(CLASSWISE, exam_share=0.25), turns=1) as players:
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
    task, config = trained(TENTH), replace(SPREAD, exam_share=0.25)
    monkeypatch.setattr(schedule, "_LESSON_NUMBERS", 25 * (7 + 4 * SPREAD.attacker_hidden) + 3)  # u is [N, 7]
    assert plan_game(task, config)[1].lesson_images == 25
    split = task.split
    assert len(split.forget) > 25

    def lesson(seed: int) -> tuple[Tensor, ...]:
        taught: list[tuple[Tensor, ...]] = []
        loss = game.attacker_loss
        with monkeypatch.context() as patch, game_of(replace(task, seed=seed), config) as players:
            patch.setattr(game, "attacker_loss", lambda *seen: (taught.append(seen[1:]), loss(*seen))[1])
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
    asked = torch.tensor([1.0, 1, 0, 1, 0, 1])
    labels, u = torch.arange(6) % 3, _show_others(forget.logits, torch.zeros(6, dtype=torch.int64))
    taught, attacker = torch.randn(12, 3, generator=torch.Generator().manual_seed(3)), Attacker(u, 8)
    gone = torch.tensor([True, False, False])
    config = replace(CLASSWISE, anchor=0.4, departure=0.6, beta=0.2, lambd=0.3)
    fit = -retain.logits.log_softmax(1)[torch.arange(6), labels].mean()
    exposed = -(asked * torch.log(1 - torch.sigmoid(attacker(u)))).sum() / 6
    without = taught.clone()
    without[:, 0] = -torch.inf
    kept, left = divergence(without[:6], retain.logits), divergence(without[6:], forget.logits)
    alignment = barlow_twins_loss(forget.features, validation.features, 0.3)
    found = defender_loss(sets, labels, u, asked, attacker, taught, gone, alpha=0.7, config=config)
    torch.testing.assert_close(found, fit + 0.4 * kept + 0.7 * exposed + 0.6 * left + 0.2 * alignment)
    bare = replace(config, anchor=0.0, departure=0.0, beta=0.0)
    found = defender_loss(sets, labels, u, asked, attacker, None, gone, alpha=0.0, config=bare)
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
        (CLASSWISE, [64, 64]), (replace(CLASSWISE, departure=0.0), [32, 32]),
        (replace(CLASSWISE, departure=0.0, anchor=0.0), []),
    ):  # fmt: skip
        asked.clear()
        with game_of(task, config, turns=1) as players:
            players.warm_up()
            players.play()
        assert asked == rows, "in the rehearsal and in the turn"
