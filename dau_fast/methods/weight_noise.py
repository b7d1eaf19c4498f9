"""Weight noise, then recovery: every weight is disturbed by chance, and the retain set is learned again.

A plain baseline; no publication fixes its settings. The recovery is fine-tuning.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from dau_fast.config import UnlearningRecipe
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.objectives import minimise
from dau_fast.methods.task import Task, Unlearned
from dau_fast.models import Classifier


@dataclass(frozen=True)
class WeightNoiseConfig(UnlearningRecipe):
    """Passes are those of the recovery, over the retain set."""

    noise: float = 0.5  # standard deviation of the noise, over that of the tensor it is added to

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("noise")


def unlearn(task: Task, config: WeightNoiseConfig) -> Unlearned:
    """Disturb a copy of the original and train it on the retain set."""
    model = copy.deepcopy(task.original)
    disturb(model, config.noise, task.generator("weight noise"))
    if task.masks is not None:
        task.masks.apply_(model.network)
    return Unlearned(model, minimise(model, task, config, "noise", (task.split.retain,)))


@torch.no_grad()
def disturb(model: Classifier, noise: float, chance: torch.Generator) -> None:
    """Add to every parameter Gaussian noise of `noise` times its standard deviation, in place."""
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=chance, device=chance.device, dtype=parameter.dtype)
        spread = parameter.std(correction=0)  # zero for a single number
        parameter.add_(noise * spread * drawn.to(parameter.device))


METHODS = (
    Method(
        name="noise",
        label="weight noise",
        about="noise on the weights, then fine-tuning on the retain set",
        run=unlearn,
        choose=recipe_chooser(lambda task: WeightNoiseConfig()),
        space={
            "lr": (1e-3, 3e-3, 0.01, 0.03, 0.1),
            "epochs": (2, 5, 10, 20),
            "noise": (0.1, 0.25, 0.5, 0.8, 1.2),
        },
    ),
)
