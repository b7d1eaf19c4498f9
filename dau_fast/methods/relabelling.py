"""Random labels for the forget set, beside the true ones of the retain set."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from dau_fast.config import UnlearningRecipe
from dau_fast.engine.batches import Batch, steps_for
from dau_fast.engine.loop import LoopCost
from dau_fast.methods.objectives import Objective, alternate, pursue
from dau_fast.methods.task import Task
from dau_fast.models import Classifier


def fit_random_labels(
    trainee: Classifier, optimizer: Optimizer, task: Task, recipe: UnlearningRecipe, name: str
) -> tuple[LoopCost, ...]:
    """In every epoch a pass over the forget set with random labels, and one over the retain set; in place.

    Labels are drawn anew for every batch, among all classes, the true one too. Returns how the steps ran.
    """
    split, size = task.split, recipe.batch_size
    chance = task.generator(f"{name} labels")

    def mislabel(batch: Batch) -> tuple[Tensor, Tensor]:
        # Every process draws for the whole batch, so that their number changes nothing.
        drawn = torch.randint(
            len(task.images.class_names), (size,), generator=chance, device=batch.labels.device
        )
        return batch.images, drawn[task.ranks.own_rows(size)]

    parts = [
        Objective(f"{name} forget", (split.forget,), size, optimizer, show=mislabel),
        Objective(f"{name} retain", (split.retain,), size, optimizer),
    ]
    turns = alternate(recipe.epochs, *(steps_for(1, len(part.sets[0]), size) for part in parts))
    return pursue(trainee, task, name, parts, turns, recipe.milestones)
