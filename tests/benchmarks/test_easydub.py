"""Margins in EasyDUB's published layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dau_fast.errors import UserError

pytestmark = pytest.mark.usefixtures("importable")


def margins_of(model: int, images: int) -> np.ndarray:
    """Whole numbers that say whose they are: model 2's image 5 has 205."""
    return (100 * model + np.arange(images)).astype(np.float32)


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six training images, of which 1 and 4 are forgotten, and three others; 11 originals, two retrained."""
    forget = np.array([4, 1], dtype=np.int32)
    write(tmp_path / "forget_sets/cifar10/forget_set_3.npy", forget)
    kept = np.delete(np.arange(6), forget)
    for model in range(11):
        name = f"resnet9/id_{model}_epoch_23.npy"
        root = tmp_path / "margins/cifar10/pretrain"
        write(root / "retain" / name, margins_of(model, 6))
        write(root / "val" / name, margins_of(model, 3))
        write(root / "forget_3" / name, margins_of(model, 6)[forget])
    for model in range(2):
        name = f"resnet9/id_{model}_epoch_23.npy"
        root = tmp_path / "margins/cifar10/oracle/forget_3"
        write(root / "retain" / name, margins_of(model, 6)[kept])
        write(root / "val" / name, margins_of(model, 3))
        write(root / "forget" / name, margins_of(model, 6)[forget])
    return tmp_path


def test_images_and_models_are_in_the_same_order(folder: Path) -> None:
    from support.easydub import read_forget_set, read_margins

    retain = read_margins(folder, 3, "retain")
    assert retain.originals.shape == (11, 4)
    assert retain.originals[10].tolist() == [1000, 1002, 1003, 1005]  # by number, not by name
    assert retain.retrained.tolist() == [[0, 2, 3, 5], [100, 102, 103, 105]]
    forget = read_margins(folder, 3, "forget")
    assert forget.originals[:2].tolist() == forget.retrained.tolist() == [[4, 1], [104, 101]]
    assert read_margins(folder, 3, "val", models=1).originals.tolist() == [[0, 1, 2]]
    assert read_forget_set(folder, 3).tolist() == [4, 1]


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    from support.easydub import read_forget_set, read_margins

    with pytest.raises(UserError, match="unknown part 'test'"):
        read_margins(folder, 3, "test")
    with pytest.raises(UserError, match="holds 2 models: fetch 3"):
        read_margins(folder, 3, "val", models=3)
    with pytest.raises(UserError, match="holds 0 models"):
        read_margins(folder, 4, "val")
    oracle = folder / "margins/cifar10/oracle/forget_3"
    write(oracle / "val/resnet9/id_1_epoch_24.npy", margins_of(1, 3))
    with pytest.raises(UserError, match="a model has one file"):
        read_margins(folder, 3, "val")
    write(oracle / "forget/resnet9/id_1_epoch_23.npy", margins_of(1, 3))
    with pytest.raises(UserError, match="different numbers of images"):
        read_margins(folder, 3, "forget")
    write(oracle / "retain/resnet9/id_0_epoch_23.npy", np.array([{}], dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        read_margins(folder, 3, "retain")
    for wrong in (np.array([1, 1]), np.array([-1, 2]), np.array([], dtype=np.int64)):
        write(folder / "forget_sets/cifar10/forget_set_3.npy", wrong)
        with pytest.raises(UserError, match="is not a list of different indices"):
            read_forget_set(folder, 3)
