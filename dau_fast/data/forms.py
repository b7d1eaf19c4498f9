"""The forms in which callers give their sets: pairs of tensors, data sets of pairs or dicts, loaders."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, default_collate

from dau_fast.data.inputs import Inputs, Layout, read_named, read_tensor
from dau_fast.errors import UserError

# What the label of an item is called where an item is a dict.
_LABELS = ("label", "labels", "target", "targets", "y")
# Items, the first ones, that are compared with what they were when they were read before.
_COMPARED = 4


class Part(Protocol):
    """One set of a caller."""

    name: str

    def __len__(self) -> int: ...

    def read_all(self, layout: Layout | None) -> tuple[Tensor, Tensor]:
        """All inputs, [N, ...] as they are or [N, D] as `layout` packs them, and labels, int64 [N]."""

    def read_first(self) -> Inputs:
        """The first item's inputs, [1, ...] each, on the CPU."""

    def read_labels(self) -> Tensor:
        """int64 [N] on the CPU; those that the set tells, or else every item is read once."""

    def read(self, index: Tensor, rows: Tensor, out: Tensor, layout: Layout | None) -> None:
        """Write items `index` [b] to out[rows]."""


def open_set(name: str, given: Any, accepted: Sequence[str] | None = None) -> Part:
    """The set that a caller has `given` and that messages call `name`.

    given: (inputs, labels), each a tensor, an array or a list, inputs also several of them by name in a dict;
    or anything of items with a length: a Dataset, one of Hugging Face, a DataLoader, whose items are read one
    by one. An item is (inputs, label), or a dict that also holds the label. accepted: names that the network
    takes, None for any. Raises UserError for anything else.
    """
    if isinstance(given, tuple) and len(given) == 2:
        return Rows(name, *given, accepted)
    if isinstance(given, DataLoader):
        return Items(name, given.dataset, accepted, _collation(given))
    if isinstance(given, Tensor | np.ndarray | Mapping) or not hasattr(given, "__getitem__"):
        raise UserError(
            f"the {name} set is a {type(given).__name__}: expected (inputs, labels), or a data set that has "
            "items and a length"
        )
    return Items(name, given, accepted)


def _collation(loader: DataLoader[Any]) -> Any:
    """What a loader does to its batches, None where PyTorch's own way has nothing to add."""
    return None if loader.collate_fn in (default_collate, None) else loader.collate_fn


class Rows:
    """A set of tensors: inputs [N, ...], or several of them by name, and labels int64 [N]."""

    def __init__(self, name: str, inputs: Any, labels: Any, accepted: Sequence[str] | None = None) -> None:
        self.name = name
        self.inputs = _read_rows(name, inputs, accepted)
        self.labels = _read_label_row(name, labels)
        for tensor in _tensors(self.inputs):
            check_finite(name, tensor)
        counts = {len(tensor) for tensor in _tensors(self.inputs)}
        if counts != {len(self.labels)} or 0 in counts:
            shown = "/".join(str(count) for count in sorted(counts))
            raise UserError(
                f"the {name} set has {shown} images and {len(self.labels)} labels: expected as many of "
                "both, at least one"
            )
        if empty := [tensor for tensor in _tensors(self.inputs) if not tensor.numel()]:
            shape = list(empty[0].shape[1:])
            raise UserError(f"the images of the {name} set have shape {shape}: expected no side of length 0")

    def __len__(self) -> int:
        return len(self.labels)

    def read_all(self, layout: Layout | None) -> tuple[Tensor, Tensor]:
        return self._pack(self.inputs, layout), self.labels

    def read_first(self) -> Inputs:
        if isinstance(self.inputs, dict):
            return {key: tensor[:1].detach().cpu() for key, tensor in self.inputs.items()}
        return self.inputs[:1].detach().cpu()

    def read_labels(self) -> Tensor:
        return self.labels.cpu()

    def read(self, index: Tensor, rows: Tensor, out: Tensor, layout: Layout | None) -> None:
        if not len(index):
            return
        if isinstance(self.inputs, dict):
            taken: Inputs = {key: tensor[index.to(tensor.device)] for key, tensor in self.inputs.items()}
        else:
            taken = self.inputs[index.to(self.inputs.device)]
        out[rows] = self._pack(taken, layout).to(out)

    def _pack(self, inputs: Inputs, layout: Layout | None) -> Tensor:
        inputs = match_form(inputs, layout, f"the {self.name} set")
        if layout is None or isinstance(inputs, Tensor):
            assert isinstance(inputs, Tensor)
            return inputs
        layout.check({key: tensor[0] for key, tensor in inputs.items()}, f"the {self.name} set")
        return layout.pack(inputs)


