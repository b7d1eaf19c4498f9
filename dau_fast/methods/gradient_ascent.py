"""Gradient ascent on the forget set (Thudi et al. 2022, arXiv 2109.13398)."""

from __future__ import annotations

import copy

from torch import Tensor
from torch.nn import functional as F

from dau_fast.config import GRADIENT_ASCENT_CLASSWISE, GRADIENT_ASCENT_RANDOM, TrainingRecipe
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.supervised import fit
from dau_fast.methods.task import Task, Unlearned


def unlearn(task: Task, recipe: TrainingRecipe) -> Unlearned:
    """Maximise a copy's loss on the forget set."""
    model = copy.deepcopy(task.original)
    return Unlearned(model, fit(model, task.split.forget, task, recipe, "ga", loss=_negative_loss))


def _usual(task: Task) -> TrainingRecipe:
    return GRADIENT_ASCENT_CLASSWISE if task.split.classwise else GRADIENT_ASCENT_RANDOM


def _negative_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits, labels)


METHODS = (
    Method(
        name="ga",
        label="GA",
        about="gradient ascent on the forget set",
        run=unlearn,
        choose=recipe_chooser(_usual),
        space={"lr": (1e-5, 1e-4, 1e-3, 3e-3, 0.01), "epochs": (1, 2, 5, 10)},
    ),
)
