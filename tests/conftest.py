"""Options and fixtures of the whole suite."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
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
    parser.addoption("--only-device", action="store_true", help="only tests that take a device")
    parser.addoption("--kills", type=int, default=2, help="of runs at random moments, each then resumed")
    parser.addoption("--outcomes", type=Path, help="file that gets a line of JSON a test as it ends")
    parser.addoption("--seconds-a-test", type=int, default=0, help="after which a test fails; 0 for never")


def pytest_configure(config: pytest.Config) -> None:
    """Tests compare with exact results: CUDA's own shortcuts are off, and what is not written is NaN."""
    if config.getoption("--device") == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    limit = item.config.getoption("--seconds-a-test")

    def give_up(*_: object) -> None:
        raise TimeoutError(f"the test takes longer than {limit} s")

    before = signal.signal(signal.SIGALRM, give_up) if limit else None
    signal.alarm(limit)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        if limit:
            signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    file = item.config.getoption("--outcomes")
    if file and (report.when == "call" or not report.passed):
        row = {"test": item.nodeid, "outcome": report.outcome, "seconds": report.duration}
        if report.failed:
            row["reason"] = str(call.excinfo and call.excinfo.value)[:500]
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this process is not for.

    Triton reads TRITON_INTERPRET once, so tests in its interpreter have a process of their own.
    """
    others = set()
    if os.environ.get("TRITON_INTERPRET") != "1":
        others.add("interpreter")
    if not config.getoption("--slow"):
        others.add("slow")
    only_device = config.getoption("--only-device")

    def chosen(item: pytest.Item) -> bool:
        without = only_device and "device" not in getattr(item, "fixturenames", ())
        return not without and not any(map(item.get_closest_marker, others))

    left_out = [item for item in items if not chosen(item)]
    items[:] = filter(chosen, items)
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
