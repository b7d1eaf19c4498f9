"""Selective synaptic dampening (Foster et al. 2024, arXiv 2308.07707).

    where F_forget > alpha F_train:    w' = min(lambda F_train / F_forget, 1) w

F: importance of each weight for a set, the diagonal of its empirical Fisher matrix, sample by sample as in
the paper; its code squares the gradients of mini-batches.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from dau_fast.config import check_numbers
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.sample_gradients import (
    SampleGradients,
    check_sample_gradients,
    flat_parameters,
    set_parameters,
)
from dau_fast.methods.task import Task, Unlearned


@dataclass(frozen=True)
class SsdConfig:
    """Selective synaptic dampening. Defaults: Foster et al. 2024, for ResNet-18."""

    alpha: float = 10.0  # times as important for forget as for all training images: what is dampened
    lambd: float = 1.0  # the paper's lambda: less dampens more

    def __post_init__(self) -> None:
        check_numbers(self, "alpha", "lambd")


def unlearn(task: Task, config: SsdConfig) -> Unlearned:
    """Dampen those weights of a copy of the original that are mainly important for the forget set."""
    model, split = copy.deepcopy(task.original), task.split
    forget, retain = (SampleGradients(model, task, index).squares() for index in (split.forget, split.retain))
    share = len(split.forget) / (len(split.forget) + len(split.retain))
    train = share * forget + (1 - share) * retain
    set_parameters(model, flat_parameters(model) * dampening(forget, train, config), task)
    return Unlearned(model)


def dampening(forget: Tensor, train: Tensor, config: SsdConfig) -> Tensor:
    """What each weight is multiplied by, from its importances for both sets; all [P]."""
    chosen = forget > config.alpha * train
    return torch.where(chosen, (config.lambd * train / forget).clamp_max(1), 1.0)


METHODS = (
    Method(
        name="ssd",
        label="SSD",
        about="selective synaptic dampening: weights shrunk that matter mainly to the forget set",
        run=unlearn,
        choose=recipe_chooser(lambda task: SsdConfig()),
        check=lambda task, _: check_sample_gradients(task, "ssd"),
        space={
            "alpha": (1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0),
            "lambd": (0.1, 0.3, 1.0, 2.0, 5.0),
        },
    ),
)
