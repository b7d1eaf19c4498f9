"""Influence unlearning: one Newton step by WoodFisher (Jia et al. 2023, arXiv 2304.04934).

    w' = w + alpha H^-1 g
    g = sum_forget grad l / N - (N_f / (N N_r)) sum_retain grad l
    H = damping I + sum_S (grad l)(grad l)^T / |S|

with N = N_f + N_r images and S a sample of the retain set. g is the gradient at the original of what is lost
when the weights of the images go from 1/N each to 1/N_r for the retained. H is WoodFisher's estimate of the
Hessian (Singh and Alistarh 2020, arXiv 2004.14340), from which H^-1 g is found here by conjugate gradients:
the same as by its recursion over samples, without the vectors of all of them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dau_fast.config import check_numbers
from dau_fast.data.split import draw_sample
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.sample_gradients import (
    SampleGradients,
    check_sample_gradients,
    flat_parameters,
    set_parameters,
)
from dau_fast.methods.task import Task, Unlearned

# Conjugate gradients: the residual that ends them, relatively, and the products with H at most.
_RESIDUAL, _PRODUCTS = 1e-5, 200


@dataclass(frozen=True)
class InfluenceConfig:
    """Influence unlearning. Defaults: Jia et al. 2023's reference implementation, which tunes alpha."""

    alpha: float = 1.0  # length of the step in Newton steps; published from 1 to 20
    samples: int = 1000  # retain images that H is estimated on, drawn once; all of them where there are fewer
    damping: float = 1.0  # what H is without a sample, times the identity

    def __post_init__(self) -> None:
        check_numbers(self, "alpha")
        check_numbers(self, "samples", low=1, whole=True)
        check_numbers(self, "damping", open_low=True)


def unlearn(task: Task, config: InfluenceConfig) -> Unlearned:
    """Take one step of a copy of the original towards where training without the forget set would end."""
    model, split = copy.deepcopy(task.original), task.split
    forget, retain = (SampleGradients(model, task, index) for index in (split.forget, split.retain))
    count = len(forget) + len(retain)
    gradient = forget.total() / count - retain.total() * (len(forget) / (count * len(retain)))
    chosen = draw_sample(split.retain, config.samples, task.generator("influence sample"))
    sample = SampleGradients(model, task, chosen)
    sample.hold()

    def hessian(v: Tensor) -> Tensor:
        return config.damping * v + sample.sum(lambda g: g.T @ (g @ v)) / len(sample)

    step = solve(hessian, gradient)
    set_parameters(model, flat_parameters(model) + config.alpha * step, task)
    return Unlearned(model)


def solve(product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """x [P] with product(x) = `v` [P], by conjugate gradients; product: with a positive definite matrix.

    Warns where the residual stays above 1e-5 of `v`.
    """
    x, residual = v.new_zeros(v.shape), v.clone()
    direction, square = residual, residual @ residual
    enough = _RESIDUAL**2 * square
    for _ in range(_PRODUCTS):
        if square <= enough:
            return x
        pushed = product(direction)
        length = square / (direction @ pushed)
        x, residual = x + length * direction, residual - length * pushed
        before, square = square, residual @ residual
        direction = residual + square / before * direction
    logging.getLogger("dau_fast").warning(
        "influence: no convergence in %d products with its Hessian: take a larger damping",
        _PRODUCTS,
    )
    return x


METHODS = (
    Method(
        name="influence",
        label="IU",
        about="one Newton step, its Hessian from gradients of retain images (WoodFisher)",
        run=unlearn,
        choose=recipe_chooser(lambda task: InfluenceConfig()),
        check=lambda task, _: check_sample_gradients(task, "influence"),
        space={
            "alpha": (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
            "damping": (1.0, 0.3, 0.1, 0.03),
        },
    ),
)
