"""Data sets on the disk: streamed or in memory, and which of the two is chosen."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from storing import save_arrays

from dau_fast.data import stored
from dau_fast.data.arrays import Arrays
from dau_fast.data.images import Images
from dau_fast.data.named import load
from dau_fast.data.stored import choose_streaming
from dau_fast.data.streaming import StreamedImages
from dau_fast.errors import UserError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["folder", "arrays"])
def test_a_streamed_data_set_is_the_one_in_memory(name: str, arrays: Path, pictures: Path) -> None:
    folder = {"folder": pictures, "arrays": arrays}[name]
    held, streamed = (load(name, folder, stream=stream) for stream in ("off", "on"))
    assert (type(held), type(streamed)) == (Images, StreamedImages)
    assert len(streamed.pixels) == 0
    for field in ("labels", "test", "mean", "std"):
        assert torch.equal(getattr(held, field), getattr(streamed, field))
    for field in ("class_names", "augmentation", "dtype", "shape", "device"):
        assert getattr(held, field) == getattr(streamed, field)
    index = torch.tensor([50, 3, 0, 35, 36, 3])
    assert torch.equal(held.batch(index, seeded(1)), streamed.batch(index, seeded(1)))


def test_the_sample_that_normalises_is_the_same_in_a_large_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(10_500) % 2
    save_arrays(tmp_path / "train", rng.integers(0, 256, (10_500, 2, 2, 1), dtype=np.uint8), labels)
    save_arrays(tmp_path / "test", np.full((10, 2, 2, 1), 255, dtype=np.uint8), labels[:10])
    asked: list[int] = []
    read = Arrays.read
    monkeypatch.setattr(
        Arrays, "read", lambda self, index, out: (asked.extend(index.tolist()), read(self, index, out))[1]
    )
    streamed = load("arrays", tmp_path, stream="on")
    assert asked == list(range(0, 10_500, 2))
    held = load("arrays", tmp_path, stream="off")
    assert torch.equal(streamed.mean, held.mean)
    assert torch.equal(streamed.std, held.std)
    pixels = held.pixels[asked[: len(range(0, 10_500, 2))]].double() / 255
    torch.testing.assert_close(held.mean.double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(held.std.double(), pixels.std((0, 2, 3)), rtol=1e-6, atol=0)


# `pictures` as uint8.
TAKEN = 54 * 16 * 16 * 3


@pytest.mark.parametrize(("free", "streamed"), [(2 * TAKEN, False), (2 * TAKEN - 2, True), (0, True)])
def test_auto_streams_what_takes_more_than_half_of_the_free_memory_and_says_so_once(
    free: int, streamed: bool, arrays: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stored, "free_memory", lambda device: free)
    assert isinstance(load("arrays", arrays, stream="auto"), StreamedImages) == streamed
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == streamed
    assert all(re.fullmatch(r"images are streamed, as they take 0\.0 GB .* are free", line) for line in said)


def test_images_that_must_be_in_memory_and_do_not_fit_are_an_error(
    arrays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "free_memory", lambda device: TAKEN)
    assert type(load("arrays", arrays, stream="off")) is Images
    monkeypatch.setattr(stored, "free_memory", lambda device: TAKEN - 1)
    with pytest.raises(UserError, match=r"do not fit into memory .*leave `stream=off` out"):
        load("arrays", arrays, stream="off")
    assert isinstance(load("arrays", arrays, stream="on"), StreamedImages)


def test_the_smaller_of_two_memories_decides(arrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images are read into the CPU's memory before they are on another device."""
    for small in ("cpu", "meta"):
        monkeypatch.setattr(stored, "free_memory", lambda device, small=small: 10**9 * (device.type != small))
        source = Arrays([arrays / "train/images.npy"])
        assert choose_streaming(source, "auto", torch.device("meta"), 1)


@pytest.mark.parametrize(("processes", "streamed"), [(1, False), (3, False), (4, True)])
def test_processes_of_one_machine_share_its_memory_but_not_that_of_their_gpus(
    processes: int, streamed: bool, arrays: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    source = Arrays([arrays / "train/images.npy"])
    taken = len(source) * 16 * 16 * 3
    free = {"cpu": 6 * taken, "meta": 2 * taken}
    monkeypatch.setattr(stored, "free_memory", lambda device: free[device.type])
    assert choose_streaming(source, "auto", torch.device("meta"), processes) == streamed
    assert ("free for each of 4 processes" in caplog.text) == streamed
    with pytest.raises(UserError, match="free for each of 7 processes"):
        choose_streaming(source, "off", torch.device("meta"), 7)
