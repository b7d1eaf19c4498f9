"""A pruned model in a file: sparse, without the weights that are masked, or dense with a note of its masks.

Sparse: "dau_fast.masks" holds the masks' arena, uint8 [A]; a masked tensor holds the values that its mask
keeps, row by row, [kept]; every other tensor stands as it is. Dense: all tensors as they are, for every
reader; masked weights are its zeros, but for those that the note names as kept.
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
    _check_follows(tensors, masks)
    small = {_ARENA: masks.arena}
    for name, tensor in tensors.items():
        small[name] = tensor[masks[name]] if name in masks else tensor.contiguous()
    return small, json.dumps({name: masks.shape(name) for name in masks})


def _check_follows(tensors: Mapping[str, Tensor], masks: Masks) -> None:
    for name, kept in masks.items():
        if name not in tensors or tensors[name].shape != kept.shape:
            raise UserError(f"the masks are of another model: it has no weight like the one of '{name}'")
        if tensors[name][~kept].view(torch.uint8).any():
            raise UserError(
                f"'{name}' is not zero where it is masked, which this file could not hold: call "
                "masks.apply_(model) first"
            )


def expand(
    tensors: Mapping[str, Tensor], shapes: str, wanted: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], Masks]:
    """The inverse of `compress`. Raises ValueError (UserError among them) for what does not fit.

    wanted: tensors whose shapes the full ones must have, which is seen before memory is taken.
    """
    masks = Masks.from_state_dict({"arena": tensors.get(_ARENA), "shapes": json.loads(shapes)})
    if wanted is not None:
        for name in masks:
            if name not in wanted or wanted[name].shape != masks.shape(name):
                raise ValueError(f"its masks are of another architecture, such as that of '{name}'")
    full = {name: tensor for name, tensor in tensors.items() if name != _ARENA}
    for name, kept in masks.items():
        values = full.get(name)
        if values is None or values.shape != (int(kept.sum()),):
            raise ValueError(f"it does not hold as many values of '{name}' as its mask keeps")
        full[name] = torch.zeros(kept.shape, dtype=values.dtype)
        full[name][kept] = values
    return full, masks


def note(tensors: Mapping[str, Tensor], masks: Masks) -> str:
    """What a dense file of the state_dict `tensors` need say of its masks for `recover`, as JSON.

    The names of what is masked, each with the places, row by row, of weights that are zero and kept.
    Raises UserError as `compress` does.
    """
    _check_follows(tensors, masks)
    zeros = {name: (kept & (tensors[name] == 0)).flatten().nonzero() for name, kept in masks.items()}
    return json.dumps({name: places.squeeze(1).tolist() for name, places in zeros.items()})


def recover(tensors: Mapping[str, Tensor], text: str) -> Masks:
    """The masks of which `text`, from `note`, speaks. Raises ValueError for what does not fit."""
    masks = {}
    try:
        for name, places in json.loads(text).items():
            kept = (tensors[name] != 0).flatten()
            kept[torch.tensor(places, dtype=torch.int64)] = True
            masks[name] = kept.view(tensors[name].shape)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"its note of masks does not fit its tensors ({error})") from error
    return Masks(masks)
