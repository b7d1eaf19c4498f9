"""A caller's sets as images: all of them in memory, or read from the sets while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dau_fast.data.forms import Part, Rows, match_form, open_set
from dau_fast.data.images import Images
from dau_fast.data.inputs import Inputs, Layout
from dau_fast.data.overlap import check_disjoint, check_subsets
from dau_fast.data.streaming import StreamedImages
from dau_fast.errors import UserError

# More would be names and logits without end.
_MOST_CLASSES = 10**6


class Joined(NamedTuple):
    """Sets as images, one after the other. counts: how many each has. layout: of inputs by name, or None."""

    images: Images
    counts: dict[str, int]
    layout: Layout | None


def join_sets(
    sets: Mapping[str, Any], stream: bool, device: torch.device, accepted: Sequence[str] | None = None
) -> Joined:
    """The images of `sets`, which `open_set` reads, on `device`.

    stream: whether to read them when a batch needs them. accepted: names of inputs that the network takes,
    None for any. Raises UserError for sets that do not fit together.
    """
    parts = {name: open_set(name, given, accepted) for name, given in sets.items()}
    if "forget" in sets:
        check_subsets(sets)
    counts = {name: len(part) for name, part in parts.items()}
    if stream:
        source = Sets(parts)
        # Laid out as all of them together would be.
        pixels, names = torch.cat(source.examples)[:0], _name_classes(source.label_parts)
        images: Images = StreamedImages(pixels, source.labels, names, source=source)
        held = {
            name: part.read_all(source.layout)[0] for name, part in parts.items() if isinstance(part, Rows)
        }
        _check_disjoint(held)
        return Joined(images.to(device), counts, source.layout)
    layout = _find_layout(next(iter(parts.values())).read_first())
    columns = {name: part.read_all(layout) for name, part in parts.items()}
    _check_alike({name: inputs[:1] for name, (inputs, _) in columns.items()})
    _check_disjoint({name: inputs for name, (inputs, _) in columns.items()})
    names = _name_classes({name: labels for name, (_, labels) in columns.items()})
    pixels, labels = (torch.cat(column) for column in zip(*columns.values(), strict=True))
    return Joined(Images(pixels, labels, names).to(device), counts, layout)


def _find_layout(first: Inputs) -> Layout | None:
    return Layout.of(first) if isinstance(first, dict) else None


def _check_disjoint(images: Mapping[str, Tensor]) -> None:
    if "forget" in images:
        check_disjoint(images)


def _name_classes(labels: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The classes by number. UserError, before any memory is taken, for a label that cannot be one."""
    for name, given in labels.items():
        place = int(given.argmax())
        if given[place] >= _MOST_CLASSES:
            raise UserError(
                f"image {place} of the {name} set has the label {given[place]}: expected a class, from 0 to "
                f"{_MOST_CLASSES - 1:,} at most"
            )
    return tuple(str(label) for label in range(1 + max(int(given.max()) for given in labels.values())))


class Sets:
    """A caller's sets, one after the other, as a source of images that need no normalisation.

    One thread, always the same, calls the data sets: they need not be safe for several, and may hold what
    belongs to a thread. labels: int64 [N], label_parts: those of each set, by its name. examples: the first
    image of each set, [1, ...].
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = list(parts.values())
        self._thread = ThreadPoolExecutor(1, "dau_fast data sets")
        firsts = [self._thread.submit(part.read_first).result() for part in self._parts]
        self.layout = _find_layout(firsts[0])
        self.examples = [self._pack(part, first) for part, first in zip(self._parts, firsts, strict=True)]
        _check_alike(dict(zip(parts, self.examples, strict=True)))
        self.label_parts = {
            name: self._thread.submit(part.read_labels).result() for name, part in parts.items()
        }
        self.labels = torch.cat(list(self.label_parts.values()))

    def _pack(self, part: Part, first: Inputs) -> Tensor:
        where = f"the first item of the {part.name} set"
        first = match_form(first, self.layout, where)
        if self.layout is None or isinstance(first, Tensor):
            assert isinstance(first, Tensor)
            return first
        self.layout.check({key: tensor[0] for key, tensor in first.items()}, where)
        return self.layout.pack(first)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.examples[0].shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: Tensor, out: Tensor) -> None:
        """Write images `index`, int64 [B], to `out`, [B, ...]; both on the CPU."""
        self._thread.submit(self._read, index, out).result()

    @torch.no_grad()
    def _read(self, index: Tensor, out: Tensor) -> None:
        start = 0
        for part in self._parts:
            rows = ((start <= index) & (index < start + len(part))).nonzero().flatten()
            part.read(index[rows] - start, rows, out, self.layout)
            start += len(part)


def _check_alike(examples: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(image.shape[1:]) for name, image in examples.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"the sets hold images of different shapes {shapes}: give all the same shape")
    kinds = {name: str(image.dtype) for name, image in examples.items()}
    if len({image.is_floating_point() for image in examples.values()}) > 1:
        raise UserError(f"the sets hold images of different types {kinds}: give all the same type")
