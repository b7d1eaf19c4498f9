"""Data sets in NumPy arrays, which are memory-mapped: only the pages of the images asked for are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dau_fast.data.paths import check_regular
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


class Arrays:
    """Memory-mapped arrays, uint8 [N, H, W, channels] in C order, one after the other, as a Source."""

    def __init__(self, paths: Sequence[Path]) -> None:
        arrays = [map_array(path) for path in paths]
        for path, array in zip(paths, arrays, strict=True):
            _check_images(path, array)
            if array.shape[1:] != arrays[0].shape[1:]:
                raise UserError(
                    f"'{path}' holds images of shape {list(array.shape[1:])} and '{paths[0]}' of "
                    f"{list(arrays[0].shape[1:])}: give both the same shape"
                )
        self.parts = arrays
        height, width, channels = arrays[0].shape[1:]
        self.shape = channels, height, width

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def read(self, index: Tensor, out: Tensor) -> None:
        """Write images `index`, int64 [B], to `out`, uint8 [B, H, W, channels], as Source says."""
        # Row by row, as PyTorch's indexing takes ten times as long: it copies twice, and to new memory.
        for number, pixels in zip(index.tolist(), out.numpy(), strict=True):
            for part in self.parts:
                if number < len(part):
                    pixels[...] = part[number]
                    break
                number -= len(part)


def map_array(path: Path) -> np.ndarray:
    """The array in the .npy file `path`, memory-mapped and not empty. Raises UserError where it is none."""
    check_regular(path, f"'{path}'")
    try:
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise UserError(f"'{path}' is missing: expected a NumPy array, as numpy.save writes it") from error
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"'{path}' is not a readable NumPy array: write it with numpy.save ({reason})"
        ) from error
    if array.size == 0:
        raise UserError(f"'{path}' holds no numbers: shape {list(array.shape)}, expected at least one image")
    return array


def _check_images(path: Path, array: np.ndarray) -> None:
    """UserError unless `array` may be images: its last axis, the channels, is no longer than H and W."""
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] > min(array.shape[1:3]):
        raise UserError(
            f"'{path}' is {array.dtype} of shape {list(array.shape)}: expected uint8 images "
            "[N, height, width, channels]"
        )
    if not array.flags.c_contiguous:
        raise UserError(
            f"'{path}' is in Fortran order, which scatters every image over the file: write "
            "numpy.ascontiguousarray of it"
        )


def _read_labels(path: Path, count: int) -> np.ndarray:
    """Integers [count] of a .npy file. Raises UserError where it holds something else."""
    labels = map_array(path)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise UserError(
            f"'{path}' is {labels.dtype} of shape {list(labels.shape)}: expected integers of shape "
            f"[{count}], one for each image"
        )
    return np.array(labels)
