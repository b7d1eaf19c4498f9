"""The comparison of processes runs, and sees a difference where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from calling import environment

ROOT = Path(__file__).parents[2]
SHORT = ["--epochs", "1", "--forget", "class:3", "--count", "2"]


def test_the_record_is_written(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "benchmarks/processes.py", *SHORT, "--record", tmp_path],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "summary.json").read_text())["largest difference to one process"]
    assert list(found) == ["class:3, 2 processes"]
    assert json.loads((tmp_path / "class-3-2.json").read_text())["run"]["processes"] == 2


def test_differences_are_those_of_the_worst_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from processes import largest_difference

    def report(**dau: float) -> dict[str, dict[str, dict[str, float]]]:
        same = dict.fromkeys(("ua", "ra", "ta", "mia_efficacy", "avg_gap"), 50.0)
        return {"methods": {"retrain": same, "dau": {**same, **dau}}}

    assert largest_difference(report(), report()) == 0
    assert largest_difference(report(ua=51.0), report(ta=47.5)) == 2.5
