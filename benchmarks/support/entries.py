"""Judging methods on tasks of the bank, a row for each, that a killed command goes on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dau_fast.config import PruneConfig
from dau_fast.engine.device import run_flushed
from dau_fast.errors import UserError
from dau_fast.job.tuning import tune
from dau_fast.methods.registry import find_methods, get_method
from dau_fast.methods.running import Finished, run_timed
from dau_fast.methods.task import Task
from dau_fast.models import Classifier
from support.judging import Judge
from support.recording import append_row, read_lines
from support.tasks import Tasks, answer_requests

Row = dict[str, Any]
# Of a retraining's epochs, what is timed in the run itself.
TIMED = 0.1


@dataclass(frozen=True)
class Entry:
    """A method with settings that replace its usual ones. kinds: tasks it is for, None for all."""

    name: str
    method: str = "dau"
    asked: Mapping[str, Any] | None = None
    kinds: tuple[str, ...] | None = None


def list_rivals() -> tuple[Entry, ...]:
    """All methods but those that retrain, with their usual settings; `dau` first."""
    rows = [row for row in find_methods().values() if not row.reference]
    return tuple(sorted((Entry(row.name, row.name) for row in rows), key=lambda entry: entry.name != "dau"))


@dataclass(frozen=True)
class Case:
    """A task of the bank, dense or pruned."""

    kind: str
    seed: int
    pruning: PruneConfig | None = None

    def describe(self) -> Row:
        """What rows say of it; of a dense one nothing about pruning."""
        found: Row = {"task": self.kind, "seed": self.seed}
        if self.pruning is not None:
            found |= {"pruning": self.pruning.method, "sparsity": self.pruning.sparsity}
        return found


# What makes the figures of one row.
Work = Callable[[Judge, Task], Row]


def judge_all(
    made: Tasks,
    case: Case,
    works: Mapping[str, Work],
    retrained: int,
    file: Path,
    measure: Callable[[Task], Row] = lambda _: {},
    over: Callable[[], bool] = lambda: False,
) -> Iterator[Row]:
    """The rows of those of `works` that `file` lacks, by the entry's name, each added to it.

    measure: what all of them say of the task as it is now. over: whether no further one is to be begun.
    """
    left = list_left(case, works, file)
    if not left or over():
        return
    judge = Judge(made.problem(case.kind, case.seed, case.pruning), made.bank, retrained)
    task = made.task(case.kind, case.seed, case.pruning)
    # As whole runs do: methods are much slower with denormal numbers.
    flushed = partial(run_flushed, device=task.images.device)
    found = case.describe() | {"floor": judge.floor} | flushed(partial(measure, task))
    for name, work in left.items():
        if over():
            return
        row = found | {"entry": name, **flushed(partial(work, judge, task))}
        append_row(file, row)
        yield row


def list_left(case: Case, works: Mapping[str, Work], file: Path) -> dict[str, Work]:
    """Those of `works` that `file` has no row of."""
    done = {row["entry"] for row in read_lines(file) if is_about(row, case.describe())}
    return {name: work for name, work in works.items() if name not in done}


def is_about(row: Row, about: Row) -> bool:
    """Whether `row` is of the task that `about` describes."""
    return all(row.get(key) == about.get(key) for key in ("task", "seed", "pruning", "sparsity"))


def judge_original(judge: Judge, _: Task) -> Row:
    """What doing nothing comes to."""
    return {"seconds": 0.0, **asdict(judge.judge_original())}


def judge_entry(entry: Entry, trials: int = 0) -> Work:
    """What `entry` comes to, with as many settings tried, or why it fails."""
    return partial(_judge_entry, entry, trials)


def _judge_entry(entry: Entry, trials: int, judge: Judge, task: Task) -> Row:
    """One request, or several one after the other, whose seconds are added up."""
    seconds = []

    def unlearn(given: Task) -> Classifier:
        finished = _run(given, entry, trials)
        seconds.append(finished.seconds)
        return finished.model

    try:
        requests = judge.outputs.problem.requests
        model = answer_requests(task, requests, unlearn) if requests else unlearn(task)
        return {"seconds": sum(seconds), **asdict(judge.judge(model))}
    except UserError as error:
        return {"seconds": None, "failed": str(error)}


def _run(task: Task, entry: Entry, trials: int) -> Finished:
    method = get_method(entry.method)
    settings = method.resolve(task, entry.asked)
    method.check(task, settings)
    if trials and method.space:
        return tune(method, task, trials).finished
    return run_timed(method.name, lambda given: method.run(given, settings), task)


def time_retraining(task: Task) -> Row:
    """Seconds of one retraining, of which a part is run: a method's seconds are of the same run then."""
    epochs = max(1, round(TIMED * task.recipe.epochs))
    method, recipe = get_method("retrain"), replace(task.recipe, epochs=epochs)
    made = run_timed(method.name, lambda given: method.run(given, recipe), task)
    return {"retraining_seconds": made.seconds * task.recipe.epochs / epochs}


def row_line(row: Row) -> str:
    """One row as the terminal shows it."""
    gap = "failed" if "failed" in row else f"{row['avg_gap']:6.2f} at a floor of {row['floor']:.2f}"
    pruned = f" {row['pruning']}" if "pruning" in row else ""
    return f"{row['task']}:{row['seed']}{pruned} {row['entry']:36} {gap}"
