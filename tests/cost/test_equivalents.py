"""Image equivalents against counters in real games and retrainings, and the line that tells of them."""

from __future__ import annotations

from functools import partial

import pytest
from counting import CONFIGS, count_equivalents_of, once
from toys import ONE_CLASS, TENTH, trained

from dau_fast.config import DauConfig, TrainingRecipe
from dau_fast.cost import Equivalents, Passes, count_equivalents, has_batchnorm
from dau_fast.data.split import Forget
from dau_fast.methods import retrain
from dau_fast.methods.dau import game
from dau_fast.methods.task import Task

SHORT = TrainingRecipe(epochs=3, batch_size=48, lr=0.05)


def predicted(task: Task, config: DauConfig) -> Equivalents:
    split = task.split
    return count_equivalents(
        config,
        {"retrain": task.recipe, "retrain_fast": SHORT},
        forget=len(split.forget),
        retain=len(split.retain),
        validation=len(split.validation),
        classes=len(task.images.class_names),
        batchnorm=has_batchnorm(task.original.network),
    )


@pytest.mark.parametrize("forget", [TENTH, ONE_CLASS], ids=["tenth", "class"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_game_makes_the_passes_that_were_predicted(name: str, forget: Forget) -> None:
    task = trained(forget)
    with once():
        made = count_equivalents_of(lambda: game.unlearn(task, CONFIGS[name]))
    assert predicted(task, CONFIGS[name]).list_totals()["dau"] == pytest.approx(made, rel=1e-12)


def test_retrainings_make_the_passes_that_were_predicted() -> None:
    task = trained(TENTH)
    totals = predicted(task, CONFIGS["usual"]).list_totals()
    rows = {"retrain": (retrain.unlearn, task.recipe), "retrain_fast": (retrain.unlearn_fast, SHORT)}
    for name, (unlearn, recipe) in rows.items():
        made = count_equivalents_of(partial(unlearn, task, recipe))
        assert totals[name] == pytest.approx(made, rel=1e-12), name


@pytest.mark.parametrize(("classwise", "most"), [(False, 110_000), (True, 130_000)], ids=["tenth", "class"])
def test_the_default_game_on_cifar_stays_within_its_budget(classwise: bool, most: int) -> None:
    config = DauConfig.default(classwise=classwise, retain_images=40_500, forget_images=4500)
    sizes = {"retain": 40_500, "forget": 4500, "validation": 4500 if classwise else 5000, "classes": 10}
    found = count_equivalents(config, {"retrain": TrainingRecipe()}, **sizes, batchnorm=True)
    totals = found.list_totals()
    assert totals["dau"] <= most
    assert totals["retrain"] / totals["dau"] >= 80


def test_the_line_says_what_each_costs_and_how_much_faster_the_game_can_be() -> None:
    played = Passes(turns=3000, teaching=4500, looks=900, lesson=300, batchnorm=300)
    retraining = {"retrain": 100_000, "retrain_fast": 7_500}
    found = Equivalents(played, retraining, step_images={"dau": 192, "retrain": 256})
    assert found.list_totals() == {"dau": 5000} | retraining
    assert found.describe() == (
        "image equivalents: dau 5,000 (turns 3,000, original 1,500, looks 300, lesson 100, BatchNorm 100), "
        "retrain 100,000, retrain_fast 7,500; images of a step: dau 192, retrain 256; by passes alone, a "
        "game is at most 20.0 times as fast as retrain and 1.5 times as fast as retrain_fast"
    )


def test_without_retraining_nothing_is_compared() -> None:
    found = Equivalents(Passes(30, 45, 6, 6, 3), {}, {"dau": 6})
    assert found.describe() == (
        "image equivalents: dau 50 (turns 30, original 15, looks 2, lesson 2, BatchNorm 1); "
        "images of a step: dau 6"
    )
