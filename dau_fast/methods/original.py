"""Training the original where no checkpoint is given, and pruning it."""

from __future__ import annotations

from dau_fast.methods.pruned import fit_pruned
from dau_fast.methods.supervised import fit
from dau_fast.methods.task import Task, Unlearned


def train(task: Task) -> Unlearned:
    """Train task.original itself, fresh until now, on the whole training set by task.recipe.

    Where task.pruning is set, it is pruned as that says.
    """
    if task.pruning is not None:
        return _prune(task, trained=False)
    return Unlearned(task.original, fit(task.original, task.split.train, task, task.recipe, "original"))


def prune_trained(task: Task) -> Unlearned:
    """Prune task.original itself, a trained model, as task.pruning says, and train it on."""
    return _prune(task, trained=True)


def _prune(task: Task, *, trained: bool) -> Unlearned:
    """Prune task.original itself, fresh or `trained`, and train it on the whole training set."""
    assert task.pruning is not None
    masks, loops = fit_pruned(
        task.original, task.split.train, task, task.pruning, task.recipe, "original", trained=trained
    )
    return Unlearned(task.original, loops, masks=masks)
