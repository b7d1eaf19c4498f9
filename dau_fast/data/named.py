"""The data sets that have a name, and how each is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dau_fast.data.arrays import read_arrays
from dau_fast.data.arrow import read_arrow
from dau_fast.data.decoding import count_decoder_threads
from dau_fast.data.folder import read_folder
from dau_fast.data.images import Augmentation, Images
from dau_fast.data.progress import Progress, silent
from dau_fast.data.stored import Stored, choose_streaming
from dau_fast.errors import UserError, check_choice, exists

STREAMING = ("auto", "on", "off")


def load(
    dataset: str,
    data: Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    stream: str = "auto",
    device: torch.device | None = None,
    processes: int = 1,
    progress: Progress = silent,
) -> Images:
    """Read `dataset` (one of `NAMES`) from the folder `data` onto `device`, None for the CPU.

    image_size: pixels, for those of RESIZED: shorter side resized, centre cropped.
    stream: one of STREAMING, for those of STORED; auto streams what would take more than half of the
    memory that is free. processes: how many on this machine share its cores and memory.
    Raises UserError for an unknown name, for what that data set cannot do, for a missing or unreadable
    folder, and for images that do not fit.
    """
    device = device or torch.device("cpu")
    _check(dataset, image_size, stream)
    if dataset in STORED:
        stored = _read_stored(dataset, data, image_size, count_decoder_threads(processes))
        streamed = choose_streaming(stored.source, stream, device, processes)
        return stored.make_images(device, streamed=streamed, progress=progress)
    images = _read_digits() if dataset == "digits" else _read_torchvision(dataset, data, download)
    return images.to(device)


def _check(dataset: str, image_size: int | None, stream: str) -> None:
    """UserError for names that are unknown, and for what `dataset` could only ignore."""
    check_choice("stream", stream, STREAMING)
    check_choice("dataset", dataset, NAMES)
    if image_size is not None and dataset not in RESIZED:
        raise UserError(
            f"`image_size={image_size}` is for {', '.join(RESIZED)}: leave it out, or store the images of "
            f"{dataset} as files and take `dataset=folder`"
        )
    if stream == "on" and dataset not in STORED:
        raise UserError(f"`stream=on` is for {', '.join(STORED)}: leave it out, {dataset} is small")


def _read_stored(dataset: str, data: Path | None, image_size: int | None, threads: int) -> Stored:
    if data is None:
        raise UserError(f"`dataset={dataset}` needs `data=DIR`, a folder that holds train/ and test/")
    if not exists(data, "folder"):
        raise UserError(f"`data` '{data}' is not a folder: name one that holds train/ and test/")
    return STORED[dataset](data, image_size, threads)


def _read_digits() -> Images:
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

# Those that may be larger than memory. Called with the folder, `image_size` and a number of threads.
STORED: dict[str, Callable[[Path, int | None, int], Stored]] = {
    "folder": read_folder,
    "arrays": lambda data, _image_size, _threads: read_arrays(data),
    "arrow": read_arrow,
}
# Those whose images are decoded one by one, and resized on the way.
RESIZED = ("folder", "arrow")
NAMES = ("digits", *_TORCHVISION, *STORED)


def _read_torchvision(dataset: str, data: Path | None, download: bool) -> Images:
    """CIFAR-10, CIFAR-100 or SVHN as torchvision stores them below `data`, None for the folder data/ here."""
    from torchvision import datasets

    source, folder = _TORCHVISION[dataset], data or Path("data")
    cls = getattr(datasets, source.dataset)
    try:
        parts = [cls(folder, download=download, **part) for part in (source.train, source.test)]
    except (RuntimeError, OSError) as error:
        hint = "check the network and the folder" if download else "add `download=True` to fetch it"
        raise UserError(f"{dataset} cannot be read from '{folder}': {hint} ({error})") from error
    arrays = [torch.as_tensor(part.data) for part in parts]
    if arrays[0].shape[-1] == 3:
        arrays = [array.permute(0, 3, 1, 2) for array in arrays]
    pixels = torch.cat(arrays).contiguous(memory_format=torch.channels_last)
    labels = [torch.as_tensor(part.labels if dataset == "svhn" else part.targets).long() for part in parts]
    names = getattr(parts[0], "classes", None) or [str(digit) for digit in range(10)]
    test = torch.arange(len(labels[0]), len(pixels))
    mean, std = torch.tensor(source.mean), torch.tensor(source.std)
    return Images(pixels, torch.cat(labels), tuple(names), test, mean, std, source.augmentation)
