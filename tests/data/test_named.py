"""The data sets that have a name: what is in them, and a clear line where they are not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dau_fast.data.images import Augmentation
from dau_fast.data.named import NAMES, RESIZED, load
from dau_fast.errors import UserError


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
    with pytest.raises(UserError, match="`dataset=mnist`: expected one of ") as raised:
        load("mnist")
    assert all(name in str(raised.value) for name in NAMES)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(RESIZED)))
def test_a_size_that_would_be_ignored_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="`image_size=16` is for folder, arrow: leave it out, or store"
    ) as told:
        load(name, tmp_path, image_size=16)
    assert name in str(told.value)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_a_missing_torchvision_set_is_an_error_that_names_the_way_to_fetch_it(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="add `download=True` to fetch it") as raised:
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
