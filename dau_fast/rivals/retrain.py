"""Retraining from scratch on the retain set: exact, slow, and the standard the others are held to."""

from __future__ import annotations

from dau_fast.rivals._sgd import fit
from dau_fast.task import Task, Unlearned


def unlearn(task: Task) -> Unlearned:
    """Train a fresh network by the original's recipe, without the forget set."""
    return _retrain(task, "retrain")


def unlearn_again(task: Task) -> Unlearned:
    """A second retraining that shares no random draw with the first, for the noise floor."""
    return _retrain(task, "retrain again")


def _retrain(task: Task, name: str) -> Unlearned:
    seed = task.generator(name).initial_seed()
    return Unlearned(fit(task.fresh(seed), task.split.retain, task, task.recipe, name))
