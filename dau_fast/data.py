"""The data sets that can be named, and how each is read."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dau_fast.engine.runtime import free_memory
from dau_fast.errors import UserError, exists
from dau_fast.images import Augmentation, Images
from dau_fast.sources import Arrays, Files, Source, mapped
from dau_fast.streaming import StreamedImages

__all__ = ["NAMES", "STREAMING", "Augmentation", "Images", "load"]

STREAMING = ("auto", "on", "off")
# Images that are read at once where all are.
_CHUNK = 256

Announce = Callable[[str, int], Callable[[], None]]


def load(
    name: str,
    folder: Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    stream: str = "auto",
    device: torch.device | None = None,
    progress: Announce = lambda _description, _steps: lambda: None,
) -> Images:
    """Read data set `name` (one of `NAMES`) from `folder` onto `device`, None for the CPU.

    image_size: pixels; `folder` only: shorter side resized, centre cropped.
    stream: one of STREAMING, for `folder` and `arrays`; auto streams what would take more than half of the
    memory that is free. progress: called with a description and a number of steps; what it returns is
    called after each.
    Raises UserError for an unknown name, for a missing or unreadable folder, and for images that do not fit.
    """
    device = device or torch.device("cpu")
    if stream not in STREAMING:
        raise UserError(f"unknown streaming '{stream}': expected one of {', '.join(STREAMING)}")
    if name not in NAMES:
        raise UserError(f"unknown dataset '{name}': expected one of {', '.join(NAMES)}")
    if name in ("folder", "arrays"):
        if folder is None:
            raise UserError(f"--dataset {name} needs --data DIR, a folder that holds train/ and test/")
        if not exists(folder, "folder"):
            raise UserError(f"--data '{folder}' is not a folder: name one that holds train/ and test/")
        stored = _folder(folder, image_size) if name == "folder" else _arrays(folder)
        return stored.images(device, streamed=_streams(stored.source, stream, device), progress=progress)
    if stream == "on":
        raise UserError(f"--stream on is for folder and arrays: leave it out, {name} is small")
    images = _digits() if name == "digits" else _torchvision(name, folder or Path("data"), download)
    return images.to(device)


def _digits() -> Images:
    """The 1,797 8x8 grey-scale digits of scikit-learn, 0..16 scaled to 0..255; no test part."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    names = tuple(str(name) for name in digits.target_names)
    return Images(pixels, labels, names, None, torch.tensor([0.305]), torch.tensor([0.376]))


@dataclass(frozen=True)
class _Source:
    """How torchvision calls a data set, and the constants the literature normalises it with."""

    dataset: str
    train: dict[str, object]
    test: dict[str, object]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augmentation: Augmentation


_TORCHVISION = {
    "cifar10": _Source(
        "CIFAR10",
        {"train": True},
        {"train": False},
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        Augmentation(pad=4, flip=True),
    ),
    "cifar100": _Source(
        "CIFAR100",
        {"train": True},
        {"train": False},
        (0.5071, 0.4866, 0.4409),
        (0.2673, 0.2564, 0.2762),
        Augmentation(pad=4, flip=True),
    ),
    # House numbers must not be mirrored.
    "svhn": _Source(
        "SVHN",
        {"split": "train"},
        {"split": "test"},
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        Augmentation(pad=4),
    ),
}

NAMES = ("digits", *_TORCHVISION, "folder", "arrays")


def _torchvision(name: str, folder: Path, download: bool) -> Images:
    """CIFAR-10, CIFAR-100 or SVHN as torchvision stores them below `folder`."""
    from torchvision import datasets

    source = _TORCHVISION[name]
    cls = getattr(datasets, source.dataset)
    try:
        parts = [cls(folder, download=download, **part) for part in (source.train, source.test)]
    except (RuntimeError, OSError) as error:
        hint = "check the network and the folder" if download else "add --download to fetch it"
        raise UserError(f"{name} cannot be read from '{folder}': {hint} ({error})") from error
    arrays = [torch.as_tensor(part.data) for part in parts]
    if arrays[0].shape[-1] == 3:
        arrays = [array.permute(0, 3, 1, 2) for array in arrays]
    pixels = torch.cat(arrays).contiguous(memory_format=torch.channels_last)
    targets = [torch.as_tensor(part.labels if name == "svhn" else part.targets).long() for part in parts]
    names = getattr(parts[0], "classes", None) or [str(digit) for digit in range(10)]
    test = torch.arange(len(targets[0]), len(pixels))
    return Images(
        pixels,
        torch.cat(targets),
        tuple(names),
        test,
        torch.tensor(source.mean),
        torch.tensor(source.std),
        source.augmentation,
    )


# ---- folders and arrays, which may be larger than memory


