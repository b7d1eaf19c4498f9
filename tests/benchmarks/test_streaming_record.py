"""The benchmark of reading at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from calling import environment

ROOT = Path(__file__).parents[2]


def test_smoke_leaves_a_record_of_all_rows(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    command = [sys.executable, "benchmarks/streaming.py", "--smoke", "--record", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
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
