"""One-shot magnitude pruning: the smallest weights go, all at once (Han et al. 2015)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from dau_fast.prune.masks import Masks
from dau_fast.prune.prunable import prunable_weights
from dau_fast.prune.pruner import Pruner, Search
from dau_fast.prune.select import check_scope, check_sparsity, keep_largest, warn_of_emptied


def omp(
    model: nn.Module,
    sparsity: float,
    *,
    scope: str = "global",
    linear: bool = False,
    rewind: Mapping[str, Any] | None = None,
) -> Masks:
    """Masks that drop the share `sparsity`, in [0, 1), of smallest magnitude.

    scope: "global" ranks the weights of all layers together, "layer" each layer's alone. linear: prune
    Linear layers, and not convolutions alone. rewind: an earlier state_dict of the model; where it is
    given, `model` is set to it, masked weights zero (Frankle et al. 2020, arXiv 1903.01611); otherwise
    `model` stays as it is.
    Raises UserError for a wrong sparsity or scope, NaN weights, and a model without such layers.
    """
    check_sparsity(sparsity)
    check_scope(scope)
    masks = warn_of_emptied(keep_largest(prunable_weights(model, linear), sparsity, scope))
    if rewind is not None:
        model.load_state_dict(rewind)
        masks.apply_(model)
    return masks


def _find(search: Search) -> Masks:
    if search.trained:
        return omp(search.network, search.sparsity)
    early = copy.deepcopy(search.network.state_dict())
    search.train("dense", None)
    return omp(search.network, search.sparsity, rewind=early)


PRUNER = Pruner(
    name="omp",
    about="the smallest trained weights, all at once",
    find=_find,
    source="the weights of {model}, trained on {images}",
    trains=True,
    takes_trained=True,
)
