"""A caller's inputs as rows of one tensor: images, rows of numbers, tokens, or several of these by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dau_fast.errors import UserError

# What one item or set of a caller is: one tensor, or several by name.
Inputs = Tensor | dict[str, Tensor]


def read_tensor(value: Any) -> Tensor | None:
    """`value`, a tensor, array, number or list of numbers, as a tensor; None for anything else.

    float64 arrays, which NumPy makes unless it is told not to, become float32 as networks take it.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        array = value.astype(np.float32) if value.dtype == np.float64 else value
        return torch.as_tensor(array)
    if isinstance(value, bool | int | float) or (isinstance(value, list | tuple) and len(value)):
        try:
            return torch.tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return None
    return None


@dataclass(frozen=True)
class Layout:
    """Inputs by name, side by side in one row of numbers: what a network takes, and what batches are made of.

    names, shapes, kinds: of each input, one item's. dtype: of the rows, which holds all of them exactly.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kinds: tuple[torch.dtype, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, first: Mapping[str, Tensor]) -> Layout:
        """That of items like the `first`, [1, ...] each."""
        kinds = {tensor.dtype for tensor in first.values()}
        floating = [kind.is_floating_point for kind in kinds]
        if not any(floating):
            dtype = torch.int64
        elif len(kinds) == 1:
            (dtype,) = kinds
        else:
            dtype = torch.float64  # exact for float32 and for whole numbers below 2**53
        shapes = tuple(tuple(tensor.shape[1:]) for tensor in first.values())
        return cls(tuple(first), shapes, tuple(tensor.dtype for tensor in first.values()), dtype)

    def pack(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Rows [N, D] of inputs [N, ...] by name."""
        parts = [inputs[name] for name in self.names]
        return torch.cat([part.reshape(len(part), -1).to(self.dtype) for part in parts], 1)

    def check(self, item: Mapping[str, Tensor], where: str) -> None:
        """UserError for an `item` that is not like the first. where: what messages call it."""
        found = [tuple(item[name].shape) if name in item else None for name in self.names]
        if found != list(self.shapes):
            raise UserError(
                f"{where} has the inputs {_describe(item)}, and the first one {self.describe()}: give all "
                "the same, texts padded to one length"
            )

    def pack_item(self, item: Mapping[str, Tensor], where: str) -> Tensor:
        """One row [D]. Raises UserError as `check` does."""
        self.check(item, where)
        return self.pack({name: item[name][None] for name in self.names})[0]

    def __call__(self, rows: Tensor) -> dict[str, Tensor]:
        """What a network takes, [B, ...] by name, of rows [B, D]."""
        parts = rows.split([math.prod(shape) for shape in self.shapes], 1)
        return {
            name: part.reshape(-1, *shape).to(kind)
            for name, part, shape, kind in zip(self.names, parts, self.shapes, self.kinds, strict=True)
        }

    def to_double(self) -> Layout:
        """The same for a network in float64."""
        kinds = tuple(torch.float64 if kind.is_floating_point else kind for kind in self.kinds)
        return replace(self, kinds=kinds, dtype=torch.float64 if self.dtype.is_floating_point else self.dtype)

    def describe(self) -> str:
        """Names and shapes in words."""
        return ", ".join(f"{name} {list(shape)}" for name, shape in zip(self.names, self.shapes, strict=True))


def _describe(item: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in item.items())


def read_named(item: Mapping[str, Any], accepted: Sequence[str] | None) -> dict[str, Tensor]:
    """The tensors of `item` that a network takes, by name.

    accepted: names that it takes, None for any; all others, and what holds no numbers, is left out.
    """
    found = {}
    for name, value in item.items():
        if accepted is not None and name not in accepted:
            continue
        tensor = read_tensor(value)
        if tensor is not None:
            found[str(name)] = tensor
    return found
