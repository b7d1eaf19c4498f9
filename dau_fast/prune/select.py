"""From scores to masks: the weights with the smallest scores go, exactly as many as asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from dau_fast.errors import UserError, check_choice
from dau_fast.ops import mask_smallest, unpack_mask
from dau_fast.prune.masks import Masks

SCOPES = ("global", "layer")


def check_sparsity(sparsity: float) -> None:
    """UserError for a `sparsity` outside [0, 1)."""
    if not 0 <= sparsity < 1:
        raise UserError(
            f"`sparsity={sparsity:g}`: expected a share of the weights, from 0 to below 1, such as 0.95"
        )


def check_scope(scope: str) -> None:
    """UserError for an unknown `scope`."""
    check_choice("scope", scope, SCOPES)


def keep_largest(
    scores: Mapping[str, Tensor], sparsity: float, scope: str, pruned: Masks | None = None
) -> Masks:
    """Masks that drop the smallest absolute values of `scores`, which have a weight's name and shape.

    sparsity: share to drop, in [0, 1), rounded to a whole weight. scope: "global" ranks all weights
    together, "layer" each tensor's alone. pruned: masks of weights that are dropped before all others.
    Of equal scores the first go, so every device agrees.
    """
    groups = [list(scores)] if scope == "global" else [[name] for name in scores]
    kept: dict[str, Tensor] = {}
    for names in groups:
        before = {name: pruned[name] for name in names} if pruned is not None else {}
        left = [scores[name][before[name]] if before else scores[name] for name in names]
        weights = sum(scores[name].numel() for name in names)
        gone = weights - sum(score.numel() for score in left)
        chosen = mask_smallest(left, max(0, round(sparsity * weights) - gone))
        for name, score, bits in zip(names, left, chosen, strict=True):
            kept[name] = unpack_mask(bits, score.shape)
            if before:
                kept[name] = before[name].masked_scatter(before[name], kept[name])
    return Masks(kept)


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
