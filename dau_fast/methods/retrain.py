"""Retraining from scratch on the retain set: exact, slow, and the standard the others are held to."""

from __future__ import annotations

from dau_fast.config import FAST_RETRAINING, PruneConfig, TrainingRecipe
from dau_fast.errors import UserError
from dau_fast.methods.pruned import fit_pruned
from dau_fast.methods.supervised import fit
from dau_fast.methods.task import Task, Unlearned


def unlearn(task: Task) -> Unlearned:
    """Train a fresh network by the original's recipe, without the forget set.

    With the original's masks, where it has some: the literature's reference, although masks found with
    the forget set tell of it. settings["retrain"] replaces the recipe.
    """
    return _retrain(task, "retrain", task.settings.get("retrain", task.recipe))


def unlearn_again(task: Task) -> Unlearned:
    """A second retraining that shares no random draw with the first, for the noise floor."""
    return _retrain(task, "retrain again", task.settings.get("retrain", task.recipe))


def unlearn_fast(task: Task) -> Unlearned:
    """The same by a recipe made to reach the same accuracy sooner; settings["retrain_fast"] replaces it."""
    return _retrain(task, "retrain fast", task.settings.get("retrain_fast", FAST_RETRAINING))


def unlearn_clean(task: Task) -> Unlearned:
    """Train and prune a fresh network as the original was, without the forget set: masks of its own.

    Raises UserError where task.pruning does not say how.
    """
    check_clean(task.pruning)
    assert task.pruning is not None
    name = "retrain clean"
    model = task.fresh(task.generator(name).initial_seed())
    return Unlearned(model, masks=fit_pruned(model, task.split.retain, task, task.pruning, name))


def check_clean(pruning: PruneConfig | None) -> None:
    """UserError where there is no pruning for `unlearn_clean` to repeat."""
    if pruning is None:
        raise UserError(
            "method 'retrain_clean' retrains with masks of its own, and nothing is pruned: add --prune, or "
            "take 'retrain'"
        )


def _retrain(task: Task, name: str, recipe: TrainingRecipe) -> Unlearned:
    seed = task.generator(name).initial_seed()
    return Unlearned(fit(task.fresh(seed), task.split.retain, task, recipe, name))
