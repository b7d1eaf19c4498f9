"""How long a game must be: quality and seconds over its budget, on CIFAR-10 with ResNet-18.

    python benchmarks/budget.py --device cuda --data DIR --minutes 9
    python benchmarks/budget.py --device cuda --data DIR            with all epochs of the literature

DIR holds train/ and test/; left out, torchvision's copy. Trains one original, two retrained models for random
10 %, whose gap is the noise floor, and one for class 0, each for as many epochs as fit into a part of the
minutes; then plays the game by its defaults, and with other numbers of turns, other samples of the retain set
and other step sizes, until the time is over. Every row (avg gap to the first retrained model, seconds, image
equivalents) goes to rows.jsonl as it is found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from support.jobs import synthetic
from support.loops import fit_epochs, measure_training_rate
from support.measuring import Clock
from support.recording import append_row
from support.speed import ROWS, start

from dau_fast.config import TrainingRecipe, split_config
from dau_fast.cost import count_equivalents, has_batchnorm
from dau_fast.data import named
from dau_fast.data.images import Images
from dau_fast.data.split import Forget
from dau_fast.engine.device import run_flushed, warm_up
from dau_fast.engine.runtime import Runtime, choose_precision
from dau_fast.errors import UserError
from dau_fast.job.assembly import measure_model, network_builder
from dau_fast.job.experiment import Checkpoint, Experiment, make_task
from dau_fast.methods import original, retrain
from dau_fast.methods.registry import get_method
from dau_fast.methods.running import Finished, run_timed
from dau_fast.methods.task import Task, Unlearned
from dau_fast.metrics.unlearning import Measures, avg_gap

FORGET = ("random:0.1", "class:0")
# Share of the minutes that goes to the trainings.
TRAINING, TRAININGS = 0.6, 4
# Turns, step sizes and weights as times the default's, retain images as times the forget set's: those first
# that say most. Of a class, which is soon forgotten, the first few.
FEW = 1
SWEEP: tuple[Mapping[str, float], ...] = (
    {}, {"turns": 0.5}, {"alpha": 2.0}, {"lr": 0.5}, {"turns": 2.0}, {"alpha": 0.5}, {"lr": 2.0},
    {"turns": 0.25}, {"retain_sample": 2.0}, {"retain_sample": 4.0}, {"turns": 0.5, "lr": 2.0},
    {"turns": 2.0, "lr": 0.5}, {"turns": 0.5, "retain_sample": 2.0}, {"turns": 0.25, "lr": 2.0},
)  # fmt: skip


@click.command()
@click.option("--device", "device_name", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--data", type=Path, help="Folder with train/ and test/ of CIFAR-10; else torchvision's.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="For everything; else all epochs.")
@click.option("--record", type=Path, help="Folder; default benchmarks/records/<date>-budget-<device>.")
@click.option("--smoke", is_flag=True, help="Toy sizes.")
def main(
    device_name: str, data: Path | None, minutes: float | None, record: Path | None, smoke: bool
) -> None:
    """Train, play and judge."""
    clock = Clock.start(minutes)
    folder, device = start("budget", device_name, record)
    try:
        images = _load(data, device, smoke)
    except UserError as error:
        raise click.UsageError(str(error)) from error
    # Of the training images, a tenth are for validation.
    trained_on = 0.9 * (len(images.labels) - len(images.test))
    epochs = 2 if smoke else count_epochs(minutes, device, trained_on)
    full = TrainingRecipe().epochs
    append_row(folder / ROWS, {"row": "epochs", "epochs": epochs, "of": full, "at": clock.seconds})
    run_flushed(partial(measure_all, images, epochs, clock, folder / ROWS, smoke), device)


def _load(data: Path | None, device: torch.device, smoke: bool) -> Images:
    if smoke:
        return synthetic(240, 8).to(device)
    return named.load("folder" if data else "cifar10", data).to(device)


def count_epochs(minutes: float | None, device: torch.device, images: float) -> int:
    """The literature's, or as many as let all trainings fit."""
    full = TrainingRecipe().epochs
    if minutes is None:
        return full
    rate = measure_training_rate(device)
    return fit_epochs(full, TRAININGS * images, TRAINING * 60 * minutes, rate)


