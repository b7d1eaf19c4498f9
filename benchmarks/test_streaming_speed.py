"""Batches of 256 images of 224x224 pixels, read while training, against torchvision and PyTorch's loader.

    pytest benchmarks/test_streaming_speed.py                 on the CPU
    pytest benchmarks/test_streaming_speed.py --device cuda

Every row goes from what is stored (JPEG files of 20 to 100 kB; the same in Arrow; their pixels as arrays) to
random batches on the device, resized, cropped, mirrored and normalised, eight of them a round. The rival is
torchvision's ImageFolder and transforms, or a Dataset that reads the same Arrow file or array, in a
DataLoader with a worker a core. All reads come from the system's file cache. `extra_info`:

    images_per_second
    percent_of_floor   floor: 5 bytes a pixel's channel (read, and written as float32), over what a copy of as
                       much reaches on the device, and before that, of files and Arrow, what Pillow takes to
                       decode them on one thread, over the cores; of arrays, 2 bytes (read and stored)
    waiting            share of a step that waits for its batch, where the rest of it takes STEP seconds and
                       leaves the CPU alone; on the CPU cropping and normalising count as waiting
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.measuring import bytes_per_second, seconds, synchronise
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dau_fast.data import named as data
from dau_fast.data.decoding import count_decoder_threads
from dau_fast.engine.waiting import Waiting

BATCHES, ROUNDS, STEPS, STEP = 8, 5, 12, 0.1
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def size(smoke: bool) -> int:
    """Of an image in pixels, and of a batch in images."""
    return 16 if smoke else 224


@pytest.fixture(scope="session")
def batch(smoke: bool) -> int:
    return 8 if smoke else 256


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, size: int, batch: int) -> Path:
    """files/, arrow/ and arrays/ with the same images: smooth colours, and noise that makes them heavy."""
    import pyarrow as pa

    root, rng = tmp_path_factory.mktemp("streaming"), np.random.default_rng(0)
    for part, count in (("train", 2 * batch), ("test", 8)):
        contents = []
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
            noisy = smooth + rng.normal(0, 20, smooth.shape)
            file = root / "files" / part / str(i % 2) / f"{i:04}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=90)
            contents.append(file.read_bytes())
        for kind in ("arrow", "arrays"):
            (root / kind / part).mkdir(parents=True)
        labels = np.arange(count) % 2
        images = pa.array([{"bytes": content, "path": None} for content in contents])
        table = pa.table({"image": images, "label": labels})
        with pa.ipc.new_stream(str(root / "arrow" / part / "0.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
        pixels = np.stack([np.asarray(Image.open(BytesIO(content))) for content in contents])
        np.save(root / "arrays" / part / "images.npy", pixels)
        np.save(root / "arrays" / part / "labels.npy", labels)
    return root


# ---- the rows: batches for ever


def ours(kind: str, place: Path, size: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    name = {"files": "folder"}.get(kind, kind)
    resized = None if kind == "arrays" else size
    images = data.load(name, place / kind, image_size=resized, stream="on", device=device)
    generator = torch.Generator(device).manual_seed(0)
    train = len(images.labels) - 8

    def choices() -> Iterator[Any]:
        while True:
            index = torch.randint(train, (batch,), device=device, generator=generator)
            yield images.choose(index, generator)

    return (pixels for _, pixels in images.make_batches(choices()))


class Stored(Dataset[tuple[Any, int]]):
    """The Arrow file or the array of a part, image by image."""

    def __init__(self, place: Path, transform: Callable[[Any], Any]) -> None:
        self.place, self.transform = place, transform
        self.labels = np.arange(len(self._open()))

    @cache  # noqa: B019, as it lives as long as the row; each worker opens the file by itself
    def _open(self) -> Any:
        if self.place.suffix == ".npy":
            return np.load(self.place, mmap_mode="r")
        import pyarrow as pa

        return pa.ipc.open_stream(pa.memory_map(str(self.place))).read_all().column("image")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        stored = self._open()[i]
        if self.place.suffix == ".npy":
            image = Image.fromarray(stored)
        else:
            image = Image.open(BytesIO(stored.as_py()["bytes"])).convert("RGB")
        return self.transform(image), int(self.labels[i])


def torchvision(kind: str, place: Path, size: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomCrop(size, padding=max(1, size // 8)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.25] * 3),
    ]
    if kind != "arrays":
        steps = [transforms.Resize(size), transforms.CenterCrop(size), *steps]
    transform, part = transforms.Compose(steps), place / kind / "train"
    stored: Dataset[Any]
    if kind == "files":
        stored = datasets.ImageFolder(os.fspath(part), transform)
    else:
        stored = Stored(part / {"arrow": "0.arrow", "arrays": "images.npy"}[kind], transform)
    loader = DataLoader(
        stored, batch, shuffle=True, drop_last=True, num_workers=count_decoder_threads(1),
        persistent_workers=True, pin_memory=device.type == "cuda",
    )  # fmt: skip
    while True:
        for images, _ in loader:
            yield images.to(device, non_blocking=True)


ROWS = {"dau_fast": ours, "torchvision": torchvision}


# ---- what limits them, and how long a step waits


@cache
def decoding_seconds(files: Path) -> float:
    """Pillow's, of one image on one thread."""
    contents = [path.read_bytes() for path in sorted(files.glob("*/*"))[:64]]
    return seconds(lambda: [Image.open(BytesIO(content)).load() for content in contents], CPU) / len(contents)


def floor_seconds(kind: str, place: Path, size: int, images: int, device: torch.device) -> float:
    channels = 3 * size**2 * images
    # Copies of a batch's size and more: caches help neither.
    made = 5 * channels / bytes_per_second(device, 5 * channels // 8)
    if kind == "arrays":
        return made + 2 * channels / bytes_per_second(CPU, 2 * channels // 8)
    return made + images * decoding_seconds(place / "files" / "train") / count_decoder_threads(1)


def waiting(batches: Iterator[Any], device: torch.device, steps: int, length: float) -> float:
    """Share of `steps` steps of `length` seconds that is spent waiting for their batches."""
    clock = Waiting(device)
    for _ in range(steps):
        clock.take(batches)
        time.sleep(length)
        clock.finish()
    return clock.data / clock.seconds


@pytest.mark.parametrize("kind", ["files", "arrow", "arrays"])
@pytest.mark.parametrize("row", ROWS)
def test_reading(
    benchmark: Any, device: torch.device, smoke: bool, place: Path, size: int, batch: int, row: str, kind: str
) -> None:
    batches = ROWS[row](kind, place, size, batch, device)

    def work() -> None:
        for _ in range(BATCHES):
            next(batches)
        synchronise(device)

    benchmark.group = kind
    benchmark.pedantic(work, rounds=2 if smoke else ROUNDS, warmup_rounds=1)
    taken, images = benchmark.stats.stats.median, BATCHES * batch
    weights = [path.stat().st_size for path in (place / "files").glob("train/*/*")]
    benchmark.extra_info.update(
        case=kind,
        implementation=row,
        images_per_second=images / taken,
        percent_of_floor=100 * floor_seconds(kind, place, size, images, device) / taken,
        waiting=waiting(batches, device, STEPS, 0.01 if smoke else STEP),
        decoding_seconds=decoding_seconds(place / "files" / "train"),
        file_bytes=statistics.median(weights),
        cores=count_decoder_threads(1),
    )
    batches.close()
