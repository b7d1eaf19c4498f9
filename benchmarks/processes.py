"""One job on one, two and three processes of one machine, on the CPU: whether they agree.

    python benchmarks/processes.py

The main job on digits at full length in float64, for random 10 % and one class; a few minutes on 2 cores.
Writes benchmarks/records/<date>-processes/: every run's report, and a summary with the largest difference
to one process in any final measure of any method.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from support.main_job import unlearn
from support.recording import environment, record_folder, write_json

FORGET = ("random:0.1", "class:3")
MEASURES = ("ua", "ra", "ta", "mia_efficacy", "avg_gap")
# Points by which processes may differ in any of them.
LIMIT = 1.0


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Between two reports, over methods and measures, in percentage points."""
    pairs = [
        (entry[measure], other["methods"][name][measure])
        for name, entry in one["methods"].items()
        for measure in MEASURES
    ]
    return max(abs(a - b) for a, b in pairs)


@click.command()
@click.option("--epochs", type=click.IntRange(1), help="Length of training; default that of digits.")
@click.option("--forget", "forgets", multiple=True, default=FORGET, show_default=True)
@click.option("--count", "counts", multiple=True, default=(2, 3), show_default=True, type=click.IntRange(2))
@click.option("--record", type=Path, help="Record folder; default benchmarks/records/<date>-processes.")
def main(epochs: int | None, forgets: tuple[str, ...], counts: tuple[int, ...], record: Path | None) -> None:
    """Run the jobs and write the record."""
    folder = record or record_folder("processes")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "environment.json", environment(torch.device("cpu")))
    summary: dict[str, Any] = {}
    for forget in forgets:
        reports = {}
        for count in (1, *counts):
            file = folder / f"{forget.replace(':', '-')}-{count}.json"
            arguments = ["--forget", forget, "--precision", "fp64", "--retrain-recipe", "literature"]
            arguments += ["--methods", "dau,retrain,ft", "--seed", "100"]
            arguments += ["--epochs", str(epochs)] if epochs else []
            print(unlearn(file, arguments, count), flush=True)
            reports[count] = json.loads(file.read_text())
        for count in counts:
            value = largest_difference(reports[1], reports[count])
            summary[f"{forget}, {count} processes"] = (value, LIMIT, value <= LIMIT)
    write_json(folder / "summary.json", {"largest difference to one process": summary})
    for job, (value, limit, reached) in summary.items():
        print(f"{job:28} {value:8.4f} points (limit {limit:.1f}) {'reached' if reached else 'MISSED'}")


if __name__ == "__main__":
    main()
