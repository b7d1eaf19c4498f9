"""Options and fixtures of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from calling import Called, succeed
from PIL import Image

# Networks here are so small that more threads only wait for each other: for long, on a busy machine.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where device tests run")
    parser.addoption("--slow", action="store_true", help="also run tests that are marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this process is not for.

    Triton reads TRITON_INTERPRET once, so tests in its interpreter have a process of their own.
    """
    others = set()
    if os.environ.get("TRITON_INTERPRET") != "1":
        others.add("interpreter")
    if not config.getoption("--slow"):
        others.add("slow")
    left_out = [item for item in items if any(map(item.get_closest_marker, others))]
    items[:] = [item for item in items if not any(map(item.get_closest_marker, others))]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device chosen with --device; asking for CUDA where there is none is an error, not a skip."""
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: PyTorch finds no CUDA device", returncode=2)
    return torch.device(name)


# ---- runs of the command line that several files look at


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unlearn")


@pytest.fixture(scope="session")
def once(place: Path) -> Called:
    """Defaults, in a folder whose parent is missing as well."""
    return succeed(place / "new" / "once")


@pytest.fixture(scope="session")
def pictures(place: Path) -> Path:
    """train/ and test/ with three classes of coloured noise, 12 and 6 images of 16x16 pixels each."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = place / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                mean = np.full(3, 60)
                mean[channel] = 180
                pixels = rng.normal(mean, 30, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return place / "pictures"
