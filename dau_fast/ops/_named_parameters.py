"""The parameters that an optimiser is given, by name, and the masks that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dau_fast.ops._step_plan import Order, permuted
from dau_fast.ops.packed_masks import check_mask, pack_mask, unpack_mask

# What a caller may give: by parameter name, as in dau_fast.prune.Masks.
MasksByName = Mapping[str, Tensor]


def list_each_once(params: ParamsT) -> list[Any]:
    """`params` as a list, each shared parameter where it comes first."""
    seen: set[Tensor] = set()

    def fresh(members: Any) -> list[Any]:
        kept = []
        for member in [members] if isinstance(members, Tensor) else list(members):
            parameter = member[1] if isinstance(member, tuple) else member
            if parameter not in seen:
                seen.add(parameter)
                kept.append(member)
        return kept

    if isinstance(params, Tensor):
        raise ValueError("params is a tensor: expected model.named_parameters()")
    entries: list[Any] = list(params)
    if entries and isinstance(entries[0], dict):
        return [{**entry, "params": fresh(entry["params"])} for entry in entries]
    return fresh(entries)


def list_names(group: dict[str, Any]) -> list[str]:
    if "param_names" not in group:
        raise ValueError(
            "params have no names, by which masks are found: pass model.named_parameters(), or groups of "
            "(name, parameter) pairs"
        )
    return list(group["param_names"])


def pack_in_order(masks: MasksByName, name: str, parameter: Tensor, order: Order) -> Tensor:
    """The packed mask of `parameter` with its dimensions in `order`, on its device."""
    packed = getattr(masks, "packed", None)
    mask = (packed(name) if packed is not None else masks[name]).to(parameter.device)
    check_mask(f"mask of {name}", mask, parameter)
    if mask.dtype == torch.bool:
        return pack_mask(permuted(mask, order))
    if order is None:
        # A copy: a change of the caller's masks must not reach only half of what depends on them.
        return mask.clone(memory_format=torch.contiguous_format)
    return pack_mask(permuted(unpack_mask(mask, parameter.shape), order))