def measure_all(images: Images, epochs: int, clock: Clock, rows: Path, smoke: bool) -> None:
    """Both tasks: the original is trained once, and the sweep takes turns between them."""
    device = images.device
    warm_up(device)
    runtime = Runtime(device, choose_precision("auto", device), "auto")
    base = Experiment(
        images, Forget.parse(FORGET[0], images.class_names), (get_method("dau"),),
        network_builder("small" if smoke else "resnet18", images, runtime), TrainingRecipe(epochs=epochs),
        shares=split_config("cifar10"), runtime=runtime,
    )  # fmt: skip
    roles = base.draw_roles(0)
    first = make_task(base, roles, 0)
    trained = run_timed("original", original.train, first)
    loop = trained.loops[0]
    append_row(rows, {
        "row": "original", "seconds": trained.seconds, "compile_seconds": trained.compile_seconds,
        "engine": loop.engine, "reason": loop.reason,
    })  # fmt: skip

    def judge(forget: str) -> Judge:
        given = Checkpoint(first.original, roles)
        job = replace(base, forget=Forget.parse(forget, images.class_names), checkpoint=given)
        return Judge(forget, make_task(job, roles, 0), rows, clock)

    # A game as early as can be: where time runs out, there is one.
    usual, *others = ({"turns": 0.1}, {"turns": 0.1, "retain_sample": 2.0}) if smoke else SWEEP
    spread = judge(FORGET[0])
    spread.play(usual)
    spread.measure_noise()
    classwise = judge(FORGET[1])
    classwise.play(usual)
    for place, changes in enumerate(others):
        for one in (spread, classwise) if place < FEW else (spread,):
            if clock.over:
                return
            one.play(changes)


class Judge:
    """Games of one task, beside its retrained model."""

    def __init__(self, forget: str, task: Task, rows: Path, clock: Clock) -> None:
        self.forget, self.task, self.rows, self.clock = forget, task, rows, clock
        made = self._time("retrained", partial(retrain.unlearn, recipe=task.recipe))
        self.retrained, self.retraining = measure_model(made.model, task), made.seconds
        self._note("original", measure_model(task.original, task), {})
        self._note("retrained", self.retrained, {"seconds": made.seconds})

    def measure_noise(self) -> None:
        """The gap between two retrained models that share no random draw."""
        again = self._time("retrained again", partial(retrain.unlearn_again, recipe=self.task.recipe))
        self._note("retrained again", measure_model(again.model, self.task), {"seconds": again.seconds})

    def play(self, changes: Mapping[str, float]) -> None:
        """The game with its default settings changed by `changes`; a game that fails says why."""
        method, name = get_method("dau"), ", ".join(f"{key} x {by:g}" for key, by in changes.items())
        usual = method.resolve(self.task)
        asked: dict[str, Any] = {key: getattr(usual, key) for key in changes if key != "retain_sample"}
        asked = {key: type(value)(value * changes[key]) for key, value in asked.items()}
        if "retain_sample" in changes:
            asked["retain_sample"] = changes["retain_sample"]
        settings = replace(usual, **asked)
        try:
            made = self._time("dau", lambda task: method.run(task, settings))
        except UserError as error:
            append_row(self.rows, {"row": f"{self.forget}: {name or 'defaults'}", "failed": str(error)})
            return
        sizes = {part: len(getattr(self.task.split, part)) for part in ("forget", "retain", "validation")}
        counted = count_equivalents(
            settings, {}, **sizes, classes=len(self.task.images.class_names),
            features=self.task.original.head.in_features,
            batchnorm=has_batchnorm(self.task.original.network), classwise=self.task.split.classwise,
        )  # fmt: skip
        self._note(name or "defaults", measure_model(made.model, self.task), {
            "seconds": made.seconds, "compile_seconds": made.compile_seconds, **asked,
            "speedup": self.retraining / made.seconds, "image_equivalents": counted.list_totals()["dau"],
            "loops": [{k: v for k, v in asdict(loop).items() if k != "profile"} for loop in made.loops],
        })  # fmt: skip

    def _time(self, name: str, work: Callable[[Task], Unlearned]) -> Finished:
        return run_timed(name, work, self.task)

    def _note(self, name: str, found: Measures, more: Mapping[str, Any]) -> None:
        row = {"row": f"{self.forget}: {name}", "ua": found.ua, "ra": found.ra, "ta": found.ta}
        row |= {"mia_efficacy": found.mia_efficacy, "avg_gap": avg_gap(found, self.retrained), **more}
        row["at"] = self.clock.seconds
        append_row(self.rows, row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
