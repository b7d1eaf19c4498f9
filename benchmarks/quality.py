"""How near unlearned models come to retrained ones where the original memorises.

    python benchmarks/quality.py --data DIR                               what each part of the game is worth
    python benchmarks/quality.py --data DIR --entries dau                 the game alone
    python benchmarks/quality.py --data DIR --entries rivals              every method, by its usual settings
    python benchmarks/quality.py --data DIR --entries rivals --tune 8     with as many trials for each

DIR holds train/ and test/ of CIFAR-10. The models of the tasks come from the bank, which
`python benchmarks/bank.py` fills; what is missing is trained here. A game takes a quarter of a minute on one
core: 40 minutes for the parts on two tasks and five seeds. Killed, the same command goes on where it was. The
record holds every judgement, and for each entry and task the mean over seeds, the interval of the paired
difference from `dau`, and tests against the noise floor.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from bank import SMOKE, parse_seeds
from support.bank import Bank
from support.comparing import paired_interval, summarise
from support.entries import Case, Entry, judge_all, judge_entry, judge_original, list_rivals, row_line
from support.recording import ROOT, environment, read_lines, record_folder, write_json
from support.tasks import KINDS, Setting, Tasks

from dau_fast.engine.device import warm_up
from dau_fast.errors import UserError

# Where labels are wrong, what is shown for it is judged; elsewhere everything else.
_WRONG = ("mislabelled", "backdoor")
_OTHERS = tuple(kind for kind in KINDS if kind not in _WRONG)
_CLASSES = ("class", "digits-class")
_SPREAD = tuple(kind for kind in KINDS if kind not in _CLASSES)

PARTS = (
    Entry("dau"),
    Entry("no attacker", asked={"alpha": 0.0}, kinds=_OTHERS),
    Entry("attacker frozen after its warm-up", asked={"attacker_steps": 0}, kinds=_OTHERS),
    Entry("no anchor", asked={"anchor": 0.0}, kinds=_OTHERS),
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
@click.option("--seeds", default="100-104", show_default=True, help="Two or more.")
@click.option("--entries", default="parts", show_default=True, type=click.Choice(["parts", "dau", "rivals"]))
@click.option(
    "--only", multiple=True, help="An entry's name, to judge it beside `dau` alone; may be repeated."
)
@click.option("--tune", "trials", default=0, show_default=True, help="Trials for each method; 0 for none.")
@click.option("--retrained", default=3, show_default=True, type=click.IntRange(2), help="A task and seed.")
@click.option("--smoke", is_flag=True, help="Toy sizes, to see that everything runs.")
@click.option(
    "--record", type=Path, help="Record folder; default benchmarks/records/<date>-quality-<entries>."
)
def main(
    data: Path | None,
    bank: Path,
    tasks: str,
    seeds: str,
    entries: str,
    only: tuple[str, ...],
    trials: int,
    retrained: int,
    smoke: bool,
    record: Path | None,
) -> None:
    """Judge every entry on every task and seed, and write the record."""
    torch.set_num_threads(1)
    warm_up(torch.device("cpu"))
    folder = record or record_folder(f"quality-{entries}")
    folder.mkdir(parents=True, exist_ok=True)
    made = Tasks(Bank(bank), data, SMOKE if smoke else Setting())
    chosen, rows = list_entries(entries), folder / "judgements.jsonl"
    names = [entry.name for entry in chosen]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise click.UsageError(f"--only {unknown[0]!r}: expected one of {', '.join(names)}")
    chosen = tuple(entry for entry in chosen if not only or entry.name in ("dau", *only))
    write_json(folder / "environment.json", environment(torch.device("cpu")))
    try:
        for kind in tasks.split(","):
            for seed in parse_seeds(seeds):
                works = {e.name: judge_entry(e, trials) for e in chosen if not e.kinds or kind in e.kinds}
                works = {"original": judge_original} | works
                for row in judge_all(made, Case(kind, seed), works, retrained, rows):
                    print(row_line(row), flush=True)
    except UserError as error:
        raise click.UsageError(str(error)) from error
    summary = summarise_all(rows)
    write_json(folder / "summary.json", summary)
    for line in summary:
        print(_summary_line(line))


def summarise_all(file: Path) -> list[dict[str, Any]]:
    """For every task and entry: means over seeds, tests against the floor, and the difference from `dau`."""
    rows, found = read_lines(file), []
    for kind in dict.fromkeys(row["task"] for row in rows):
        here = [row for row in rows if row["task"] == kind]
        ours = {row["seed"]: row for row in here if row["entry"] == "dau" and "failed" not in row}
        for name in dict.fromkeys(row["entry"] for row in here):
            mine = [row for row in here if row["entry"] == name]
            kept = [row for row in mine if "failed" not in row]
            line: dict[str, Any] = {"task": kind, "entry": name, "failed": len(mine) - len(kept)}
            if len(kept) > 1:
                line |= _summarise(kept)
                both = [row for row in kept if row["seed"] in ours]
                if name != "dau" and len(both) > 1:
                    pairs = [row["avg_gap"] for row in both], [ours[row["seed"]]["avg_gap"] for row in both]
                    line["worse_than_dau"] = asdict(paired_interval(*pairs))
            found.append(line)
    return found


def _summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    floors = [row["floor"] for row in rows]
    summary = asdict(summarise([row["avg_gap"] for row in rows], floors))

    def average(name: str) -> dict[str, float]:
        return {key: sum(row[name][key] for row in rows) / len(rows) for key in rows[0][name]}

    return summary | {
        "floors": summary["gap"] / summary["floor"],
        "seconds": sum(row["seconds"] for row in rows) / len(rows),
        "gap_to_mean": sum(row["gap_to_mean"] for row in rows) / len(rows),
        **{name: average(name) for name in ("signed", "margins", "extra_signed")},
    }


def _summary_line(line: dict[str, Any]) -> str:
    if "gap" not in line:
        return f"{line['task']:10} {line['entry']:36} failed"
    more = "".join(f", {name} {value:+.1f}" for name, value in line["extra_signed"].items())
    return f"{line['task']:10} {line['entry']:36} {line['gap']:6.2f}, {line['floors']:5.2f} floors{more}"


if __name__ == "__main__":
    main()
