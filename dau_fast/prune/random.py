"""Random pruning: what the other ways of choosing have to beat."""

from __future__ import annotations

import torch
from torch import nn

from dau_fast.prune.masks import Masks
from dau_fast.prune.prunable import prunable_weights
from dau_fast.prune.pruner import Pruner, Search
from dau_fast.prune.select import check_scope, check_sparsity, keep_largest, warn_of_emptied


def random(
    model: nn.Module, sparsity: float, *, seed: int = 0, scope: str = "global", linear: bool = False
) -> Masks:
    """Masks that drop the share `sparsity`, in [0, 1), by chance; `seed` gives the same on every device.

    `model` stays as it is. scope, linear: as in `omp`. Raises UserError as `omp` does.
    """
    check_sparsity(sparsity)
    check_scope(scope)
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        for name, weight in prunable_weights(model, linear).items()
    }
    return warn_of_emptied(keep_largest(scores, sparsity, scope))


def _find(search: Search) -> Masks:
    return random(search.network, search.sparsity, seed=search.seed)


PRUNER = Pruner(name="random", about="by chance", find=_find, source="chance, no data")
