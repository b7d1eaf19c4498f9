"""Everything that needs a CUDA device, in one command and in stages.

    python benchmarks/gpu_suite.py --data DIR            all stages; DIR holds train/ and test/ of CIFAR-10
    python benchmarks/gpu_suite.py --stage tests         one of them
    python benchmarks/gpu_suite.py --smoke               every stage at toy size on the CPU

Each stage is a list of jobs. A job that has left its result in the record folder is not run again, so
an interrupted suite goes on where it stopped; `--minutes` shortens training so that a stage fits, and
starts no job after that time. Hardware, versions and commit stand in the record.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from support.loops import measure_training_rate
from support.recording import ROOT, environment, record_folder, write_json

from dau_fast.config import TrainingRecipe
from dau_fast.engine.runtime import choose_device
from dau_fast.errors import UserError


@dataclass(frozen=True)
class Suite:
    """record: where results go. minutes: time for the quality stage, or None for the full recipe.

    deadline: no job starts after this time.perf_counter() value.
    """

    record: Path
    device: torch.device
    smoke: bool
    data: Path | None
    minutes: float | None
    deadline: float
    dataset: str

    def run(self, job: str, command: list[str]) -> None:
        """Run `command` with its output in <job>.log; ends the suite where it fails or is too late."""
        began = time.perf_counter()
        if began > self.deadline:
            sys.exit(f"out of time before {job}: the same command goes on from here")
        log = self.record / f"{job}.log"
        with log.open("w") as output:
            done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        print(f"  {job}: exit code {done.returncode} after {time.perf_counter() - began:.0f} s", flush=True)
        if done.returncode:
            sys.exit("\n".join(log.read_text().splitlines()[-30:]))


# ---- tests: the test suite with every device test on the chosen device


def tests(suite: Suite) -> None:
    """The whole suite, with its device tests on CUDA; at toy size the device tests alone."""
    if (suite.record / "tests.json").exists():
        return
    what = ["tests/test_device.py", "-k", "not main_job"] if suite.smoke else ["tests"]
    command = [sys.executable, "-m", "pytest", *what, "--device", suite.device.type, "-p", "no:cacheprovider"]
    began = time.perf_counter()
    suite.run("tests", command)
    outcome = (suite.record / "tests.log").read_text().strip().splitlines()[-1]
    write_json(suite.record / "tests.json", {"outcome": outcome, "seconds": time.perf_counter() - began})


# ---- ops: every op against its rivals


def ops(suite: Suite) -> None:
    """Timings, memory, errors and targets of each benchmark script."""
    _compare(suite, {name: f"ops-{name}" for name in ("barlow", "images", "sensitivity")})


def masks(suite: Suite) -> None:
    """The same for masks and the masked optimiser steps."""
    _compare(suite, {"masks": "masks"})


def _compare(suite: Suite, scripts: dict[str, str]) -> None:
    """Run benchmarks/<script>.py for each script into the record folder of its name."""
    for name, folder in scripts.items():
        out = suite.record / folder
        if (out / "summary.json").exists():
            continue
        command = [sys.executable, f"benchmarks/{name}.py", "--device", suite.device.type]
        command += ["--record", str(out), *(["--smoke"] if suite.smoke else [])]
        suite.run(out.name, command)


# ---- loop: what the engine reaches


def loop(suite: Suite) -> None:
    """Steps and whole jobs by every engine and as research code writes them, and one main job."""
    out = suite.record / "loop"
    if (out / "summary.json").exists():
        return
    command = [sys.executable, "benchmarks/loop.py", "--device", suite.device.type, "--record", str(out)]
    command += ["--data", str(suite.data)] if suite.data is not None else []
    suite.run("loop", [*command, *(["--smoke"] if suite.smoke else [])])


# ---- scale: ResNet-50 on images of ImageNet's shape, and images that are read while training


def scale(suite: Suite) -> None:
    """Images a second, utilisation and memory at 224x224, by batch size; memory as predicted beside it."""
    _compare(suite, {"streaming": "scale-streaming"})
    out = suite.record / "scale"
    if (out / "summary.json").exists():
        return
    command = [sys.executable, "benchmarks/scaling.py", "--part", "steps", "--device", suite.device.type]
    suite.run("scale", [*command, "--record", str(out), *(["--smoke"] if suite.smoke else [])])


# ---- quality: the main job with ResNet-18 on CIFAR-10, by the literature's recipe


def quality(suite: Suite) -> None:
    """Original, retrained, dau, ft and ga, for random 10 % and one class; one original for all."""
    source = ["--dataset", suite.dataset, "--arch", "small" if suite.smoke else "resnet18"]
    source += ["--device", suite.device.type]
    if suite.data is not None:
        source += ["--data", str(suite.data)]
    source += ["--epochs", str(_epochs(suite))]
    original = suite.record / "quality-original"
    if not (original / "report.json").exists():
        _unlearn(suite, original, [*source, "--methods", "dau"])
    weights = ["--checkpoint", str(original / "original.safetensors")]
    for forget in ("random:0.1", "class:0"):
        out = suite.record / f"quality-{forget.replace(':', '-')}"
        if not (out / "report.json").exists():
            chosen = ["--forget", forget, "--methods", "dau,retrain,ft,ga"]
            _unlearn(suite, out, [*source, *weights, *chosen, "--profile"])
    _summarise(suite)


def _unlearn(suite: Suite, out: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "dau_fast.unlearn", *arguments, "--out", str(out)]
    suite.run(out.name, command)


def _epochs(suite: Suite) -> int:
    """The literature's epochs, or as many as let the longest job fit into `minutes`."""
    full = TrainingRecipe().epochs
    if suite.smoke:
        return 2
    if suite.minutes is None:
        return full
    remembered = suite.record / "quality-epochs.json"
    if not remembered.exists():
        rate = measure_training_rate(suite.device)
        # Four trainings in all: the original, and retrained for both forget sets with room to spare.
        affordable = int(60 * suite.minutes / 4 * rate / 45_000)
        write_json(
            remembered, {"images_per_second": rate, "epochs": max(1, min(full, affordable)), "of": full}
        )
    return int(json.loads(remembered.read_text())["epochs"])


