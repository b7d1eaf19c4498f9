"""Everything that needs a CUDA device, in one command and in stages, from the first minute on.

    python benchmarks/gpu_suite.py --data DIR                all stages, 35 minutes; DIR has train/ and test/
    python benchmarks/gpu_suite.py --data DIR --minutes 14   the same in less: every stage takes its part
    python benchmarks/gpu_suite.py --stage probe             one of them
    python benchmarks/gpu_suite.py --data DIR --full         without limits: trainings have all their epochs
    python benchmarks/gpu_suite.py --dry-run                 the plan: jobs, commands and their limits
    python benchmarks/gpu_suite.py --smoke                   every stage at toy size on the CPU

Where a GPU is there for a quarter of an hour, `--stage quality --minutes 8` comes first: quality needs
originals that were trained for long, the other stages two minutes each.

In order: correctness (selfcheck, and the tests that take a device), probe (copy rate, matrix product, a
ResNet-18 step by every engine), quality (with --data the game beside three retrained models, random and
class-wise, of an original that memorises, and at random of one that was trained with augmentation; then
games of many lengths beside one original and its retrained models; with --full and --data the paper's tables,
too, which take hours), ops, loop, scale. Each job has a limit of its own, and what becomes of it costs no
other: rows are written as they come, and after every job `summary.json`, `jobs.jsonl` and `suite.tar.gz` (at
most 16 MiB, no weights) stand in the record folder, and copies in `--deliver`. What is done is not run again.
"""

from __future__ import annotations

import math
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# Also where the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import barlow
import batch_norm
import click
import images
import masks
import sensitivity
import torch
from support.recording import ROOT, environment, record_folder, write_json
from support.speed import compare
from support.suite import Job, Judge, Stage, Suite

from dau_fast.engine.runtime import choose_device
from dau_fast.errors import UserError

# Of the minutes of the stage quality, what goes to its first job and to its second; epochs after which a
# ResNet-18 without augmentation is right on 99.9 % of the training images, and with it on 97.7 %
# (benchmarks/records/2026-11-27-gpu-2).
MEMORISED, AUGMENTED = 0.45, 0.35
EPOCHS, AUGMENTED_EPOCHS = 16, 36
# cuBLAS is deterministic with a workspace of a fixed size alone.
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def plan_stages(
    record: Path, device: torch.device, data: Path | None, smoke: bool, bank: Path = ROOT / "bank"
) -> list[Stage]:
    """All of them, in order. data: folder with train/ and test/ of CIFAR-10, None for torchvision's.

    bank: folder of trained models. They are no part of the record, whose files are delivered.
    """
    common = ["--device", device.type, *(["--smoke"] if smoke else [])]
    source = [] if data is None else ["--data", str(data)]

    def script(name: str, folder: str, more: Sequence[str] = (), share: float = 1.0) -> Job:
        command = [sys.executable, f"benchmarks/{name}.py", "--record", str(record / folder), *common, *more]
        return Job(folder, tuple(command), share)

    def single(name: str, more: Sequence[str] = ()) -> Callable[[float], list[Job]]:
        return lambda seconds: [script(name, name, [*more, *_minutes(seconds)])]

    def quality(seconds: float) -> list[Job]:
        if not source:
            return [script("budget", "budget", _minutes(seconds))]
        kept = [*source, "--bank", str(bank)]
        plain = ["--plain", "--tasks", "random,class", "--seeds", "105", "--entries", "dau"]
        plain += ["--retrained", "3", "--epochs", "1" if smoke else str(EPOCHS)]
        little = ["--tasks", "random", "--seeds", "105", "--retrained", "2"]
        little += ["--only", "exposure alone", "--only", "no anchor of logits"]
        little += ["--epochs", "1" if smoke else str(AUGMENTED_EPOCHS)]
        rest = (1 - MEMORISED - AUGMENTED) * seconds
        jobs = [
            script("quality", "quality", [*kept, *plain, *_minutes(MEMORISED * seconds)], MEMORISED),
            script("quality", "augmented", [*kept, *little, *_minutes(AUGMENTED * seconds)], AUGMENTED),
            script("budget", "budget", [*source, *_minutes(rest)]),
        ]
        # All trainings of the paper's tables: for days without a limit.
        return [*jobs, script("paper", "paper", kept)] if math.isinf(seconds) else jobs

    ops = {"sensitivity": 0.4, "barlow": 0.4, "masks": 0.3, "images": 0.3, "batch_norm": 0.3}
    return [
        Stage("correctness", 4, lambda _: check(record, device, smoke)),
        Stage("probe", 3, single("probe")),
        Stage("quality", 9, quality),
        Stage("ops", 8, lambda _: [script(name, f"ops-{name}", share=part) for name, part in ops.items()]),
        Stage("loop", 6, lambda _: [script("loop", "loop", source)]),
        Stage(
            "scale",
            5,
            lambda _: [
                script("scaling", "scale", ["--part", "steps"], share=0.7),
                script("streaming", "scale-streaming"),
            ],
        ),
    ]


