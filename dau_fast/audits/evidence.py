"""What is looked at in one model, once, for all audits: margins on every set, and what its features hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.audits.neighbours import mean_distributions
from dau_fast.audits.perturbation import recognise
from dau_fast.audits.probes import head_accuracy, information
from dau_fast.audits.relearning import count_relearning
from dau_fast.audits.signals import Array, margins
from dau_fast.config import AuditConfig
from dau_fast.data.images import Images
from dau_fast.data.split import Split, draw_sample
from dau_fast.engine.chance import generator_for
from dau_fast.engine.evaluation import predict
from dau_fast.errors import UserError
from dau_fast.metrics.unlearning import Measures, measure
from dau_fast.models import Classifier

SETS = ("forget", "retain", "validation", "test")


@dataclass(frozen=True)
class Evidence:
    """What one model shows. Arrays of different models are of the same images in the same order.

    measures: as reports have them. margins: by set, in nats, [N]. distributions: mean predicted one of the
    forget images of each class, [C, C], NaN in rows of classes without any. head_accuracy: percent of the
    forget images that a new head on frozen features recognises. information: nats that features tell of
    whether an image is forgotten. relearning: steps until the forget accuracy of the original is back. noisy:
    share, 0 to 1, of each forget image's noisy copies that are recognised, [N]. reappears: percent of the
    forget images whose label comes back within the ball only.
    """

    measures: Measures
    margins: Mapping[str, Array]
    distributions: Array
    head_accuracy: float
    information: float
    relearning: float
    noisy: Array
    reappears: float


@dataclass(frozen=True)
class Scene:
    """The same looks for all models: which images, and which draws. seed: of these.

    Raises UserError where a forget set leaves nothing to audit.
    """

    images: Images
    split: Split
    seed: int
    config: AuditConfig

    def __post_init__(self) -> None:
        if not len(self.split.test):
            raise UserError("there are no test images: audits need some that no model was trained on")
        if min(len(self.split.forget), len(self.split.retain)) < 4:
            raise UserError(
                f"{len(self.split.forget)} images to forget and {len(self.split.retain)} to retain: audits "
                "need at least 4 of each"
            )

    def generator(self, purpose: str) -> torch.Generator:
        """The same draws for every model."""
        return generator_for(self.seed, purpose, self.images.device)

    @cached_property
    def sets(self) -> dict[str, Tensor]:
        """The images of each set that are looked at."""
        chance, most = self.generator("audited images"), self.config.most_images
        return {name: draw_sample(getattr(self.split, name), most, chance) for name in SETS}

    @cached_property
    def forget_counts(self) -> np.ndarray:
        """Forget images of each class that are looked at, [C]."""
        labels = self.images.labels[self.sets["forget"]].cpu().numpy()
        return np.bincount(labels, minlength=len(self.images.class_names))

    @cached_property
    def shown(self) -> Tensor:
        """The training images that a new head sees, of each class the same share, at least two."""
        chance, labels = self.generator("new head"), self.images.labels[self.split.train]
        parts = []
        for label in labels.unique():
            own = self.split.train[labels == label]
            parts.append(draw_sample(own, max(2, round(self.config.head_share * len(own))), chance))
        return draw_sample(torch.cat(parts).sort().values, self.config.most_images, chance)


def examine(model: Classifier, scene: Scene, relearn_to: float) -> Evidence:
    """Look at `model`, which stays as it is. relearn_to: the original's forget accuracy, in percent."""
    images, labels, split = scene.images, scene.images.labels, scene.split
    config, sets = scene.config, scene.sets
    outputs = {name: predict(model, images, index) for name, index in sets.items()}
    steps = count_relearning(
        model, images.batch, labels, sets["forget"], sets["retain"], target=relearn_to,
        most=config.relearning_steps, lr=config.relearning_lr, generator=scene.generator("relearning"),
    )  # fmt: skip
    seen = recognise(
        model, images, sets["forget"], radius=config.radius, draws=config.noisy_copies,
        steps=config.search_steps, generator=scene.generator("noise"),
    )  # fmt: skip
    predicted = F.softmax(outputs["forget"].logits.double(), 1)
    return Evidence(
        measures=measure(model, images, labels, split, scene.generator("measures")),
        margins={
            name: margins(found.logits, labels[sets[name]]).cpu().numpy() for name, found in outputs.items()
        },
        distributions=mean_distributions(_numpy(predicted), _numpy(labels[sets["forget"]])),
        head_accuracy=measure_new_head(model, scene, outputs["forget"].features),
        information=_information(scene, outputs["forget"].features, outputs["retain"].features),
        relearning=float(steps),
        noisy=seen.noisy,
        reappears=100 * float(seen.reappears.mean()),
    )


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def measure_new_head(model: Classifier, scene: Scene, features: Tensor | None = None) -> float:
    """Percent of the forget images that a new head on the frozen features of `model` recognises.

    Of those that it has not seen; of all where it has seen all of them. features [N, D]: of the forget images
    that are looked at, where they are known.
    """
    labels, forget = scene.images.labels, scene.sets["forget"]
    fresh = ~torch.isin(forget, scene.shown)
    if not fresh.any():
        fresh[:] = True
    shown = predict(model, scene.images, scene.shown).features
    if features is None:
        features = predict(model, scene.images, forget).features
    asked = features.double()[fresh], labels[forget][fresh]
    return head_accuracy(_numpy(shown.double()), _numpy(labels[scene.shown]), *map(_numpy, asked))


def _information(scene: Scene, forgotten: Tensor, retained: Tensor) -> float:
    count, chance = min(len(forgotten), len(retained)), scene.generator("information")
    sides = []
    for side in (forgotten, retained):
        order = torch.randperm(len(side), generator=chance, device=side.device)[:count]
        sides.append(_numpy(side[order].double()))
    return information(*sides)
