"""One unlearning problem as every method receives it, and what a method returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dau_fast.config import PruneConfig, TrainingRecipe
from dau_fast.data import Images
from dau_fast.engine.batches import generator_for
from dau_fast.engine.steps import Engine
from dau_fast.models import Classifier
from dau_fast.prune import Masks
from dau_fast.split import Split


class Progress(Protocol):
    """Announces long work and returns what is to be called after each step of it."""

    def __call__(self, description: str, steps: int) -> Callable[[], None]: ...


def silent(description: str, steps: int) -> Callable[[], None]:
    """No progress shown."""
    return lambda: None


@dataclass(frozen=True)
class Task:
    """A trained model, its data, and what is to be forgotten. Methods leave all of it unchanged.

    original: the trained model. fresh: seed -> a newly initialised network of the same
    architecture. recipe: how the original was trained, for retraining. settings: configurations
    that replace a method's own, by the method's name. masks: of the original's network, whose masked
    weights every method keeps at zero; None for a dense one. pruning: how the masks were found.
    engine: how training steps run.
    """

    images: Images
    split: Split
    seed: int
    original: Classifier
    fresh: Callable[[int], Classifier]
    recipe: TrainingRecipe
    settings: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress = silent
    masks: Masks | None = None
    pruning: PruneConfig | None = None
    engine: Engine = field(default_factory=Engine)

    @property
    def labels(self) -> Tensor:
        return self.images.labels

    def generator(self, purpose: str) -> torch.Generator:
        """Randomness for one purpose; it depends on the task's seed alone."""
        return generator_for(self.seed, purpose, self.images.device)

    def augmented(self, purpose: str) -> Callable[[Tensor], Tensor]:
        """index [B] -> augmented images [B, ...], drawn from a generator of their own."""
        generator = self.generator(f"{purpose} augmentation")
        return lambda index: self.images.batch(index, generator)


@dataclass(frozen=True)
class Unlearned:
    """A method's result. history: what the game recorded, by name, one entry a check.

    masks: of the model, where the method found its own.
    """

    model: Classifier
    history: dict[str, Any] | None = None
    masks: Masks | None = None


Method = Callable[[Task], Unlearned]
