"""The benchmark of the membership attacks at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts import succeed


@pytest.mark.slow
def test_smoke_leaves_a_record_in_which_the_attacks_agree(tmp_path: Path) -> None:
    succeed("evaluation.py", "--smoke", "--record", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["cases"]) == 4
    for case, entries in summary["cases"].items():
        assert entries.keys() == {"dau_fast", "scikit-learn"}
        assert entries["dau_fast"]["lowest_agreement_percent"] >= 99, case
        assert len(entries["dau_fast"]["agreement_percent"]) == 5
    assert len(summary["targets"]) == 5
    assert json.loads((tmp_path / "environment.json").read_text())["commit"]
