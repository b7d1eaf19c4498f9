"""Bad teacher: learn the forget set from a network that knows nothing (Chundawat et al. 2023).

"Can Bad Teaching Induce Forgetting?", AAAI 2023, arXiv 2205.08096. On retain images the teacher is the
original, on forget images one of the same architecture with random weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from dau_fast.config import UnlearningRecipe
from dau_fast.data.split import draw_sample
from dau_fast.engine.batches import Batch
from dau_fast.engine.chance import seeded
from dau_fast.engine.loop import Forward
from dau_fast.engine.optimizers import adamw
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.objectives import Objective, divergence, frozen, pursue, steps_of
from dau_fast.methods.task import Task, Unlearned
from dau_fast.models import Classifier


@dataclass(frozen=True)
class BadTeacherConfig(UnlearningRecipe):
    """Defaults are the authors'. Passes are those over the forget set and the sample of the retain set."""

    epochs: int = 1
    lr: float = 1e-4  # Adam
    momentum: float = 0.9  # of Adam, for gradients; 0.999 for their squares
    weight_decay: float = 0.0
    retain_share: float = 0.3  # of the retain set that is learned from
    temperature: float = 1.0  # of all networks' outputs

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("retain_share", high=1, open_low=True)
        self.check("temperature", open_low=True)


def unlearn(task: Task, config: BadTeacherConfig) -> Unlearned:
    """Distil the original and an untrained network into a copy of the original."""
    model, split = copy.deepcopy(task.original), task.split
    lesson = draw_lesson(task, config)
    forgotten = torch.zeros(len(task.labels), dtype=torch.bool, device=task.labels.device)
    forgotten[split.forget] = True
    untrained = forget_all(task.original, task.derive_seed("bad teacher"))
    with (
        task.trainee(model) as trainee,
        frozen(task, task.original) as competent,
        frozen(task, untrained) as incompetent,
    ):

        def loss(forward: Forward, images: Tensor, forget: Tensor) -> Tensor:
            target = torch.where(forget[:, None], incompetent(images), competent(images))
            return divergence(forward(images).logits, target, config.temperature).mean()

        def show(batch: Batch) -> tuple[Tensor, Tensor]:
            return batch.images, forgotten[batch.indices]

        optimizer = adamw(
            trainee.network, task.masks, lr=config.lr, betas=(config.momentum, 0.999),
            weight_decay=config.weight_decay,
        )  # fmt: skip
        taught = Objective("bad_teacher", (lesson,), config.batch_size, optimizer, loss, show)
        turns = [0] * steps_of(config, lesson)
        return Unlearned(model, pursue(trainee, task, "bad_teacher", [taught], turns, config.milestones))


def draw_lesson(task: Task, config: BadTeacherConfig) -> Tensor:
    """Indices of what is learned from: a sample of the retain set, and the forget set."""
    split, chance = task.split, task.generator("bad_teacher sample")
    count = max(1, round(config.retain_share * len(split.retain)))
    return torch.cat([draw_sample(split.retain, count, chance), split.forget])


@torch.no_grad()
def forget_all(model: Classifier, seed: int) -> Classifier:
    """A copy of `model` with random weights: layers initialise themselves as PyTorch's do.

    Parameters of others, such as class tokens, are drawn with the mean and spread that they have.
    """
    untrained = copy.deepcopy(model)
    with seeded(seed, model.head.weight.device):
        for module in untrained.network.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
                continue
            for weight in module.parameters(recurse=False):
                mean, spread = weight.mean(), weight.std(correction=0)
                weight.normal_().mul_(spread).add_(mean)
    return untrained


METHODS = (
    Method(
        name="bad_teacher",
        label="bad teacher",
        about="an untrained network teaches the forget set, the original the retain set",
        run=unlearn,
        choose=recipe_chooser(lambda task: BadTeacherConfig()),
        space={
            "lr": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
            "epochs": (1, 2, 5, 10),
            "retain_share": (0.1, 0.3, 1.0),
        },
    ),
)
