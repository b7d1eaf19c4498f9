"""The paper's two tables and its attack figure: random and class-wise, dense and pruned.

    python benchmarks/paper.py --data DIR                          every method, by its published settings
    python benchmarks/paper.py --data DIR --methods dau,ft --prune dense,omp --sparsity 0.95 --seeds 105,106
    python benchmarks/paper.py --data DIR --device cuda    the literature's: all of CIFAR-10, and ResNet-18

DIR holds train/ and test/ of CIFAR-10; on the CPU a part of it is taken, at 16x16, and the small network. For
every seed, task and pruning there is an original, models retrained with its masks by its own recipe, and
every method. Models come from the bank and stay there: 43 trainings a seed, 15 of them of IMP's original,
half a minute each on one core, and by the rate of training on an H200 two and a quarter minutes each with
all epochs of the literature. Seeds come one after the other; killed, the same command goes on where it was.
The record holds judgements.jsonl, summary.json, tables.md and attacks.svg, of all judgements in its folder.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

# Also as `python -m benchmarks.paper`.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import click
import torch
from bank import parse_seeds
from support.bank import Bank
from support.entries import (
    Case,
    Entry,
    Row,
    Work,
    judge_all,
    judge_entry,
    judge_original,
    list_rivals,
    row_line,
    time_retraining,
)
from support.judging import Judge
from support.paper_plots import draw_attacks
from support.paper_tables import RETRAINED, summarise_paper, write_tables
from support.recording import ROOT, environment, read_lines, record_folder, write_json
from support.settings import choose_setting
from support.tasks import Tasks

from dau_fast.config import PruneConfig
from dau_fast.engine.device import warm_up
from dau_fast.engine.runtime import Runtime, choose_device, choose_precision
from dau_fast.errors import UserError
from dau_fast.methods.registry import get_method
from dau_fast.methods.task import Task
from dau_fast.prune.registry import get_pruner


@click.command()
@click.option("--data", type=Path, help="Folder with train/ and test/; left out, what the bank keeps.")
@click.option("--bank", default=ROOT / "bank", type=Path, show_default="bank/", help="Folder of the bank.")
@click.option("--tasks", default="random,class", show_default=True, help="Kinds of benchmarks/bank.py.")
@click.option("--prune", default="dense,omp,synflow,imp", show_default=True, help="dense, and pruners.")
@click.option("--sparsity", default=0.95, show_default=True, help="Share of the convolutions' weights.")
@click.option("--methods", default="all", show_default=True, help="With commas; all but those that retrain.")
@click.option("--seeds", default="105-106", show_default=True, help="One, several, or a range.")
@click.option("--retrained", default=3, show_default=True, type=click.IntRange(3), help="A task and seed.")
@click.option("--device", "device_name", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--epochs", type=click.IntRange(1), help="Of all trainings; else those of the recipe.")
@click.option("--smoke", is_flag=True, help="Toy sizes, to see that everything runs.")
@click.option("--record", type=Path, help="Folder; default benchmarks/records/<date>-paper-<device>.")
def main(
    data: Path | None, bank: Path, tasks: str, prune: str, sparsity: float, methods: str, seeds: str,
    retrained: int, device_name: str, epochs: int | None, smoke: bool, record: Path | None,
) -> None:  # fmt: skip
    """Judge every method on every task, and write the record."""
    try:
        device = choose_device(device_name)
        if device.type == "cpu":
            torch.set_num_threads(1)
        warm_up(device)
        works = list_works(methods, retrained)
        prunings = [parse_pruning(name.strip(), sparsity) for name in prune.split(",")]
        kinds, chosen = [kind.strip() for kind in tasks.split(",")], parse_seeds(seeds)
        runtime = Runtime(device, choose_precision("auto", device), "auto")
        made = Tasks(Bank(bank), data, choose_setting(device, epochs, smoke), runtime)
        folder = record or record_folder(f"paper-{device.type}")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "environment.json", environment(device) | {"setting": asdict(made.setting)})
        for case in (Case(kind, seed, how) for seed in chosen for how in prunings for kind in kinds):
            rows = folder / "judgements.jsonl"
            for row in judge_all(made, case, works, retrained, rows, time_retraining):
                print(row_line(row), flush=True)
    except UserError as error:
        raise click.UsageError(str(error)) from error
    write_record(folder)


def list_works(methods: str, retrained: int) -> Mapping[str, Work]:
    """The original, each retrained model beside the others, and the methods."""
    names = [name.strip() for name in methods.split(",")]
    entries = list_rivals() if "all" in names else [Entry(get_method(name).name, name) for name in names]
    again = {f"{RETRAINED} {number}": partial(judge_retrained, number) for number in range(retrained)}
    return {"original": judge_original} | again | {entry.name: judge_entry(entry) for entry in entries}


def parse_pruning(name: str, sparsity: float) -> PruneConfig | None:
    """How to prune by the pruner `name`; None for dense. Raises UserError for an unknown one."""
    return None if name == "dense" else PruneConfig(get_pruner(name).name, sparsity)


def judge_retrained(number: int, judge: Judge, _: Task) -> Row:
    """What another retraining comes to."""
    return {"seconds": None, **asdict(judge.judge_retrained(number))}


def write_record(folder: Path) -> None:
    """Summary, tables and figure of all judgements in `folder`."""
    summary = summarise_paper(read_lines(folder / "judgements.jsonl"))
    write_json(folder / "summary.json", summary)
    (folder / "tables.md").write_text(write_tables(summary))
    draw_attacks(summary).savefig(folder / "attacks.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
