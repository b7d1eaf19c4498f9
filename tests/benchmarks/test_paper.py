"""The command that fills the paper's tables, on tiny invented pictures, and its tables by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
from calling import environment
from click.testing import CliRunner, Result
from scripts import ROOT

pytestmark = pytest.mark.usefixtures("importable")

FILES = {"attacks.svg", "environment.json", "judgements.jsonl", "summary.json", "tables.md"}


def filled(pictures: Path, folder: Path, *arguments: str) -> Result:
    import paper

    given = ["--data", pictures, "--bank", folder / "bank", "--record", folder / "record", "--smoke"]
    few = ["--tasks", "random", "--prune", "dense,synflow", "--sparsity", "0.5", "--methods", "ga,ft"]
    return CliRunner().invoke(paper.main, [*map(str, given), *few, *arguments])


def test_it_fills_once_and_goes_on_where_it_was_killed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support import bank

    first = filled(pictures, tmp_path, "--seeds", "1")
    assert first.exit_code == 0, first.output
    assert {path.name for path in (tmp_path / "record").iterdir()} == FILES
    rows = tmp_path / "record" / "judgements.jsonl"
    lines = rows.read_text().splitlines()
    names = ["original", "retrained 0", "retrained 1", "retrained 2", "ga", "ft"]
    assert [json.loads(line)["entry"] for line in lines] == 2 * names
    # Killed in the middle of the last row.
    rows.write_text("\n".join([*lines[:-1], lines[-1][:20]]))
    monkeypatch.setattr(bank.Training, "train", None)  # every model is there
    again = filled(pictures, tmp_path, "--seeds", "1")
    assert again.exit_code == 0, again.output
    assert [line.split()[:3] for line in again.output.splitlines()] == [["random:1", "synflow", "ft"]]
    tables = (tmp_path / "record" / "tables.md").read_text()
    assert [line.split(" | ")[1] for line in tables.splitlines() if "| SynFlow 50 % |" in line][:2] == [
        "retrained",
        "original",
    ]


def row(entry: str, seed: int, gap: float, ua: float, **more: Any) -> dict[str, Any]:
    """Of a task where retrained models have a UA of 50 and 90 in all else."""
    rates = {"ua": ua} | dict.fromkeys(("ra", "ta"), 90.0)
    rates |= dict.fromkeys(("correctness", "confidence", "entropy", "modified_entropy", "probability"), 90.0)
    signed = {name: rate - (50 if name == "ua" else 90) for name, rate in rates.items()}
    return {
        "task": "random", "seed": seed, "entry": entry, "floor": 2.0, "avg_gap": gap, "seconds": 10.0,
        "retraining_seconds": 40.0, "rates": rates, "signed": signed, "margins": {"forget": 1.0}, **more,
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    found = []
    for seed in (1, 2):
        found += [row("original", seed, 12.5, 0.0), row("retrained 0", seed, 2.0, 48.0 - seed)]
        found += [row("retrained 1", seed, 2.0, 52.0 + seed), row("dau", seed, 1.0 + seed, 51.0)]
    found.append({"task": "random", "seed": 1, "entry": "ga", "failed": "diverged", "floor": 2.0})
    pruned = {"pruning": "omp", "sparsity": 0.95}
    found += [row("original", 1, 12.5, 0.0, **pruned), row("retrained 0", 1, 2.0, 50.0, **pruned)]
    return [*found, row("dau", 1, 4.0, 54.0, **pruned)]


def test_figures_over_seeds() -> None:
    from support.paper_tables import summarise_paper

    dense, pruned = summarise_paper(rows())
    assert (dense["pruning"], pruned["pruning"], pruned["sparsity"]) == (None, "omp", 0.95)
    assert dense["seeds"] == [1, 2]
    assert (dense["floor"], dense["retraining_seconds"]) == (2.0, 40.0)
    retrained = dense["retrained"]
    assert (retrained["rates"]["ua"], retrained["lowest"]["ua"], retrained["highest"]["ua"]) == (50, 46, 54)
    original, dau, ga = dense["entries"]
    assert [each["entry"] for each in (original, dau, ga)] == ["original", "dau", "ga"]
    assert (dau["avg_gap"], dau["floors"], dau["share"], dau["signed"]["ua"]) == (2.5, 1.25, 0.25, 1.0)
    # Student's t for one degree of freedom: 12.706, times a standard error of half a point.
    assert dau["interval"]["low"] == pytest.approx(2.5 - 12.706 * 0.5, abs=1e-3)
    assert dau["tests"]["floor"] == 2.0
    assert (ga["seeds"], ga["failed"]) == (0, 1)
    assert "interval" not in pruned["entries"][1]


def test_tables_show_rates_with_their_gaps_and_name_what_failed() -> None:
    from support.paper_tables import summarise_paper, write_tables

    lines = write_tables(summarise_paper(rows())).splitlines()
    assert lines[0] == "## Random forgetting"
    assert "- dense: seeds 1, 2; noise floor 2.00." in lines
    assert "| dense | retrained | 50.0 | 90.0 | 90.0 | 90.0 | 2.00 | 1.0 | 40.0 |" in lines
    gap = "2.50 [-3.85, 8.85]"
    rates = "51.0 (+1.0) | 90.0 (+0.0) | 90.0 (+0.0) | 90.0 (+0.0)"
    assert f"| dense | `dau` | {rates} | {gap} | 1.2 | 10.0 (0.25) |" in lines
    assert any(line.startswith("| dense | `ga` | failed |") for line in lines)
    assert any(line.startswith("| OMP 95 % | `dau` | 54.0 (+4.0) |") for line in lines)


def test_the_figure_has_a_panel_for_each_pruning_and_all_retrained_models_behind_the_methods() -> None:
    from support.paper_plots import draw_attacks
    from support.paper_tables import summarise_paper

    figure = draw_attacks(summarise_paper(rows()))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["Random forgetting, dense", "Random forgetting, OMP 95 %"]
    first = figure.axes[0]
    assert len(first.collections) == 5
    assert {line.get_label() for line in first.lines} >= {"original", "dau", "retrained, mean"}
    assert not {line.get_label() for line in first.lines} & {"ga"}


def test_a_gpu_takes_all_of_the_literatures_images_and_network() -> None:
    from support.settings import Setting, choose_setting

    full = choose_setting(torch.device("cuda"), None, smoke=False)
    assert (full.training + full.validation, full.test, full.arch, full.recipe.epochs) == (
        50_000,
        10_000,
        "resnet18",
        182,
    )
    assert full.augmentation.flip
    assert choose_setting(torch.device("cpu"), None, smoke=False) == Setting()
    assert choose_setting(torch.device("cuda"), 20, smoke=False).recipe.epochs == 20


def test_a_mistake_is_one_line(pictures: Path, tmp_path: Path) -> None:
    for arguments, reason in [
        (("--prune", "dense,opm"), "opm"),
        (("--methods", "dau,everything"), "everything"),
        (("--sparsity", "1"), "sparsity=1"),
    ]:
        done = filled(pictures, tmp_path, *arguments)
        assert done.exit_code == 2
        assert reason in done.output
        assert not (tmp_path / "record").exists()


@pytest.mark.slow
def test_it_runs_as_a_module(pictures: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.paper", "--smoke", "--data", pictures, "--seeds", "1"]
    command += ["--bank", tmp_path / "bank", "--record", tmp_path / "record", "--methods", "dau,l1_sparse"]
    done = run(list(map(str, command)), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((tmp_path / "record" / "summary.json").read_text())) == 8
