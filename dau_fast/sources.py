"""Where pixels come from that are read when they are needed: image files, and arrays in files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dau_fast.errors import UserError


class Source(Protocol):
    """Images on a disk. shape: of each, (channels, H, W)."""

    shape: tuple[int, int, int]

    def __len__(self) -> int:
        """How many images there are."""

    def read(self, index: Tensor, out: Tensor) -> None:
        """Write the pixels of images `index`, int64 [B], to `out`, uint8 [B, H, W, channels]; no others.

        Both on the CPU. Raises UserError for an image that cannot be read. May be called by several threads.
        """


class Files:
    """Image files, decoded by as many threads as there are cores.

    image_size: pixels; the shorter side is resized to it and the centre cropped. None for files that are
    all of one size, that of the first.
    """

    def __init__(self, paths: Sequence[str], image_size: int | None) -> None:
        self.paths, self.image_size = paths, image_size
        height, width, channels = decode(paths[0], image_size).shape
        self.shape = channels, height, width
        self._pool = ThreadPoolExecutor(_cores(), "dau_fast decoder")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: Tensor, out: Tensor) -> None:
        # A list, because errors come out where results are taken.
        list(self._pool.map(self._read_one, index.tolist(), out.numpy()))

    def _read_one(self, number: int, out: np.ndarray) -> None:
        pixels = decode(self.paths[number], self.image_size)
        if pixels.shape != out.shape:
            raise UserError(
                f"images differ in size ('{self.paths[number]}' is not like '{self.paths[0]}'): "
                "add --image-size PIXELS to resize them"
            )
        out[...] = pixels


def _cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode(path: str, image_size: int | None) -> np.ndarray:
    """One image file as uint8 [H, W, 3]. Raises UserError where it is none."""
    from PIL import Image
    from torchvision.transforms import functional as transforms

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"'{path}' is not a readable image: remove or replace it") from error
    if image_size is not None:
        image = transforms.center_crop(transforms.resize(image, image_size), image_size)
    return np.asarray(image)


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
        self.parts = [torch.from_numpy(array) for array in arrays]
        height, width, channels = arrays[0].shape[1:]
        self.shape = channels, height, width

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def read(self, index: Tensor, out: Tensor) -> None:
        start = 0
        for part in self.parts:
            rows = ((start <= index) & (index < start + len(part))).nonzero().flatten()
            out.index_copy_(0, rows, part.index_select(0, index[rows] - start))
            start += len(part)


def mapped(path: Path) -> np.ndarray:
    """The array in the .npy file `path`, memory-mapped and not empty. Raises UserError where it is none."""
    try:
        # Copy on write: PyTorch warns of memory that cannot be written, and the file stays as it is.
        array: np.ndarray = np.lib.format.open_memmap(path, mode="c")
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
