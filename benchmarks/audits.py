"""Whether unlearned models pass the audits that retrained ones pass, where the original memorises.

    python benchmarks/audits.py --data DIR                    random:110 and class:105
    python benchmarks/audits.py --data DIR --entries dau,rl --tune 8

DIR holds train/ and test/ of CIFAR-10. Each method is played from several originals that differ in their
seed. Each of its models is audited by itself against all retrained models, which gives a verdict, and all
together, which gives KLoM and U-LiRA; each retrained model in turn is audited as if it had been unlearned.
The untouched originals and a new last layer on the original's features (`head_only`) are controls that must
fail. Models come from the bank, which `python benchmarks/bank.py` fills; missing ones are trained here,
half a minute each on one core. Looking at a model takes ten seconds, a game a quarter of a minute: half an
hour a task with a filled bank. Killed, the same command goes on with the next method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from support.bank import Bank
from support.recording import ROOT, append_row, environment, read_lines, record_folder, write_json
from support.settings import SMOKE, Setting
from support.tasks import Tasks

from dau_fast.audits.catalogue import find_audits
from dau_fast.audits.comparing import Context
from dau_fast.audits.evidence import Evidence, Scene, examine
from dau_fast.audits.verdicts import Audited, audit_models
from dau_fast.config import AuditConfig
from dau_fast.engine.device import run_flushed, warm_up
from dau_fast.errors import UserError
from dau_fast.job.tuning import tune
from dau_fast.methods.registry import get_method
from dau_fast.methods.running import run_timed
from dau_fast.methods.task import Task
from dau_fast.models import Classifier

UNTOUCHED = "original"


@dataclass(frozen=True)
class Size:
    """models: originals that methods are played from. references: retrained models, twice that or more."""

    models: int
    references: int

    def __post_init__(self) -> None:
        if self.references < 2 * self.models:
            raise UserError(
                f"`references={self.references}`: expected {2 * self.models} or more, twice `models`, so "
                "that as many can be held out twice"
            )


class Auditor:
    """One task of the bank, its references looked at when they are first needed."""

    def __init__(self, made: Tasks, kind: str, seed: int, size: Size, config: AuditConfig) -> None:
        self.problem, self.size, bank = made.problem(kind, seed), size, made.bank
        self.scene = Scene(self.problem.images, self.problem.split, seed, config)
        originals = [bank.get(self.problem.original(i)) for i in range(size.models)]
        task = made.task(kind, seed)
        self.tasks = [
            replace(task, original=original, seed=task.derive_seed(f"audited {i}"))
            for i, original in enumerate(originals)
        ]
        self.originals = [self.look(originals[0], 0.0)]
        self.originals += map(self.look, originals[1:])
        retrained = (bank.get(self.problem.retrained(i)) for i in range(size.references))
        self.references = list(map(self.look, retrained))

    def look(self, model: Classifier, known: float | None = None) -> Evidence:
        """What `model` shows; known: the accuracy that counts as relearned, None for the first original's."""
        target = 100.0 - self.originals[0].measures.ua if known is None else known
        return examine(model.eval(), self.scene, target)

    def audit(self, found: Sequence[Evidence]) -> dict[str, Any]:
        """The audits of models by one method: of each by itself, and of all together."""
        alone = [self._compare([each]) for each in found]
        together = self._compare(found)
        several = together.audits.keys() - alone[0].audits.keys()
        return {
            "verdicts": [_describe_verdict(each) for each in alone],
            "audits": {
                name: {
                    "values": [each.audits[name].value for each in alone],
                    "retrained": fmean(kept.held_out),
                    "band": kept.band,
                    "outside": sum(each.audits[name].outside for each in alone),
                }
                for name, kept in alone[0].audits.items()
            },
            "together": {
                name: {
                    "value": kept.value,
                    "retrained": fmean(kept.held_out),
                    "band": kept.band,
                    "outside": kept.outside,
                }
                for name, kept in together.audits.items()
                if name in several
            },
        }

    def _compare(self, group: Sequence[Evidence]) -> Audited:
        context = Context(self.originals[:1], self.scene.forget_counts, self.scene.config)
        return audit_models(group, self.references, context)


def _describe_verdict(found: Audited) -> dict[str, Any]:
    verdict = found.verdict
    return {
        "inside": verdict.inside,
        "p": verdict.p_value,
        "outside": verdict.outside,
        "expected": verdict.expected,
        "audits": verdict.audits,
    }


@click.command()
@click.option("--data", type=Path, help="Folder with train/ and test/; left out, what the bank keeps.")
@click.option("--bank", default=ROOT / "bank", type=Path, show_default="bank/", help="Folder of the bank.")
@click.option("--tasks", default="random:110,class:105", show_default=True, help="Kinds and their seeds.")
@click.option("--entries", default="dau,rl,sfron,salun,ft,head_only", show_default=True, help="Methods.")
@click.option(
    "--tune", "trials", default=0, show_default=True, help="Trials on the first original; 0 for none."
)
@click.option("--models", default=4, show_default=True, type=click.IntRange(1), help="Originals of a task.")
@click.option("--references", default=12, show_default=True, type=click.IntRange(2), help="Retrained models.")
@click.option("--smoke", is_flag=True, help="Toy sizes, to see that everything runs.")
@click.option("--record", type=Path, help="Record folder; default benchmarks/records/<date>-audits.")
def main(
    data: Path | None,
    bank: Path,
    tasks: str,
    entries: str,
    trials: int,
    models: int,
    references: int,
    smoke: bool,
    record: Path | None,
) -> None:
    """Audit every method on every task, and write the record."""
    torch.set_num_threads(1)
    warm_up(torch.device("cpu"))
    folder = record or record_folder("audits")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "environment.json", environment(torch.device("cpu")))
    config = AuditConfig(relearning_steps=2, noisy_copies=2) if smoke else AuditConfig()
    try:
        names = [get_method(name).name for name in entries.split(",")]
        made, size = Tasks(Bank(bank), data, SMOKE if smoke else Setting()), Size(models, references)
        chosen = _parse(tasks)

        def work() -> None:
            for kind, seed in chosen:
                for row in audit_all(made, kind, seed, names, trials, size, config, folder / "audits.jsonl"):
                    print(_line(row), flush=True)

        # As whole runs do: methods are much slower with denormal numbers.
        run_flushed(work, torch.device("cpu"))
    except UserError as error:
        raise click.UsageError(str(error)) from error
    (folder / "tables.md").write_text(write_tables(read_lines(folder / "audits.jsonl")))