def check(record: Path, device: torch.device, smoke: bool) -> list[Job]:
    """Every op against its definition, then each test that takes a device; one test a minute at most."""
    rows = record / "correctness" / "rows.jsonl"
    rows.parent.mkdir(exist_ok=True)
    what = ["tests/test_device_masks.py"] if smoke else ["tests"]
    tests = [sys.executable, "-m", "pytest", *what, "--device", device.type, "--only-device"]
    tests += ["--outcomes", str(rows), "--seconds-a-test", "60", "--continue-on-collection-errors"]
    # Most of their time is a processor's, that builds kernels.
    tests += ["-n", str(min(8, os.cpu_count() or 1))]
    selfcheck = [sys.executable, "-m", "dau_fast", "selfcheck", "--device", device.type]
    return [
        Job("selfcheck", tuple(selfcheck), share=0.3),
        Job("correctness", (*tests, "-p", "no:cacheprovider"), environment=_DETERMINISTIC),
    ]


def list_judges(device: torch.device) -> dict[str, Judge]:
    """Of the ops' rows, which are worth judging without those that were out of time."""

    def judge(module: ModuleType) -> Judge:
        return lambda rows: module.targets(compare(rows), device)

    return {
        f"ops-{module.__name__}": judge(module) for module in (barlow, batch_norm, images, masks, sensitivity)
    }


def _minutes(seconds: float) -> list[str]:
    """What a job is told of its stage's time, of which it leaves a little for its start."""
    return [] if math.isinf(seconds) else ["--minutes", f"{0.9 * seconds / 60:.3f}"]


STAGES = ("correctness", "probe", "quality", "ops", "loop", "scale")
RIVALS = (
    "Rivals of the ops take part where they are installed, from these wheels: lightly with hydra_core, "
    "omegaconf and pytorch_lightning, opacus with opt_einsum, backpack_for_pytorch with einops and unfoldNd. "
    "Without them their rows are left out."
)


@click.command(epilog=RIVALS)
@click.option("--stage", "chosen", multiple=True, type=click.Choice(STAGES), help="Default: all.")
@click.option(
    "--data", type=Path, help="Folder with train/ and test/, or an archive of one; else torchvision's."
)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="For everything, loading included.")
@click.option("--full", is_flag=True, help="No limits; trainings as long as the literature's.")
@click.option("--record", type=Path, help="Record folder; default benchmarks/records/<date>-gpu-suite.")
@click.option("--deliver", type=Path, help="Folder that gets the summary and the archive after every job.")
@click.option("--smoke", is_flag=True, help="Toy size, on the CPU.")
@click.option("--dry-run", is_flag=True, help="Print the plan and run nothing.")
def main(
    chosen: tuple[str, ...], data: Path | None, minutes: float | None, full: bool, record: Path | None,
    deliver: Path | None, smoke: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Run the stages and write one record folder; exit code 1 where a job is not done."""
    device = torch.device("cuda") if dry_run else choose_device("cpu" if smoke else "cuda")
    with tempfile.TemporaryDirectory() as nowhere, _unpacked(data) as place:
        folder = Path(nowhere) if dry_run else (record or record_folder("gpu-suite")).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        bank = Path(nowhere) / "bank" if smoke else ROOT / "bank"
        planned = plan_stages(folder, device, place, smoke, bank)
        stages = [stage for stage in planned if stage.name in (chosen or STAGES)]
        if full:
            stages = [Stage(stage.name, math.inf, stage.plan) for stage in stages]
        seconds = 60 * minutes if minutes and not full else None
        suite = Suite(folder, seconds, deliver, judges=list_judges(device))
        if dry_run:
            _show(stages, suite)
            return
        write_json(folder / "environment.json", _describe(device))
        if not suite.run(stages):
            sys.exit(1)


def _describe(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit: what cannot be told of them costs nothing else."""
    try:
        return environment(device)
    except Exception as error:
        return {"device": str(device), "unknown": repr(error)}


def _show(stages: Sequence[Stage], suite: Suite) -> None:
    for stage in stages:
        limit = stage.minutes * suite.scale(stages)
        print(f"{stage.name}: {limit:.1f} minutes")
        for job in stage.plan(60 * limit):
            print(f"  {job.name}, at most {job.share * limit:.1f}: {' '.join(job.command[1:])}")


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