@dataclass(frozen=True)
class _Stored:
    """A data set on the disk: the training part's images come first. labels: int64 [N]."""

    source: Source
    labels: Tensor
    class_names: tuple[str, ...]
    train: int

    def images(self, device: torch.device, *, streamed: bool, progress: Announce) -> Images:
        """On `device`: all of the pixels or, `streamed`, none of them."""
        channels, height, width = self.source.shape
        held = torch.empty((0 if streamed else len(self.source), height, width, channels), dtype=torch.uint8)
        # At most 9,999 of the training part, and no other.
        sample = torch.arange(0, self.train, max(1, self.train // 5000))
        if streamed:
            mean, std = _mean_and_std(_chunks(self.source, sample, progress))
        else:
            start = 0
            for chunk in _chunks(self.source, torch.arange(len(held)), progress):
                held[start : start + len(chunk)] = chunk
                start += len(chunk)
            mean, std = _mean_and_std(held[some] for some in sample.split(_CHUNK))
        test = torch.arange(self.train, len(self.source))
        augmentation = Augmentation(pad=max(1, width // 8), flip=True)
        known = held.permute(0, 3, 1, 2), self.labels, self.class_names, test, mean, std, augmentation
        return (StreamedImages(*known, source=self.source) if streamed else Images(*known)).to(device)


def _chunks(source: Source, index: Tensor, progress: Announce) -> Iterator[Tensor]:
    """Pixels [B, H, W, channels] of images `index` [N], one part after the other."""
    channels, height, width = source.shape
    advance = progress("reading images", len(index))
    for some in index.split(_CHUNK):
        chunk = torch.empty((len(some), height, width, channels), dtype=torch.uint8)
        source.read(some, chunk)
        yield chunk
        for _ in range(len(some)):
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


def _streams(source: Source, asked: str, device: torch.device) -> bool:
    """Whether to stream; says so where nobody asked. Raises UserError for images that do not fit and must."""
    if asked == "on":
        return True
    needed = len(source) * math.prod(source.shape)
    # All images are read into the CPU's memory before any of them is on a GPU.
    free = min(free_memory(place) for place in (device, torch.device("cpu")))
    sizes = f"{needed / 1e9:.1f} GB as uint8, and {free / 1e9:.1f} GB of memory are free"
    if asked == "off" and needed > free:
        raise UserError(f"the images do not fit into memory ({sizes}): leave --stream off out")
    if asked == "off" or needed <= free / 2:
        return False
    logging.getLogger("dau_fast").warning("images are streamed, as they take %s", sizes)
    return True


def _folder(folder: Path, image_size: int | None) -> _Stored:
    """Images under folder/train/<class>/ and folder/test/<class>/."""
    from torchvision.datasets import ImageFolder

    parts = []
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise UserError(f"--data '{folder}' has no '{part}' folder: expected {part}/<class>/<image>")
        try:
            parts.append(ImageFolder(os.fspath(folder / part)))
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"'{folder / part}' holds no readable images: {error}") from error
    train, test = parts
    if train.classes != test.classes:
        differing = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
        raise UserError(
            f"train/ and test/ of '{folder}' differ in classes ({differing}): "
            "give both the same class folders"
        )
    files = train.samples + test.samples
    labels = torch.tensor([label for _, label in files])
    source = Files([path for path, _ in files], image_size)
    return _Stored(source, labels, tuple(train.classes), len(train))


def _arrays(folder: Path) -> _Stored:
    """folder/train/images.npy, uint8 [N, H, W, channels], and labels.npy, integers [N]; test/ alike."""
    source = Arrays([folder / part / "images.npy" for part in ("train", "test")])
    paths = [folder / part / "labels.npy" for part in ("train", "test")]
    train, test = (_labels(path, len(part)) for path, part in zip(paths, source.parts, strict=True))
    classes = np.unique(train)
    if not np.array_equal(classes, np.arange(len(classes))):
        missing = next(label for label, found in enumerate(classes) if label != found)
        raise UserError(
            f"'{paths[0]}' has labels from {classes[0]} to {classes[-1]} but no {missing}: expected every "
            "number from 0 to the largest"
        )
    unknown = test[~np.isin(test, classes)]
    if len(unknown):
        raise UserError(
            f"'{paths[1]}' has the label {unknown[0]}, which no training image has: expected 0 to "
            f"{classes[-1]}"
        )
    labels = torch.from_numpy(np.concatenate([train, test]).astype(np.int64))
    return _Stored(source, labels, tuple(str(label) for label in classes), len(train))


def _labels(path: Path, count: int) -> np.ndarray:
    """Integers [count] of a .npy file. Raises UserError where it holds something else."""
    labels = mapped(path)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise UserError(
            f"'{path}' is {labels.dtype} of shape {list(labels.shape)}: expected integers of shape "
            f"[{count}], one for each image"
        )
    return np.array(labels)
