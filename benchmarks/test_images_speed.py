"""Batches of 256 images, plain and augmented, against plain PyTorch and against torchvision's transforms.

    pytest benchmarks/test_images_speed.py                 on the CPU
    pytest benchmarks/test_images_speed.py --device cuda

Every row goes from a random choice of images to a normalised float32 batch on the device, its random
windows included. Images are as many and as large as those of CIFAR-10 and of the digits. Floor, in bytes:
5 a number of the batch (a pixel read, the result written) and 8 for each entry of the index and of the
windows, over what a copy of as much reaches. `extra_info` as in measuring.record_row. The loader's row
runs in this process, as its own workers would need several cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.measuring import captured, record_row
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dau_fast.data.images import Augmentation, Draws, Images
from dau_fast.ops.reference import image_batch_reference

# (N, C, H, W), and the augmentation of the augmented rows.
SETS = {
    "cifar": ((50_000, 3, 32, 32), Augmentation(pad=4, flip=True)),
    "digits": ((1797, 1, 8, 8), Augmentation(pad=1, flip=True)),
}
Batch = Callable[[], Tensor]


def some_images(name: str, augmented: bool, smoke: bool, device: torch.device) -> Images:
    shape, augmentation = SETS[name]
    if smoke:
        shape = (20, *shape[1:])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, shape, generator=generator).to(torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    mean, std = torch.linspace(0.4, 0.5, shape[1]), torch.linspace(0.2, 0.3, shape[1])
    chosen = augmentation if augmented else Augmentation()
    return Images(pixels, torch.zeros(len(pixels)).long(), ("any",), None, mean, std, chosen).to(device)


def default_generator(device: torch.device) -> torch.Generator:
    """The one that captured graphs know."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def some_index(images: Images, size: int) -> Tensor:
    return torch.randint(len(images.pixels), (size,), device=images.device)


# ---- the rows


def ours(images: Images, size: int, smoke: bool) -> Batch:
    index, generator = some_index(images, size), default_generator(images.device)
    return lambda: images.batch(index, generator)


def definition(
    images: Images, size: int, smoke: bool, function: Callable[..., Tensor] = image_batch_reference
) -> Batch:
    index, generator = some_index(images, size), default_generator(images.device)
    pad = images.augmentation.pad

    def batch() -> Tensor:
        draws = images.draw(size, generator) or Draws(None, None, None)
        return function(images.pixels, index, images.mean, images.std, *draws, pad)

    return batch


def compiled(images: Images, size: int, smoke: bool) -> Batch:
    torch.compiler.reset()
    function = torch.compile(image_batch_reference, backend="eager" if smoke else "inductor")
    return definition(images, size, smoke, function)


class Transformed(Dataset[Tensor]):
    """One image at a time through torchvision's transforms, as training scripts have it."""

    def __init__(self, images: Images) -> None:
        from torchvision.transforms import v2

        pad, flip = images.augmentation.pad, images.augmentation.flip
        steps = [v2.RandomCrop(images.shape[1:], padding=pad)] if pad else []
        steps += [v2.RandomHorizontalFlip()] if flip else []
        steps += [v2.ToDtype(torch.float32, scale=True)]
        steps += [v2.Normalize(images.mean.tolist(), images.std.tolist())]
        self.transform, self.pixels = v2.Compose(steps), images.pixels.cpu()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(self.pixels[i])


def loader(images: Images, size: int, smoke: bool) -> Batch:
    # Pinned memory and a copy that nobody waits for, where there is a device to copy to.
    cuda = images.device.type == "cuda"
    loading = DataLoader(Transformed(images), size, shuffle=True, drop_last=True, pin_memory=cuda)

    def for_ever() -> Iterator[Tensor]:
        while True:
            yield from loading

    batches = for_ever()
    return lambda: next(batches).to(images.device, non_blocking=True)


ROWS = {"dau_fast": ours, "PyTorch": definition, "PyTorch compiled": compiled, "torchvision": loader}
CAPTURED = [f"{name} captured" for name in ROWS if name != "torchvision"]


@pytest.mark.parametrize("augmented", [True, False], ids=["augmented", "plain"])
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("row", [*ROWS, *CAPTURED])
def test_batch(
    benchmark: Any, device: torch.device, smoke: bool, row: str, name: str, augmented: bool
) -> None:
    if row in CAPTURED and device.type != "cuda":
        pytest.skip("captured graphs need CUDA")
    size = 8 if smoke else 256
    images = some_images(name, augmented, smoke, device)
    work = ROWS[row.removesuffix(" captured")](images, size, smoke)
    entries = 4 if augmented else 1  # index, rows, columns, flip
    record_row(
        benchmark,
        captured(work) if row in CAPTURED else work,
        device,
        case=f"{name}, {'augmented' if augmented else 'plain'}",
        implementation=row,
        moved=5 * size * images.pixels[0].numel() + 8 * size * entries,
        smoke=smoke,
    )
