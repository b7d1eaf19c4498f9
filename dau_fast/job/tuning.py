"""Tuning: as many trials for every method that has a space of settings, judged without retraining.

A trial is one run of the method on the task itself. Neither retrained models nor test images are looked at:
the proxy of `dau_fast.metrics.proxy` judges, on forget, retain and validation set.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dau_fast.config import change
from dau_fast.data.progress import silent
from dau_fast.engine.device import Stopwatch
from dau_fast.engine.sharding import placed
from dau_fast.errors import Diverged
from dau_fast.methods.method import Method
from dau_fast.methods.running import Finished, run_timed
from dau_fast.methods.task import Task
from dau_fast.metrics.proxy import Behaviour, check_halves, list_terms, observe, proxy_gap
from dau_fast.models import Classifier


@dataclass(frozen=True)
class Trial:
    """One run. settings: the fields of the method's space, by name. seconds: of the method alone.

    terms: of the proxy, in percentage points; score: their mean, smaller is better. failure: why there is no
    score, where the trial diverged; seconds is then None too.
    """

    settings: dict[str, Any]
    score: float | None = None
    terms: dict[str, float] | None = None
    seconds: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Tuning:
    """All trials in their order, and which one was `chosen`. seconds: of all of them, judging included."""

    trials: tuple[Trial, ...]
    chosen: int
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """The best trial: what came of it, the whole settings that it ran with, and how it was found."""

    finished: Finished
    settings: Any
    tuning: Tuning


class Judge:
    """Scores models of `task`, all on the same draws, against its original, which is trained by now."""

    def __init__(self, task: Task) -> None:
        self.task = hide_test(task)
        self.before = self.observe(task.original)

    def observe(self, model: Classifier) -> Behaviour:
        """How `model` treats forget, retain and validation set. Raises Diverged as `observe` does."""
        task = self.task
        with placed(task.images.device, model):
            return observe(
                model, task.images, task.labels, task.split, task.generator("tuning"), ranks=task.ranks
            )

    def judge(self, model: Classifier) -> dict[str, float]:
        """The proxy's terms of `model`, in percentage points."""
        return list_terms(self.observe(model), self.before, classwise=self.task.split.classwise)


def tune(
    method: Method[Any], task: Task, trials: int, asked: Any = None, judge: Judge | None = None
) -> Tuned:
    """Run `method` on `task` with up to `trials` settings of its space and keep the best.

    asked: settings of the first trial, whole or some fields, where they are not the usual ones. judge: of
    this task, where there is one already. Raises UserError for a task that a trial does not go with, and
    Diverged where every trial did.
    """
    plan = plan_trials(method, task, method.resolve(task, asked), trials)
    return run_trials(method, task, plan, judge or Judge(task))


def plan_trials(method: Method[Any], task: Task, first: Any, trials: int) -> list[Any]:
    """The settings of each trial: `first`, then random ones of the method's space, none of them twice.

    Fewer than `trials`, with a warning, where the space holds no more. What is drawn depends on the task's
    seed, the method's name and its space alone. Raises UserError where one of them does not go with the task.
    """
    check_halves(task.split)
    space = method.space
    usual = {name: getattr(first, name) for name in space}
    size = math.prod(len(values) for values in space.values())
    chance = np.random.default_rng(task.derive_seed(f"tuning {method.name}"))
    # One more than needed: the first may be among them.
    drawn = chance.choice(size, min(size, trials), replace=False)
    others = [chosen for place in drawn if (chosen := _at(space, int(place))) != usual]
    plan = [first, *(change(first, chosen, method.name) for chosen in others[: trials - 1])]
    if len(plan) < trials:
        logging.getLogger("dau_fast").warning(
            "%s has %d settings to try, fewer than %d: it gets fewer trials", method.name, len(plan), trials
        )
    for settings in plan:
        method.check(task, settings)
    return plan


def run_trials(method: Method[Any], task: Task, plan: Sequence[Any], judge: Judge) -> Tuned:
    """Run `method` with each settings of `plan`; the smallest score wins, the earlier one of equal ones.

    A trial that diverges is noted and loses. Raises Diverged where every one did.
    """
    blind = replace(judge.task, progress=silent)
    best: tuple[float, int, Finished] | None = None
    advance = task.progress(f"{method.name} trials", len(plan))
    tried: list[Trial] = []
    with Stopwatch(task.images.device) as watch:
        for settings in plan:
            trial, finished = _try(method, settings, blind, judge)
            if finished and trial.score is not None and (best is None or trial.score < best[0]):
                best = trial.score, len(tried), finished
            tried.append(trial)
            advance()
    if best is None:
        raise Diverged(
            f"{method.name} diverged in every trial, such as the first: {tried[0].failure}: leave it out"
        )
    _, chosen, finished = best
    return Tuned(finished, plan[chosen], Tuning(tuple(tried), chosen, watch.seconds))


def hide_test(task: Task) -> Task:
    """`task` without its test images."""
    return replace(task, split=replace(task.split, test=task.split.test[:0]))


def _try(method: Method[Any], settings: Any, task: Task, judge: Judge) -> tuple[Trial, Finished | None]:
    tried = {name: getattr(settings, name) for name in method.space}
    try:
        finished = run_timed(method.name, lambda given: method.run(given, settings), task)
        terms = judge.judge(finished.model)
    except Diverged as error:
        return Trial(tried, failure=str(error)), None
    return Trial(tried, proxy_gap(terms), terms, finished.seconds), finished


def _at(space: Mapping[str, Sequence[Any]], place: int) -> dict[str, Any]:
    """The values at number `place` of all combinations."""
    found = {}
    for name, values in space.items():
        place, number = divmod(place, len(values))
        found[name] = values[number]
    return found
