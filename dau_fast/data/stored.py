"""Data sets on the disk, which may be larger than memory: what is in them, and whether to stream it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dau_fast.data.images import Augmentation, Images
from dau_fast.data.memory import free_memory
from dau_fast.data.progress import Progress
from dau_fast.data.streaming import Source, StreamedImages
from dau_fast.errors import UserError

# What people call the part that is held out while training.
VALIDATION_FOLDERS = ("val", "valid", "validation")

# Images that are read at once where all are.
_CHUNK = 256


@dataclass(frozen=True)
class Stored:
    """A data set on the disk. labels: int64 [N]. names: of the images, files as a rule, where they have any.

    The training part's images come first, then those of the validation part and of the test part, if there
    are such parts. train, validation: how many images there are of each.
    """

    source: Source
    labels: Tensor
    class_names: tuple[str, ...]
    train: int
    validation: int = 0
    names: tuple[str, ...] = ()

    def make_images(self, device: torch.device, *, streamed: bool, progress: Progress) -> Images:
        """The images on `device`: all of the pixels or, `streamed`, none of them."""
        channels, height, width = self.source.shape
        held = torch.empty((0 if streamed else len(self.source), height, width, channels), dtype=torch.uint8)
        # At most 9,999 of the training part, and no other.
        sample = torch.arange(0, self.train, max(1, self.train // 5000))
        if streamed:
            mean, std = _mean_and_std(_read_chunks(self.source, sample, progress))
        else:
            start = 0
            for chunk in _read_chunks(self.source, torch.arange(len(held)), progress):
                held[start : start + len(chunk)] = chunk
                start += len(chunk)
            mean, std = _mean_and_std(held[rows] for rows in sample.split(_CHUNK))
        augmentation = Augmentation(pad=max(1, width // 8), flip=True)
        known: dict[str, Any] = {
            "pixels": held.permute(0, 3, 1, 2),
            "labels": self.labels,
            "class_names": self.class_names,
            "test": self._number(self.train + self.validation, len(self.source)),
            "validation": self._number(self.train, self.train + self.validation),
            "mean": mean,
            "std": std,
            "augmentation": augmentation,
            "names": self.names,
        }
        return (StreamedImages(**known, source=self.source) if streamed else Images(**known)).to(device)

    @staticmethod
    def _number(start: int, stop: int) -> Tensor | None:
        """The images of a part, None where there is none."""
        return torch.arange(start, stop) if start < stop else None


def _read_chunks(source: Source, index: Tensor, progress: Progress) -> Iterator[Tensor]:
    """Pixels [B, H, W, channels] of images `index` [N], one part after the other."""
    channels, height, width = source.shape
    advance = progress("reading images", len(index))
    for rows in index.split(_CHUNK):
        chunk = torch.empty((len(rows), height, width, channels), dtype=torch.uint8)
        source.read(rows, chunk)
        yield chunk
        for _ in range(len(rows)):
            advance()


def _mean_and_std(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each channel of pixels [B, H, W, channels], in units of pixel / 255; float32 [channels].

    From counts of the 256 values, so that it does not matter which images a part holds.
    """
    counts: Tensor | int = 0
    for part in parts:
        columns = part.flatten(0, 2).unbind(1)
        counts = counts + torch.stack([torch.bincount(column, minlength=256) for column in columns])
    assert isinstance(counts, Tensor)
    values, counts = torch.arange(256, dtype=torch.float64) / 255, counts.double()
    count = counts.sum(1)
    mean = counts @ values / count
    variance = (counts * (values - mean[:, None]).square()).sum(1) / (count - 1).clamp_min(1)
    return mean.float(), variance.sqrt().float().clamp_min(1e-3)


def choose_streaming(source: Source, stream: str, device: torch.device, processes: int) -> bool:
    """Whether to stream; says so where nobody asked. Raises UserError for images that do not fit and must.

    processes: how many on this machine do the same, each on a GPU of its own or all on the CPU.
    """
    if stream == "on":
        return True
    needed = len(source) * math.prod(source.shape)
    # All images are read into the CPU's memory before any of them is on a GPU.
    free = free_memory(torch.device("cpu")) // processes
    if device.type != "cpu":
        free = min(free, free_memory(device))
    each = "" if processes == 1 else f" for each of {processes} processes"
    sizes = f"{needed / 1e9:.1f} GB as uint8, and {free / 1e9:.1f} GB of memory are free{each}"
    if stream == "off" and needed > free:
        raise UserError(f"the images do not fit into memory ({sizes}): leave `stream=off` out")
    if stream == "off" or needed <= free / 2:
        return False
    logging.getLogger("dau_fast").warning("images are streamed, as they take %s", sizes)
    return True


def check_labels(train: tuple[str, np.ndarray], test: tuple[str, np.ndarray]) -> int:
    """How many classes there are. UserError, which names a part, for labels that do not count from 0."""
    (part, labels), (test_part, test_labels) = train, test
    classes = np.unique(labels)
    if not np.array_equal(classes, np.arange(len(classes))):
        missing = next(label for label, found in enumerate(classes) if label != found)
        raise UserError(
            f"{part} has labels from {classes[0]} to {classes[-1]} but no {missing}: expected every "
            "number from 0 to the largest"
        )
    unknown = test_labels[~np.isin(test_labels, classes)]
    if len(unknown):
        raise UserError(
            f"{test_part} has the label {unknown[0]}, which no training image has: expected 0 to "
            f"{classes[-1]}"
        )
    return len(classes)
