"""The benchmark of scaling at toy size, and the tables in the docs against what its command prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from calling import environment

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    command = [sys.executable, "benchmarks/scaling.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_smoke_leaves_a_record_with_every_case_and_its_prediction(tmp_path: Path) -> None:
    run("--smoke", "--record", str(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"what", "value", "limit", "reached"} <= summary["targets"][0].keys()
    cases = summary["cases"]
    assert {case["processes"] for case in cases} == {1, 2}
    assert {case["held_out"] for case in cases} == {True, False}
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert len(seconds) == len(cases)
    for case in cases:
        assert case["predicted"] == pytest.approx(sum(case["parts"].values()))
        assert case["seconds"] > 0
    for row in summary["memory"]:
        assert abs(row["error_percent"]) < 20
    assert {"growth.svg", "predictions.svg", "processes.svg"} <= {path.name for path in tmp_path.iterdir()}


def test_the_tables_in_the_docs_are_those_that_the_command_prints() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text()
    shown = text.partition("<!-- predictions -->\n")[2].partition("<!-- end of predictions -->")[0]
    assert shown.strip() == run("--predict").strip()


def test_figures_in_the_docs_are_those_of_the_record_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from support.scaling_docs import between, measurements, quality

    text = (ROOT / "docs" / "scaling.md").read_text()
    for name, what, section in (
        ("scaling", "measurements", measurements), ("retain-sample", "quality", quality)
    ):  # fmt: skip
        record = max((ROOT / "benchmarks" / "records").glob(f"*-{name}-cpu"))
        shown = text.partition(f"<!-- {what} -->\n")[2].partition(f"<!-- end of {what} -->")[0]
        assert shown.strip() == section(record)
    assert between("a<!-- x -->\nold<!-- end of x -->b", "x", "new") == "a<!-- x -->\nnew\n<!-- end of x -->b"
