"""Deletion requests: which images are asked for, by indices or by names, in files of several kinds."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from dau_fast.data.paths import check_regular
from dau_fast.errors import UserError

Entry = int | str

# Columns of a table, and keys of JSON, that name an image; the first that is there is taken.
_INDEX = ("index", "indices", "idx")
_NAME = ("path", "file", "filename", "file_name", "image", "name", "id", "ids", "forget")


def read_request(path: Path) -> list[Entry]:
    """The indices or names that the file `path` lists: .csv, .tsv, .json, .npy, or text with one a line.

    A table needs a column of _INDEX or _NAME, or has one column and no heading. JSON is a list of numbers,
    words or objects with such a key, or an object that holds such a list. Raises UserError for anything else.
    """
    check_regular(path, f"request file '{path}'")
    try:
        if path.suffix == ".npy":
            return _entries(path, np.load(path, allow_pickle=False).tolist())
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return _entries(path, json.loads(text))
        if path.suffix in (".csv", ".tsv"):
            return _entries(path, _read_table(path, text))
    except (OSError, ValueError, EOFError, csv.Error, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"request file '{path}' cannot be read: {reason}") from error
    words = text.split()
    if all(map(_is_index, words)):
        return _entries(path, words)
    return _entries(path, [line.strip() for line in text.splitlines() if line.strip()])


def _read_table(path: Path, text: str) -> list[str]:
    """One column of a table with commas, semicolons or tabs."""
    lines = [line for line in text.splitlines() if line.strip()]
    separator = max(",;\t", key=(lines or [""])[0].count)
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)]
    heading = [cell.lower() for cell in rows[0]] if rows else []
    for name in (*_INDEX, *_NAME):
        if name in heading:
            column = heading.index(name)
            cells = ["".join(row[column : column + 1]) for row in rows[1:]]
            if "" in cells:
                raise UserError(f"request file '{path}': row {cells.index('') + 2} has no '{name}'")
            wrong = [cell for cell in cells if name in _INDEX and not _is_index(cell)]
            if wrong:
                raise UserError(f"request file '{path}': {wrong[0][:40]!r} is not an index from 0 up")
            return cells
    if any(len(row) > 1 for row in rows):
        raise UserError(
            f"request file '{path}' has the columns {', '.join(rows[0])}: expected one called "
            f"{', '.join((_INDEX[0], *_NAME[:5]))} or id"
        )
    return [row[0] for row in rows]


def _entries(path: Path, found: Any) -> list[Entry]:
    """Numbers and words of what a file holds."""
    if isinstance(found, dict):
        keys = [key for key in (*_INDEX, *_NAME) if key in found]
        found = found[keys[0]] if keys else None
    if not isinstance(found, list) or not found:
        raise UserError(f"request file '{path}' lists nothing: expected indices or names of images")
    entries = [_entry(path, item) for item in found]
    if all(isinstance(entry, str) and _is_index(entry) for entry in entries):
        return [int(entry) for entry in entries]
    return entries


def _entry(path: Path, item: Any) -> Entry:
    if isinstance(item, dict):
        item = next((item[key] for key in (*_INDEX, *_NAME) if key in item), None)
    if isinstance(item, str) or (isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**62):
        return item
    raise UserError(f"request file '{path}': {str(item)[:40]!r} is neither an index from 0 up nor a name")


def _is_index(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) < 19


def find_images(entries: Iterable[Entry], names: Sequence[str], where: str) -> tuple[int, ...]:
    """The indices of the images that `entries` name, each once.

    names: of all images, in their order; empty where they have none. A name is that of an image, or its last
    parts where only one image has them, or one in train/ and its namesakes in val/ and test/; a number that
    no image is called is an index. where: what messages call the request. Raises UserError for a name of no
    image or several, and for one image named twice.
    """
    lookup = _Names(names)
    found: dict[int, Entry] = {}
    for entry in entries:
        index = entry if isinstance(entry, int) else lookup.find(entry, where)
        if index in found:
            raise UserError(f"{where} names {entry!r} twice: name every image once")
        found[index] = entry
    return tuple(found)


class _Names:
    """Images by their names, and by the last parts of these; both are read when the first is looked for."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._whole: dict[str, int] | None = None
        self._ends: dict[str, list[int]] = {}

    def find(self, name: str, where: str) -> int:
        if not self._names:
            raise UserError(f"{where} names {name!r}, and the images have no names: give their indices")
        if self._whole is None:
            self._whole = {PurePath(known).as_posix(): index for index, known in enumerate(self._names)}
            for index, known in enumerate(self._names):
                self._ends.setdefault(PurePath(known).name, []).append(index)
        wanted = PurePath(name).as_posix()
        if wanted in self._whole:
            return self._whole[wanted]
        fitting = [
            index for index in self._ends.get(PurePath(name).name, []) if self._ends_alike(index, wanted)
        ]
        trained = [index for index in fitting if self._names[index].startswith("train/")]
        if len(trained) == 1 and self._are_namesakes(fitting):
            return trained[0]  # only those of train/ can be forgotten
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            some = ", ".join(self._names[index] for index in fitting[:2])
            raise UserError(
                f"{where} names {name!r}, which {len(fitting)} images end in ({some}): name the folder"
            )
        near = get_close_matches(wanted, list(self._whole), 1) or get_close_matches(
            wanted, list(self._ends), 1
        )
        hint = f": did you mean {near[0]!r}?" if near else f": they are called such as {self._names[0]!r}"
        raise UserError(f"{where} names {name!r}, which no image is called{hint}")

    def _are_namesakes(self, indices: Sequence[int]) -> bool:
        """Whether images are called alike but for the part of the data set that they are in."""
        parts, _, names = zip(*(self._names[index].partition("/") for index in indices), strict=True)
        return {*parts} <= {"train", "val", "test"} and len({*names}) == 1

    def _ends_alike(self, index: int, wanted: str) -> bool:
        known = PurePath(self._names[index]).as_posix()
        return known.endswith(f"/{wanted}") or wanted.endswith(f"/{known}") or known == wanted
