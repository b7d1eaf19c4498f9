"""The data sets that can be named, and how each is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dau_fast.data.arrow import arrow
from dau_fast.data.decoding import decoder_threads
from dau_fast.data.images import Augmentation, Images
from dau_fast.data.stored import Announce, Stored, arrays, folder_of_files, streams
from dau_fast.errors import UserError, exists

__all__ = ["NAMES", "STREAMING", "Augmentation", "Images", "load"]

STREAMING = ("auto", "on", "off")


def load(
    name: str,
    folder: Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    stream: str = "auto",
    device: torch.device | None = None,
    processes: int = 1,
    progress: Announce = lambda _description, _steps: lambda: None,
) -> Images:
    """Read data set `name` (one of `NAMES`) from `folder` onto `device`, None for the CPU.

    image_size: pixels; `folder` and `arrow` only: shorter side resized, centre cropped.
    stream: one of STREAMING, for those of STORED; auto streams what would take more than half of the
    memory that is free. processes: how many on this machine share its cores and memory.
    progress: called with a description and a number of steps; what it returns is called after each.
    Raises UserError for an unknown name, for a missing or unreadable folder, and for images that do not fit.
    """
    device = device or torch.device("cpu")
    if stream not in STREAMING:
        raise UserError(f"unknown streaming '{stream}': expected one of {', '.join(STREAMING)}")
    if name not in NAMES:
        raise UserError(f"unknown dataset '{name}': expected one of {', '.join(NAMES)}")
    if name in STORED:
        if folder is None:
            raise UserError(f"--dataset {name} needs --data DIR, a folder that holds train/ and test/")
        if not exists(folder, "folder"):
            raise UserError(f"--data '{folder}' is not a folder: name one that holds train/ and test/")
        stored = _stored(name, folder, image_size, decoder_threads(processes))
        streamed = streams(stored.source, stream, device, processes)
        return stored.images(device, streamed=streamed, progress=progress)
    if stream == "on":
        raise UserError(f"--stream on is for {', '.join(STORED)}: leave it out, {name} is small")
    images = _digits() if name == "digits" else _torchvision(name, folder or Path("data"), download)
    return images.to(device)


def _stored(name: str, folder: Path, image_size: int | None, threads: int) -> Stored:
    if name == "arrays":
        return arrays(folder)
    return (folder_of_files if name == "folder" else arrow)(folder, image_size, threads)


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

# Those that may be larger than memory.
STORED = ("folder", "arrays", "arrow")
NAMES = ("digits", *_TORCHVISION, *STORED)


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
