"""The comparison of processes runs, and sees a difference where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts import succeed

SHORT = ["--epochs", "1", "--forget", "class:3", "--count", "2"]


@pytest.mark.slow
def test_the_record_is_written(tmp_path: Path) -> None:
    succeed("processes.py", *SHORT, "--record", tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())["largest difference to one process"]
    assert list(found) == ["class:3, 2 processes"]
    assert json.loads((tmp_path / "class-3-2.json").read_text())["run"]["processes"] == 2


@pytest.mark.usefixtures("importable")
def test_differences_are_those_of_the_worst_measure() -> None:
    from processes import largest_difference

    def report(**dau: float) -> dict[str, dict[str, dict[str, float]]]:
        same = dict.fromkeys(("ua", "ra", "ta", "mia_efficacy", "avg_gap"), 50.0)
        return {"methods": {"retrain": same, "dau": {**same, **dau}}}

    assert largest_difference(report(), report()) == 0
    assert largest_difference(report(ua=51.0), report(ta=47.5)) == 2.5
