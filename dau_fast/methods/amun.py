"""AMUN: forget images are learned beside their adversarial neighbours, with the neighbours' classes.

Ebrahimpour-Boroojeny et al. 2025, "Not All Wrong is Bad: Using Adversarial Examples for Unlearning", ICML
2025, arXiv 2503.00917. For every forget image the nearest wrongly classified point is found once, on the
original, and held on the device; a copy is then fine-tuned on retain set, forget set and these points
together. A pass shows each forget image twice, as itself or as its neighbour by the toss of a coin, where the
authors show either once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dau_fast.config import UnlearningRecipe
from dau_fast.engine.batches import Batch
from dau_fast.methods.adversarial import Units, attack, pgd
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.objectives import minimise
from dau_fast.methods.task import Task, Unlearned


@dataclass(frozen=True)
class AmunConfig(UnlearningRecipe):
    """Passes are those over all of the three sets. Defaults are those of the authors' code on CIFAR-10."""

    batch_size: int = 128
    milestones: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # every epoch of 10
    radius: float = 0.04  # of the attack at first, L2 in units of pixels from 0 to 1; then doubled
    attack_steps: int = 50  # for each radius

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("radius", open_low=True)
        self.check("attack_steps", low=1, whole=True)


def unlearn(task: Task, config: AmunConfig) -> Unlearned:
    """Train a copy of the original on retain set, forget set and the forget set's adversarial neighbours."""
    model, split = copy.deepcopy(task.original), task.split
    find = partial(
        pgd, task.original, radius=config.radius, steps=config.attack_steps, units=Units.of(task.images)
    )
    neighbours, classes = attack(task, split.forget, find)
    show = mix_in(task, config.batch_size, neighbours, classes)
    together = torch.cat([split.retain, split.forget, split.forget])
    return Unlearned(model, minimise(model, task, config, "amun", (together,), show=show))


def mix_in(
    task: Task, batch_size: int, neighbours: Tensor, classes: Tensor
) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """What shows a batch with half of its forget images, drawn, as their `neighbours` [N, ...].

    classes: of these, [N], in the order of the forget set.
    """
    forget, chance = task.split.forget, task.generator("amun coin")
    places = torch.full_like(task.labels, -1)
    places[forget] = torch.arange(len(forget), device=forget.device)

    def show(batch: Batch) -> tuple[Tensor, Tensor]:
        # Every process draws for the whole batch, so that their number changes nothing.
        coin = torch.rand(batch_size, generator=chance, device=chance.device) < 0.5
        place = places[batch.indices]
        swapped = coin[task.ranks.own_rows(batch_size)] & (place >= 0)
        place = place.clamp_min(0)
        labels = torch.where(swapped, classes[place], batch.labels)
        rows = swapped.view(-1, *[1] * (batch.images.ndim - 1))
        return torch.where(rows, neighbours[place], batch.images), labels

    return show


METHODS = (
    Method(
        name="amun",
        label="AMUN",
        about="fine-tuning with adversarial neighbours of the forget set beside it",
        moves_images=True,
        run=unlearn,
        choose=recipe_chooser(lambda task: AmunConfig()),
        space={
            "lr": (1e-3, 3e-3, 0.01, 0.03, 0.1),
            "epochs": (2, 5, 10, 20),
            "milestones": (
                (),
                (0.5,),
                (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
            ),
        },
    ),
)
