"""SCRUB: away from the original on the forget set, towards it on the retain set (Kurmanji et al. 2023).

"Towards Unbounded Machine Unlearning", NeurIPS 2023, arXiv 2302.09880. Defaults are those of the authors'
large-scale notebook (CIFAR-10). Their choice of an epoch by the forget set's error (SCRUB+R), which is for
attacks on privacy, is left out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dau_fast.config import UnlearningRecipe
from dau_fast.engine.batches import steps_for
from dau_fast.engine.loop import Forward
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.objectives import Objective, descend, divergence, frozen, pursue
from dau_fast.methods.task import Task, Unlearned


@dataclass(frozen=True)
class ScrubConfig(UnlearningRecipe):
    """Passes are those over the retain set; over the forget set there are max_epochs."""

    epochs: int = 3
    max_epochs: int = 2  # begin with a pass over the forget set
    batch_size: int = 128  # images of the retain set
    forget_batch_size: int = 32  # images of the forget set
    lr: float = 5e-4
    alpha: float = 1e-3  # weight of the divergence from the original on the retain set
    gamma: float = 0.99  # weight of the cross-entropy there
    temperature: float = 4.0  # of both networks' outputs in the divergence

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("max_epochs", whole=True)
        self.check("forget_batch_size", low=1, whole=True)
        self.check("alpha", "gamma")
        self.check("temperature", open_low=True)


def unlearn(task: Task, config: ScrubConfig) -> Unlearned:
    """Take max steps on the forget set and min steps on the retain set, by turns, with a copy."""
    model, split = copy.deepcopy(task.original), task.split
    with task.trainee(model) as trainee, frozen(task, task.original) as teacher:

        def part_ways(logits: Tensor, images: Tensor) -> Tensor:
            # T^2 makes up for the gradient's 1 / T^2 (Hinton et al. 2015, arXiv 1503.02531).
            scale = config.temperature**2
            return scale * divergence(logits, teacher(images), config.temperature).mean()

        def max_loss(forward: Forward, images: Tensor, _labels: Tensor) -> Tensor:
            return -part_ways(forward(images).logits, images)

        def min_loss(forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
            logits = forward(images).logits
            return config.gamma * F.cross_entropy(logits, labels) + config.alpha * part_ways(logits, images)

        optimizer = descend(trainee, task, config)
        parts = [
            Objective("scrub max", (split.forget,), config.forget_batch_size, optimizer, max_loss),
            Objective("scrub min", (split.retain,), config.batch_size, optimizer, min_loss),
        ]
        loops = pursue(trainee, task, "scrub", parts, plan_turns(task, config), config.milestones)
    return Unlearned(model, loops)


def plan_turns(task: Task, config: ScrubConfig) -> list[int]:
    """0 for each max step, 1 for each min step."""
    max_steps = steps_for(1, len(task.split.forget), config.forget_batch_size)
    min_steps = steps_for(1, len(task.split.retain), config.batch_size)
    turns = []
    for epoch in range(config.epochs):
        turns += [0] * (max_steps if epoch < config.max_epochs else 0) + [1] * min_steps
    return turns


METHODS = (
    Method(
        name="scrub",
        label="SCRUB",
        about="away from the original on the forget set and towards it on the retain set",
        run=unlearn,
        choose=recipe_chooser(lambda task: ScrubConfig()),
        space={
            "lr": (1e-4, 5e-4, 2e-3, 0.01, 0.03),
            "epochs": (3, 5, 10),
            "max_epochs": (1, 2, 3),
        },
    ),
)
