"""How near unlearned models come to retrained ones where the original memorises.

    python benchmarks/quality.py --data DIR                               what each part of the game is worth
    python benchmarks/quality.py --data DIR --entries dau                 the game alone
    python benchmarks/quality.py --data DIR --entries rivals              every method, by its usual settings
    python benchmarks/quality.py --data DIR --entries rivals --tune 8     with as many trials for each
    python benchmarks/quality.py --data DIR --entries dau --device cuda --plain --seeds 105 --minutes 4

DIR holds train/ and test/ of CIFAR-10. The models of the tasks come from the bank, which
`python benchmarks/bank.py` fills; what is missing is trained here. A game takes a quarter of a minute on one
core: 40 minutes for the parts on two tasks and five seeds. Killed, the same command goes on where it was. The
record holds every judgement, and for each entry and task the mean over seeds, the interval of the paired
difference from `dau`, and tests against the noise floor. On CUDA it is ResNet-18 and all of CIFAR-10, and 7
trainings for the two tasks of a seed: --minutes makes them so short that they fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from bank import parse_seeds
from support.bank import Bank
from support.comparing import paired_interval, summarise
from support.entries import (
    Case,
    Entry,
    Work,
    judge_all,
    judge_entry,
    judge_original,
    list_left,
    list_rivals,
    row_line,
    time_retraining,
)
from support.loops import fit_epochs, measure_training_rate
from support.measuring import Clock
from support.recording import ROOT, environment, read_lines, record_folder, write_json
from support.settings import Setting, choose_setting, set_epochs
from support.tasks import INFLUENCE, KINDS, Tasks

from dau_fast.engine.device import warm_up
from dau_fast.engine.runtime import Runtime, choose_device, choose_precision
from dau_fast.errors import UserError

# Share of the minutes that goes to the trainings.
TRAINING = 0.75
# Where labels are wrong, what is shown for it is judged; elsewhere everything else.
_WRONG = ("mislabelled", "backdoor")
_OTHERS = tuple(kind for kind in KINDS if kind not in _WRONG)
_CLASSES = ("class", "digits-class")
# Where a model may have memorised little: on CUDA, which trains with augmentation, at random too.
_LITTLE = ("augmented", "random")
_SPREAD = tuple(kind for kind in KINDS if kind not in _CLASSES)

PARTS = (
    Entry("dau"),
    Entry("no attacker", asked={"alpha": 0.0}, kinds=_OTHERS),
    Entry("attacker frozen after its warm-up", asked={"attacker_steps": 0}, kinds=_OTHERS),
    Entry("no anchor", asked={"anchor": 0.0}, kinds=_OTHERS),
    Entry("no anchor of logits", asked={"anchor_logits": 0.0}, kinds=_LITTLE),
    Entry("exposure alone", asked={"half_sure": 1e6}, kinds=_LITTLE),
    Entry("no departure", asked={"departure": 0.0}),
    Entry("departure by the original alone", asked={"plain_share": 0.0}),
    Entry("features out of sight", asked={"features": False}, kinds=_CLASSES),
    Entry("statistics taken at the end", asked={"settled": 0.0}, kinds=_CLASSES),
    Entry("smaller steps, lr 0.02", asked={"lr": 0.02}),
    Entry("difficulty out of sight", asked={"difficulty": False}, kinds=_SPREAD),
    Entry("no wrong labels shown", asked={"wrong_labels": 0.0}, kinds=_WRONG),
    Entry("pull without a limit", asked={"pull": 0.0}, kinds=_SPREAD),
    Entry("sensitivity in sight", asked={"sensitivity": "classifier"}, kinds=_OTHERS),
    Entry("Barlow Twins, beta 1e-3", asked={"beta": 1e-3}, kinds=_OTHERS),
    Entry("half as many turns", asked={"turns": 160}, kinds=_OTHERS),
)


def list_entries(name: str) -> tuple[Entry, ...]:
    """The game alone, its parts, or all methods but those that retrain; `dau` first."""
    if name != "rivals":
        return PARTS if name == "parts" else PARTS[:1]
    return list_rivals()


@click.command()
@click.option("--data", type=Path, help="Folder with train/ and test/; left out, what the bank keeps.")
@click.option("--bank", default=ROOT / "bank", type=Path, show_default="bank/", help="Folder of the bank.")
@click.option("--tasks", default="random,class", show_default=True, help="Kinds of benchmarks/bank.py.")
@click.option("--seeds", default="100-104", show_default=True, help="One or more; intervals need two.")
@click.option("--entries", default="parts", show_default=True, type=click.Choice(["parts", "dau", "rivals"]))
@click.option(
    "--only", multiple=True, help="An entry's name, to judge it beside `dau` alone; may be repeated."
)
@click.option("--tune", "trials", default=0, show_default=True, help="Trials for each method; 0 for none.")
@click.option("--retrained", default=3, show_default=True, type=click.IntRange(2), help="A task and seed.")
@click.option("--device", "device_name", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--epochs", type=click.IntRange(1), help="Of all trainings; else those of the recipe.")
@click.option("--plain", is_flag=True, help="Train without augmentation, so that models memorise.")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="After these no entry is begun; without --epochs, trainings are so short that they fit.",
)
@click.option("--smoke", is_flag=True, help="Toy sizes, to see that everything runs.")
@click.option(
    "--record", type=Path, help="Folder; default benchmarks/records/<date>-quality-<entries>[-cuda]."
)
def main(
    data: Path | None, bank: Path, tasks: str, seeds: str, entries: str, only: tuple[str, ...], trials: int,
    retrained: int, device_name: str, epochs: int | None, plain: bool, minutes: float | None, smoke: bool,
    record: Path | None,
) -> None:  # fmt: skip
    """Judge every entry on every task and seed, and write the record."""
    clock = Clock.start(minutes)
    try:
        device = choose_device(device_name)
        if device.type == "cpu":
            torch.set_num_threads(1)
        warm_up(device)
        chosen = choose_entries(entries, only)
        kinds, numbers = [kind.strip() for kind in tasks.split(",")], parse_seeds(seeds)
        works = {Case(kind, one): list_works(kind, chosen, trials) for kind in kinds for one in numbers}
        folder = record or record_folder(f"quality-{entries}{'-cuda' if device.type == 'cuda' else ''}")
        folder.mkdir(parents=True, exist_ok=True)
        setting = choose_setting(device, epochs, smoke, plain)
        if minutes and not epochs:
            trainings = count_trainings(setting, kinds, numbers, retrained)
            setting = fit_setting(setting, trainings, minutes, device, folder)
        told = device.type == "cuda" or epochs or plain or minutes
        about = {"setting": asdict(setting)} if told else {}
        write_json(folder / "environment.json", environment(device) | about)
        made = Tasks(Bank(bank), data, setting, Runtime(device, choose_precision("auto", device), "auto"))
        judge_in_time(made, works, retrained, folder / "judgements.jsonl", clock)
    except UserError as error:
        raise click.UsageError(str(error)) from error
    summary = summarise_all(folder / "judgements.jsonl")
    write_json(folder / "summary.json", summary)
    for line in summary:
        print(_summary_line(line))


def choose_entries(name: str, only: Sequence[str]) -> tuple[Entry, ...]:
    """Those of `list_entries`; where some are named by `only`, these and `dau`."""
    found = list_entries(name)
    names = [entry.name for entry in found]
    for unknown in (each for each in only if each not in names):
        raise UserError(f"--only {unknown!r}: expected one of {', '.join(names)}")
    return tuple(entry for entry in found if not only or entry.name in ("dau", *only))


def list_works(kind: str, entries: Sequence[Entry], trials: int) -> dict[str, Work]:
    """The original, and those of `entries` that are for tasks of this kind."""
    own = {each.name: judge_entry(each, trials) for each in entries if not each.kinds or kind in each.kinds}
    return {"original": judge_original} | own


def judge_in_time(
    made: Tasks, works: Mapping[Case, Mapping[str, Work]], retrained: int, file: Path, clock: Clock
) -> None:
    """Judge what `file` lacks and print each row, until the clock is over; say what is left then.

    On CUDA rows say what retraining takes there: the models may come from another machine.
    """
    measure = time_retraining if made.runtime.device.type == "cuda" else lambda _: {}
    for case, those in works.items():
        for row in judge_all(made, case, those, retrained, file, measure, lambda: clock.over):
            print(row_line(row), flush=True)
    left = sum(len(list_left(case, those, file)) for case, those in works.items())
    if left:
        print(f"The minutes are over: {left} more rows come when the same command is run again.")


# ---- how long trainings are


def fit_setting(
    setting: Setting, trainings: int, minutes: float, device: torch.device, folder: Path
) -> Setting:
    """`setting` with as many epochs, its own at most, as let the trainings fit into their part of `minutes`.

    Where the record in `folder` was begun before, with its epochs: models must not differ in them.
    """
    full = setting.recipe.epochs
    epochs = read_epochs(folder, full)
    if epochs is None:
        rate = measure_training_rate(device, setting.arch, setting.image_size, setting.recipe.batch_size)
        epochs = fit_epochs(full, trainings * setting.training, 60 * TRAINING * minutes, rate)
    print(f"{trainings} trainings of {epochs} epochs, of {full}", flush=True)
    return set_epochs(setting, epochs)


def count_trainings(setting: Setting, kinds: Sequence[str], seeds: Sequence[int], retrained: int) -> int:
    """Models of the tasks, each of at most as many images as `setting` trains on, two halves as one.

    Tasks of a seed whose labels are right share an original.
    """
    originals = len({kind if kind in _WRONG else "right" for kind in kinds})
    halvings = setting.halvings if set(kinds) & set(INFLUENCE) else 0
    return len(seeds) * (originals + halvings + retrained * len(kinds))


def read_epochs(folder: Path, usual: int) -> int | None:
    """Those that the record in `folder` was begun with, `usual` where it says none; None for a new record."""
    file = folder / "environment.json"
    if not file.exists():
        return None
    known = json.loads(file.read_text())
    return known["setting"]["recipe"]["epochs"] if "setting" in known else usual


# ---- what it comes to


def summarise_all(file: Path) -> list[dict[str, Any]]:
    """For every task and entry: means over seeds.

    With two or more of them also tests against the floor, and the difference from `dau`.
    """
    rows, found = read_lines(file), []
    for kind in dict.fromkeys(row["task"] for row in rows):
        here = [row for row in rows if row["task"] == kind]
        ours = {row["seed"]: row for row in here if row["entry"] == "dau" and "failed" not in row}
        for name in dict.fromkeys(row["entry"] for row in here):
            mine = [row for row in here if row["entry"] == name]
            kept = [row for row in mine if "failed" not in row]
            line: dict[str, Any] = {"task": kind, "entry": name, "failed": len(mine) - len(kept)}
            if kept:
                line |= _summarise(kept)
                both = [row for row in kept if row["seed"] in ours]
                if name != "dau" and len(both) > 1:
                    pairs = [row["avg_gap"] for row in both], [ours[row["seed"]]["avg_gap"] for row in both]
                    line["worse_than_dau"] = asdict(paired_interval(*pairs))
            found.append(line)
    return found


def _summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means; the interval of gap less floor, and tests, where there are rows of two seeds or more."""
    gaps, floors = [row["avg_gap"] for row in rows], [row["floor"] for row in rows]
    if len(rows) > 1:
        summary: dict[str, Any] = asdict(summarise(gaps, floors))
    else:
        summary = {"seeds": 1, "gap": gaps[0], "floor": floors[0]}
    timed = [row["retraining_seconds"] for row in rows if "retraining_seconds" in row]

    def average(name: str) -> dict[str, float]:
        return {key: sum(row[name][key] for row in rows) / len(rows) for key in rows[0][name]}

    return summary | {
        "floors": summary["gap"] / summary["floor"] if summary["floor"] else None,
        "seconds": sum(row["seconds"] for row in rows) / len(rows),
        "gap_to_mean": sum(row["gap_to_mean"] for row in rows) / len(rows),
        **({"retraining_seconds": sum(timed) / len(timed)} if timed else {}),
        **{name: average(name) for name in ("signed", "margins", "extra_signed")},
    }


def _summary_line(line: dict[str, Any]) -> str:
    if "gap" not in line:
        return f"{line['task']:10} {line['entry']:36} failed"
    more = "".join(f", {name} {value:+.1f}" for name, value in line["extra_signed"].items())
    if "retraining_seconds" in line:
        more += f", {line['seconds']:.1f} s of {line['retraining_seconds']:.1f} for retraining"
    floors = "" if line["floors"] is None else f", {line['floors']:5.2f} floors"
    return f"{line['task']:10} {line['entry']:36} {line['gap']:6.2f}{floors}{more}"


if __name__ == "__main__":
    main()
