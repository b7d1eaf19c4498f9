"""Iterative magnitude pruning: train, prune a fifth, rewind, again (Frankle and Carbin 2019)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import count

from torch import nn

from dau_fast.errors import UserError
from dau_fast.prune.masks import Masks
from dau_fast.prune.prunable import prunable_weights
from dau_fast.prune.pruner import Pruner, Search
from dau_fast.prune.select import check_scope, check_sparsity, keep_largest, warn_of_emptied


def imp(
    model: nn.Module,
    sparsity: float,
    train: Callable[[nn.Module, Masks | None], None],
    *,
    rate: float = 0.2,
    scope: str = "global",
    linear: bool = False,
) -> Masks:
    """Masks of the share `sparsity`, in [0, 1), found in rounds that each drop `rate` of what is left.

    train(model, masks): trains the model in place with masked weights at zero; masks is None in the
    first round. After each round `model` is set back to the state in which it was given, masked
    weights zero, and so it is left: train it once more to use it. scope, linear: as in `omp`.
    Raises UserError as `omp` does, and for a rate outside (0, 1).
    """
    check_sparsity(sparsity)
    check_scope(scope)
    if not 0 < rate < 1:
        raise UserError(f"`rate={rate:g}`: expected a share of the weights, above 0 and below 1, such as 0.2")
    beginning = copy.deepcopy(model.state_dict())
    masks: Masks | None = None
    for target in schedule(sparsity, rate):
        train(model, masks)
        # A kept weight may have become zero: a masked one goes before it.
        masks = keep_largest(prunable_weights(model, linear), target, scope, pruned=masks)
        model.load_state_dict(beginning)
        masks.apply_(model)
    assert masks is not None
    return warn_of_emptied(masks)


def schedule(sparsity: float, rate: float) -> list[float]:
    """The sparsity after each round, at least one; the last is `sparsity`."""
    rounds = max(1, math.ceil(math.log(1 - sparsity) / math.log(1 - rate) - 1e-9))
    return [1 - (1 - rate) ** done for done in range(1, rounds)] + [sparsity]


def _find(search: Search) -> Masks:
    rounds = count(1)

    def train(_: nn.Module, masks: Masks | None) -> None:
        search.train(f"round {next(rounds)}", masks)

    return imp(search.network, search.sparsity, train, rate=search.rate)


PRUNER = Pruner(
    name="imp",
    about="the smallest trained weights, in rounds of training",
    find=_find,
    source="the weights after each round of training on {images}",
    trains=True,
)
