"""Data sets on the disk, and what only looks like a file of one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from storing import save_arrays

from dau_fast.data.named import load


@pytest.fixture(scope="module")
def arrays(place: Path, pictures: Path) -> Path:
    """The images of `pictures` as arrays."""
    images, root = load("folder", pictures), place / "arrays"
    assert images.test is not None
    train = torch.ones(len(images.labels), dtype=torch.bool)
    train[images.test] = False
    for part, rows in (("train", train), ("test", ~train)):
        save_arrays(root / part, images.pixels[rows].permute(0, 2, 3, 1).numpy(), images.labels[rows].numpy())
    return root


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A named pipe in which the numbers 1 and 2 wait for whoever opens it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def offer() -> None:
        with suppress(BrokenPipeError):
            path.write_text("1 2")

    writer = threading.Thread(target=offer, daemon=True)
    writer.start()
    yield path
    # Whom nobody reads from would wait for ever.
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer.join()
    os.close(reader)
