"""Image equivalents against counters in real games and retrainings, and the line that tells of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from counting import CONFIGS, count_equivalents_of, once
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from toys import ONE_CLASS, TENTH, trained, with_earlier

from dau_fast.config import DauConfig, TrainingRecipe
from dau_fast.cost import (
    COUNTS,
    Equivalents,
    Passes,
    Sizes,
    count_equivalents,
    count_rival,
    has_batchnorm,
)
from dau_fast.data.split import Forget
from dau_fast.methods import retrain
from dau_fast.methods.dau import game
from dau_fast.methods.dau.difficulty import are_pictures
from dau_fast.methods.mu_mis import MuMisConfig, sensitivity_gap
from dau_fast.methods.registry import find_methods, get_method
from dau_fast.methods.sample_gradients import SampleGradients
from dau_fast.methods.task import Task
from dau_fast.models import Classifier, SmallResNet

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
        features=task.original.head.in_features,
        batchnorm=has_batchnorm(task.original.network),
        earlier=len(split.earlier),
        classwise=split.classwise,
        pictures=are_pictures(task.images.shape),
    )


@pytest.mark.parametrize("forget", [TENTH, ONE_CLASS], ids=["tenth", "class"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_game_makes_the_passes_that_were_predicted(name: str, forget: Forget) -> None:
    task = trained(forget)
    with once():
        made = count_equivalents_of(lambda: game.unlearn(task, CONFIGS[name]))
    assert predicted(task, CONFIGS[name]).list_totals()["dau"] == pytest.approx(made, rel=1e-12)


@pytest.mark.parametrize("name", ["usual", "no teacher"])
def test_after_earlier_requests_the_original_is_shown_their_images_too(name: str) -> None:
    task = with_earlier(trained(TENTH), 30)
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


# With a third of it a ResNet-18 loses its retain set, or does not forget what it memorised (measured).
@pytest.mark.parametrize("classwise", [False, True], ids=["tenth", "class"])
def test_the_default_game_on_cifar_stays_within_its_budget(classwise: bool) -> None:
    config = DauConfig.default(classwise=classwise, retain_images=40_500, forget_images=4500)
    sizes = {"retain": 40_500, "forget": 4500, "validation": 4500 if classwise else 5000, "classes": 10}
    sizes["features"] = 512
    found = count_equivalents(config, {"retrain": TrainingRecipe()}, **sizes, batchnorm=True)
    totals = found.list_totals()
    assert totals["dau"] <= 300_000
    assert totals["retrain"] / totals["dau"] >= 25


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


# ---- the other methods

SHORTER = {"epochs": 3, "batch_size": 48}
# By example, so that rounding of steps shows; the rest is as usual.
ASKED: dict[str, dict[str, Any]] = {
    "head_only": {"retain_images": 100},
    "influence": {"samples": 50},
    "fisher": {},
    "ssd": {},
    "scrub": {"epochs": 3, "max_epochs": 2, "batch_size": 48, "forget_batch_size": 10},
    "sfron": {"epochs": 2, "batch_size": 48, "forget_every": 4},
    "amun": {"epochs": 3, "batch_size": 48, "milestones": (), "radius": 1e6},
}
# Searches end when they have found something.
AT_LEAST = ("amun",)
# Their images pass one by one inside a batch, and ordinarily beside it.
BY_SAMPLES = ("fisher", "ssd", "influence")


def asked_of(name: str) -> Any:
    return ASKED.get(name, SHORTER)


def count_samples_of(work: Callable[[], object]) -> float:
    """Images whose gradients are taken, in batches or one by one, each as often as they are."""
    seen = []
    batches = SampleGradients._batches

    def counted(self: SampleGradients, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in batches(self, size):
            seen.append(len(images))
            yield images, labels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleGradients, "_batches", counted)
        work()
    return sum(seen)


@pytest.mark.parametrize("forget", [TENTH, ONE_CLASS], ids=["tenth", "class"])
@pytest.mark.parametrize("name", [name for name in COUNTS if name != "mu_mis"])
def test_every_method_makes_the_passes_that_were_predicted(name: str, forget: Forget) -> None:
    task, method = trained(forget), get_method(name)
    settings, split = method.resolve(task, asked_of(name)), task.split
    sizes = Sizes(len(split.forget), len(split.retain), len(split.validation), split.classwise)
    counter = count_samples_of if name in BY_SAMPLES else count_equivalents_of
    made = counter(lambda: method.run(task, settings))
    found = count_rival(name, settings, sizes)
    if name in AT_LEAST:
        assert made / 2 < found <= made
    else:
        assert found == pytest.approx(made, rel=1e-12)


def test_an_image_of_mu_mis_costs_three_of_training() -> None:
    """By FLOPs, as what stands in a gradient of a gradient is not seen from outside."""
    torch.manual_seed(0)
    model, labels = Classifier(SmallResNet(3, 10)).eval(), torch.tensor([1, 2])
    leaf = torch.randn(2, 3, 32, 32, requires_grad=True)
    with FlopCounterMode(display=False) as training:
        nn.functional.cross_entropy(model(leaf.detach()).logits, labels).backward()
    with FlopCounterMode(display=False) as forgetting:
        images = 1 * leaf  # the counter takes no leaf
        sensitivity_gap(model(images).logits, images, labels, labels + 1).mean().backward()
    sizes = Sizes(48, 1, 1, False)
    settings = MuMisConfig(epochs=1, batch_size=48)
    ratio = forgetting.get_total_flops() / training.get_total_flops()
    assert count_rival("mu_mis", settings, sizes) == pytest.approx(48 * ratio, rel=0.1)


def test_every_method_has_a_count() -> None:
    """But for retraining with masks of its own, which depends on how the original was pruned."""
    counted = {*COUNTS, "dau", "retrain", "retrain_fast", "retrain_clean"}
    assert counted == set(find_methods())
    assert count_rival("retrain_clean", None, Sizes(1, 1, 1, False)) is None


@pytest.mark.parametrize("forget", [TENTH, ONE_CLASS], ids=["tenth", "class"])
def test_totals_name_all_methods(forget: Forget) -> None:
    task = trained(forget)
    settings = {name: get_method(name).resolve(task) for name in ("ft", "scrub", "retrain", "dau")}
    split = task.split
    found = count_equivalents(
        settings.pop("dau"), {"retrain": settings["retrain"]}, others=settings,
        forget=len(split.forget), retain=len(split.retain), validation=len(split.validation),
        classes=len(task.images.class_names), features=task.original.head.in_features, batchnorm=False,
        classwise=split.classwise,
    )  # fmt: skip
    assert found.list_totals().keys() == {"dau", "retrain", "ft", "scrub"}
    assert f"ft {found.others['ft']:,.0f}" in found.describe()
