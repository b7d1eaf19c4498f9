"""What a report says of a run beside its measures."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from toys import TENTH, trained

from dau_fast.config import DauConfig
from dau_fast.report.facts import describe_costs

CONFIG = DauConfig(label_conditioned=True, alpha=1.0, turns=30)


def equivalents(config: DauConfig, history: dict[str, Any] | None) -> float:
    task = trained(TENTH)
    outcome = SimpleNamespace(settings={"dau": config}, task=task)
    found = describe_costs(SimpleNamespace(outcome=outcome, split=task.split, history=history))  # type: ignore[arg-type]
    assert found is not None
    return found.list_totals()["dau"]


def test_games_that_ruined_the_model_cost_as_well() -> None:
    again = equivalents(CONFIG, {"turns": [30, 60]})
    assert again == equivalents(replace(CONFIG, turns=90), {"turns": [90]})
    assert again > 2 * equivalents(CONFIG, {"turns": [30]})
