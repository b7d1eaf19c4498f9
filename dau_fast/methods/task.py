"""One unlearning problem as every method receives it, and what a method returns."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dau_fast.config import PruneConfig, TrainingRecipe
from dau_fast.data.images import Augmented, Images
from dau_fast.data.progress import Progress, silent
from dau_fast.data.split import Split
from dau_fast.engine.batches import Batch, index_stream, match_labels
from dau_fast.engine.chance import derive_seed, generator_for
from dau_fast.engine.loop import LoopCost
from dau_fast.engine.modes import evaluating
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.sharding import sharded
from dau_fast.models import Classifier
from dau_fast.prune import Masks


@dataclass(frozen=True)
class Task:
    """A trained model, its data, and what is to be forgotten. Methods leave all of it unchanged.

    original: the trained model. fresh: seed -> a newly initialised network of the same architecture.
    recipe: how the original was trained, for retraining. masks: of the original's network, whose masked
    weights every method keeps at zero; None for a dense one. pruning: how the masks were found.
    runtime: how everything computes.
    """

    images: Images
    split: Split
    seed: int
    original: Classifier
    fresh: Callable[[int], Classifier]
    recipe: TrainingRecipe
    progress: Progress = silent
    masks: Masks | None = None
    pruning: PruneConfig | None = None
    runtime: Runtime = field(default_factory=Runtime)

    @property
    def ranks(self) -> Ranks:
        """The processes that share the work."""
        return self.runtime.ranks

    @property
    def labels(self) -> Tensor:
        return self.images.labels

    @property
    def pruned(self) -> bool:
        """Whether the original is pruned, or will be before any method runs."""
        return self.masks is not None or self.pruning is not None

    def derive_seed(self, purpose: str) -> int:
        """A number for one purpose; it depends on the task's seed alone."""
        return derive_seed(self.seed, purpose)

    def generator(self, purpose: str) -> torch.Generator:
        """Randomness for one purpose; it depends on the task's seed alone."""
        return generator_for(self.seed, purpose, self.images.device)

    def load_augmented(self, purpose: str) -> Augmented:
        """All images as training sees them, one augmentation each, for a pass such as BatchNorm's statistics.

        What is drawn depends on the task's seed and `purpose` alone: not on batches, order or processes.
        """
        return self.images.augmented(self.generator(purpose))

    @contextmanager
    def trainee(self, model: Classifier) -> Iterator[Classifier]:
        """What a method trains to have `model` trained in the end: itself, or its sharded copy.

        In the latter case all whole models of this task rest on the CPU inside.
        """
        if not self.runtime.shard:
            yield model
            return
        with sharded(model, self.images.device, self.original) as part:
            yield part

    @contextmanager
    def teacher(self) -> Iterator[Classifier]:
        """The original, in evaluation mode, to be called beside a trainee; sharded where models are."""
        if not self.runtime.shard:
            with evaluating(self.original):
                yield self.original
            return
        with sharded(self.original, self.images.device) as part:
            yield part.eval()

    def feed(
        self, purpose: str, batch_size: int, *sets: Tensor, paired_by: Tensor | None = None
    ) -> Generator[Batch, None, None]:
        """Training batches for ever: `batch_size` augmented images of each of `sets`, one after the other.

        paired_by: labels [N] of all images: by them each image of the last set is of the class of that at its
        place in the set before, where there is one of it. What is drawn depends on the task's seed and
        `purpose` alone. Several processes hold a part each of every set's images.
        """
        order, chance = self.generator(purpose), self.generator(f"{purpose} augmentation")
        streams = [index_stream(index, batch_size, order) for index in sets]
        rows: Iterator[tuple[Tensor, ...]] = zip(*streams, strict=True)
        if paired_by is not None:
            pairing = self.generator(f"{purpose} pairs")
            rows = (
                (*others, match_labels(paired_by[others[-1]], sets[-1], paired_by, pairing))
                for *others, _ in rows
            )
        own = self.ranks.own_positions(batch_size, len(sets), self.images.device)
        choices = (self.images.choose(torch.cat(parts), chance, own) for parts in rows)
        for index, images in self.images.make_batches(choices):
            yield Batch(images, self.labels[index], index)


@dataclass(frozen=True)
class Unlearned:
    """A method's result. loops: how its training loops ran, in their order.

    history: what the game recorded, by name, one entry a check. masks: of the model, where the method
    found its own.
    """

    model: Classifier
    loops: tuple[LoopCost, ...] = ()
    history: dict[str, Any] | None = None
    masks: Masks | None = None
