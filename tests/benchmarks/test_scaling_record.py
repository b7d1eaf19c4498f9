"""The benchmark of scaling at toy size, and the tables in the docs against what its command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from scripts import ROOT, succeed


def check_record(folder: Path) -> None:
    """Every case with its seconds and its prediction, memory as predicted, pictures."""
    summary = json.loads((folder / "summary.json").read_text())
    assert {"what", "value", "limit", "reached"} <= summary["targets"][0].keys()
    cases = summary["cases"]
    assert {case["processes"] for case in cases} == {1, 2}
    assert {case["held_out"] for case in cases} == {True, False}
    seconds = json.loads((folder / "seconds.json").read_text())
    assert len(seconds) == len(cases)
    for case in cases:
        assert case["predicted"] == pytest.approx(sum(case["parts"].values()))
        assert case["seconds"] > 0
    for row in summary["memory"]:
        assert abs(row["error_percent"]) < 20
    assert {"growth.svg", "predictions.svg", "processes.svg"} <= {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_smoke_leaves_a_record_with_every_case_and_its_prediction(tmp_path: Path) -> None:
    succeed("scaling.py", "--smoke", "--record", tmp_path)
    check_record(tmp_path)


@pytest.mark.usefixtures("importable")
def test_a_record_of_invented_seconds_predicts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scaling
    from support import costs

    from dau_fast.cost import predict

    machine = scaling.fit_machine([(costs.job_of(costs.cases(smoke=True)[0]), 0.3)])
    invented = {
        case.name: [predict(costs.job_of(case), machine).total_seconds] for case in costs.cases(smoke=True)
    }
    monkeypatch.setattr(costs, "measured", lambda cases, rounds: invented)
    targets, found = scaling.measure_costs(tmp_path, smoke=True)
    scaling.finish(tmp_path, targets, found)
    check_record(tmp_path)


@pytest.mark.usefixtures("importable")
def test_the_tables_in_the_docs_are_those_that_the_command_prints() -> None:
    from scaling import main

    text = (ROOT / "docs" / "scaling.md").read_text()
    shown = text.partition("<!-- predictions -->\n")[2].partition("<!-- end of predictions -->")[0]
    printed = CliRunner().invoke(main, ["--predict"], catch_exceptions=False)
    assert printed.exit_code == 0
    assert shown.strip() == printed.stdout.strip()


@pytest.mark.usefixtures("importable")
def test_figures_in_the_docs_are_those_of_the_record_they_name() -> None:
    from support.scaling_docs import between, measurements, quality

    text = (ROOT / "docs" / "scaling.md").read_text()
    for name, what, section in (
        ("scaling", "measurements", measurements), ("retain-sample", "quality", quality)
    ):  # fmt: skip
        record = max((ROOT / "benchmarks" / "records").glob(f"*-{name}-cpu"))
        shown = text.partition(f"<!-- {what} -->\n")[2].partition(f"<!-- end of {what} -->")[0]
        assert shown.strip() == section(record)
    assert between("a<!-- x -->\nold<!-- end of x -->b", "x", "new") == "a<!-- x -->\nnew\n<!-- end of x -->b"