def _summarise(suite: Suite) -> None:
    """One small JSON of what the reports say; the reports themselves stay beside it."""
    keys = (
        "ua", "ra", "ta", "mia_efficacy", "avg_gap", "seconds", "compile_seconds", "speedup", "speedup_fast",
    )  # fmt: skip
    summary = {}
    for out in sorted(suite.record.glob("quality-*/report.json")):
        report = json.loads(out.read_text())
        summary[out.parent.name] = {
            "epochs": report["run"]["epochs"],
            "dataset": "CIFAR-10 (JPEG)" if suite.dataset == "folder" else suite.dataset,
            "methods": {
                name: {key: entry.get(key) for key in keys} for name, entry in report["methods"].items()
            },
        }
    write_json(suite.record / "quality.json", summary)


STAGES: dict[str, Callable[[Suite], None]] = {
    "tests": tests, "ops": ops, "masks": masks, "loop": loop, "scale": scale, "quality": quality,
}  # fmt: skip


@click.command()
@click.option("--stage", "stages", multiple=True, type=click.Choice(list(STAGES)), help="Default: all.")
@click.option(
    "--data", type=Path, help="Folder with train/ and test/, or an archive of one; else torchvision's."
)
@click.option("--minutes", type=float, help="For each stage; shortens training to fit.")
@click.option("--record", type=Path, help="Record folder; default benchmarks/records/<date>-gpu-suite.")
@click.option("--smoke", is_flag=True, help="Toy size, on the CPU.")
def main(
    stages: tuple[str, ...], data: Path | None, minutes: float | None, record: Path | None, smoke: bool
) -> None:
    """Run the stages and write one record folder."""
    device = choose_device("cpu" if smoke else "cuda")
    folder = (record or record_folder("gpu-suite")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "environment.json", environment(device))
    dataset = "digits" if smoke else "folder" if data else "cifar10"
    with _unpacked(data) as place:
        for name in stages or STAGES:
            deadline = time.perf_counter() + 60 * minutes if minutes else float("inf")
            print(f"stage {name}", flush=True)
            STAGES[name](Suite(folder, device, smoke, place, minutes, deadline, dataset))


@contextmanager
def _unpacked(data: Path | None) -> Iterator[Path | None]:
    """`data` itself, or the folder an archive unpacks to, for as long as it is needed."""
    if data is None or data.is_dir():
        yield data.resolve() if data else None
        return
    with tempfile.TemporaryDirectory() as folder, tarfile.open(data) as archive:
        archive.extractall(folder, filter="data")
        yield Path(folder)


if __name__ == "__main__":
    try:
        main(standalone_mode=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
