"""What a report says of a run beside its measures."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from toys import TENTH, trained, with_earlier

from dau_fast.config import DauConfig
from dau_fast.report.facts import describe_costs

CONFIG = DauConfig(label_conditioned=True, alpha=1.0, turns=30)


def equivalents(config: DauConfig, history: dict[str, Any] | None, earlier: int = 0) -> float:
    task = with_earlier(trained(TENTH), earlier)
    outcome = SimpleNamespace(settings={"dau": config}, task=task)
    found = describe_costs(SimpleNamespace(outcome=outcome, split=task.split, history=history))  # type: ignore[arg-type]
    assert found is not None
    return found.list_totals()["dau"]


def test_games_that_ruined_the_model_cost_as_well() -> None:
    again = equivalents(CONFIG, {"turns": [30, 60]})
    assert again == equivalents(replace(CONFIG, turns=90), {"turns": [90]})
    assert again > 2 * equivalents(CONFIG, {"turns": [30]})


def test_after_earlier_requests_the_original_passes_over_two_sets_in_every_turn() -> None:
    usual, later = (equivalents(CONFIG, {"turns": [30]}, earlier) for earlier in (0, 5))
    fewer = 5 * (5 + 1)  # retain images, in five looks and the pass for BatchNorm
    assert later == pytest.approx(usual + (30 * CONFIG.batch_size - fewer) / 3)


def test_what_unseen_inputs_get_is_asked_once_where_they_are_no_pictures() -> None:
    split = trained(TENTH).split
    asked = len(split.forget) + len(split.retain) + len(split.validation)
    found = equivalents(replace(CONFIG, departure=1.0), {"turns": [30]})
    assert found == pytest.approx(equivalents(CONFIG, {"turns": [30]}) + asked / 3)
