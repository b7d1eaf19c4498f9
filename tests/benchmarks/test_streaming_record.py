"""The benchmark of reading at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts import succeed


@pytest.mark.slow
def test_smoke_leaves_a_record_of_all_rows(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    succeed("streaming.py", "--smoke", "--record", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["cases"].keys() == {"files", "arrow", "arrays"}
    for case, entries in summary["cases"].items():
        assert entries.keys() == {"dau_fast", "torchvision"}, case
        for entry in entries.values():
            assert 0 <= entry["waiting"] <= 1
            assert entry["images_per_second"] * entry["median_seconds"] == pytest.approx(64)
            assert 0 < entry["percent_of_floor"] < 100
    assert len(summary["targets"]) == 5
    assert json.loads((tmp_path / "environment.json").read_text())["commit"]
