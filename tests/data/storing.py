"""Writing data sets as the tests of reading them want them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def noise(size: tuple[int, int], seed: int) -> np.ndarray:
    """RGB noise of `size` (height, width)."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def save_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_folder(root: Path, size: tuple[int, int] = (8, 8)) -> list[np.ndarray]:
    """Two classes, two images each for training and one for testing; the images in order of load."""
    drawn = []
    for part, count in (("train", 2), ("test", 1)):
        for name in ("cat", "dog"):
            for i in range(count):
                drawn.append(noise(size, len(drawn)))
                save_image(root / part / name / f"{i}.png", drawn[-1])
    return drawn


def save_arrays(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
