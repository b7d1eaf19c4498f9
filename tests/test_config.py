"""Settings are checked when they are made, and changed by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dau_fast.config import DauConfig, PruneConfig, SplitConfig, TrainingRecipe, change
from dau_fast.errors import UserError

GAME = DauConfig.default(classwise=False, retain_images=800, forget_images=90)
USUAL: dict[str, Any] = {
    "dau": GAME,
    "recipe": TrainingRecipe(),
    "prune": PruneConfig("omp"),
    "split": SplitConfig(),
}

WRONG = [
    ("dau", "batch_size", 0, "a whole number from 2 up"),
    ("dau", "batch_size", 1, "a whole number from 2 up"),
    ("dau", "batch_size", 2.5, "a whole number from 2 up"),
    ("dau", "batch_size", True, "a whole number from 2 up"),
    ("dau", "turns", 0, "a whole number from 1 up"),
    ("dau", "turns", -1, "a whole number from 1 up"),
    ("dau", "turns", math.inf, "a whole number from 1 up"),
    ("dau", "retain_sample", math.inf, "a number above 0"),
    ("dau", "turns", "1", "a whole number from 1 up"),
    ("dau", "looks", 0, "a whole number from 1 up"),
    ("dau", "retain_sample", math.nan, "a number above 0"),
    ("dau", "lr", -1, "a number above 0"),
    ("dau", "lr", 0, "a number above 0"),
    ("dau", "lr", None, "a number above 0"),
    ("dau", "momentum", 2, "a number from 0 to below 1"),
    ("dau", "exam_share", 2, "a number from 0 to below 1"),
    ("dau", "attacker_steps", -1, "a whole number from 0 up"),
    ("dau", "alpha", math.inf, "a number from 0 up"),
    ("recipe", "epochs", 0, "a whole number from 1 up"),
    ("recipe", "warm_up", 1.5, "a number from 0 to 1"),
    ("recipe", "label_smoothing", 1, "a number from 0 to below 1"),
    ("recipe", "milestones", (0.5, 2.0), "shares of the steps, from 0 to 1"),
    ("prune", "sparsity", 1, "a number from 0 to below 1"),
    ("prune", "rate", 0, "a number above 0 to below 1"),
    ("prune", "iterations", 0, "a whole number from 1 up"),
    ("split", "validation_share", 0, "a number above 0 to below 1"),
]


@pytest.mark.parametrize(("kind", "name", "value", "expected"), WRONG)
def test_a_wrong_value_is_one_clear_line(kind: str, name: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(USUAL[kind], **{name: value})
    assert str(caught.value) == f"`{name}={value}`: expected {expected}"


@pytest.mark.parametrize(
    ("kind", "name", "value", "most"),
    [
        ("dau", "batch_size", 1_000_000, "65,536"),
        ("dau", "turns", 10**12, "1,000,000"),
        ("dau", "attacker_steps", 10**12, "10,000"),
        ("dau", "warmup_steps", 10**12, "1,000,000"),
        ("dau", "attacker_hidden", 10**9, "16,384"),
        ("dau", "looks", 10**30, "1,000,000,000"),
        ("dau", "beta", 1e9, "1,000,000"),
        ("dau", "lr", 1e30, "1,000"),
        ("recipe", "epochs", 99999999999999999999, "1,000,000"),
    ],
)
def test_what_nobody_means_is_refused(kind: str, name: str, value: Any, most: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(USUAL[kind], **{name: value})
    assert str(caught.value) == f"`{name}={value}`: expected no more than {most}"


@pytest.mark.parametrize("name", ["lr", "turns", "batch_size"])
def test_a_number_too_long_to_write_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="a number of thousands of digits`: expected no more than"):
        replace(GAME, **{name: 10**5000})
    with pytest.raises(UserError, match="a number of thousands of digits`: expected a"):
        replace(GAME, **{name: -(10**5000)})


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308, -1.0, 0.0])
def test_a_share_that_is_no_number_is_refused_where_defaults_depend_on_it(value: float) -> None:
    with pytest.raises(UserError, match="`retain_sample="):
        DauConfig.default(classwise=False, retain_images=800, forget_images=90, retain_sample=value)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("dau", "retain_sample", None),
        ("dau", "attacker_steps", 0),
        ("dau", "alpha", 0.0),
        ("dau", "momentum", 0.0),
        ("dau", "turns", 1),
        ("dau", "anchor", 0.0),
        ("recipe", "warm_up", None),
        ("recipe", "milestones", ()),
        ("prune", "sparsity", 0.0),
    ],
)
def test_what_lies_at_the_border_is_taken(kind: str, name: str, value: Any) -> None:
    assert getattr(replace(USUAL[kind], **{name: value}), name) == value


def test_fields_are_changed_by_name() -> None:
    assert change(GAME, {"lr": 0.5, "beta": 0}, "dau") == replace(GAME, lr=0.5, beta=0)
    assert change(GAME, {}, "dau") == GAME


def test_what_json_made_of_a_tuple_is_one_again() -> None:
    assert change(TrainingRecipe(), {"milestones": [0.1, 0.2]}, "ft").milestones == (0.1, 0.2)


def test_an_unknown_field_is_named_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"^dau has no setting 'rate': expected some of label_conditioned, "):
        change(GAME, {"rate": 1}, "dau")


def test_what_is_no_switch_or_no_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"`label_conditioned=1`: expected True or False"):
        replace(GAME, label_conditioned=1)
    with pytest.raises(UserError, match=r"`sensitivity=labels`: expected one of none, classifier, "):
        replace(GAME, sensitivity="labels")
    with pytest.raises(UserError, match=r"`milestones=half`: expected shares"):
        replace(TrainingRecipe(), milestones="half")
    with pytest.raises(UserError, match=r"`nesterov=True` needs `momentum` above 0"):
        TrainingRecipe(nesterov=True, momentum=0.0)
