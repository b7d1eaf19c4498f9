"""What stays the same from one step of a masked optimiser to the next: all but the gradients.

Walking over a model's many small tensors takes the host longer than their step takes a GPU. A plan holds what
the walk found, and says when it no longer holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Dimensions of a tensor in the order in which it lies in memory; None for row by row.
Order = tuple[int, ...] | None


def memory_order(tensor: Tensor) -> Order:
    """The order in which `tensor` lies row by row, as in channels_last."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))


def permuted(tensor: Tensor, order: Order) -> Tensor:
    """`tensor` with its dimensions in `order`."""
    return tensor if order is None else tensor.permute(order)


@dataclass(frozen=True)
class StepPlan:
    """A group of parameters on one device, all of which have had a step.

    weights, families: the parameters and their states, a list for each of `keys`, as the op takes them.
    masks: packed or None. orders: of the parameters. states: of each parameter, held by `owner`, the
    optimiser's own.
    """

    parameters: Sequence[Tensor]
    weights: list[Tensor]
    families: list[list[Tensor]]
    masks: list[Tensor | None]
    orders: Sequence[Order]
    owner: Mapping[Tensor, Any]
    states: Sequence[dict[str, Any]]
    keys: tuple[str, ...]

    def __post_init__(self) -> None:
        found = [(state, key, state[key]) for state in self.states for key in self.keys]
        for name, value in (("found", found), ("count", len(self.owner)), ("places", self._find_places())):
            object.__setattr__(self, name, value)

    def find_gradients(
        self, parameters: Sequence[Tensor], keys: tuple[str, ...], owner: Mapping[Tensor, Any]
    ) -> list[Tensor] | None:
        """The gradients as the op takes them, of `parameters` with states `keys` of `owner`.

        None where these are no longer the plan's, or a gradient is missing or sparse.
        """
        known: Any = self
        counts = len(owner), len(parameters)
        same = owner is self.owner and keys == self.keys and counts == (known.count, len(self.parameters))
        if not same or self._find_places() != known.places:
            return None
        if not all(state.get(key) is tensor for state, key, tensor in known.found):
            return None
        grads, strided = [parameter.grad for parameter in parameters], torch.strided
        if not all(grad is not None and grad.layout is strided for grad in grads):
            return None
        return [
            grad if order is None else grad.permute(order)  # type: ignore[union-attr, misc]
            for grad, order in zip(grads, self.orders, strict=True)
        ]

    def _find_places(self) -> tuple[list[int], list[int]]:
        """Where the parameters lie, and how many numbers they have."""
        return list(map(Tensor.data_ptr, self.parameters)), list(map(Tensor.numel, self.parameters))
