"""Where pixels come from that are read when they are needed: image files, and arrays in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from dau_fast.data.decoding import Encoded
from dau_fast.errors import UserError


class Source(Protocol):
    """Images that are not in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each, (channels, H, W) where they are uint8."""

    def __len__(self) -> int:
        """How many images there are."""

    def read(self, index: Tensor, out: Tensor) -> None:
        """Write the pixels of images `index`, int64 [B], to `out`; no others.

        out: uint8 [B, H, W, channels], or floating-point [B, ...]. Both on the CPU. May be called by several
        threads. Raises UserError for an image that cannot be read.
        """


class Files(Encoded):
    """Image files."""

    def __init__(self, paths: Sequence[str], image_size: int | None, threads: int) -> None:
        self.paths = paths
        super().__init__(image_size, threads)

    def __len__(self) -> int:
        return len(self.paths)

    def content(self, number: int) -> str:
        return self.paths[number]

    def name(self, number: int) -> str:
        return f"'{self.paths[number]}'"


class Arrays:
    """Memory-mapped arrays, uint8 [N, H, W, channels] in C order, one after the other.

    The system reads the pages of the images that are asked for.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        arrays = [mapped(path) for path in paths]
        for path, array in zip(paths, arrays, strict=True):
            _check_images(path, array)
            if array.shape[1:] != arrays[0].shape[1:]:
                raise UserError(
                    f"'{path}' holds images of shape {_said(array.shape[1:])} and '{paths[0]}' of "
                    f"{_said(arrays[0].shape[1:])}: give both the same shape"
                )
        self.parts = arrays
        height, width, channels = arrays[0].shape[1:]
        self.shape = channels, height, width

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def read(self, index: Tensor, out: Tensor) -> None:
        # Row by row, as PyTorch's indexing takes ten times as long: it copies twice, and to new memory.
        for number, pixels in zip(index.tolist(), out.numpy(), strict=True):
            for part in self.parts:
                if number < len(part):
                    pixels[...] = part[number]
                    break
                number -= len(part)


def mapped(path: Path) -> np.ndarray:
    """The array in the .npy file `path`, memory-mapped and not empty. Raises UserError where it is none."""
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
        raise UserError(f"'{path}' holds no numbers: shape {_said(array.shape)}, expected at least one image")
    return array


def _check_images(path: Path, array: np.ndarray) -> None:
    """UserError unless `array` may be images: its last axis, the channels, is no longer than H and W."""
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] > min(array.shape[1:3]):
        raise UserError(
            f"'{path}' is {array.dtype} of shape {_said(array.shape)}: expected uint8 images "
            "[N, height, width, channels]"
        )
    if not array.flags.c_contiguous:
        raise UserError(
            f"'{path}' is in Fortran order, which scatters every image over the file: write "
            "numpy.ascontiguousarray of it"
        )


def _said(shape: Sequence[int]) -> str:
    return str(list(shape))
