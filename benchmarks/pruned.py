"""Pruned models on digits at 90 % sparsity: each pruning, random 10 % and one class, on the CPU.

    python benchmarks/pruned.py

About half an hour on 2 cores, most of it rounds of IMP. Writes benchmarks/records/<date>-pruned/: every run's
report, and a summary that says of each target whether it was reached. The seeds are not those the settings
were chosen on (10 to 33).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from support.main_job import unlearn
from support.recording import environment, record_folder, write_json

PRUNERS = ("omp", "synflow", "imp")
FORGET = ("random:0.1", "class:3")
# A test accuracy this many points below the retrained model's would be a cliff.
CLIFF = 2.0


def judge(report: dict[str, Any]) -> dict[str, Any]:
    """Figures and targets of one report: a target is (value, limit, reached)."""
    methods, floor = report["methods"], report["noise_floor"]
    dau, limit = methods["dau"], max(1.25 * floor, 1.0)
    lost = methods["retrain"]["ta"] - dau["ta"]
    return {
        "noise_floor": floor,
        "avg_gap": {"dau": dau["avg_gap"], "original": methods["original"]["avg_gap"]},
        "sparsity": dau["sparsity"],
        "speedup": dau["speedup"],
        "targets": {
            "avg gap": (dau["avg_gap"], limit, dau["avg_gap"] <= limit),
            "test accuracy lost": (lost, CLIFF, lost <= CLIFF),
        },
    }


@click.command()
@click.option("--prune", "pruners", multiple=True, type=click.Choice(PRUNERS), help="Default: all.")
@click.option("--seed", default=100, show_default=True, type=click.IntRange(0), help="The first seed.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=2), help="Seeds.")
@click.option("--record", type=Path, help="Record folder; default benchmarks/records/<date>-pruned.")
def main(pruners: tuple[str, ...], seed: int, repeats: int, record: Path | None) -> None:
    """Run the jobs and write the record; the summary is of all reports in its folder."""
    folder = record or record_folder("pruned")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "environment.json", environment(torch.device("cpu")))
    for forget in FORGET:
        for pruner in pruners or PRUNERS:
            file = _report(folder, pruner, forget)
            arguments = ["--prune", pruner, "--sparsity", "0.9", "--forget", forget]
            arguments += ["--methods", "dau,retrain", "--retrain-recipe", "literature"]
            arguments += ["--seed", str(seed), "--repeats", str(repeats)]
            print(unlearn(file, arguments), flush=True)
    summary = {
        f"{pruner} {forget}": judge(json.loads(file.read_text()))
        for pruner in PRUNERS
        for forget in FORGET
        if (file := _report(folder, pruner, forget)).exists()
    }
    write_json(folder / "summary.json", summary)
    for job, figures in summary.items():
        for target, (value, limit, reached) in figures["targets"].items():
            verdict = "reached" if reached else "MISSED"
            print(f"{job:20} {target:20} {value:6.2f} (limit {limit:.2f}) {verdict}")


def _report(folder: Path, pruner: str, forget: str) -> Path:
    return folder / f"{pruner}-{forget.replace(':', '-')}.json"


if __name__ == "__main__":
    main()
