"""The named data sets, and folders of image files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dau_fast.data.named import NAMES, Augmentation, load
from dau_fast.errors import UserError

Colour = tuple[int, int, int]


# ---- named data sets


def test_digits_are_all_1797_images_with_their_labels() -> None:
    from sklearn.datasets import load_digits

    images, source = load("digits"), load_digits()
    assert images.pixels.shape == (1797, 1, 8, 8)
    assert images.pixels.dtype == torch.uint8
    assert (images.pixels.min(), images.pixels.max()) == (0, 255)
    expected = np.round(source.images * 255 / 16)
    np.testing.assert_array_equal(images.pixels[:, 0].numpy(), expected)
    np.testing.assert_array_equal(images.labels.numpy(), source.target)
    assert images.labels.dtype == torch.int64
    assert images.class_names == tuple("0123456789")
    assert images.test is None
    assert images.shape == (1, 8, 8)


def test_digits_are_normalised_to_mean_0_and_standard_deviation_1() -> None:
    images = load("digits")
    batch = images.batch(torch.arange(1797))
    assert abs(batch.mean()) < 0.01
    assert abs(batch.std() - 1) < 0.01


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown dataset 'mnist'") as raised:
        load("mnist")
    assert all(name in str(raised.value) for name in NAMES)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_a_missing_torchvision_set_is_an_error_that_names_the_way_to_fetch_it(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="add --download") as raised:
        load(name, tmp_path)
    assert name in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_cifar10_as_torchvision_stores_it_is_training_part_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    class Stored:
        classes = tuple("abcdefghij")

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            assert (root, download) == (tmp_path, False)
            count = 6 if train else 4
            self.data = np.full((count, 32, 32, 3), 10 if train else 20, dtype=np.uint8)
            self.data[:, :, :, 2] = 30
            self.targets = list(range(count))

    monkeypatch.setattr(datasets, "CIFAR10", Stored)
    images = load("cifar10", tmp_path)
    assert images.pixels.shape == (10, 3, 32, 32)
    assert images.pixels[0, :, 0, 0].tolist() == [10, 10, 30]
    assert images.pixels[9, :, 0, 0].tolist() == [20, 20, 30]
    assert images.labels.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert images.test is not None
    assert images.test.tolist() == [6, 7, 8, 9]
    assert images.augmentation == Augmentation(pad=4, flip=True)
    assert images.class_names == tuple("abcdefghij")


def test_house_numbers_are_never_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    class Stored:
        def __init__(self, root: Path, split: str, download: bool) -> None:
            self.data = np.zeros((2, 3, 32, 32), dtype=np.uint8)
            self.labels = np.array([1, 0]) if split == "train" else np.array([9, 8])

    monkeypatch.setattr(datasets, "SVHN", Stored)
    images = load("svhn", tmp_path)
    assert images.pixels.shape == (4, 3, 32, 32)
    assert images.labels.tolist() == [1, 0, 9, 8]
    assert not images.augmentation.flip
    assert images.class_names == tuple("0123456789")


# ---- folders


def noise(size: tuple[int, int], seed: int) -> np.ndarray:
    """RGB noise of `size` (height, width)."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_tree(root: Path, size: tuple[int, int] = (8, 8), kind: str = "png") -> list[np.ndarray]:
    """Two classes, two images each for training and one for testing; the images in order of load."""
    drawn = []
    for part, count in (("train", 2), ("test", 1)):
        for name in ("cat", "dog"):
            for i in range(count):
                drawn.append(noise(size, len(drawn)))
                save(root / part / name / f"{i}.{kind}", drawn[-1])
    return drawn


def test_a_folder_of_png_files_is_read_pixel_by_pixel(tmp_path: Path) -> None:
    drawn = make_tree(tmp_path, (8, 6))
    images = load("folder", tmp_path)
    assert images.pixels.dtype == torch.uint8
    np.testing.assert_array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), np.stack(drawn))
    assert images.labels.tolist() == [0, 0, 1, 1, 0, 1]
    assert images.class_names == ("cat", "dog")
    assert images.test is not None
    assert images.test.tolist() == [4, 5]


def test_the_normalisation_of_a_folder_is_measured_on_its_training_part_alone(tmp_path: Path) -> None:
    drawn = make_tree(tmp_path)
    images = load("folder", tmp_path)
    training = np.stack(drawn[:4]).reshape(-1, 3) / 255
    np.testing.assert_allclose(images.mean.numpy(), training.mean(0), rtol=1e-5)
    np.testing.assert_allclose(images.std.numpy(), training.std(0, ddof=1), rtol=1e-5)


def test_a_folder_of_one_colour_still_gives_finite_batches(tmp_path: Path) -> None:
    for part in ("train", "test"):
        save(tmp_path / part / "a" / "0.png", np.full((4, 4, 3), 7, dtype=np.uint8))
    images = load("folder", tmp_path)
    assert images.batch(torch.tensor([0, 1])).isfinite().all()


