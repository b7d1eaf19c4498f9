"""Margins of EasyDUB's public bank: 200 originals and, for each of ten forget sets, 200 retrained models.

CIFAR-10, ResNet-9 (Rinberg et al. 2026, arXiv 2602.16400). With its files KLoM needs no training. The layout
is that of the dataset card (easydub/EasyDUB-dataset) and of the code beside it, both read, the files not:

    forget_sets/cifar10/forget_set_<Z>.npy                              indices [F] into the training images
    margins/cifar10/pretrain/{retain,val,forget_<Z>}/resnet9/id_<X>_epoch_<E>.npy      one original X, [n]
    margins/cifar10/oracle/forget_<Z>/{retain,val,forget}/resnet9/id_<X>_epoch_<E>.npy   one retrained X, [n]

`retain` holds all training images of an original, the forget set included, and of a retrained model those
without it, in the same order. A margin is `support.outputs.margins`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dau_fast.errors import UserError

PARTS = ("forget", "retain", "val")
_FILE = re.compile(r"id_(\d+)_epoch_\d+\.npy")


@dataclass(frozen=True)
class Margins:
    """Of the same n images in the same order: originals [M, n] and retrained models [K, n]."""

    originals: np.ndarray
    retrained: np.ndarray


def read_margins(folder: Path, forget_set: int, part: str, models: int | None = None) -> Margins:
    """Margins on `part`, one of PARTS, of `forget_set`, a number.

    models: how many of each kind, the first ones; None for all. Raises UserError for what is missing,
    damaged, or does not fit together.
    """
    if part not in PARTS:
        raise UserError(f"unknown part '{part}': expected one of {', '.join(PARTS)}")
    root, forget = folder / "margins" / "cifar10", f"forget_{forget_set}"
    originals = _stack(root / "pretrain" / (forget if part == "forget" else part), models)
    retrained = _stack(root / "oracle" / forget / part, models)
    if part == "retain" and originals.shape[1] > retrained.shape[1]:
        index = read_forget_set(folder, forget_set)
        if index.max() >= originals.shape[1]:
            raise UserError(f"forget set {forget_set} names image {index.max()} of {originals.shape[1]}")
        originals = np.delete(originals, index, axis=1)
    if originals.shape[1] != retrained.shape[1]:
        raise UserError(
            f"'{folder}': originals have margins of {originals.shape[1]} {part} images, retrained models of "
            f"{retrained.shape[1]}: fetch the files of forget set {forget_set} again"
        )
    return Margins(originals, retrained)


def read_forget_set(folder: Path, forget_set: int) -> np.ndarray:
    """Indices into the 50,000 training images, int64 [F]; UserError as above."""
    index = _read(folder / "forget_sets" / "cifar10" / f"forget_set_{forget_set}.npy").astype(np.int64)
    if len(index) == 0 or index.min() < 0 or len(np.unique(index)) < len(index):
        raise UserError(f"forget set {forget_set} of '{folder}' is not a list of different indices from 0 up")
    return index


def _stack(folder: Path, models: int | None) -> np.ndarray:
    """The arrays of all models below `folder`, by number, [models, n]."""
    place = folder / "resnet9"
    found: dict[int, Path] = {}
    for path in sorted(place.glob("id_*.npy")):
        match = _FILE.fullmatch(path.name)
        number = int(match[1]) if match else -1
        if match is None or number in found:
            raise UserError(f"'{path}' is not expected: a model has one file, id_<number>_epoch_<number>.npy")
        found[number] = path
    if len(found) < (models or 1):
        raise UserError(f"'{place}' holds {len(found)} models: fetch {models or 'some'}")
    arrays = [_read(found[number]) for number in sorted(found)[:models]]
    if any(array.shape != arrays[0].shape for array in arrays):
        raise UserError(f"models in '{place}' have margins of different numbers of images")
    return np.stack(arrays)


def _read(path: Path) -> np.ndarray:
    """An array [n] of numbers."""
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "fiu":
        raise UserError(f"'{path}' holds {array.dtype} {list(array.shape)}: expected numbers [n]")
    return array
