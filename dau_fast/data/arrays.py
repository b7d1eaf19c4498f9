"""Data sets in NumPy arrays, of which only the images asked for are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dau_fast.data.paths import OpenFile, check_regular
from dau_fast.data.stored import VALIDATION_FOLDERS, Stored, check_labels
from dau_fast.errors import UserError


def read_arrays(folder: Path) -> Stored:
    """folder/train/images.npy, uint8 [N, H, W, channels], and labels.npy, integers [N]; test/ alike.

    So is val/ (or valid/, validation/), where there is one. Raises UserError for files that are missing or
    hold something else.
    """
    held_out = [name for name in VALIDATION_FOLDERS if (folder / name).is_dir()][:1]
    parts = ["train", *held_out, "test"]
    source = Arrays([folder / part / "images.npy" for part in parts])
    paths = [folder / part / "labels.npy" for part in parts]
    train, *others = (_read_labels(path, len(part)) for path, part in zip(paths, source.parts, strict=True))
    for path, other in zip(paths[1:], others, strict=True):
        count = check_labels((f"'{paths[0]}'", train), (f"'{path}'", other))
    labels = torch.from_numpy(np.concatenate([train, *others]).astype(np.int64))
    validation = sum(map(len, others[:-1]))
    return Stored(source, labels, tuple(str(label) for label in range(count)), len(train), validation)


class ArrayFile:
    """The array in the .npy file `path`, which is not empty and whose header does not lie about its length.

    Raises UserError where it is no array.
    """

    def __init__(self, path: Path) -> None:
        self.path, array = path, _map_array(path)
        self.dtype, self.shape = array.dtype, array.shape
        self.c_contiguous = array.flags.c_contiguous
        self._offset, self._row_bytes = array.offset, array.nbytes // len(array) if array.ndim else 0
        self._file = OpenFile(path)

    def __len__(self) -> int:
        return self.shape[0]

    def read_row(self, number: int, out: np.ndarray) -> None:
        """Write row `number` to `out`, which is contiguous. May be called by several threads."""
        self._file.read_into(out.data, self._offset + number * self._row_bytes)

    def read(self) -> np.ndarray:
        """All of it."""
        numbers = np.empty(self.shape, self.dtype)
        self._file.read_into(numbers.data.cast("B"), self._offset)
        return numbers


class Arrays:
    """Arrays in files, uint8 [N, H, W, channels] in C order, one after the other, as a Source."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.parts = [ArrayFile(path) for path in paths]
        first = self.parts[0]
        for part in self.parts:
            _check_images(part)
            if part.shape[1:] != first.shape[1:]:
                raise UserError(
                    f"'{part.path}' holds images of shape {list(part.shape[1:])} and '{first.path}' of "
                    f"{list(first.shape[1:])}: give both the same shape"
                )
        height, width, channels = first.shape[1:]
        self.shape = channels, height, width

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def read(self, index: Tensor, out: Tensor) -> None:
        """Write images `index`, int64 [B], to `out`, uint8 [B, H, W, channels], as Source says."""
        # Row by row, as PyTorch's indexing takes ten times as long: it copies twice, and to new memory.
        for number, pixels in zip(index.tolist(), out.numpy(), strict=True):
            for part in self.parts:
                if number < len(part):
                    part.read_row(number, pixels)
                    break
                number -= len(part)


def _map_array(path: Path) -> np.memmap:
    """The array in the .npy file `path`, memory-mapped and not empty. Raises UserError where it is none."""
    check_regular(path, f"'{path}'")
    try:
        with np.errstate(over="ignore"):
            array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise UserError(f"'{path}' is missing: expected a NumPy array, as numpy.save writes it") from error
    # What NumPy's parser of headers raises has no common type: OverflowError and TokenError among others.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"'{path}' is not a readable NumPy array: write it with numpy.save ({reason})"
        ) from error
    if array.size == 0:
        raise UserError(f"'{path}' holds no numbers: shape {list(array.shape)}, expected at least one image")
    return array


def _check_images(array: ArrayFile) -> None:
    """UserError unless `array` may be images: its last axis, the channels, is no longer than H and W."""
    if array.dtype != np.uint8 or len(array.shape) != 4 or array.shape[3] > min(array.shape[1:3]):
        raise UserError(
            f"'{array.path}' is {array.dtype} of shape {list(array.shape)}: expected uint8 images "
            "[N, height, width, channels]"
        )
    if not array.c_contiguous:
        raise UserError(
            f"'{array.path}' is in Fortran order, which scatters every image over the file: write "
            "numpy.ascontiguousarray of it"
        )


def _read_labels(path: Path, count: int) -> np.ndarray:
    """Integers [count] of a .npy file. Raises UserError where it holds something else."""
    labels = ArrayFile(path)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise UserError(
            f"'{path}' is {labels.dtype} of shape {list(labels.shape)}: expected integers of shape "
            f"[{count}], one for each image"
        )
    return labels.read()
