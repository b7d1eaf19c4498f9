"""How much tasks hold of their pictures, and how models are trained on them: for a CPU, for CUDA, as toys."""

from __future__ import annotations

from dataclasses import replace

import torch

from dau_fast.config import TrainingRecipe
from dau_fast.data.images import Augmentation
from support.tasks import Setting

SMOKE = Setting(
    forget=4,
    retain=20,
    validation=8,
    test=12,
    image_size=8,
    recipe=TrainingRecipe(epochs=1, batch_size=8),
    halvings=1,
    requests=2,
    trigger=2,
    more=1.0,
)
# The literature's protocol (Jia et al. 2023, arXiv 2304.04934): of CIFAR-10's training part a tenth is held
# out, and a tenth of the rest forgotten.
CIFAR10 = Setting(
    forget=4_500, retain=40_500, validation=5_000, test=10_000, image_size=32, arch="resnet18",
    recipe=TrainingRecipe(), augmentation=Augmentation(pad=4, flip=True),
)  # fmt: skip


def choose_setting(device: torch.device, epochs: int | None, smoke: bool, plain: bool = False) -> Setting:
    """A part of CIFAR-10 for a CPU, all of it for CUDA.

    epochs: of all trainings, None for the recipe's. plain: without augmentation, so that models memorise.
    """
    setting = SMOKE if smoke else CIFAR10 if device.type == "cuda" else Setting()
    if plain:
        setting = replace(setting, augmentation=Augmentation())
    return setting if epochs is None else set_epochs(setting, epochs)


def set_epochs(setting: Setting, epochs: int) -> Setting:
    """`setting` with trainings of so many epochs."""
    return replace(setting, recipe=replace(setting.recipe, epochs=epochs))
