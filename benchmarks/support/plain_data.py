"""What research code usually makes of images: PIL pictures behind a Dataset, transforms and DataLoaders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from dau_fast.config import DauConfig, TrainingRecipe
from dau_fast.data.images import Images
from dau_fast.data.split import Split

Batch = tuple[Tensor, ...]


class Pictures(Dataset[tuple[Any, ...]]):
    """`images` as (tensor, label) pairs, each made from a PIL image when it is asked for."""

    def __init__(self, images: Images, augmented: bool) -> None:
        pixels = images.pixels.cpu().permute(0, 2, 3, 1).numpy()
        self.pictures = [Image.fromarray(p.squeeze(-1) if p.shape[-1] == 1 else p) for p in pixels]
        self.labels = images.labels.tolist()
        steps: list[nn.Module] = []
        if augmented and images.augmentation.pad:
            steps.append(transforms.RandomCrop(images.shape[-1], padding=images.augmentation.pad))
        if augmented and images.augmentation.flip:
            steps.append(transforms.RandomHorizontalFlip())
        normalise = transforms.Normalize(images.mean.tolist(), images.std.tolist())
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.transform(self.pictures[index]), self.labels[index]


@dataclass(frozen=True)
class Job:
    """What both ways of the main job share. network: newly initialised, ending in its classifier `head`."""

    images: Images
    split: Split
    network: nn.Module
    head: str
    recipe: TrainingRecipe
    config: DauConfig

    @property
    def device(self) -> torch.device:
        return self.images.device


def loader(data: Dataset[tuple[Any, ...]], index: Tensor, batch_size: int) -> DataLoader[Batch]:
    """Shuffled full batches; small images are loaded faster by this process than by workers."""
    return DataLoader(Subset(data, index.tolist()), batch_size, shuffle=True, drop_last=True)


def for_ever(batches: DataLoader[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches
