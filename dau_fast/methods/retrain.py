"""Retraining from scratch on the retain set: exact, slow, and the standard the others are held to."""

from __future__ import annotations

from dau_fast.config import FAST_RETRAINING, TrainingRecipe
from dau_fast.errors import UserError
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.pruned import fit_pruned
from dau_fast.methods.supervised import fit
from dau_fast.methods.task import Task, Unlearned


def unlearn(task: Task, recipe: TrainingRecipe) -> Unlearned:
    """Train a fresh network without the forget set.

    With the original's masks, where it has some: the literature's reference, although masks found with
    the forget set tell of it.
    """
    return _retrain(task, "retrain", recipe)


def unlearn_again(task: Task, recipe: TrainingRecipe) -> Unlearned:
    """A second retraining that shares no random draw with the first, for the noise floor."""
    return _retrain(task, "retrain again", recipe)


def unlearn_fast(task: Task, recipe: TrainingRecipe) -> Unlearned:
    """The same by a recipe made to reach the same accuracy sooner."""
    return _retrain(task, "retrain fast", recipe)


def unlearn_clean(task: Task, recipe: TrainingRecipe) -> Unlearned:
    """Train and prune a fresh network as the original was, without the forget set: masks of its own."""
    assert task.pruning is not None
    name = "retrain clean"
    model = task.fresh(task.derive_seed(name))
    masks, loops = fit_pruned(model, task.split.retain, task, task.pruning, recipe, name)
    return Unlearned(model, loops, masks=masks)


def check_clean(task: Task, _recipe: TrainingRecipe) -> None:
    """UserError where there is no pruning for `unlearn_clean` to repeat."""
    if task.pruning is None:
        raise UserError(
            "method 'retrain_clean' retrains with masks of its own, and nothing is pruned: add `prune`, or "
            "take 'retrain'"
        )


def _retrain(task: Task, name: str, recipe: TrainingRecipe) -> Unlearned:
    model = task.fresh(task.derive_seed(name))
    return Unlearned(model, fit(model, task.split.retain, task, recipe, name))


METHODS = (
    Method(
        name="retrain",
        label="retrained",
        about="trained from scratch on the retain set",
        run=unlearn,
        choose=recipe_chooser(lambda task: task.recipe),
        reference=True,
    ),
    Method(
        name="retrain_fast",
        label="retrained fast",
        about="the same by a recipe made for speed",
        run=unlearn_fast,
        choose=recipe_chooser(lambda task: FAST_RETRAINING),
        reference=True,
    ),
    Method(
        name="retrain_clean",
        label="retrained clean",
        about="the same with masks found on the retain set",
        run=unlearn_clean,
        choose=recipe_chooser(lambda task: task.recipe),
        check=check_clean,
        reference=True,
    ),
)
