"""Data sets in folders of image files, one folder a class."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dau_fast.data.decoding import Encoded
from dau_fast.data.paths import check_regular
from dau_fast.data.stored import VALIDATION_FOLDERS, Stored
from dau_fast.errors import UserError


def read_folder(folder: Path, image_size: int | None, threads: int) -> Stored:
    """Images under folder/train/<class>/, folder/val/<class>/ and folder/test/<class>/.

    val/ (or valid/, validation/) and test/ may be missing, and lack classes that train/ has; a folder with
    neither of them may hold the class folders itself. image_size, threads: see Encoded. Raises UserError for
    a part without images, and for classes that train/ does not have.
    """
    root = folder / "train"
    held_out = [folder / name for name in (*VALIDATION_FOLDERS, "test") if (folder / name).is_dir()]
    if not root.is_dir():
        if held_out or not any(entry.is_dir() for entry in folder.iterdir()):
            raise UserError(f"`data` '{folder}' has no 'train' folder: expected train/<class>/<image>")
        root = folder
    if len(held_out) > 2:
        raise UserError(f"`data` '{folder}' has several validation folders: keep one of val/ and the like")
    visited: dict[tuple[int, int], str] = {}
    for part in dict.fromkeys((root, *held_out)):
        _check_visited_once(part, visited)
    train = _read_part(root, None)
    validation = _read_parts([part for part in held_out if part.name != "test"], train.classes)
    test = _read_parts([part for part in held_out if part.name == "test"], train.classes)
    if not test:
        logging.getLogger("dau_fast").warning(
            "'%s' has no test folder: a part of the images of every class is held out for it, which a given "
            "checkpoint may have been trained on",
            folder,
        )
    files = [*train.samples, *validation, *test]
    names = tuple(os.path.relpath(path, folder) for path, _ in files)
    return Stored(
        Files([path for path, _ in files], image_size, threads),
        torch.tensor([label for _, label in files]),
        tuple(train.classes),
        len(train.samples),
        len(validation),
        names,
    )


def _read_parts(parts: Sequence[Path], classes: list[str]) -> list[tuple[str, int]]:
    """Files and labels of `parts`, none of them or one."""
    samples = [sample for part in parts for sample in _read_part(part, classes).samples]
    if parts and not samples:
        raise UserError(f"'{parts[0]}' holds no readable images: put some there, or remove it")
    return samples


def _read_part(part: Path, classes: list[str] | None) -> Any:
    """torchvision's ImageFolder of `part`. classes: that its folders are numbered by, None for its own."""
    from torchvision.datasets import ImageFolder

    class Part(ImageFolder):  # type: ignore[misc]
        def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
            found, numbers = super().find_classes(directory)
            if classes is None:
                return found, numbers
            if unknown := sorted(set(found) - set(classes)):
                raise UserError(
                    f"'{part}' has the classes {', '.join(unknown)}, which the training images do not have: "
                    "give both the same class folders"
                )
            return classes, {name: label for label, name in enumerate(classes)}

    try:
        return Part(os.fspath(part), allow_empty=classes is not None)
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"'{part}' holds no readable images: {error}") from error


def _check_visited_once(root: Path, visited: dict[tuple[int, int], str]) -> None:
    """UserError where links lead into a folder a second time, for ever or not, or a folder cannot be read.

    visited: the folders so far, by device and inode, to which those below `root` are added.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"'{error.filename}' cannot be read: {error.strerror}") from error

    for path, folders, _ in os.walk(root, onerror=refuse, followlinks=True):
        folders.sort()
        found = os.stat(path)
        before = visited.setdefault((found.st_dev, found.st_ino), path)
        if before != path:
            raise UserError(f"'{path}' and '{before}' are one folder, by a link: remove the link")


class Files(Encoded):
    """Image files."""

    def __init__(self, paths: Sequence[str], image_size: int | None, threads: int) -> None:
        self.paths = paths
        super().__init__(image_size, threads)

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, number: int) -> str:
        check_regular(self.paths[number], self.describe(number))
        return self.paths[number]

    def describe(self, number: int) -> str:
        return f"'{self.paths[number]}'"
