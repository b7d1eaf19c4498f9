"""Whether an image that is to be forgotten also stands in another set, or a second time in its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dau_fast.errors import UserError

# Numbers of an image that are compared before whole images are: few images agree in all of them.
_SAMPLED = 64


def check_disjoint(sets: Mapping[str, Tensor]) -> None:
    """UserError where an image of the set "forget" is in `sets` a second time.

    sets: images [N, ...] by name, of one dtype and shape. Equal means equal bit by bit.
    """
    forget = sets["forget"]
    first = _first_places(forget)
    for name, images in sets.items():
        for place, key in _candidates(images, {key for key, _ in first}):
            found = first.get((key, _digest(images[place])))
            if found is None or (name == "forget" and found == place):
                continue
            raise _overlap(found, place, name)


def find_copies(images: Tensor, places: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of one of `places` and another place whose images, of `images` [N, ...], are equal bit by bit."""
    at = torch.tensor(places, dtype=torch.int64, device=images.device)
    first = {key: places[place] for key, place in _first_places(images[at]).items()}
    asked = set(places)
    candidates = _candidates(images, {key for key, _ in first})
    copies = [(first.get((key, _digest(images[i]))), i) for i, key in candidates if i not in asked]
    return [(place, other) for place, other in copies if place is not None]


def check_subsets(sets: Mapping[str, Any]) -> None:
    """The same of data sets by what they are made of: parts of one data set that share an item, or itself.

    Nothing is read, so that what is in the items does not matter.
    """
    if not isinstance(sets["forget"], Dataset):
        return
    owner, forgotten = _items(sets["forget"])
    first: dict[int, int] = {}
    for place, item in enumerate(forgotten):
        if first.setdefault(item, place) != place:
            raise _overlap(first[item], place, "forget")
    for name, data in sets.items():
        other, items = _items(data)
        if name == "forget" or other is not owner:
            continue
        for place, item in enumerate(items):
            if item in first:
                raise _overlap(first[item], place, name)


def _overlap(place: int, other: int, name: str) -> UserError:
    return UserError(
        f"image {place} of the forget set is also image {other} of the {name} set: what is to be forgotten "
        "stands in no other set, and once in its own; leave it out of one"
    )


def _items(data: Any) -> tuple[Any, Sequence[int]]:
    """What `data` is a part of, or itself, and its items there."""
    if type(data) is Subset:
        return data.dataset, [int(item) for item in data.indices]
    return data, range(len(data))


def _first_places(images: Tensor) -> dict[tuple[bytes, bytes], int]:
    """Where each image comes first, by its sample and its digest."""
    found: dict[tuple[bytes, bytes], int] = {}
    for place, sample in enumerate(_samples(images)):
        found.setdefault((sample, _digest(images[place])), place)
    return found


def _candidates(images: Tensor, known: set[bytes]) -> Iterator[tuple[int, bytes]]:
    """The images whose sample is `known`: their place and that."""
    return ((place, sample) for place, sample in enumerate(_samples(images)) if sample in known)


def _samples(images: Tensor) -> Iterator[bytes]:
    """A few numbers of each image, spread over it, as bytes."""
    rows = images.detach().flatten(1)
    places = torch.linspace(0, max(0, rows.shape[1] - 1), _SAMPLED, device=rows.device).long()
    sampled = rows[:, places] if rows.shape[1] else rows
    content = sampled.contiguous().cpu().view(torch.uint8).numpy()
    return (row.tobytes() for row in content)


def _digest(image: Tensor) -> bytes:
    content = image.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(content.tobytes(), digest_size=16).digest()
