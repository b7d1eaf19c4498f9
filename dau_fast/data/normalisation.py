"""Means and standard deviations that pixels are normalised with before a network sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from dau_fast.data.images import Images
from dau_fast.errors import UserError

T = TypeVar("T", bound=Images)

Constants = tuple[Sequence[float], Sequence[float]]

# In units of pixel / 255. From torchvision's and timm's model cards, and OpenAI's CLIP.
NORMALISATIONS: dict[str, Constants] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "half": ((0.5,), (0.5,)),
    "none": ((0.0,), (1.0,)),
}


def parse_normalisation(mean: str | None, std: str | None, channels: int) -> Constants | None:
    """The constants that `mean` and `std` stand for, one of each a channel; None where neither is given.

    Each: numbers from 0 to 1 with commas between, one for all channels or one a channel; or one of
    NORMALISATIONS, which as `mean` stands for both. Raises UserError for anything else.
    """
    if mean is None and std is None:
        return None
    if mean is None or (std is None and mean not in NORMALISATIONS):
        raise UserError(
            "`mean` and `std` belong together: give numbers for both, or as `mean` one of "
            f"{', '.join(NORMALISATIONS)}"
        )
    means = _read("mean", mean, 0, channels)
    return means, _read("std", mean if std is None else std, 1, channels)


def _read(field: str, text: str, which: int, channels: int) -> list[float]:
    if text in NORMALISATIONS:
        numbers = list(NORMALISATIONS[text][which])
    else:
        numbers = [_number(field, text, word) for word in text.split(",")]
    if len(numbers) not in (1, channels):
        raise UserError(
            f"`{field}={text}` has {len(numbers)} numbers for images of {channels} channels: expected 1 or "
            f"{channels}"
        )
    return numbers * channels if len(numbers) == 1 else numbers


def _number(field: str, text: str, word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1 or (field == "std" and number == 0):
        raise UserError(
            f"`{field}={text}`: expected numbers {'above' if field == 'std' else 'from'} 0 to 1, in units of "
            f"pixel / 255, or one of {', '.join(NORMALISATIONS)}"
        )
    return number


def normalise_by(images: T, constants: Constants) -> T:
    """`images` whose batches are normalised by other `constants`."""
    mean, std = (torch.tensor(values, dtype=torch.float32, device=images.device) for values in constants)
    return replace(images, mean=mean, std=std)


def describe_normalisation(images: Images) -> str:
    """Mean and standard deviation in words, as options take them."""
    mean, std = (",".join(f"{value:.4g}" for value in of.tolist()) for of in (images.mean, images.std))
    return f"mean {mean} and standard deviation {std}"
