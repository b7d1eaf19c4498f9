"""Tuning: as many trials for everyone, a planted best that is found, and what is never looked at."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from toys import ONE_CLASS, TENTH, blobs, perceptron, trained

from dau_fast.config import TrainingRecipe
from dau_fast.data.images import Choice, Images
from dau_fast.data.split import Forget
from dau_fast.errors import Diverged, UserError
from dau_fast.job.assembly import carry_out
from dau_fast.job.experiment import Experiment, run_experiment
from dau_fast.job.request import Request
from dau_fast.job.tuning import Judge, Tuned, plan_trials, tune
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.registry import find_methods, get_method
from dau_fast.methods.task import Task, Unlearned
from dau_fast.models import Classifier


@dataclass(frozen=True)
class Planted:
    """scale: of the classifier layer; 1 leaves the model as it was. name: changes nothing."""

    scale: float = -1.0
    name: str = "a"

    def __post_init__(self) -> None:
        if self.name == "wrong":
            raise UserError("`name=wrong`: expected another")


ran: list[Planted] = []


def rescale(task: Task, settings: Planted) -> Unlearned:
    ran.append(settings)
    assert len(task.split.test) == 0
    model = copy.deepcopy(task.original)
    with torch.no_grad():
        model.head.weight.mul_(settings.scale)
        model.head.bias.mul_(settings.scale)
    return Unlearned(model)


def planted(**space: tuple[Any, ...]) -> Method[Planted]:
    return Method(
        "planted", "planted", "a scaled classifier layer", rescale, recipe_chooser(lambda _: Planted()),
        space=space,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _none_ran() -> None:
    ran.clear()


@pytest.fixture(scope="module")
def task() -> Task:
    return trained(TENTH)


def tried(tuned: Tuned) -> list[dict[str, Any]]:
    return [trial.settings for trial in tuned.tuning.trials]


# ---- what is tried


def test_the_usual_settings_come_first_and_none_comes_twice(task: Task) -> None:
    method = planted(scale=(-1.0, 0.5, 1.0), name=("a", "b"))
    tuned = tune(method, task, 6)
    found = tried(tuned)
    assert found[0] == {"scale": -1.0, "name": "a"}
    assert len({tuple(settings.items()) for settings in found}) == len(found) == 6
    assert [{"scale": settings.scale, "name": settings.name} for settings in ran] == found


def test_what_is_drawn_depends_on_seed_and_name_alone(task: Task) -> None:
    space = {"scale": tuple(float(i) for i in range(-1, 40)), "name": ("a", "b")}

    def drawn(method: Method[Planted], given: Task, trials: int = 5) -> list[Planted]:
        return plan_trials(method, given, Planted(), trials)

    method = planted(**space)
    first = drawn(method, task)
    torch.manual_seed(7)
    assert drawn(method, task) == first
    assert drawn(method, replace(task, seed=1)) != first
    assert drawn(replace(method, name="other"), task) != first


@pytest.mark.parametrize("trials", [1, 2, 7])
def test_every_method_gets_as_many_trials(trials: int, task: Task) -> None:
    one, other = (replace(planted(scale=tuple(map(float, range(-1, k)))), name=f"to {k}") for k in (7, 30))
    fixed = replace(planted(), name="fixed")
    outcome = carry_out(task, [one, other, unseen(fixed)], {}, trials=trials)
    assert {name: len(tuning.trials) for name, tuning in outcome.tunings.items()} == {
        "to 7": trials, "to 30": trials,
    }  # fmt: skip


def unseen(method: Method[Planted]) -> Method[Planted]:
    """`method`, that may be given test images: it is not tuned."""
    return replace(method, run=lambda task, settings: Unlearned(copy.deepcopy(task.original)))


def test_a_space_that_is_too_small_is_tried_whole_and_said(
    task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = tune(planted(scale=(-1.0, 1.0)), task, 5)
    assert [settings["scale"] for settings in tried(tuned)] == [-1, 1]
    assert "planted has 2 settings to try, fewer than 5" in caplog.text


def test_settings_that_were_asked_for_come_first(task: Task) -> None:
    method = planted(scale=(-1.0, 0.5))
    for asked in ({"scale": 3.0}, Planted(scale=3.0)):
        assert {settings["scale"] for settings in tried(tune(method, task, 3, asked))} == {3, -1, 0.5}
        assert ran[0].scale == 3.0
        ran.clear()


def test_wrong_settings_are_refused_before_any_trial(task: Task) -> None:
    def refuse(_: Task, settings: Planted) -> None:
        if settings.scale == 0.5:
            raise UserError("does not go with the task")

    method = planted(name=("a", "wrong"))
    with pytest.raises(UserError, match="`name=wrong`: expected another"):
        tune(method, task, 2)
    with pytest.raises(UserError, match="does not go with the task"):
        tune(replace(planted(scale=(-1.0, 0.5)), check=refuse), task, 2)
    assert not ran


# ---- which one wins


@pytest.mark.parametrize("forget", [TENTH, ONE_CLASS], ids=["spread", "class"])
def test_the_planted_best_is_found_and_its_model_is_the_result(forget: Forget) -> None:
    """Spread over classes no change is best: every other one here ruins retain and validation."""
    task = trained(forget)
    tuned = tune(planted(scale=(-1.0, 0.0, 1.0)), task, 3)
    trials, chosen = tuned.tuning.trials, tuned.tuning.chosen
    scores = {trial.settings["scale"]: trial.score for trial in trials}
    assert trials[chosen].score == min(scores.values())
    assert tuned.settings == Planted(scale=trials[chosen].settings["scale"])
    if forget is TENTH:
        assert tuned.settings.scale == 1
        assert torch.equal(tuned.finished.model.head.weight, task.original.head.weight)
        assert trials[chosen].terms["retain_change"] == trials[chosen].terms["validation_change"] == 0
    assert tuned.finished.seconds == trials[chosen].seconds
    assert tuned.tuning.seconds > sum(trial.seconds for trial in trials)
    for trial in trials:
        assert trial.score == pytest.approx(sum(trial.terms.values()) / 4)


def test_ties_go_to_the_earlier_trial(task: Task) -> None:
    names = tuple("abcdefgh")
    tuned = tune(planted(name=names), task, 8, {"scale": 1.0})
    assert len({trial.score for trial in tuned.tuning.trials}) == 1
    assert tuned.tuning.chosen == 0


def test_a_trial_that_diverges_is_noted_and_loses(task: Task) -> None:
    tuned = tune(planted(scale=(math.nan, math.inf, -1.0)), task, 3, {"scale": math.nan})
    failed = [trial for trial in tuned.tuning.trials if trial.failure]
    assert [trial.settings["scale"] for trial in failed[1:]] == [math.inf]
    for trial in failed:
        assert "planted diverged" in trial.failure
        assert (trial.score, trial.terms, trial.seconds) == (None, None, None)
    assert tuned.settings.scale == -1


def test_a_trial_that_ruins_the_model_loses_too(task: Task) -> None:
    dau = get_method("dau")
    ruinous = replace(dau.resolve(task), lr=1e3, turns=16)
    tuned = tune(dau, task, 3, ruinous)
    assert "every game ruined the model" in (tuned.tuning.trials[0].failure or "")
    assert tuned.tuning.chosen > 0


def test_outputs_that_overflow_have_diverged_too(task: Task) -> None:
    tuned = tune(planted(scale=(3e38, -1.0)), task, 2, {"scale": 3e38})
    assert "NaN or infinity" in tuned.tuning.trials[0].failure
    assert tuned.tuning.chosen == 1


def test_a_method_that_always_diverges_costs_one_line(task: Task) -> None:
    with pytest.raises(Diverged, match=r"^planted diverged in every trial, .*: planted diverged"):
        tune(planted(scale=(math.nan, math.inf)), task, 2, {"scale": math.nan})


# ---- what is never looked at


def test_neither_test_images_nor_retrained_models_are_looked_at(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    gather, choose = Images.gather, Images.choose

    def spy_gather(self: Images, index: torch.Tensor, *drawn: Any) -> torch.Tensor:
        seen.update(index.tolist())
        return gather(self, index, *drawn)

    def spy_choose(self: Images, index: torch.Tensor, *drawn: Any) -> Choice:
        seen.update(index.tolist())
        return choose(self, index, *drawn)

    def none(_: int) -> Classifier:
        pytest.fail("a fresh network is nobody's to train here")

    monkeypatch.setattr(Images, "gather", spy_gather)
    monkeypatch.setattr(Images, "choose", spy_choose)
    for method in (get_method("dau"), get_method("head_only")):
        tune(method, replace(task, fresh=none), 2)
    split = task.split
    assert seen == {i for part in (split.train, split.validation) for i in part.tolist()}


def test_scores_do_not_depend_on_what_the_test_images_are(task: Task) -> None:
    pixels = task.images.pixels.clone()
    pixels[task.split.test] = torch.nan
    blind = replace(task, images=replace(task.images, pixels=pixels))
    method = planted(scale=(-1.0, 0.5, 1.0))
    ours, theirs = (tune(method, given, 3).tuning.trials for given in (task, blind))
    assert [trial.terms for trial in ours] == [trial.terms for trial in theirs]


def test_judging_is_the_same_for_every_model(task: Task) -> None:
    judge = Judge(task)
    assert judge.observe(task.original) == judge.before == Judge(task).before


# ---- in a whole run


@pytest.mark.parametrize("forget", [TENTH, ONE_CLASS], ids=["spread", "class"])
def test_every_space_holds_the_usual_settings_and_enough_others(forget: Forget) -> None:
    task = trained(forget)
    spaces = {name: method.space for name, method in find_methods().items() if method.space}
    assert "dau" in spaces
    assert not {name for name in spaces if get_method(name).reference}
    for name, space in spaces.items():
        usual = get_method(name).resolve(task)
        assert all(getattr(usual, field) in values for field, values in space.items()), name
        assert math.prod(map(len, space.values())) >= 20, name


def test_further_seeds_run_what_the_first_one_chose() -> None:
    method = planted(scale=(-1.0, 1.0))
    method = replace(method, run=lambda task, settings: rescale(replace(task, split=no_test(task)), settings))
    recipe = TrainingRecipe(epochs=5, batch_size=32, lr=0.05)
    experiment = Experiment(blobs(240), TENTH, (method,), perceptron, recipe, repeats=2, trials=2)
    first, second = run_experiment(experiment)
    assert len(first.outcome.tunings["planted"].trials) == 2
    assert second.outcome.tunings == {}
    assert first.outcome.settings == second.outcome.settings == {"planted": Planted(scale=1.0)}
    assert [settings.scale for settings in ran] == [-1, 1, 1]


def no_test(task: Task) -> Any:
    return replace(task.split, test=task.split.test[:0])


# ---- --methods all


def test_all_stands_for_every_method_that_can_run() -> None:
    everything = list(find_methods())
    dense = [name for name in everything if name != "retrain_clean"]
    assert list(Request(methods=("all",), prune="omp").list_methods()) == everything
    assert list(Request(methods=("all",)).list_methods()) == dense
    assert list(Request(methods=("ft", "all")).list_methods()) == dense
    slow = Request(methods=("all",), retrain_recipe="literature").list_methods()
    assert list(slow) == [name for name in dense if name != "retrain_fast"]
    with pytest.raises(UserError, match="unknown method 'magic'"):
        Request(methods=("all", "magic")).list_methods()


def test_what_does_not_go_with_the_task_is_left_out_and_said(
    task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    clean, kept = get_method("retrain_clean"), unseen(planted(scale=(-1.0,)))
    outcome = carry_out(task, [clean, kept], {}, skip_unfit=True)
    assert list(outcome.settings) == list(outcome.finished) == ["planted"]
    assert [m for m in caplog.messages if "left out" in m] == [
        "retrain_clean is left out: method 'retrain_clean' retrains with masks of its own, and nothing is "
        "pruned: add `prune`, or take 'retrain'"
    ]
    with pytest.raises(UserError, match="'retrain_clean'"):
        carry_out(task, [clean, kept], {})
    with pytest.raises(UserError, match="planted has no setting 'x'"):
        carry_out(task, [kept], {"planted": {"x": 1}}, skip_unfit=True)
