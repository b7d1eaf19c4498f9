"""Uniform target: the model is to be undecided about every forget image.

A plain baseline; no publication fixes its settings, which are those of fine-tuning.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dau_fast.config import UnlearningRecipe
from dau_fast.engine.loop import Forward
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.objectives import minimise
from dau_fast.methods.task import Task, Unlearned


@dataclass(frozen=True)
class UniformTargetConfig(UnlearningRecipe):
    """Passes are those over the retain set."""

    weight: float = 1.0  # of the forget images' loss

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("weight")


def unlearn(task: Task, config: UniformTargetConfig) -> Unlearned:
    """Minimise CE(retain) + weight CE(forget, every class alike) on a copy of the original."""
    model, split = copy.deepcopy(task.original), task.split

    def loss(forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
        retain, forget = forward(images).logits.chunk(2)
        undecided = -forget.log_softmax(1).mean()
        return F.cross_entropy(retain, labels.chunk(2)[0]) + config.weight * undecided

    return Unlearned(model, minimise(model, task, config, "uniform", (split.retain, split.forget), loss))


METHODS = (
    Method(
        name="uniform",
        label="uniform target",
        about="fine-tuning on the retain set with a uniform target on the forget set",
        run=unlearn,
        choose=recipe_chooser(lambda task: UniformTargetConfig()),
        space={
            "lr": (1e-3, 3e-3, 0.01, 0.03, 0.1),
            "epochs": (2, 5, 10, 20),
            "weight": (0.03, 0.1, 0.3, 1.0, 3.0),
        },
    ),
)
