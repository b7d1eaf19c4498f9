"""The command that judges parts of the game and rivals, on tiny invented pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

pytestmark = pytest.mark.usefixtures("importable")


def judged(pictures: Path, folder: Path, *arguments: str) -> Result:
    import quality

    given = ["--data", pictures, "--bank", folder / "bank", "--record", folder / "record", "--smoke"]
    few = ["--seeds", "1-2", "--retrained", "2", "--tasks", "random"]
    return CliRunner().invoke(quality.main, [*map(str, given), *few, *arguments])


def test_it_judges_once_and_goes_on_where_it_was(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality

    entries = (quality.Entry("dau", asked={"turns": 2}), quality.Entry("ft", "ft", {"epochs": 1}))
    monkeypatch.setattr(quality, "PARTS", entries)
    first = judged(pictures, tmp_path)
    assert first.exit_code == 0, first.output
    assert first.output.count("random:1") == first.output.count("random:2") == 3
    again = judged(pictures, tmp_path)
    assert again.output.count("random:") == 0
    summary = json.loads((tmp_path / "record" / "summary.json").read_text())
    assert [line["entry"] for line in summary] == ["original", "dau", "ft"]
    rows = [json.loads(line) for line in (tmp_path / "record" / "judgements.jsonl").read_text().splitlines()]
    ft = [row["avg_gap"] for row in rows if row["entry"] == "ft"]
    assert summary[2]["gap"] == pytest.approx(sum(ft) / 2)
    assert summary[2]["worse_than_dau"]["mean"] == pytest.approx(
        sum(ft) / 2 - sum(row["avg_gap"] for row in rows if row["entry"] == "dau") / 2
    )


def test_single_entries_are_judged_beside_the_game(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality

    entries = tuple(quality.Entry(name, asked={"turns": 2}) for name in ("dau", "one", "other"))
    monkeypatch.setattr(quality, "PARTS", entries)
    found = judged(pictures, tmp_path, "--only", "other")
    assert found.exit_code == 0, found.output
    summary = json.loads((tmp_path / "record" / "summary.json").read_text())
    assert [line["entry"] for line in summary] == ["original", "dau", "other"]
    refused = judged(pictures, tmp_path / "again", "--only", "neither")
    assert refused.exit_code == 2
    assert "expected one of dau, one, other" in refused.output


def test_methods_run_with_denormal_numbers_as_zero(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality

    products, judge = [], quality.judge_original

    def spy(*given: Any) -> dict[str, Any]:
        products.append((torch.tensor(1e-30) * torch.tensor(1e-10)).item())
        return judge(*given)

    monkeypatch.setattr(quality, "PARTS", ())
    monkeypatch.setattr(quality, "judge_original", spy)
    result = judged(pictures, tmp_path)
    assert result.exit_code == 0, result.output
    assert products == [0.0, 0.0]


def test_what_fails_is_counted_and_ends_nothing(tmp_path: Path) -> None:
    import quality

    def row(entry: str, seed: int, gap: float) -> dict[str, Any]:
        return {
            "task": "random", "seed": seed, "entry": entry, "floor": 1.0, "avg_gap": gap, "seconds": 1.0,
            "gap_to_mean": gap, "signed": {"ua": gap}, "margins": {"forget": 1.0}, "extra_signed": {},
        }  # fmt: skip

    rows = [row("dau", seed, 1.0 + seed) for seed in (1, 2)] + [row("ft", seed, 4.0) for seed in (1, 2)]
    rows += [{"task": "random", "seed": seed, "entry": "ga", "failed": "diverged"} for seed in (1, 2)]
    file = tmp_path / "judgements.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    dau, ft, ga = quality.summarise_all(file)
    assert (dau["gap"], dau["floors"], dau["failed"]) == (2.5, 2.5, 0)
    assert ft["worse_than_dau"]["mean"] == 1.5
    assert (ga["failed"], "gap" in ga) == (2, False)


def test_all_methods_but_those_that_retrain_are_rivals(pictures: Path) -> None:
    import quality

    names = [entry.method for entry in quality.list_entries("rivals")]
    assert names[0] == "dau"
    assert {"ft", "ga", "salun", "scrub"} <= set(names)
    assert not {"retrain", "retrain_fast", "retrain_clean"} & set(names)


def test_the_game_can_be_judged_alone(pictures: Path) -> None:
    import quality

    assert [entry.name for entry in quality.list_entries("dau")] == ["dau"]
    assert len(quality.list_entries("parts")) > 5
