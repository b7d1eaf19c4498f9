"""One unlearning problem as every method receives it, and what a method returns."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dau_fast.config import PruneConfig, TrainingRecipe
from dau_fast.data.images import Images
from dau_fast.data.progress import Progress as Progress
from dau_fast.data.progress import silent as silent
from dau_fast.data.split import Split
from dau_fast.engine.batches import Batch, generator_for, index_stream
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.sharding import sharded
from dau_fast.engine.steps import Engine
from dau_fast.models import Classifier
from dau_fast.prune import Masks


@dataclass(frozen=True)
class Task:
    """A trained model, its data, and what is to be forgotten. Methods leave all of it unchanged.

    original: the trained model. fresh: seed -> a newly initialised network of the same
    architecture. recipe: how the original was trained, for retraining. settings: configurations
    that replace a method's own, by the method's name. masks: of the original's network, whose masked
    weights every method keeps at zero; None for a dense one. pruning: how the masks were found.
    engine: how training steps run, and on how many processes.
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
    def ranks(self) -> Ranks:
        """The processes that share the work."""
        return self.engine.ranks

    @property
    def labels(self) -> Tensor:
        return self.images.labels

    def generator(self, purpose: str) -> torch.Generator:
        """Randomness for one purpose; it depends on the task's seed alone."""
        return generator_for(self.seed, purpose, self.images.device)

    @contextmanager
    def trainee(self, model: Classifier) -> Iterator[Classifier]:
        """What a method trains to have `model` trained in the end: itself, or its sharded copy.

        In the latter case all whole models of this task rest on the CPU inside.
        """
        if not self.engine.shard:
            yield model
            return
        with sharded(model, self.images.device, self.original) as part:
            yield part

    def feed(self, purpose: str, batch_size: int, *sets: Tensor) -> Generator[Batch, None, None]:
        """Training batches for ever: `batch_size` augmented images of each of `sets`, one after the other.

        What is drawn depends on the task's seed and `purpose` alone. Several processes hold a part each
        of every set's images.
        """
        order, chance = self.generator(purpose), self.generator(f"{purpose} augmentation")
        streams = [index_stream(index, batch_size, order) for index in sets]
        mine = self.ranks.positions(batch_size, len(sets), self.images.device)
        choices = (self.images.choose(torch.cat(parts), chance, mine) for parts in zip(*streams, strict=True))
        for index, images in self.images.make_batches(choices):
            yield Batch(images, self.labels[index], index)


@dataclass(frozen=True)
class Unlearned:
    """A method's result. history: what the game recorded, by name, one entry a check.

    masks: of the model, where the method found its own.
    """

    model: Classifier
    history: dict[str, Any] | None = None
    masks: Masks | None = None


Method = Callable[[Task], Unlearned]
