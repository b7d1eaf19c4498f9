"""The usual settings of the game, by the task that it is for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn
from toys import ONE_CLASS, TENTH, trained

from dau_fast.config import DauConfig
from dau_fast.data.split import Forget
from dau_fast.methods.registry import get_method
from dau_fast.models import Classifier

THIRD = Forget("random:0.3", fraction=0.3)


@pytest.mark.parametrize("retain", [1, 10, 24, 25, 1000, 45000])
@pytest.mark.parametrize("classwise", [True, False])
def test_the_usual_settings_exist_for_every_size_of_the_retain_set(retain: int, classwise: bool) -> None:
    config = DauConfig.default(classwise=classwise, retain_images=retain, forget_images=9)
    assert config.label_conditioned != classwise
    assert (config.departure > 0) == (classwise or config.batch_size <= 9)


@pytest.mark.parametrize(
    ("layers", "lr"),
    [
        ([nn.BatchNorm1d(8)], 0.04),
        ([nn.LayerNorm(8), nn.BatchNorm1d(8)], 0.04),
        ([nn.LayerNorm(8)], 0.005),
        ([nn.RMSNorm(8)], 0.005),
        ([nn.GroupNorm(2, 8)], 0.02),
        ([], 0.02),
    ],
)
@pytest.mark.parametrize("forget", [THIRD, ONE_CLASS], ids=["third", "class"])
def test_steps_are_as_large_as_what_normalises_a_network_bears(
    forget: Forget, layers: list[nn.Module], lr: float
) -> None:
    dau, task = get_method("dau"), trained(forget)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(task.images.pixels[0].numel(), 8), *layers, nn.Linear(8, 3)
    )
    given = replace(task, original=Classifier(network))
    assert dau.resolve(given).lr == lr
    assert dau.resolve(given, {"lr": 0.01}).lr == 0.01


def test_for_fewer_images_than_a_batch_steps_are_small_and_the_pull_is_weak() -> None:
    few, third = (get_method("dau").resolve(trained(forget)) for forget in (TENTH, THIRD))
    assert (few.lr, few.alpha, few.departure) == (0.02, 4.0, 0.0)
    assert (third.lr, third.alpha, third.departure) == (0.04, 10.0, 1.0)


def test_the_usual_game_makes_six_passes_over_a_middling_set_and_part_of_one_over_a_large_one() -> None:
    small, middle, large = (
        DauConfig.default(classwise=False, retain_images=count, forget_images=400)
        for count in (200, 2400, 1_000_000)
    )
    assert (small.turns, middle.turns) == (128, 6 * 2400 // 64)
    assert middle.turns < large.turns < 1_000_000 // 64
    half = DauConfig.default(classwise=False, retain_images=1200, forget_images=1200)
    assert half.turns == middle.turns


@pytest.mark.parametrize(
    ("forget", "retain", "of_images", "of_a_class"),
    [
        (400, 3600, 64, 64),
        (2000, 2000, 64, 64),
        (2049, 2049, 128, 64),  # the forget set ten times
        (1500, 13_500, 128, 128),  # the retain set twice
        (4500, 40_500, 256, 256),
        (255, 40_500, 128, 128),  # no more than there are to forget
        (1, 40_500, 64, 64),
        (128_000, 1_000_000, 256, 256),
    ],
)
def test_large_sets_are_passed_by_larger_batches(
    forget: int, retain: int, of_images: int, of_a_class: int
) -> None:
    for classwise, batch_size in ((False, of_images), (True, of_a_class)):
        config = DauConfig.default(classwise=classwise, retain_images=retain, forget_images=forget)
        assert (config.turns, config.batch_size) == (320, batch_size)


@pytest.mark.parametrize(("forget", "seen", "settled"), [(ONE_CLASS, True, 0.5), (TENTH, False, 0.0)])
def test_features_are_seen_and_turns_settled_where_classes_go(
    forget: Forget, seen: bool, settled: float
) -> None:
    task = trained(forget)
    config = get_method("dau").resolve(task)
    assert (config.features, config.settled) == (seen, settled)
    assert config.plain_share == 0.5
