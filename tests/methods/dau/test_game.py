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
from games import CLASSWISE, NOTHING, SPREAD, percent_right, same, weights
from torch import Tensor, nn
from toys import ONE_CLASS, TENTH, game_of, perceptron, trained

from dau_fast.config import DauConfig
from dau_fast.data.split import Forget
from dau_fast.engine.batches import Batch
from dau_fast.engine.training import recompute_batchnorm
from dau_fast.errors import UserError
from dau_fast.methods import original
from dau_fast.methods.dau import game
from dau_fast.methods.dau.attacker import Attacker
from dau_fast.methods.dau.game import Game
from dau_fast.methods.dau.referee import Referee
from dau_fast.methods.registry import get_method
from dau_fast.methods.task import Task
from dau_fast.models import Classifier

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
    for one, equal, another in zip(first.chunk(3), again.chunk(3), other.chunk(3), strict=True):
        assert torch.equal(one, equal)
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
    result = game.unlearn(task, replace(CLASSWISE, lr=10.0, alpha=4.0, turns=20))
    assert result.history is not None
    assert result.history["lr"] < 10.0
    assert percent_right(task, result.model, task.split.retain) >= 90
    assert len(result.loops) == len(caplog.messages) + 1 > 1
    assert caplog.messages[0].startswith("a game of 20 turns with lr 10 ruined the model: it knew ")


def test_of_a_model_that_collapsed_more_turns_would_win_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter([True, False])
    monkeypatch.setattr(Referee, "finds_ruin", lambda self: next(verdicts))
    monkeypatch.setattr(Referee, "finds_collapse", lambda self: True)
    result = game.unlearn(trained(TENTH), SPREAD)
    assert result.history is not None
    assert (result.history["turns"], result.history["lr"]) == ([30, 30], SPREAD.lr / 4)


def test_a_game_that_costs_some_points_is_played_again_with_more_turns_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Referee.finds_ruin
    verdicts = iter([True, True, True, False])
    monkeypatch.setattr(Referee, "finds_ruin", lambda self: found(self) or next(verdicts))
    result = game.unlearn(trained(TENTH), SPREAD)
    assert result.history is not None
    assert (result.history["turns"], result.history["lr"]) == ([30, 60, 60, 60], SPREAD.lr / 16)
    assert result.history["step"][-1] == 2 * SPREAD.turns
    assert [message.split(" ruined")[0] for message in caplog.messages] == [
        "a game of 30 turns with lr 0.02",
        "a game of 60 turns with lr 0.02",
        "a game of 60 turns with lr 0.005",
    ]


def test_a_model_that_every_game_ruins_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Referee, "finds_ruin", lambda self: True)
    with pytest.raises(
        UserError,
        match=r"every game ruined the model, the last of 60 turns with `lr=0.00125`: take a smaller",
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
            *_, study, asked, held = players._show(batch)
            assert not held.any()
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
        assert players.anchor_logits == 0
        assert players.alpha == pytest.approx(0.05**2 * SPREAD.alpha)


@pytest.mark.parametrize("fewer", ["forget", "validation"])
def test_what_many_images_show_counts_however_little_it_is(fewer: str) -> None:
    task = trained(TENTH)
    sets = dict.fromkeys(("forget", "validation"), task.split.validation)
    sets[fewer] = task.split.validation[:60]
    task = replace(task, split=replace(task.split, **sets))
    with game_of(task, replace(SPREAD, half_sure=20, departure=0.8)) as players:
        players.warm_up()
        sure, exposed = 60 / (60 + 20), players.history.exposure
        assert exposed < sure
        assert players.anchor_logits == pytest.approx(SPREAD.anchor_logits * (1 - exposed / sure))
        assert players.alpha == pytest.approx(sure**2 * SPREAD.alpha)
        assert players.departure == pytest.approx(sure**2 * 0.8)


def test_logits_of_a_class_that_is_gone_are_not_held() -> None:
    with game_of(trained(ONE_CLASS), replace(SPREAD, half_sure=1e-3)) as players:
        players.warm_up()
        assert players.history.exposure < 1
        assert players.anchor_logits == 0


@pytest.mark.parametrize(("known", "share"), [(0, (0.05 / 0.6) ** 2), (30, (0.3 / 0.6) ** 2), (100, 1.0)])
def test_a_class_is_exposed_as_far_as_retain_images_are_known_by_heart(
    known: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = trained(ONE_CLASS)
    margins = torch.linspace(-1, 1, 201)
    shifted = torch.cat([margins + 3] * known + [margins] * (100 - known))
    monkeypatch.setattr(Game, "_show_margins", lambda _: (shifted, margins))
    with game_of(task, CLASSWISE) as players:
        players.warm_up()
        assert players.alpha == pytest.approx(share * CLASSWISE.alpha, rel=1e-3)
