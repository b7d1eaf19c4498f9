"""The model bank: originals and retrained models of tasks that tell unlearning methods apart, on the CPU.

    python benchmarks/bank.py --data DIR                   DIR holds train/ and test/ of CIFAR-10
    python benchmarks/bank.py --data DIR --tasks random,class --seeds 100-104 --retrained 3 --workers 2
    python benchmarks/bank.py --tasks digits,digits-class  the quick check; needs no DIR

About half a minute a model on one core, four models a task and seed; the default, five tasks and five seeds,
takes an hour. Killed or ended, the same command goes on where it was, and two at once share the work. Prints
a table that says of every task and seed whether it can tell methods apart. Models stay in the bank's folder,
which is not committed; `--record` writes the table.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
import torch
from support.filling import Filling, Place, list_jobs, open_tasks
from support.judging import TELLING_FLOORS, TELLING_TEST, TELLING_TRAIN, Judge, Telling
from support.recording import ROOT, environment, write_json
from support.settings import SMOKE, Setting
from support.tasks import KINDS

from dau_fast.errors import UserError

DEFAULT = ("random", "class", "memorised", "mislabelled", "backdoor")


def parse_seeds(text: str) -> tuple[int, ...]:
    """`100-104`, `7`, or several of these with commas; UserError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"`seeds` '{text}' is not understood: expected some like 100-104 or 100,103")
        found += range(int(first), int(last if dash else first) + 1)
    if not found:
        raise UserError(f"`seeds` '{text}' names none: expected the lower number first, as in 100-104")
    return tuple(dict.fromkeys(found))


@click.command()
@click.option("--data", type=Path, help="Folder with train/ and test/; left out, what the bank keeps.")
@click.option("--bank", default=ROOT / "bank", type=Path, show_default="bank/", help="Folder of the bank.")
@click.option("--tasks", default=",".join(DEFAULT), show_default=True, help=f"Some of {', '.join(KINDS)}.")
@click.option("--seeds", default="100-104", show_default=True, help="One, several, or a range.")
@click.option("--retrained", default=3, show_default=True, type=click.IntRange(2), help="A task and seed.")
@click.option("--references", default=0, show_default=True, type=click.IntRange(0),
              help="Further originals and retrained models of the first seed.")  # fmt: skip
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Processes.")
@click.option("--smoke", is_flag=True, help="Toy sizes, to see that everything runs.")
@click.option("--record", type=Path, help="Record folder for the table; none by default.")
def main(
    data: Path | None,
    bank: Path,
    tasks: str,
    seeds: str,
    retrained: int,
    references: int,
    workers: int,
    smoke: bool,
    record: Path | None,
) -> None:
    """Fill the bank and say which tasks can tell methods apart."""
    torch.set_num_threads(1)
    try:
        place = Place(bank, data, SMOKE if smoke else Setting())
        kinds, chosen = [name.strip() for name in tasks.split(",")], parse_seeds(seeds)
        jobs = list_jobs(open_tasks(place), kinds, chosen, retrained, references)
        filling = Filling(place, jobs, workers)
        print(filling.describe(), flush=True)
        filling.run(lambda line: print(line, flush=True))
        found = show_table(place, kinds, chosen, retrained)
    except UserError as error:
        raise click.UsageError(str(error)) from error
    if record is not None:
        record.mkdir(parents=True, exist_ok=True)
        write_json(record / "environment.json", environment(torch.device("cpu")))
        write_json(record / "summary.json", {"setting": asdict(place.setting), "tasks": found})


def show_table(
    place: Place, kinds: list[str], seeds: tuple[int, ...], retrained: int
) -> list[dict[str, object]]:
    """Print a row for every task and seed; the same as JSON."""
    tasks, found = open_tasks(place), []
    print(
        f"A task tells where its original is {TELLING_FLOORS:g} floors or more from retrained models, right\n"
        f"on {TELLING_TRAIN:g} % of the training images or more, and on {TELLING_TEST:g} points fewer of\n"
        "the test images. Floor and original are avg gaps, in points."
    )
    print(f"{'task':16}{'floor':>7}{'original':>10}{'floors':>8}{'train %':>9}{'test %':>8}  tells")
    for kind in kinds:
        for seed in seeds:
            telling = Judge(tasks.problem(kind, seed), tasks.bank, retrained).telling()
            print(_row(f"{kind}:{seed}", telling), flush=True)
            found.append({"task": kind, "seed": seed, **asdict(telling), "tells": telling.tells})
    return found


def _row(name: str, telling: Telling) -> str:
    return (
        f"{name:16}{telling.floor:7.2f}{telling.original_gap:10.2f}{telling.floors:8.1f}{telling.train:9.1f}"
        f"{telling.test:8.1f}  {'yes' if telling.tells else 'no'}"
    )


if __name__ == "__main__":
    main()