def audit_all(
    made: Tasks,
    kind: str,
    seed: int,
    entries: Sequence[str],
    trials: int,
    size: Size,
    config: AuditConfig,
    file: Path,
) -> Iterator[dict[str, Any]]:
    """A row for each of `entries` that `file` lacks, which is added to it; the untouched originals first."""
    done = {row["entry"] for row in read_lines(file) if (row["task"], row["seed"]) == (kind, seed)}
    wanted = [name for name in (UNTOUCHED, *entries) if name not in done]
    if not wanted:
        return
    auditor = Auditor(made, kind, seed, size, config)
    for name in wanted:
        if name == UNTOUCHED:
            found, settings = auditor.originals, None
        else:
            unlearned, settings = play(name, auditor.tasks, trials)
            found = list(map(auditor.look, unlearned))
        row = {"task": kind, "seed": seed, "entry": name, "settings": settings, **auditor.audit(found)}
        append_row(file, row)
        yield row


def play(name: str, tasks: Sequence[Task], trials: int) -> tuple[list[Classifier], dict[str, Any]]:
    """A model from each original, by settings that are tuned on the first where there are `trials`."""
    method = get_method(name)
    asked: dict[str, Any] = {}
    if trials and method.space:
        tuning = tune(method, tasks[0], trials).tuning
        asked = tuning.trials[tuning.chosen].settings

    def unlearn(task: Task) -> Classifier:
        settings = method.resolve(task, asked)
        method.check(task, settings)
        return run_timed(name, lambda given: method.run(given, settings), task).model

    return list(map(unlearn, tasks)), asked


def write_tables(rows: Sequence[dict[str, Any]]) -> str:
    """A table for every task: each audit of each method, beside the band of retrained models."""
    parts = []
    for task in dict.fromkeys((row["task"], row["seed"]) for row in rows):
        here = [row for row in rows if (row["task"], row["seed"]) == task]
        lines = [
            f"## {task[0]}, seed {task[1]}",
            "",
            _cells("audit", "retrained", *(r["entry"] for r in here)),
        ]
        lines.append(_cells(*["---"] * (2 + len(here))))
        inside = (f"{sum(v['inside'] for v in r['verdicts'])} of {len(r['verdicts'])}" for r in here)
        lines.append(_cells("models inside by all audits together", "", *inside))
        outside = (f"{fmean(v['outside'] for v in r['verdicts']):.1f}" for r in here)
        expected = here[0]["verdicts"][0]
        lines.append(
            _cells(
                f"of {expected['audits']} audits outside", f"{expected['expected']:.1f} expected", *outside
            )
        )
        for name, audit in here[0]["audits"].items():
            found = (f"{fmean(r['audits'][name]['values']):.2f}" for r in here)
            lines.append(_cells(_label(name), _band(audit), *found))
        for name, audit in here[0]["together"].items():
            lines.append(
                _cells(_label(name), _band(audit), *(f"{r['together'][name]['value']:.2f}" for r in here))
            )
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, LEGEND]) + "\n"


LEGEND = (
    "Means over a method's models; KLoM, U-LiRA and the challenge's scores compare them together.\n"
    "retrained: mean of the held-out retrained models, in brackets the lowest and the highest of them."
)


def _label(name: str) -> str:
    audit = find_audits()[name]
    return f"{audit.label}, {audit.unit}" if audit.unit else audit.label


def _band(audit: dict[str, Any]) -> str:
    low, high = audit["band"]
    return f"{audit['retrained']:.2f} ({low:.2f} to {high:.2f})"


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _parse(text: str) -> list[tuple[str, int]]:
    found = []
    for part in text.split(","):
        kind, _, seed = part.strip().partition(":")
        if not seed.isdecimal():
            raise UserError(f"`tasks` '{part}' is not understood: expected a kind and a seed, as random:110")
        found.append((kind, int(seed)))
    return found


def _line(row: dict[str, Any]) -> str:
    verdicts = row["verdicts"]
    inside, outside = sum(each["inside"] for each in verdicts), fmean(each["outside"] for each in verdicts)
    klom = row["together"].get("klom_forget_mean")
    several = f", KLoM forget {klom['value']:.2f} beside {klom['retrained']:.2f}" if klom else ""
    return (
        f"{row['task']}:{row['seed']} {row['entry']:12} inside {inside} of {len(verdicts)}, outside in "
        f"{outside:.1f} of {verdicts[0]['audits']} audits, {verdicts[0]['expected']:.1f} expected{several}"
    )


if __name__ == "__main__":
    main()
