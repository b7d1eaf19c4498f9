"""The README's figures: the main job on digits, 5 seeds, random 10 % and three classes, on the CPU.

    python benchmarks/digits.py

About ten minutes on 2 cores. Writes benchmarks/records/<date>-digits/: the default run as a user sees it,
every other run's report, a picture, and a summary that says of each target whether it was reached.
The seeds are not those the settings were chosen on (0 to 33).
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from support.main_job import unlearn
from support.recording import environment, record_folder, write_json

from dau_fast.report.plots import comparison

FORGET = ("random:0.1", "class:3", "class:0", "class:8")
# A method as near as another retraining has one noise floor on average.
FLOORS, FASTER_THAN_RETRAINING = 1.1, 5


def judge(report: dict[str, Any], classwise: bool) -> dict[str, Any]:
    """Figures and targets of one report: a target is (value, limit, reached)."""
    methods, floor = report["methods"], report["noise_floor"]
    dau = methods["dau"]
    limit = FLOORS * floor
    speedup = median(run["methods"]["dau"]["speedup"] for run in report["runs"])
    others = {name: methods[name]["avg_gap"] for name in ("original", "ft", "ga")}
    nearest = min(others.values())
    targets = {
        "avg gap": (dau["avg_gap"], limit, dau["avg_gap"] <= limit),
        "below original, ft and ga": (dau["avg_gap"], nearest, dau["avg_gap"] < nearest),
        "speedup, median": (speedup, FASTER_THAN_RETRAINING, speedup >= FASTER_THAN_RETRAINING),
    }
    if classwise:
        lowest = min(run["methods"]["dau"]["ua"] for run in report["runs"])
        targets["lowest UA"] = (lowest, 99, lowest >= 99)
    return {"noise_floor": floor, "avg_gap": {"dau": dau["avg_gap"], **others}, "targets": targets}


@click.command()
@click.option("--seed", default=100, show_default=True, type=click.IntRange(0), help="The first seed.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=2), help="Seeds.")
@click.option("--record", type=Path, help="Record folder; default benchmarks/records/<date>-digits.")
def main(seed: int, repeats: int, record: Path | None) -> None:
    """Run the four jobs and write the record."""
    folder = record or record_folder("digits")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "environment.json", environment(torch.device("cpu")))
    printed = unlearn(folder / "default.json", [])
    (folder / "default.txt").write_text(printed)
    summary = {}
    for forget in FORGET:
        report_file = folder / f"{forget.replace(':', '-')}.json"
        arguments = ["--forget", forget, "--methods", "dau,retrain,ft,ga"]
        seeds = ["--seed", str(seed), "--repeats", str(repeats)]
        print(unlearn(report_file, [*arguments, *seeds]), flush=True)
        report = json.loads(report_file.read_text())
        summary[forget] = judge(report, classwise=forget.startswith("class"))
        write_json(folder / "summary.json", summary)
    report = json.loads((folder / "random-0.1.json").read_text())
    (folder / "comparison.svg").write_text(comparison(report))
    for forget, figures in summary.items():
        for target, (value, limit, reached) in figures["targets"].items():
            verdict = "reached" if reached else "MISSED"
            print(f"{forget:12} {target:28} {value:6.2f} (limit {limit:.2f}) {verdict}")


if __name__ == "__main__":
    main()
