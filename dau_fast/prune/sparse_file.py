"""A pruned model's tensors without the weights that are masked: the bits of the masks, and what is kept.

The form in a file: "dau_fast.masks" holds the masks' arena, uint8 [A]; a masked tensor holds the values
that its mask keeps, row by row, [kept]; every other tensor stands as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from dau_fast.errors import UserError
from dau_fast.prune.masks import Masks

_ARENA = "dau_fast.masks"


def compress(tensors: Mapping[str, Tensor], masks: Masks) -> tuple[dict[str, Tensor], str]:
    """The state_dict `tensors` without masked weights, and the masks' shapes as JSON for `expand`.

    Raises UserError where the masks are of another model, or a masked weight is not +0.
    """
    small = {_ARENA: masks.arena}
    for name in masks:
        if name not in tensors or tuple(tensors[name].shape) != masks.shape(name):
            raise UserError(f"the masks are of another model: it has no weight like the one of '{name}'")
    for name, tensor in tensors.items():
        small[name] = tensor.contiguous()
        if name in masks:
            kept = masks[name]
            if tensor[~kept].view(torch.uint8).any():
                raise UserError(
                    f"'{name}' is not zero where it is masked, which this file could not hold: call "
                    "masks.apply_(model) first"
                )
            small[name] = tensor[kept]
    return small, json.dumps({name: masks.shape(name) for name in masks})


def expand(tensors: Mapping[str, Tensor], shapes: str) -> tuple[dict[str, Tensor], Masks]:
    """The inverse of `compress`. Raises ValueError (UserError among them) for what does not fit."""
    masks = Masks.from_state_dict({"arena": tensors.get(_ARENA), "shapes": json.loads(shapes)})
    full = {name: tensor for name, tensor in tensors.items() if name != _ARENA}
    for name, kept in masks.items():
        values = full.get(name)
        if values is None or values.shape != (int(kept.sum()),):
            raise ValueError(f"it does not hold as many values of '{name}' as its mask keeps")
        full[name] = torch.zeros(kept.shape, dtype=values.dtype)
        full[name][kept] = values
    return full, masks
