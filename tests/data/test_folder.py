"""Folders of image files: their pixels, labels, sizes and normalisation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from storing import noise, save_folder, save_image

from dau_fast.data.folder import Files
from dau_fast.data.images import Augmentation
from dau_fast.data.named import load
from dau_fast.data.streaming import StreamedImages
from dau_fast.errors import UserError

Colour = tuple[int, int, int]


def test_a_folder_of_png_files_is_read_pixel_by_pixel(tmp_path: Path) -> None:
    drawn = save_folder(tmp_path, (8, 6))
    images = load("folder", tmp_path)
    assert images.pixels.dtype == torch.uint8
    np.testing.assert_array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), np.stack(drawn))
    assert images.labels.tolist() == [0, 0, 1, 1, 0, 1]
    assert images.class_names == ("cat", "dog")
    assert images.test is not None
    assert images.test.tolist() == [4, 5]


def test_the_normalisation_of_a_folder_is_measured_on_its_training_part_alone(tmp_path: Path) -> None:
    drawn = save_folder(tmp_path)
    images = load("folder", tmp_path)
    training = np.stack(drawn[:4]).reshape(-1, 3) / 255
    np.testing.assert_allclose(images.mean.numpy(), training.mean(0), rtol=1e-5)
    np.testing.assert_allclose(images.std.numpy(), training.std(0, ddof=1), rtol=1e-5)


def test_a_folder_of_one_colour_still_gives_finite_batches(tmp_path: Path) -> None:
    for part in ("train", "test"):
        save_image(tmp_path / part / "a" / "0.png", np.full((4, 4, 3), 7, dtype=np.uint8))
    images = load("folder", tmp_path)
    assert images.batch(torch.tensor([0, 1])).isfinite().all()


def test_a_folder_of_jpeg_files_is_read_nearly_as_it_was_drawn(tmp_path: Path) -> None:
    colours: list[Colour] = [(200, 30, 60), (10, 120, 240)]
    for part, colour in zip(("train", "test"), colours, strict=True):
        save_image(tmp_path / part / "a" / "0.jpg", np.full((8, 8, 3), colour, dtype=np.uint8))
    images = load("folder", tmp_path)
    difference = images.pixels[:, :, 4, 4].int() - torch.tensor(colours)
    assert difference.abs().max() <= 4


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_images_of_any_mode_become_three_channels(mode: str, tmp_path: Path) -> None:
    save_folder(tmp_path)
    Image.fromarray(np.full((8, 8), 255, dtype=np.uint8)).convert(mode).save(tmp_path / "train/cat/9.png")
    images = load("folder", tmp_path)
    assert images.pixels.shape == (7, 3, 8, 8)
    assert (images.pixels[2] == 255).all()


def test_images_of_different_sizes_are_an_error_that_names_the_file_and_the_way_out(tmp_path: Path) -> None:
    save_folder(tmp_path)
    save_image(tmp_path / "train/dog/7.png", noise((8, 9), 0))
    with pytest.raises(UserError, match="add `image_size=PIXELS`") as raised:
        load("folder", tmp_path)
    assert str(tmp_path / "train/dog/7.png") in str(raised.value)


@pytest.mark.parametrize("image_size", [5, 8, 12, 20])
def test_image_size_makes_images_of_different_sizes_alike(image_size: int, tmp_path: Path) -> None:
    save_folder(tmp_path, (8, 12))
    save_image(tmp_path / "train/dog/7.png", noise((30, 9), 0))
    images = load("folder", tmp_path, image_size=image_size)
    assert images.pixels.shape == (7, 3, image_size, image_size)


def test_image_size_keeps_the_centre_of_a_long_image(tmp_path: Path) -> None:
    stripes = np.zeros((10, 30, 3), dtype=np.uint8)
    stripes[:, 10:20, 1] = 255
    for part in ("train", "test"):
        save_image(tmp_path / part / "a" / "0.png", stripes)
    images = load("folder", tmp_path, image_size=10)
    assert (images.pixels[:, 1] == 255).all()


def test_the_crop_of_a_folder_grows_with_its_images(tmp_path: Path) -> None:
    save_folder(tmp_path / "small", (4, 4))
    save_folder(tmp_path / "large", (32, 32))
    assert load("folder", tmp_path / "small").augmentation == Augmentation(pad=1, flip=True)
    assert load("folder", tmp_path / "large").augmentation == Augmentation(pad=4, flip=True)


def test_progress_is_told_of_every_image_of_a_folder(tmp_path: Path) -> None:
    save_folder(tmp_path)
    announced: list[int] = []
    advanced: list[int] = []

    def progress(description: str, steps: int) -> Callable[[], None]:
        announced.append(steps)
        return lambda: advanced.append(1)

    load("folder", tmp_path, progress=progress)
    assert announced == [6]
    assert len(advanced) == 6


def test_folder_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`dataset=folder` needs `data=DIR`"):
        load("folder")
    with pytest.raises(UserError, match="is not a folder"):
        load("folder", tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        load("folder", tmp_path / "file")


def test_a_missing_training_part_is_an_error_that_names_it(tmp_path: Path) -> None:
    save_folder(tmp_path)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="has no 'train' folder"):
        load("folder", tmp_path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="has no 'train' folder"):
        load("folder", tmp_path / "bare")


@pytest.mark.parametrize("flat", [False, True])
def test_without_a_test_part_all_images_are_training_images_and_that_is_said(
    flat: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_folder(tmp_path / "all")
    rest = tmp_path / "all" / "train"
    if not flat:
        rest = tmp_path / "rest"
        rest.mkdir()
        (tmp_path / "all" / "train").rename(rest / "train")
    images = load("folder", rest)
    assert images.test is None
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.class_names == ("cat", "dog")
    assert "has no test folder" in caplog.text


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_part_is_read_and_lies_between_the_others(name: str, tmp_path: Path) -> None:
    drawn = save_folder(tmp_path)
    extra = noise((8, 8), 77)
    save_image(tmp_path / name / "dog" / "7.png", extra)
    images = load("folder", tmp_path)
    assert images.labels.tolist() == [0, 0, 1, 1, 1, 0, 1]
    assert images.validation is not None
    assert images.test is not None
    assert (images.validation.tolist(), images.test.tolist()) == ([4], [5, 6])
    np.testing.assert_array_equal(images.pixels[4].permute(1, 2, 0).numpy(), extra)
    np.testing.assert_array_equal(images.pixels[5].permute(1, 2, 0).numpy(), drawn[4])
    assert images.names[4] == f"{name}/dog/7.png"
    training = np.stack(drawn[:4]).reshape(-1, 3) / 255
    np.testing.assert_allclose(images.mean.numpy(), training.mean(0), rtol=1e-5)


def test_classes_may_be_missing_in_the_test_part_but_not_in_the_training_part(tmp_path: Path) -> None:
    save_folder(tmp_path)
    for file in (tmp_path / "test/cat").iterdir():
        file.unlink()
    (tmp_path / "test/cat").rmdir()
    assert load("folder", tmp_path).labels.tolist() == [0, 0, 1, 1, 1]
    (tmp_path / "test/dog").rename(tmp_path / "test/wolf")
    with pytest.raises(UserError, match="has the classes wolf, which the training images do not have"):
        load("folder", tmp_path)


def test_a_part_without_classes_or_a_class_without_images_is_an_error(tmp_path: Path) -> None:
    save_folder(tmp_path)
    (tmp_path / "train/empty").mkdir()
    with pytest.raises(UserError, match="holds no readable images"):
        load("folder", tmp_path)
    (tmp_path / "bare/train").mkdir(parents=True)
    (tmp_path / "bare/test").mkdir()
    with pytest.raises(UserError, match="holds no readable images"):
        load("folder", tmp_path / "bare")


def test_streaming_a_folder_decodes_the_files_of_its_batches_alone(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = load("folder", pictures, stream="on")
    assert isinstance(streamed, StreamedImages)
    assert isinstance(streamed.source, Files)
    opened: list[int] = []
    fetch = Files.fetch
    monkeypatch.setattr(Files, "fetch", lambda self, number: (opened.append(number), fetch(self, number))[1])
    streamed.batch(torch.tensor([7, 7, 40]))
    assert sorted(opened) == [7, 7, 40]


def test_a_pipe_among_the_files_is_an_error_and_not_waited_for(tmp_path: Path, pipe: Path) -> None:
    save_folder(tmp_path)
    path = tmp_path / "train/cat/0.png"
    path.unlink()
    path.symlink_to(pipe)
    with pytest.raises(UserError, match=r"0\.png' is a pipe or a device: expected a regular file"):
        load("folder", tmp_path)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("train/cat/again", "."),
        ("train/cat/up", ".."),
        ("train/cat/other", "../dog"),
        ("train/wolf", "dog"),
        ("test/cat/training", "../../train/cat"),
    ],
)
def test_a_link_into_a_folder_that_is_read_anyway_is_an_error(link: str, target: str, tmp_path: Path) -> None:
    save_folder(tmp_path)
    (tmp_path / link).symlink_to(target)
    with pytest.raises(UserError, match="are one folder, by a link: remove the link"):
        load("folder", tmp_path)


def test_classes_may_be_links_to_folders_elsewhere(tmp_path: Path) -> None:
    save_folder(tmp_path / "real")
    for part in ("train", "test"):
        (tmp_path / "linked" / part).mkdir(parents=True)
        for name in ("cat", "dog"):
            (tmp_path / "linked" / part / name).symlink_to(tmp_path / "real" / part / name)
    assert torch.equal(load("folder", tmp_path / "linked").pixels, load("folder", tmp_path / "real").pixels)


def test_a_folder_that_cannot_be_read_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_folder(tmp_path)
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("cat"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cat' cannot be read: Permission denied"):
        load("folder", tmp_path)
