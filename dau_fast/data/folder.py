"""Data sets in folders of image files, one folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dau_fast.data.decoding import Encoded
from dau_fast.data.paths import check_regular
from dau_fast.data.stored import Stored
from dau_fast.errors import UserError


def read_folder(folder: Path, image_size: int | None, threads: int) -> Stored:
    """Images under folder/train/<class>/ and folder/test/<class>/; image_size, threads: see Encoded.

    Raises UserError for a part that is missing, for one without images, and for parts that differ in classes.
    """
    from torchvision.datasets import ImageFolder

    parts = []
    visited: dict[tuple[int, int], str] = {}
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise UserError(f"`data` '{folder}' has no '{part}' folder: expected {part}/<class>/<image>")
        _check_visited_once(folder / part, visited)
        try:
            parts.append(ImageFolder(os.fspath(folder / part)))
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"'{folder / part}' holds no readable images: {error}") from error
    train, test = parts
    if train.classes != test.classes:
        differing = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
        raise UserError(
            f"train/ and test/ of '{folder}' differ in classes ({differing}): "
            "give both the same class folders"
        )
    files = train.samples + test.samples
    labels = torch.tensor([label for _, label in files])
    source = Files([path for path, _ in files], image_size, threads)
    return Stored(source, labels, tuple(train.classes), len(train))


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
