"""The command that audits methods on the bank, on tiny invented pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

pytestmark = pytest.mark.usefixtures("importable")


def audited(pictures: Path, folder: Path, *arguments: str) -> Result:
    import audits

    given = ["--data", pictures, "--bank", folder / "bank", "--record", folder / "record", "--smoke"]
    few = ["--tasks", "random:1", "--models", "2", "--references", "4"]
    return CliRunner().invoke(audits.main, [*map(str, given), *few, *arguments])


@pytest.mark.slow
def test_every_method_is_audited_once_beside_the_untouched_originals(pictures: Path, tmp_path: Path) -> None:
    first = audited(pictures, tmp_path, "--entries", "ga")
    assert first.exit_code == 0, first.output
    assert first.output.count("random:1") == 2
    again = audited(pictures, tmp_path, "--entries", "ga,head_only")
    assert again.exit_code == 0, again.output
    assert "head_only" in again.output
    assert again.output.count("random:1") == 1
    rows = [json.loads(line) for line in (tmp_path / "record" / "audits.jsonl").read_text().splitlines()]
    assert [row["entry"] for row in rows] == ["original", "ga", "head_only"]
    for row in rows:
        assert len(row["verdicts"]) == len(row["audits"]["ua"]["values"]) == 2
        assert "klom_forget_mean" in row["together"]
        assert len({tuple(audit["values"]) for audit in row["audits"].values()}) > 5, "each audit has its own"
        low, high = row["audits"]["ua"]["band"]
        assert low <= row["audits"]["ua"]["retrained"] <= high
    table = (tmp_path / "record" / "tables.md").read_text()
    assert "| audit | retrained | original | ga | head_only |" in table
    assert f"| UA, % | {rows[0]['audits']['ua']['retrained']:.2f} (" in table
    # A new last layer leaves the features as they were, and so what is found in them.
    head, untouched = rows[2]["audits"], rows[0]["audits"]
    assert head["information"]["values"] == untouched["information"]["values"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--tasks", "random"), "expected a kind and a seed"),
        (("--models", "3"), "expected 6 or more"),
        (("--entries", "nothing"), "unknown method"),
    ],
)
def test_what_is_not_understood_is_said(
    arguments: tuple[str, ...], complaint: str, pictures: Path, tmp_path: Path
) -> None:
    result = audited(pictures, tmp_path, *arguments)
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.split())
