"""Encoded images as pixels, by several threads."""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import numpy as np
from torch import Tensor

from dau_fast.errors import UserError

# What images may be, whatever the file's name says: for some other formats Pillow starts programs, such as
# Ghostscript for EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class Encoded(ABC):
    """Encoded images, decoded by `threads` threads. shape: of each, (3, H, W).

    image_size: pixels; the shorter side is resized to it and the centre cropped. None for images that are
    all of one size, that of the first.
    """

    def __init__(self, image_size: int | None, threads: int) -> None:
        self.image_size, self.threads = image_size, threads
        height, width, channels = self._decode(0).shape
        self.shape = channels, height, width
        self._pool = ThreadPoolExecutor(threads, "dau_fast decoder")

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def fetch(self, number: int) -> str | BytesIO:
        """Image `number` as it is stored: a file's path or its content. UserError where there is none."""

    @abstractmethod
    def describe(self, number: int) -> str:
        """What messages call image `number`."""

    def read(self, index: Tensor, out: Tensor) -> None:
        """Write the pixels of images `index`, int64 [B], to `out`, uint8 [B, H, W, 3], as Source says."""
        rows, numbers, pixels = itertools.count(), index.tolist(), out.numpy()

        def work() -> None:
            while (row := next(rows)) < len(numbers):
                self._read_one(numbers[row], pixels[row])

        # One job a thread and not one an image: on two cores handing over took a fifth of the time.
        for job in [self._pool.submit(work) for _ in range(min(self.threads, len(numbers)))]:
            job.result()

    def _read_one(self, number: int, out: np.ndarray) -> None:
        pixels = self._decode(number)
        if pixels.shape != out.shape:
            raise UserError(
                f"images differ in size ({self.describe(number)} is not like {self.describe(0)}): "
                "add `image_size=PIXELS` to resize them"
            )
        out[...] = pixels

    def _decode(self, number: int) -> np.ndarray:
        return decode(self.fetch(number), self.describe(number), self.image_size)


def count_decoder_threads(processes: int) -> int:
    """How many threads are this process's share of the cores, where `processes` share them; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


def decode(content: str | BytesIO, name: str, image_size: int | None) -> np.ndarray:
    """One image as uint8 [H, W, 3]; image_size as above.

    Raises UserError, with its `name`, for what is damaged or in none of FORMATS.
    """
    from PIL import Image
    from torchvision.transforms import functional as transforms

    try:
        with Image.open(content, formats=FORMATS) as file:
            file.load()
            # Converting what needs none would copy it.
            image = file if file.mode == "RGB" else _to_rgb(file)
    except UserError as error:
        raise UserError(f"{name} {error}") from error
    # What Pillow's decoders raise for damaged images has no common type, and they do not say what they raise.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{name} is not a readable image of {', '.join(FORMATS)}: remove or replace it ({reason})"
        ) from error
    if image_size is not None and image.size != (image_size, image_size):
        image = transforms.center_crop(transforms.resize(image, image_size), image_size)
    return np.asarray(image)


def _to_rgb(image: Any) -> Any:
    """Pillow's `image` with three channels of 8 bits. UserError, without its name, where it has no range.

    16 bits are scaled to 8: Pillow's own conversion would cut them off at 255.
    """
    from PIL import Image

    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if sixteen_bits:
        image = Image.fromarray(np.round(np.asarray(image, dtype=np.float32) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise UserError(
            f"holds {kind}, of which nobody says what is white: store it with 8 or 16 bits a channel"
        )
    return image.convert("RGB")