def check_finite(name: str, inputs: Tensor, start: int = 0) -> None:
    """UserError where one of `inputs`, from number `start` of the set `name` on, holds NaN or infinity."""
    # Not isfinite of all of them, which would take memory for as many answers.
    if not inputs.numel() or not inputs.is_floating_point():
        return
    if bool(torch.stack(inputs.detach().aminmax()).isfinite().all()):
        return
    wrong = inputs.detach().reshape(len(inputs), -1).isfinite().all(1).logical_not().nonzero().flatten()
    raise UserError(
        f"image {start + int(wrong[0])} of the {name} set holds NaN or infinity ({len(wrong)} such): "
        "expected finite numbers, as the model takes them; leave it out or repair it"
    )


def match_form(inputs: Inputs, layout: Layout | None, where: str) -> Inputs:
    """`inputs` by name where `layout` has names, else a tensor; a single one need not be told by its name.

    Raises UserError where several inputs meet one, or one meets several. where: what messages call them.
    """
    if layout is not None and isinstance(inputs, Tensor) and len(layout.names) == 1:
        return {layout.names[0]: inputs}
    if layout is None and isinstance(inputs, dict) and len(inputs) == 1:
        (inputs,) = inputs.values()
    if isinstance(inputs, dict) == (layout is None):
        told = "several inputs by name" if layout is None else "a single input without a name"
        raise UserError(f"{where} has {told}, unlike the first set: give all sets in one form")
    return inputs


def _tensors(inputs: Inputs) -> list[Tensor]:
    return list(inputs.values()) if isinstance(inputs, dict) else [inputs]


def _read_rows(name: str, inputs: Any, accepted: Sequence[str] | None) -> Inputs:
    if isinstance(inputs, Mapping):
        found = read_named(inputs, accepted)
        if not found:
            raise UserError(f"the {name} set has no inputs that the model takes: expected {_list(accepted)}")
        return found
    tensor = read_tensor(inputs)
    if tensor is None:
        raise UserError(
            f"the {name} set's inputs are a {type(inputs).__name__}: expected a tensor or an array, or a "
            "dict of them"
        )
    _check_kind(f"the {name} set has {tensor.dtype} images", tensor)
    return tensor


def _check_kind(what: str, tensor: Tensor) -> None:
    """UserError for inputs that no network takes as they are: pixels that are to be normalised first."""
    if not tensor.is_floating_point() and tensor.dtype not in (torch.int64, torch.int32):
        raise UserError(f"{what}: expected a floating-point tensor as the model takes it, or int64 tokens")


def _list(names: Sequence[str] | None) -> str:
    return "some" if names is None else ", ".join(names)


def _read_label_row(name: str, labels: Any) -> Tensor:
    found = read_tensor(labels)
    whole = found is not None and not (found.is_floating_point() or found.is_complex())
    if found is None or not whole or found.dtype == torch.bool or found.ndim != 1:
        shown = type(labels).__name__ if found is None else f"{found.dtype} of shape {list(found.shape)}"
        raise UserError(f"the {name} set's labels are {shown}: expected whole numbers from 0, [N]")
    return found.long()


