"""Fine-tuning on the retain set: forgetting by catastrophic forgetting (Warnecke et al. 2023)."""

from __future__ import annotations

import copy

from dau_fast.config import FINE_TUNE, TrainingRecipe
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.supervised import fit
from dau_fast.methods.task import Task, Unlearned


def unlearn(task: Task, recipe: TrainingRecipe) -> Unlearned:
    """Go on training a copy of the original on the retain set."""
    model = copy.deepcopy(task.original)
    return Unlearned(model, fit(model, task.split.retain, task, recipe, "ft"))


METHODS = (
    Method(
        name="ft",
        label="FT",
        about="fine-tuning on the retain set",
        run=unlearn,
        choose=recipe_chooser(lambda task: FINE_TUNE),
        space={"lr": (1e-3, 3e-3, 0.01, 0.03, 0.1), "epochs": (2, 5, 10, 20)},
    ),
)
