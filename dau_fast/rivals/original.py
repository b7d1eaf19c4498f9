"""Training the original, where no checkpoint is given."""

from __future__ import annotations

from dau_fast.rivals._sgd import fit
from dau_fast.task import Task, Unlearned


def train(task: Task) -> Unlearned:
    """Train task.original itself, fresh until now, on the whole training set by task.recipe."""
    return Unlearned(fit(task.original, task.split.train, task, task.recipe, "original"))