class Items:
    """A set of items that are read one by one. collate: what a loader does to a batch, None for nothing."""

    def __init__(
        self, name: str, data: Any, accepted: Sequence[str] | None = None, collate: Any = None
    ) -> None:
        self.name, self.data, self.accepted, self.collate = name, data, accepted, collate
        if not hasattr(data, "__len__"):
            raise UserError(f"the {name} set has no length: give a map-style Dataset, or tensors")
        self._count = len(data)
        if self._count == 0:
            raise UserError(f"the {name} set is empty: give at least one image")
        self._labels: Tensor | None = None
        self._seen: dict[int, Inputs] = {}
        self._warned = False

    def __len__(self) -> int:
        return self._count

    def read_item(self, i: int) -> tuple[Inputs, int]:
        """Inputs [...] and label of item `i`, after a warning where it is not what it was before.

        Raises UserError where there is none, whatever the reason.
        """
        inputs, label = self._read_item(i)
        for tensor in _tensors(inputs):
            check_finite(self.name, tensor[None], i)
        if i < _COMPARED and not self._warned:
            seen = self._seen.setdefault(i, inputs)
            if seen is not inputs and not _same(seen, inputs):
                self._warned = True
                logging.getLogger("dau_fast").warning(
                    "item %d of the %s set is another one every time it is read, as random augmentation "
                    "makes it: so is what is measured; give the set without it",
                    i, self.name,
                )  # fmt: skip
        return inputs, label

    def _read_item(self, i: int) -> tuple[Inputs, int]:
        where = f"item {i} of the {self.name} set"
        try:
            item = self.data[i] if self.collate is None else _first(self.collate([self.data[i]]))
            inputs, label = _split_item(item)
            label = int(label)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{where} cannot be read as an image and a label: {reason}") from error
        if isinstance(inputs, Mapping):
            named = read_named(inputs, self.accepted)
            if named:
                return named, label
            raise UserError(f"{where} has no inputs that the model takes: expected {_list(self.accepted)}")
        tensor = read_tensor(inputs)
        if tensor is None:
            raise UserError(
                f"{where} has an image of {type(inputs).__name__}: expected a floating-point tensor as the "
                "model takes it, such as torchvision's transforms or with_format('torch') of datasets give"
            )
        _check_kind(f"{where} has an image of {tensor.dtype}", tensor)
        return tensor, label

    def _pack(self, inputs: Inputs, i: int, layout: Layout | None) -> Tensor:
        where = f"item {i} of the {self.name} set"
        inputs = match_form(inputs, layout, where)
        if layout is None or isinstance(inputs, Tensor):
            assert isinstance(inputs, Tensor)
            return inputs
        return layout.pack_item(inputs, where)

    def read_all(self, layout: Layout | None) -> tuple[Tensor, Tensor]:
        for i in range(min(_COMPARED, len(self))):
            self.read_item(i)
        pairs = [self.read_item(i) for i in range(len(self))]
        packed = [self._pack(inputs, i, layout) for i, (inputs, _) in enumerate(pairs)]
        try:
            return torch.stack(packed), torch.tensor([label for _, label in pairs])
        except RuntimeError as error:
            raise UserError(
                f"the {self.name} set's pairs do not fit together, all images need one shape: {error}"
            ) from error

    def read_first(self) -> Inputs:
        inputs, self._first_label = self.read_item(0)
        if isinstance(inputs, dict):
            return {key: tensor.detach().cpu()[None] for key, tensor in inputs.items()}
        self._kind = inputs.dtype, inputs.shape
        return inputs.detach().cpu().contiguous()[None]

    def read_labels(self) -> Tensor:
        told = find_labels(self.data)
        # What changes labels on their way out changes the first one, too, as a rule.
        if told is None or self.collate is not None or told[0] != self._first_label:
            told = torch.tensor([self.read_item(i)[1] for i in range(len(self))])
        self._labels = told
        return told

    def read(self, index: Tensor, rows: Tensor, out: Tensor, layout: Layout | None) -> None:
        assert self._labels is not None
        for i, row in zip(index.tolist(), rows.tolist(), strict=True):
            inputs, label = self.read_item(i)
            if isinstance(inputs, Tensor) and (inputs.dtype, inputs.shape) != self._kind:
                raise UserError(
                    f"item {i} of the {self.name} set is an image of {inputs.dtype} and shape "
                    f"{tuple(inputs.shape)}, and item 0 of {self._kind[0]} and {tuple(self._kind[1])}: give "
                    "all the same"
                )
            if label != self._labels[i]:
                raise UserError(
                    f"item {i} of the {self.name} set has the label {label}, and had {self._labels[i]} "
                    "before or in its targets: give a Dataset whose labels stay the same"
                )
            out[row] = self._pack(inputs, i, layout)


def _same(one: Inputs, other: Inputs) -> bool:
    pairs = zip(_tensors(one), _tensors(other), strict=False)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _split_item(item: Any) -> tuple[Any, Any]:
    """Inputs and label of an item, (inputs, label) or a dict that holds both."""
    if not isinstance(item, Mapping):
        inputs, label = item
        return inputs, label
    names = [name for name in _LABELS if name in item]
    if not names:
        raise KeyError(f"no label: expected one of {', '.join(_LABELS)} beside {', '.join(map(str, item))}")
    return {key: value for key, value in item.items() if key != names[0]}, item[names[0]]


def _first(batch: Any) -> Any:
    """The only item of a `batch`."""
    if isinstance(batch, Mapping):
        return {key: value[0] for key, value in batch.items()}
    return tuple(value[0] for value in batch)


def find_labels(data: Any) -> Tensor | None:
    """What `targets` or `labels` of a data set tell, as torchvision's do, int64 [N]; None for neither.

    A Hugging Face data set tells its column of labels.
    """
    if type(data) is Subset:
        told = find_labels(data.dataset)
        return None if told is None else told[torch.as_tensor(data.indices)]
    if getattr(data, "target_transform", None) is not None:
        return None
    columns = getattr(data, "column_names", None)
    for name in _LABELS if isinstance(columns, list) else ("targets", "labels"):
        try:
            column = data[name] if isinstance(columns, list) else getattr(data, name)
            told = torch.as_tensor(column if isinstance(column, Tensor) else np.asarray(column))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            continue
        integers = not (told.is_floating_point() or told.is_complex() or told.dtype == torch.bool)
        if integers and told.shape == (len(data),):
            return told.detach().cpu().long()
    return None
