"""Fisher forgetting: noise where the retain set does not mind (Golatkar et al. 2020, arXiv 1911.04933).

    w' = w + sigma n,    sigma_i = min(sqrt(alpha / F_i), largest),    n ~ N(0, 1)

F_i: mean over the retain set of (d log p_y / d w_i)^2 at the true label y. Variance by the inverse of F,
where the paper has its square root, and the bound are those of Jia et al. 2023's reference implementation.
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
class FisherConfig:
    """Fisher forgetting. Defaults: Jia et al. 2023's reference implementation."""

    alpha: float = 1e-9  # variance of the noise times the Fisher information
    largest: float = 1e-3  # standard deviation of the noise at most, in units of a weight

    def __post_init__(self) -> None:
        check_numbers(self, "alpha", "largest", open_low=True)


def unlearn(task: Task, config: FisherConfig) -> Unlearned:
    """Add noise to a copy of the original, most to the weights that the retain set depends on least."""
    model = copy.deepcopy(task.original)
    information = SampleGradients(model, task, task.split.retain).squares()
    deviation = noise_deviation(information, config)
    noise = torch.randn(
        len(deviation), generator=task.generator("fisher"), device=deviation.device, dtype=deviation.dtype
    )
    set_parameters(model, flat_parameters(model) + deviation * noise, task)
    return Unlearned(model)


def noise_deviation(information: Tensor, config: FisherConfig) -> Tensor:
    """Standard deviation of each weight's noise [P], from the Fisher `information` [P], which may be 0."""
    return (config.alpha / information).sqrt().clamp_max(config.largest)


METHODS = (
    Method(
        name="fisher",
        label="Fisher",
        about="noise where the retain set does not mind",
        run=unlearn,
        choose=recipe_chooser(lambda task: FisherConfig()),
        check=lambda task, _: check_sample_gradients(task, "fisher"),
        space={
            "alpha": (1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5),
            "largest": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        },
    ),
)
