"""From scores to masks: the weights with the smallest scores go, exactly as many as asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from dau_fast.errors import UserError
from dau_fast.prune.masks import Masks

SCOPES = ("global", "layer")


def check_sparsity(sparsity: float) -> None:
    """UserError for a `sparsity` outside [0, 1)."""
    if not 0 <= sparsity < 1:
        raise UserError(
            f"sparsity {sparsity:g} is not a share of the weights: expected 0 up to, but not including, 1, "
            "such as 0.95"
        )


def check_scope(scope: str) -> None:
    """UserError for an unknown `scope`."""
    if scope not in SCOPES:
        raise UserError(f"unknown scope '{scope}': expected one of {', '.join(SCOPES)}")


def keep_largest(scores: Mapping[str, Tensor], sparsity: float, scope: str) -> Masks:
    """Masks that drop the smallest of `scores`, which have a weight's name and shape, without NaN.

    sparsity: share to drop, in [0, 1), rounded to a whole weight. scope: "global" ranks all weights
    together, "layer" each tensor's alone. Of equal scores the first go, so every device agrees.
    """
    if scope == "layer":
        return Masks(
            {name: _kept(score.flatten(), sparsity).view(score.shape) for name, score in scores.items()}
        )
    kept = _kept(torch.cat([score.flatten() for score in scores.values()]), sparsity)
    parts = kept.split([score.numel() for score in scores.values()])
    return Masks(
        {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}
    )


def _kept(scores: Tensor, sparsity: float) -> Tensor:
    """Bool [n]: all but the round(sparsity * n) smallest of `scores` [n]."""
    drop = round(sparsity * len(scores))
    if not drop:
        return torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    threshold = scores.kthvalue(drop).values  # by selection, in linear time
    kept = scores > threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    surplus = len(scores) - drop - int(kept.sum())
    kept[ties[len(ties) - surplus :]] = True
    return kept


def warn_of_emptied(masks: Masks) -> Masks:
    """`masks`, after a warning that names the layers of which nothing is left."""
    if masks.emptied:
        logging.getLogger("dau_fast").warning(
            "pruning to %.4g %% left no weight of %s: nothing passes there any more; prune less, or in "
            "the scope 'layer'",
            100 * masks.sparsity,
            ", ".join(f"'{name}'" for name in masks.emptied),
        )
    return masks
