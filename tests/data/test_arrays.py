"""Arrays in files: what is in them, what is read of them, and a clear line for what does not fit."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from storing import save_arrays

from dau_fast.data.arrays import Arrays
from dau_fast.data.images import Augmentation
from dau_fast.data.named import load
from dau_fast.errors import UserError


def test_arrays_hold_the_training_part_and_then_the_test_part(arrays: Path, pictures: Path) -> None:
    images, same = load("arrays", arrays), load("folder", pictures)
    assert torch.equal(images.pixels, same.pixels)
    assert torch.equal(images.labels, same.labels)
    assert images.labels.dtype == torch.int64
    assert images.class_names == ("0", "1", "2")
    assert images.test is not None
    assert images.test.tolist() == list(range(36, 54))
    assert images.augmentation == Augmentation(2, True)
    assert torch.equal(images.mean, same.mean)
    assert torch.equal(images.std, same.std)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to tell resident memory")
def test_of_a_large_array_only_the_images_asked_for_are_read(tmp_path: Path) -> None:
    count, path = 100_000, tmp_path / "images.npy"
    # 4.9 GB of zeros that take no room on the disk, but for a few images.
    written = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, 128, 128, 3))
    index = torch.arange(5, count, 999)
    written[index.numpy()] = np.arange(len(index), dtype=np.uint8)[:, None, None, None]
    del written
    before = resident_bytes()
    source = Arrays([path])
    out = torch.empty((len(index), 128, 128, 3), dtype=torch.uint8)
    source.read(index, out)
    assert torch.equal(out[:, 0, 0, 0], torch.arange(len(index)).to(torch.uint8))
    assert torch.equal(out.float().amax((1, 2, 3)), out.float().amin((1, 2, 3)))
    assert resident_bytes() - before < 200e6


IMAGES, LABELS = np.zeros((4, 5, 6, 3), dtype=np.uint8), np.array([0, 1, 2, 1])


def header(shape: str, kind: str = "|u1") -> bytes:
    """A .npy file of `shape`, as text, and few numbers."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(500)


# What train/ and test/ hold in place of IMAGES and LABELS, or files; and what the message must name.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"train/images": None}, r"train/images.npy' is missing"),
    "no labels": ({"test/labels": None}, r"test/labels.npy' is missing"),
    "text": ({"train/images": b"no array"}, r"train/images.npy' is not a readable NumPy array"),
    "empty file": ({"test/images": b""}, r"test/images.npy' is not a readable NumPy array"),
    "objects": ({"train/labels": np.array([{}] * 4)}, r"train/labels.npy' is not a readable NumPy array"),
    "cut": ({"train/images": "cut"}, r"train/images.npy' is not a readable NumPy array"),
    "negative shape": (
        {"train/images": header("(-4, 5, 6, 3)")}, r"train/images.npy' is not a readable NumPy array"
    ),
    "a shape that lies": (
        {"train/labels": header(f"({2**62},)", "<i8")}, r"train/labels.npy' is not a readable NumPy array"
    ),
    "header cut": ({"train/images": header("(4,\n")}, r"train/images.npy' is not a readable NumPy array"),
    "deep header": (
        {"train/images": header("(" * 3000)}, r"train/images.npy' is not a readable NumPy array"
    ),
    "floats": ({"train/images": IMAGES / 1}, r"is float64 of shape \[4, 5, 6, 3\]: expected uint8 images"),
    "no channels": ({"train/images": IMAGES[..., 0]}, r"of shape \[4, 5, 6\]: expected uint8 images"),
    "channels first": (
        {"train/images": IMAGES.transpose(0, 3, 1, 2).copy()}, r"shape \[4, 3, 5, 6\]: expected uint8 images"
    ),
    "Fortran": ({"train/images": np.asfortranarray(IMAGES)}, "is in Fortran order"),
    "none": ({"train/images": IMAGES[:0]}, r"train/images.npy'"),
    "differing": ({"test/images": IMAGES[:, 1:]}, r"of shape \[4, 6, 3\] and .* of \[5, 6, 3\]"),
    "too few labels": ({"test/labels": LABELS[1:]}, r"of shape \[3\]: expected integers of shape \[4\]"),
    "float labels": ({"train/labels": LABELS / 1}, r"train/labels.npy' is float64 of shape \[4\]"),
    "missing label": ({"train/labels": np.array([0, 1, 3, 0])}, "labels from 0 to 3 but no 2"),
    "huge label": ({"train/labels": np.array([0, 1, 2**60, 0])}, "but no 2"),
    "negative": ({"train/labels": np.array([0, 1, -1, 0])}, "labels from -1 to 1 but no 0"),
    "unknown label": ({"test/labels": np.array([0, 1, 7, 0])}, "has the label 7, which no training image"),
}  # fmt: skip


@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_do_not_fit_are_an_error_before_anything_runs(
    name: str, stream: str, tmp_path: Path
) -> None:
    changes, message = WRONG[name]
    for part in ("train", "test"):
        save_arrays(tmp_path / part, IMAGES, LABELS)
    for place, change in changes.items():
        path = tmp_path / f"{place}.npy"
        whole = path.read_bytes()
        path.unlink()
        if isinstance(change, np.ndarray):
            np.save(path, change)
        elif change is not None:
            path.write_bytes(whole[:-1] if change == "cut" else change)
    with pytest.raises(UserError, match=message) as raised:
        load("arrays", tmp_path, stream=stream)
    assert "\n" not in str(raised.value)


def test_arrays_need_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`dataset=arrays` needs `data=DIR`"):
        load("arrays")
    with pytest.raises(UserError, match="is not a folder"):
        load("arrays", tmp_path / "absent")


@pytest.mark.parametrize("name", ["images", "labels"])
def test_a_pipe_in_place_of_an_array_is_an_error_and_not_waited_for(
    name: str, tmp_path: Path, pipe: Path
) -> None:
    for part in ("train", "test"):
        save_arrays(tmp_path / part, IMAGES, LABELS)
    path = tmp_path / f"train/{name}.npy"
    path.unlink()
    path.symlink_to(pipe)
    with pytest.raises(UserError, match=rf"{name}\.npy' is a pipe or a device: expected a regular file"):
        load("arrays", tmp_path)


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    np.save(path, np.zeros((4000, 8, 8, 3), dtype=np.uint8))
    source = Arrays([path])
    os.truncate(path, 5000)
    out = torch.empty((2, 8, 8, 3), dtype=torch.uint8)
    source.read(torch.tensor([0, 1]), out)
    with pytest.raises(UserError, match=r"images\.npy' was cut short while it was read"):
        source.read(torch.tensor([1, 3999]), out)
