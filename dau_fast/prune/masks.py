"""Which weights of a model are kept, at one bit a weight, for all its tensors in one piece of memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from dau_fast.errors import UserError, exists
from dau_fast.ops import apply_masks_, count_kept, pack_mask, unpack_mask
from dau_fast.prune.prunable import check_plain, prunable_weights

# Every tensor's bits begin at a multiple of this, so that they can be read a machine word at a time.
_WORD_BYTES = 8


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bits are: `shape` of the tensor, first and last byte in the arena."""

    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


class Masks(Mapping[str, Tensor]):
    """Masks of a model's parameters by name; True where a weight is kept.

    masks: bool tensors by parameter name, of the parameters' shapes, all on one device.
    `masks[name]` is a bool tensor that was unpacked on demand. Immutable; equal where names, shapes
    and all bits are. `arena` is uint8 [A]: the tensors' packed bits (see `dau_fast.ops.pack_mask`),
    each beginning at a multiple of 64 bits, unused bits 0.
    Raises UserError where there is nothing to mask, or a mask is not bool.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise UserError(
                    f"the mask of '{name}' is {str(mask.dtype).removeprefix('torch.')}: expected bool, "
                    "True where a weight is kept; convert it with mask.bool()"
                )
        self._places = _lay_out({name: tuple(mask.shape) for name, mask in masks.items()})
        devices = {mask.device for mask in masks.values()}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise UserError(f"the masks are on {found}: expected one device; move them to one")
        self.arena = torch.zeros(_size(self._places), dtype=torch.uint8, device=devices.pop())
        for name, mask in masks.items():
            self.packed(name).copy_(pack_mask(mask))

    @classmethod
    def from_zeros(cls, model: nn.Module, *, linear: bool = False) -> Masks:
        """The masks that a pruned `model` follows: False where a convolution's weight is zero.

        linear: those of Linear layers too. Raises UserError where it has no such layer.
        """
        return cls({name: weight.detach() != 0 for name, weight in prunable_weights(model, linear).items()})

    @classmethod
    def from_torch_prune(cls, model: nn.Module) -> Masks:
        """The masks that torch.nn.utils.prune has put on `model`, under the parameters' plain names.

        Raises UserError where there are none.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found = {
            name.removesuffix("_mask"): buffer.bool()
            for name, buffer in model.named_buffers(remove_duplicate=False)
            if name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in parameters
        }
        if not found:
            raise UserError(
                f"{type(model).__name__} is not pruned by torch.nn.utils.prune: masks of a model with "
                "zeros come from Masks.from_zeros"
            )
        return cls(found)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Masks:
        """The inverse of `state_dict`. Raises UserError for anything else."""
        try:
            arena, shapes = state["arena"], state["shapes"]
            places = _lay_out({str(name): _shape(shape) for name, shape in shapes.items()})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"this is no state of masks: expected what Masks.state_dict() gives ({error})"
            ) from (error)
        if not isinstance(arena, Tensor) or arena.dtype != torch.uint8 or arena.shape != (_size(places),):
            raise UserError(
                f"the masks' bits do not fit their shapes: expected {_size(places)} bytes, this is damaged"
            )
        return cls._from_arena(arena, places)

    @classmethod
    def _from_arena(cls, arena: Tensor, places: dict[str, _Place]) -> Masks:
        masks = cls.__new__(cls)
        masks.arena, masks._places = arena, places
        return masks

    # ---- reading

    def __getitem__(self, name: str) -> Tensor:
        return unpack_mask(self.packed(name), self._places[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places  # Mapping's own would unpack the mask

    def __len__(self) -> int:
        return len(self._places)

    def packed(self, name: str) -> Tensor:
        """The bits of `name`, uint8 [ceil(n / 8)]: a view of the arena."""
        place = self._places[name]
        return self.arena[place.begin : place.end]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the parameter `name`."""
        return self._places[name].shape

    @property
    def device(self) -> torch.device:
        return self.arena.device

    @property
    def weights(self) -> int:
        """How many weights have a mask, kept or not."""
        return sum(place.weights for place in self._places.values())

    @property
    def kept(self) -> int:
        """How many weights are kept; waits for the device."""
        return count_kept(self.arena, 8 * len(self.arena))  # the bits between the tensors are 0

    @property
    def sparsity(self) -> float:
        """Share of the weights that is masked, from 0 to 1."""
        return 1 - self.kept / max(1, self.weights)

    @property
    def layer_sparsity(self) -> dict[str, float]:
        """Share of each tensor's weights that is masked, from 0 to 1, by name."""
        return {
            name: 1 - count_kept(self.packed(name), place.weights) / max(1, place.weights)
            for name, place in self._places.items()
        }

    @property
    def emptied(self) -> list[str]:
        """Names of the tensors of which no weight is kept."""
        return [name for name, share in self.layer_sparsity.items() if share == 1]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self._places == other._places and torch.equal(self.arena, other.arena.to(self.device))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        width = max(map(len, self._places))
        rows = [
            f"  {name:{width}}  {100 * share:5.1f} % of {self._places[name].weights:,}"
            for name, share in self.layer_sparsity.items()
        ]
        kept = f"{self.kept:,} of {self.weights:,} weights kept, {100 * self.sparsity:.1f} % masked"
        return "\n".join([f"Masks of {len(self)} tensors: {kept}", *rows])

    # ---- combining

    def __and__(self, other: Masks) -> Masks:
        """Kept by both. Raises UserError for masks of another model."""
        return self._from_arena(self.arena & self._fitting(other), self._places)

    def __or__(self, other: Masks) -> Masks:
        """Kept by at least one. Raises UserError for masks of another model."""
        return self._from_arena(self.arena | self._fitting(other), self._places)

    def _fitting(self, other: Masks) -> Tensor:
        if self._places != other._places:
            ours, theirs = ({name: m.shape(name) for name in m} for m in (self, other))
            raise UserError(f"the masks are of two models: {_difference(ours, theirs)}")
        return other.arena.to(self.device)

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on `device`."""
        return self._from_arena(self.arena.to(device), self._places)

    # ---- models

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set every masked weight of `model` to 0, in place.

        Raises UserError, before anything is changed, where the model lacks a parameter or has it in
        another shape.
        """
        weights = self.find_weights(model)
        apply_masks_(list(weights.values()), [self.packed(name) for name in weights])

    def find_weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of `model` that have a mask, by name. Raises UserError as `apply_` does."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        theirs = {name: tuple(parameters[name].shape) for name in self if name in parameters}
        if theirs != {name: place.shape for name, place in self._places.items()}:
            difference = _difference({name: self.shape(name) for name in self}, theirs)
            check_plain(model)  # torch.nn.utils.prune and weight norms rename what they hold
            raise UserError(f"the masks are of another model than this {type(model).__name__}: {difference}")
        return {name: parameters[name] for name in self}

    def to_torch_prune(self, model: nn.Module) -> None:
        """Put the masks on `model` by torch.nn.utils.prune: a parameter becomes *_orig and *_mask."""
        for name in self.find_weights(model):
            layer, _, attribute = name.rpartition(".")
            torch_prune.custom_from_mask(model.get_submodule(layer), attribute, self[name])

    # ---- saving

    def state_dict(self) -> dict[str, Any]:
        """{"arena": uint8 [A], "shapes": {name: shape}}, for torch.save and torch.load(weights_only=True)."""
        return {"arena": self.arena, "shapes": {name: place.shape for name, place in self._places.items()}}

    def save(self, path: Path | str) -> None:
        """Write the masks to `path` as safetensors, one bit a weight."""
        shapes = json.dumps({name: place.shape for name, place in self._places.items()})
        Path(path).write_bytes(serialize({"arena": self.arena.cpu()}, metadata={"dau_fast_masks": shapes}))

    @classmethod
    def load(cls, path: Path | str) -> Masks:
        """What `save` wrote, on the CPU. Raises UserError for a file that is missing, damaged or another."""
        path = Path(path)
        if not exists(path, "file"):
            raise UserError(f"masks '{path}' do not exist: name a file that Masks.save wrote")
        try:
            with safe_open(path, "pt") as file:
                shapes = json.loads((file.metadata() or {})["dau_fast_masks"])
                return cls.from_state_dict({"arena": file.get_tensor("arena"), "shapes": shapes})
        except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
            reason = "it holds no masks" if isinstance(error, KeyError) else error
            raise UserError(f"masks '{path}' cannot be read: {reason}") from error


def _shape(sizes: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(sizes)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{shape} is no shape")
    return shape


def _lay_out(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Place]:
    """Every tensor's place, one after the other. Raises UserError where there is none."""
    if not shapes:
        raise UserError("there is nothing to mask: expected the mask of at least one parameter")
    places, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + -(-math.prod(shape) // 8)
        places[name] = _Place(shape, begin, end)
        begin = -(-end // _WORD_BYTES) * _WORD_BYTES
    return places


def _size(places: Mapping[str, _Place]) -> int:
    """Bytes of the arena, whole words."""
    return max(-(-place.end // _WORD_BYTES) * _WORD_BYTES for place in places.values())


def _difference(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]) -> str:
    """In words, the first thing in which two sets of shapes differ."""
    for name in [*ours, *theirs]:
        if name not in theirs or name not in ours:
            has, lacks = ("the one", "the other") if name in ours else ("the other", "the one")
            return f"{has} has a mask for '{name}', {lacks} has no such parameter"
        if ours[name] != theirs[name]:
            return f"'{name}' is {list(ours[name])} in the one and {list(theirs[name])} in the other"
    return "their parameters come in another order"
