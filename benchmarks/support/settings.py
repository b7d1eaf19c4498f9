"""How much tasks hold of their pictures, and how models are trained on them: for a CPU, for CUDA, as toys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dau_fast.config import TrainingRecipe, _check
from dau_fast.data.images import Augmentation

# The literature's, with as many steps as let `small` remember every picture (measured, as below).
RECIPE = TrainingRecipe(epochs=30, batch_size=64)
_PLAIN = Augmentation()


@dataclass(frozen=True)
class Setting:
    """How much the picture tasks hold and how models are trained on them.

    Defaults: on CIFAR-10 the original is right on more than 99 % of the training images and 50 % of the test
    images, and one training takes half a minute on one core (measured; `python benchmarks/bank.py` says it).
    """

    forget: int = 400  # images; of `class`, `half` and `one` what their names say
    retain: int = 3_600  # images
    validation: int = 500  # images
    test: int = 2_000  # images of the official test part
    image_size: int = 16  # pixels a side
    arch: str = "small"
    recipe: TrainingRecipe = RECIPE
    halvings: int = 2  # random halvings of the training images behind `influence`, two models each
    requests: int = 5  # of `five`
    trigger: int = 3  # pixels a side: a white square in the lower right corner (Gu et al. 2017, section 4)
    augmentation: Augmentation = _PLAIN  # with one, models remember less
    more: float = 2.5  # times as many images for `augmented`

    def __post_init__(self) -> None:
        _check(self, "forget", "retain", "validation", "test", "image_size", low=1, whole=True)
        _check(self, "halvings", "requests", "trigger", low=1, whole=True)

    @property
    def training(self) -> int:
        """Training images."""
        return self.forget + self.retain

    def augment(self) -> Setting:
        """For models that generalise: with more images, and twice the passes, cropped and mirrored."""
        return replace(
            self,
            forget=round(self.more * self.forget),
            retain=round(self.more * self.retain),
            validation=round(self.more * self.validation),
            recipe=replace(self.recipe, epochs=2 * self.recipe.epochs),
            augmentation=Augmentation(pad=max(1, self.image_size // 16), flip=True),
        )


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
