"""The data sets that can be named, and how each is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dau_fast.errors import UserError, exists
from dau_fast.images import Augmentation, Images

__all__ = ["NAMES", "Augmentation", "Images", "load"]


def load(
    name: str,
    folder: Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    progress: Callable[[str, int], Callable[[], None]] = lambda _description, _steps: lambda: None,
) -> Images:
    """Read data set `name` (one of `NAMES`) from `folder` onto the CPU.

    image_size: pixels; `folder` only: shorter side resized, centre cropped.
    progress: called with a description and a number of steps; what it returns is called after each.
    Raises UserError for an unknown name, and for a missing or unreadable folder.
    """
    if name == "digits":
        return _digits()
    if name in _TORCHVISION:
        return _torchvision(name, folder or Path("data"), download)
    if name == "folder":
        if folder is None:
            raise UserError("--dataset folder needs --data DIR, a folder that holds train/ and test/")
        return _folder(folder, image_size, progress)
    raise UserError(f"unknown dataset '{name}': expected one of {', '.join(NAMES)}")


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

NAMES = ("digits", *_TORCHVISION, "folder")


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


def _folder(
    folder: Path, image_size: int | None, progress: Callable[[str, int], Callable[[], None]]
) -> Images:
    """Images under folder/train/<class>/ and folder/test/<class>/, decoded once."""
    from torchvision.datasets import ImageFolder

    if not exists(folder, "folder"):
        raise UserError(f"--data '{folder}' is not a folder: name one that holds train/ and test/")
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
    advance = progress("reading images", len(files))
    decoded = []
    for path, _ in files:
        decoded.append(_decode(path, image_size))
        advance()
    odd = next((i for i, image in enumerate(decoded) if image.shape != decoded[0].shape), None)
    if odd is not None:
        raise UserError(
            f"images differ in size ('{files[odd][0]}' is not like '{files[0][0]}'): "
            "add --image-size PIXELS to resize them"
        )
    pixels = torch.stack(decoded).contiguous(memory_format=torch.channels_last)
    sample = pixels[: len(train) : max(1, len(train) // 5000)].float().div_(255)
    mean, std = sample.mean(dim=(0, 2, 3)), sample.std(dim=(0, 2, 3)).clamp_min(1e-3)
    return Images(
        pixels,
        torch.tensor([label for _, label in files]),
        tuple(train.classes),
        torch.arange(len(train), len(files)),
        mean,
        std,
        Augmentation(pad=max(1, pixels.shape[-1] // 8), flip=True),
    )


def _decode(path: str, image_size: int | None) -> Tensor:
    """One image file as uint8 [3, H, W]."""
    from PIL import Image
    from torchvision.transforms import functional as transforms

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"'{path}' is not a readable image: remove or replace it") from error
    if image_size is not None:
        image = transforms.center_crop(transforms.resize(image, image_size), image_size)
    return transforms.pil_to_tensor(image)
