"""Random labels: the forget set is learned with labels drawn at random (Golatkar et al. 2020).

"Eternal Sunshine of the Spotless Net", CVPR 2020, arXiv 1911.04933, has it as a baseline; the recipe is that
of the reference implementation of SalUn (Fan et al. 2024, arXiv 2310.12508).
"""

from __future__ import annotations

import copy

from dau_fast.config import UnlearningRecipe
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.objectives import descend
from dau_fast.methods.relabelling import fit_random_labels
from dau_fast.methods.task import Task, Unlearned


def unlearn(task: Task, config: UnlearningRecipe) -> Unlearned:
    """Train a copy of the original on the forget set with random labels and on the retain set, by turns."""
    model = copy.deepcopy(task.original)
    with task.trainee(model) as trainee:
        return Unlearned(
            model, fit_random_labels(trainee, descend(trainee, task, config), task, config, "rl")
        )


METHODS = (
    Method(
        name="rl",
        label="RL",
        about="random labels for the forget set, then the retain set, in every epoch",
        run=unlearn,
        choose=recipe_chooser(lambda task: UnlearningRecipe()),
        space={"lr": (1e-3, 3e-3, 0.01, 0.03, 0.1), "epochs": (2, 5, 10, 20)},
    ),
)
