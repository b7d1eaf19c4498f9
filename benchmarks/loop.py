"""The record of loops and whole jobs: every engine, research code, both retrainings, and the targets.

    python benchmarks/loop.py                                  on the CPU, about 15 minutes on 2 cores
    python benchmarks/loop.py --device cuda --data DIR         DIR as for gpu_suite.py

Writes benchmarks/records/<date>-loop-<device>/: pytest-benchmark's raw numbers, the report of one main job
(UA, RA, TA, MIA-efficacy and avg gap of what was timed), a summary with ratios of medians, a picture of how
cost grows, hardware, versions and commit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from support.recording import ROOT, append_row
from support.speed import OURS, ROWS, Cases, Target, faster, figure, finish, run_rows, start

from dau_fast.config import TrainingRecipe

LITERATURE = TrainingRecipe().epochs
KEYS = ("ua", "ra", "ta", "mia_efficacy", "avg_gap", "seconds", "compile_seconds", "speedup", "speedup_fast")


def targets(cases: Cases, job: dict[str, Any] | None, device: torch.device) -> list[Target]:
    step = "training step, batch 256"
    whole = cases.get("whole job, random:0.1", {}).get(OURS, {})
    share = Target(
        "evaluation, percent of the whole job", whole.get("evaluation_percent"), 25, at_least=False
    )
    if device.type != "cuda":
        return [faster(cases, "whole job, random:0.1", "DataLoader", 2), share]
    small = "training step, batch 64"
    found = [
        faster(cases, small, "eager bf16", 3),
        faster(cases, step, "eager bf16", 1.5),
        faster(cases, step, "DataLoader", 10),
        figure(cases, step, "percent_of_peak", 30),
        share,
    ]
    if job is None:
        return found
    dau = job["methods"]["dau"]
    # Retraining takes as long as its epochs are many; shortened ones are stretched to the literature's.
    stretch = LITERATURE / job["epochs"]
    return [
        *found,
        Target(f"times as fast as retraining for {LITERATURE} epochs", dau["speedup"] * stretch, 50),
        Target("times as fast as retraining by the fast recipe", dau["speedup_fast"] * stretch, 10),
        Target("seconds of unlearning", dau["seconds"], 3, at_least=False),
    ]


def main_job(folder: Path, device: torch.device, data: Path | None, epochs: int | None) -> dict[str, Any]:
    """One run of the command line on digits, or CIFAR-10 on CUDA; its report stays in `folder`."""
    source = ["--methods", "dau,retrain,ft"]
    if device.type == "cuda":
        source += ["--arch", "resnet18", "--dataset", "folder" if data else "cifar10"]
        source += ["--data", str(data)] if data else []
    source += ["--epochs", str(epochs)] if epochs else []
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "dau_fast.unlearn", *source, "--device", device.type]
        subprocess.run([*command, "--out", out], cwd=ROOT, check=True)
        text = (Path(out) / "report.json").read_text()
    (folder / "report.json").write_text(text)
    report = json.loads(text)
    methods = {name: {key: entry[key] for key in KEYS} for name, entry in report["methods"].items()}
    return {"epochs": report["run"]["epochs"], "engine": report["run"]["engine"], "methods": methods}


def draw(cases: Cases, path: Path) -> None:
    """Images a second over the batch, and seconds of unlearning over the forget set."""
    drawing = Figure(figsize=(9, 3.6), layout="constrained")
    speed, growth = drawing.subplots(1, 2)
    for way in ("dau_fast", "eager bf16", "DataLoader"):
        prefix = "training step, batch "
        points = sorted(
            (int(case.removeprefix(prefix)), rows[way]["images_per_second"])
            for case, rows in cases.items()
            if case.startswith(prefix) and way in rows
        )
        if points:
            speed.plot(*zip(*points, strict=True), marker="o", label=way)
    batches = (32, 64, 128, 256, 512)  # as in test_loop_speed.py
    speed.set(xscale="log", yscale="log", xlabel="batch, images", ylabel="images a second", title="training")
    speed.set_xticks(batches, labels=map(str, batches))
    speed.xaxis.minorticks_off()
    speed.legend(frameon=False)
    points = sorted(
        (rows[OURS]["forget_images"], rows[OURS]["median_seconds"])
        for case, rows in cases.items()
        if case.startswith("unlearning ")
    )
    growth.plot([images for images, _ in points], [seconds for _, seconds in points], marker="o")
    highest = max((seconds for _, seconds in points), default=1.0)
    growth.set(
        xscale="log", ylim=(0, 1.1 * highest), xlabel="images to forget", ylabel="seconds", title="unlearning"
    )
    drawing.savefig(path)


@click.command()
@click.option("--device", "device_name", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--data", type=Path, help="CUDA: folder with train/ and test/ of CIFAR-10; else torchvision's.")
@click.option("--epochs", type=click.IntRange(1), help="Of the main job; else its usual ones, 20 on CUDA.")
@click.option("--record", type=Path, help="Folder; default benchmarks/records/<date>-loop-<device>.")
@click.option("--smoke", is_flag=True, help="Toy sizes.")
def main(device_name: str, data: Path | None, epochs: int | None, record: Path | None, smoke: bool) -> None:
    """Run it and write the record."""
    folder, device = start("loop", device_name, record)
    length = epochs or (3 if smoke else 20 if device.type == "cuda" else None)
    cases: Cases = {}
    for file in ("test_loop_speed.py", "test_unlearn_speed.py"):
        cases |= run_rows(file, folder, device, smoke)
        if (folder / "benchmark.json").exists():
            (folder / "benchmark.json").rename(folder / f"{file.removesuffix('.py')}.json")
    # After the rows: where time runs out, they are there.
    try:
        job = main_job(folder, device, data, length)
    except subprocess.CalledProcessError as error:
        append_row(folder / ROWS, {"row": "main job", "failed": str(error)})
        job = None
    draw(cases, folder / "growth.svg")
    finish(folder, cases, targets(cases, job, device), job=job)


if __name__ == "__main__":
    main()
