"""Boundary shrink: forget images get the label on the other side of the nearest boundary (Chen et al. 2023).

"Boundary Unlearning", CVPR 2023, arXiv 2303.11570. The nearest class is where one FGSM step on the original
leads. It is found once, of images as they are; the authors find it anew for each augmented batch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from dau_fast.config import UnlearningRecipe
from dau_fast.engine.batches import Batch
from dau_fast.methods.adversarial import Units, attack, fgsm
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.objectives import minimise
from dau_fast.methods.task import Task, Unlearned


@dataclass(frozen=True)
class BoundaryShrinkConfig(UnlearningRecipe):
    """Passes are those over the forget set. Defaults are those of the authors' code."""

    batch_size: int = 64
    lr: float = 1e-5
    weight_decay: float = 0.0
    bound: float = 0.1  # of the FGSM step, in units of pixels from 0 to 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("bound")


def unlearn(task: Task, config: BoundaryShrinkConfig) -> Unlearned:
    """Train a copy of the original on the forget set with the labels of its neighbours."""
    model, forget = copy.deepcopy(task.original), task.split.forget
    labels = task.labels.clone()
    labels[forget] = find_neighbours(task, config.bound)

    def relabel(batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.images, labels[batch.indices]

    return Unlearned(model, minimise(model, task, config, "boundary_shrink", (forget,), show=relabel))


def find_neighbours(task: Task, bound: float) -> Tensor:
    """What the original takes each forget image for after an FGSM step, [N]; the true class if that fails."""
    units = Units.of(task.images)

    def find(images: Tensor, labels: Tensor) -> tuple[Tensor]:
        moved = fgsm(task.original, images, labels, bound, units)
        with torch.no_grad():
            return (task.original(moved).logits.argmax(1),)

    return attack(task, task.split.forget, find)[0]


METHODS = (
    Method(
        name="boundary_shrink",
        label="boundary shrink",
        about="the forget set takes the labels of its nearest other classes",
        moves_images=True,
        run=unlearn,
        choose=recipe_chooser(lambda task: BoundaryShrinkConfig()),
        space={
            "lr": (1e-6, 1e-5, 1e-4, 1e-3, 0.01),
            "epochs": (2, 5, 10, 20),
            "bound": (0.03, 0.1, 0.3),
        },
    ),
)
