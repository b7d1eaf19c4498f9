"""The record of how cost grows, and of how well dau_fast.cost predicts it.

    python benchmarks/scaling.py                     costs on the CPU, below 10 minutes on 2 quiet cores
    python benchmarks/scaling.py --data DIR          and quality with 10 times the retain set, 5 minutes more
    python benchmarks/scaling.py --part quality --data DIR          quality alone
    python benchmarks/scaling.py --device cuda       ResNet-50 at 224x224: speed, utilisation and memory
    python benchmarks/scaling.py --predict           prints the tables of predictions, and measures nothing
    python benchmarks/scaling.py --one-gpu           the same for CIFAR-10 on one GPU, by loop and method
    python benchmarks/scaling.py --docs RECORD       writes a record and the predictions into docs/scaling.md

DIR holds train/<class>/ and test/<class>/. Writes benchmarks/records/<date>-scaling-<device>/: summary.json
(targets, constants, every case with its seconds and its prediction), plots, hardware, versions and commit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from support import costs, large_images, retain_quality
from support.one_gpu import one_gpu_tables
from support.predicting import tables
from support.recording import write_json
from support.scaling_docs import write_docs
from support.scaling_plots import CORES, ERROR, Rows, draw, series_named
from support.speed import Target, start

from dau_fast.cost import Cost, fit_machine, predict, predict_memory

# Limit of growth at 10 times the retain set.
GROWTH = 1.3


# ---- costs on the CPU


def measure_costs(folder: Path, smoke: bool) -> tuple[list[Target], dict[str, Any]]:
    """Every case's seconds, the fit, what it predicts for the cases it has not seen, and memory."""
    cases = costs.cases(smoke)
    seconds = costs.measured(cases, 1 if smoke else costs.ROUNDS)
    write_json(folder / "seconds.json", seconds)
    typical = costs.typical(seconds)
    jobs = {case.name: costs.job_of(case) for case in cases}
    seen = [(jobs[case.name], typical[case.name]) for case in cases if not case.held_out]
    machine = fit_machine(seen, CORES)
    rows = [_cost_row(case, typical[case.name], predict(jobs[case.name], machine)) for case in cases]
    memory = [_memory_row(case) for case in costs.memory_cases(smoke)]
    draw(rows, folder)
    return targets(rows, memory), {"constants": machine.constants, "cases": rows, "memory": memory}


def _cost_row(case: costs.Case, seconds: float, cost: Cost) -> dict[str, Any]:
    return asdict(case) | {
        "seconds": seconds,
        "predicted": cost.total_seconds,
        "error_percent": 100 * (cost.total_seconds / seconds - 1),
        "parts": cost.seconds,
    }


def _memory_row(case: costs.Case) -> dict[str, Any]:
    phase, predicted = predict_memory(costs.job_of(case))
    held = costs.held(case)
    error = 100 * (predicted / held - 1)
    return asdict(case) | {"bytes": held, "predicted": predicted, "phase": phase, "error_percent": error}


def targets(rows: Rows, memory: Rows) -> list[Target]:
    sampled = series_named(rows, "retain set, sampled")
    held = [abs(row["error_percent"]) for row in rows if row["held_out"]]
    alone = [abs(row["error_percent"]) for row in rows if row["held_out"] and row["processes"] == 1]
    return [
        Target("cost at 10 times the retain set, sampled", _growth(sampled), GROWTH, at_least=False),
        Target("largest held-out error, one process, percent", max(alone), ERROR, at_least=False),
        Target("largest held-out error, all, percent", max(held), ERROR, at_least=False),
        Target("largest error of memory, percent", max(abs(r["error_percent"]) for r in memory), ERROR,
               at_least=False),
    ]  # fmt: skip


def quality_targets(rows: Rows) -> list[Target]:
    """With 10 times the retain set the gap is no larger than with the small one, but for chance."""
    small, large = rows
    grown = large["avg_gap"] - small["avg_gap"]
    floor = max(row["noise_floor"] for row in rows)
    return [Target("points of avg gap more at 10 times the retain set", grown, floor, at_least=False)]


def _growth(series: Rows) -> float:
    return series[-1]["seconds"] / series[0]["seconds"]


# ---- the command


@click.command()
@click.option("--device", "device_name", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option(
    "--part",
    type=click.Choice(["costs", "steps", "quality"]),
    help="Default: costs on the CPU, steps on CUDA; quality too where --data is given.",
)
@click.option("--data", type=Path, help="Folder with train/ and test/: measures quality too.")
@click.option("--image-size", type=click.IntRange(4), default=8, show_default=True, help="Of --data, pixels.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Of --data.")
@click.option("--record", type=Path, help="Folder; default benchmarks/records/<date>-scaling-<device>.")
@click.option("--smoke", is_flag=True, help="Toy sizes.")
@click.option("--predict", "print_predictions", is_flag=True, help="Print the predictions, and nothing else.")
@click.option("--one-gpu", is_flag=True, help="Print what CIFAR-10 is predicted to take on one GPU.")
@click.option("--docs", type=Path, help="A record folder whose figures go into docs/scaling.md.")
def main(
    device_name: str, part: str | None, data: Path | None, image_size: int, seeds: int, record: Path | None,
    smoke: bool, print_predictions: bool, one_gpu: bool, docs: Path | None,
) -> None:  # fmt: skip
    """Run it and write the record."""
    if print_predictions:
        print(tables())
        return
    if one_gpu:
        print(one_gpu_tables())
        return
    if docs is not None:
        write_docs(docs)
        return
    if part == "quality" and data is None:
        raise click.UsageError("--part quality needs --data DIR, with train/<class>/ and test/<class>/")
    torch.set_flush_denormal(True)
    part = part or ("steps" if device_name == "cuda" else "costs")
    if part != "quality":
        folder, device = start("scaling", device_name, record)
        if part == "steps":
            finish(folder, [], {"steps": large_images.rows(device, smoke, folder / "rows.jsonl")})
        else:
            finish(folder, *measure_costs(folder, smoke))
    if data is not None:
        folder, _ = start("retain-sample", "cpu", record and record / "quality")
        rows = retain_quality.measure(data, image_size, seeds, smoke)
        finish(folder, quality_targets(rows), {"quality": rows})


def finish(folder: Path, judged: list[Target], found: Mapping[str, Any]) -> None:
    targets = [asdict(target) | {"reached": target.reached} for target in judged]
    write_json(folder / "summary.json", {"targets": targets, **found})
    for target in judged:
        print(target)


if __name__ == "__main__":
    main()