def test_a_folder_of_jpeg_files_is_read_nearly_as_it_was_drawn(tmp_path: Path) -> None:
    colours: list[Colour] = [(200, 30, 60), (10, 120, 240)]
    for part, colour in zip(("train", "test"), colours, strict=True):
        save(tmp_path / part / "a" / "0.jpg", np.full((8, 8, 3), colour, dtype=np.uint8))
    images = load("folder", tmp_path)
    difference = images.pixels[:, :, 4, 4].int() - torch.tensor(colours)
    assert difference.abs().max() <= 4


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_images_of_any_mode_become_three_channels(mode: str, tmp_path: Path) -> None:
    make_tree(tmp_path)
    Image.fromarray(np.full((8, 8), 255, dtype=np.uint8)).convert(mode).save(tmp_path / "train/cat/9.png")
    images = load("folder", tmp_path)
    assert images.pixels.shape == (7, 3, 8, 8)
    assert (images.pixels[2] == 255).all()


def test_images_of_different_sizes_are_an_error_that_names_the_file_and_the_way_out(tmp_path: Path) -> None:
    make_tree(tmp_path)
    save(tmp_path / "train/dog/7.png", noise((8, 9), 0))
    with pytest.raises(UserError, match="--image-size") as raised:
        load("folder", tmp_path)
    assert str(tmp_path / "train/dog/7.png") in str(raised.value)


@pytest.mark.parametrize("image_size", [5, 8, 12, 20])
def test_image_size_makes_images_of_different_sizes_alike(image_size: int, tmp_path: Path) -> None:
    make_tree(tmp_path, (8, 12))
    save(tmp_path / "train/dog/7.png", noise((30, 9), 0))
    images = load("folder", tmp_path, image_size=image_size)
    assert images.pixels.shape == (7, 3, image_size, image_size)


def test_image_size_keeps_the_centre_of_a_long_image(tmp_path: Path) -> None:
    stripes = np.zeros((10, 30, 3), dtype=np.uint8)
    stripes[:, 10:20, 1] = 255
    for part in ("train", "test"):
        save(tmp_path / part / "a" / "0.png", stripes)
    images = load("folder", tmp_path, image_size=10)
    assert (images.pixels[:, 1] == 255).all()


def test_the_crop_of_a_folder_grows_with_its_images(tmp_path: Path) -> None:
    make_tree(tmp_path / "small", (4, 4))
    make_tree(tmp_path / "large", (32, 32))
    assert load("folder", tmp_path / "small").augmentation == Augmentation(pad=1, flip=True)
    assert load("folder", tmp_path / "large").augmentation == Augmentation(pad=4, flip=True)


def test_progress_is_told_of_every_image_of_a_folder(tmp_path: Path) -> None:
    make_tree(tmp_path)
    announced: list[int] = []
    advanced: list[int] = []

    def progress(description: str, steps: int) -> Callable[[], None]:
        announced.append(steps)
        return lambda: advanced.append(1)

    load("folder", tmp_path, progress=progress)
    assert announced == [6]
    assert len(advanced) == 6


def test_folder_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --data"):
        load("folder")
    with pytest.raises(UserError, match="is not a folder"):
        load("folder", tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        load("folder", tmp_path / "file")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_part_of_a_folder_is_an_error_that_names_it(part: str, tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"has no '{part}' folder"):
        load("folder", tmp_path)


def test_parts_with_different_classes_are_an_error_that_names_them(tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / "test/dog").rename(tmp_path / "test/wolf")
    with pytest.raises(UserError, match=r"differ in classes \(dog, wolf\)"):
        load("folder", tmp_path)


def test_a_part_without_classes_or_a_class_without_images_is_an_error(tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / "train/empty").mkdir()
    with pytest.raises(UserError, match="holds no readable images"):
        load("folder", tmp_path)
    (tmp_path / "bare/train").mkdir(parents=True)
    (tmp_path / "bare/test").mkdir()
    with pytest.raises(UserError, match="holds no readable images"):
        load("folder", tmp_path / "bare")


def png_with_a_broken_chunk() -> bytes:
    """A signature, a sound header, and then a chunk whose name is not letters."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(8 * 25))[:6])
    return b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"\x01\x02\x03\x04", b"") + chunk(b"IEND", b"")


DAMAGED = {
    "text.png": b"this is no image",
    "empty.png": b"",
    "truncated.png": None,
    "broken_chunk.png": png_with_a_broken_chunk(),
    "header_cut.ppm": b"P6 8",
    "pixels_cut.ppm": b"P6\n8 8\n255\n" + bytes(10),
    # 60,000 x 60,000 pixels in a file of 54 bytes.
    "bomb.bmp": struct.pack("<2sIIIIIIHH6I", b"BM", 54, 0, 54, 40, 60000, 60000, 1, 24, *[0] * 6),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_an_unreadable_image_is_an_error_that_names_the_file(name: str, tmp_path: Path) -> None:
    make_tree(tmp_path)
    damaged = tmp_path / "train/cat" / name
    whole = (tmp_path / "train/cat/0.png").read_bytes()
    content = DAMAGED[name]
    damaged.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match="is not a readable image") as raised:
        load("folder", tmp_path)
    assert str(damaged) in str(raised.value)
