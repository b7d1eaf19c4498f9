"""Data sets in Arrow files, as the `datasets` library of Hugging Face writes them.

Only the encoded images that are asked for are read. pyarrow is optional.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from dau_fast.data.decoding import Encoded
from dau_fast.data.paths import OpenFile, check_regular
from dau_fast.data.stored import VALIDATION_FOLDERS, Stored, check_labels
from dau_fast.errors import UserError

_IMAGE, _LABELS = "image", ("label", "labels")


def read_arrow(folder: Path, image_size: int | None, threads: int) -> Stored:
    """The .arrow files of folder/train/ and folder/test/, each in the order of their names.

    So is val/ (or valid/, validation/), where it is there.

    Columns: `image`, binary or a struct with a binary field `bytes`; `label` or `labels`, integers. Classes
    are named by the ClassLabel in the schema's metadata, else by their numbers. image_size, threads: see
    Encoded. Raises UserError for files that hold anything else.
    """
    held_out = [name for name in VALIDATION_FOLDERS if (folder / name).is_dir()][:1]
    parts = {
        part: [_read_file(path) for path in _find_files(folder / part)]
        for part in ("train", *held_out, "test")
    }
    files = [file for part in parts.values() for file in part]
    labels = {part: np.concatenate([file.labels for file in found]) for part, found in parts.items()}
    for part, found in labels.items():
        if len(found) == 0:
            raise UserError(f"the .arrow files in '{folder / part}' hold no images: expected at least one")
    names = _shared_names(files)
    if names is None:
        names = _number_classes(folder, labels)
    every = torch.from_numpy(np.concatenate(list(labels.values())))
    validation = sum(len(labels[part]) for part in held_out)
    return Stored(ArrowImages(files, image_size, threads), every, names, len(labels["train"]), validation)


def _number_classes(folder: Path, labels: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Numbers for names. UserError for labels, by part, that do not count from 0."""
    told = {part: (f"'{folder / part}'", found) for part, found in labels.items()}
    train = told.pop("train")
    count, *_ = [check_labels(train, other) for other in told.values()]
    return tuple(str(label) for label in range(count))


class ArrowImages(Encoded):
    """Encoded images in the files' binary arrays."""

    def __init__(self, files: Sequence[_File], image_size: int | None, threads: int) -> None:
        self._chunks = [(file.path, chunk) for file in files for chunk in file.chunks]
        self._ends = list(accumulate(len(chunk) for _, chunk in self._chunks))
        starts = accumulate((len(file.labels) for file in files), initial=0)
        self._starts = {file.path: start for file, start in zip(files, starts, strict=False)}
        super().__init__(image_size, threads)

    def __len__(self) -> int:
        return self._ends[-1]

    def fetch(self, number: int) -> BytesIO:
        which = bisect_right(self._ends, number)
        chunk = self._chunks[which][1]
        return BytesIO(chunk.fetch(number - self._ends[which] + len(chunk)))

    def describe(self, number: int) -> str:
        path = self._chunks[bisect_right(self._ends, number)][0]
        return f"image {number - self._starts[path]} of '{path}'"


class _Chunk(Protocol):
    """Encoded images, one after the other."""

    def __len__(self) -> int: ...

    def fetch(self, number: int) -> bytes | bytearray:
        """The content of image `number`."""


class _Placed:
    """Those in `file`. edges: int64 [N + 1], image i lies at the bytes [edges[i], edges[i + 1])."""

    def __init__(self, file: OpenFile, edges: np.ndarray) -> None:
        self._file, self._edges = file, edges

    def __len__(self) -> int:
        return len(self._edges) - 1

    def fetch(self, number: int) -> bytearray:
        start, end = (int(edge) for edge in self._edges[number : number + 2])
        content = bytearray(end - start)
        self._file.read_into(memoryview(content), start)
        return content


class _Held:
    """Those that pyarrow holds in memory, as of files that are compressed."""

    def __init__(self, chunk: Any) -> None:
        self._chunk = chunk

    def __len__(self) -> int:
        return len(self._chunk)

    def fetch(self, number: int) -> bytes:
        content: bytes = self._chunk[number].as_py()
        return content


class _File(NamedTuple):
    """One file. chunks: of its images, one after the other. labels: int64 [N]."""

    path: Path
    chunks: Sequence[_Chunk]
    labels: np.ndarray
    class_names: tuple[str, ...] | None


def _find_files(folder: Path) -> list[Path]:
    # `datasets` leaves the results of its `map` beside the data, in files of that name.
    paths = [path for path in sorted(folder.glob("*.arrow")) if not path.name.startswith("cache-")]
    if not paths:
        raise UserError(
            f"'{folder}' holds no .arrow files: expected train/*.arrow and test/*.arrow, as "
            "DatasetDict.save_to_disk writes them"
        )
    return paths


def _read_file(path: Path) -> _File:
    """What the file `path` holds, checked but for what is in the images."""
    table, mapped = _map_table(path)
    found = [name for name in _LABELS if name in table.column_names]
    if _IMAGE not in table.column_names or not found:
        raise UserError(
            f"'{path}' has the columns {', '.join(table.column_names)}: expected 'image' and 'label', "
            "rename them with rename_column"
        )
    file = OpenFile(path)
    stored = [_find_binary(path, chunk) for chunk in table.column(_IMAGE).chunks]
    chunks = [_place(file, chunk, mapped) for chunk in stored]
    labels = _read_labels(path, found[0], table.column(found[0]))
    return _File(path, chunks, labels, _read_names(table.schema.metadata, found[0]))


def _map_table(path: Path) -> tuple[Any, Any]:
    """pyarrow's table in `path`, its columns for images and labels checked, and the file's memory map."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UserError(
            "`dataset=arrow` needs pyarrow, which is not installed: pip install 'dau-fast[arrow]'"
        ) from error
    check_regular(path, f"'{path}'")
    try:
        mapped = pa.memory_map(str(path))
        is_file = mapped.size() >= 6 and mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        table = (pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)).read_all()
        # Offsets that lead out of the file would end the process.
        table.select([name for name in (_IMAGE, *_LABELS) if name in table.column_names]).validate(full=True)
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"'{path}' is not a readable Arrow file: write it again, or remove it ({reason})"
        ) from error
    mapped.seek(0)
    return table, mapped.read_buffer()


def _place(file: OpenFile, chunk: Any, mapped: Any) -> _Chunk:
    """The images of pyarrow's array `chunk`, in the memory map `mapped` of `file` or outside it."""
    import pyarrow as pa

    _, offsets, content = chunk.buffers()
    if len(chunk) == 0 or content is None or not 0 <= content.address - mapped.address < mapped.size:
        return _Held(chunk)
    kind = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
    edges = np.frombuffer(offsets, kind)[chunk.offset : chunk.offset + len(chunk) + 1]
    return _Placed(file, edges.astype(np.int64) + (content.address - mapped.address))


def _find_binary(path: Path, images: Any) -> Any:
    """pyarrow's array of the encoded images of a column's chunk `images`. UserError where it has none."""
    import pyarrow as pa

    kind, stored = images.type, images
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        # Not `field`, which forgets that the whole struct may be missing.
        stored = images.flatten()[kind.get_field_index("bytes")]
    if not (pa.types.is_binary(stored.type) or pa.types.is_large_binary(stored.type)):
        raise UserError(
            f"column 'image' of '{path}' is {' '.join(str(kind).split())}: expected encoded images, as the "
            "Image feature of datasets stores them"
        )
    if stored.null_count:
        raise UserError(
            f"'{path}' has {stored.null_count} images that are missing, or stored as paths only: expected "
            "the files' bytes, which save_to_disk embeds"
        )
    return stored


def _read_labels(path: Path, name: str, column: Any) -> np.ndarray:
    """The numbers in the table's `column`, which is called `name`; int64 [N]."""
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        raise UserError(
            f"column '{name}' of '{path}' is {column.type} with {column.null_count} missing: expected an "
            "integer for each image"
        )
    return np.array(column.to_numpy(), dtype=np.int64)


def _read_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """The names of the ClassLabel `column` in a schema's metadata; None where there are none."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    good = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return tuple(names) if good else None


def _shared_names(files: Sequence[_File]) -> tuple[str, ...] | None:
    """The classes that all `files` name alike; None where none names any. Every label must have its name."""
    names = files[0].class_names
    for file in files:
        if file.class_names != names:
            raise UserError(
                f"'{files[0].path}' and '{file.path}' differ in the classes of their labels "
                f"({_tell_difference(names, file.class_names)}): give both the same ClassLabel"
            )
    for file in files if names is not None else ():
        _check_labels_named(file)
    return names


def _tell_difference(names: tuple[str, ...] | None, others: tuple[str, ...] | None) -> str:
    if names is None or others is None:
        return "one names them, the other does not"
    return ", ".join(sorted(set(names) ^ set(others))) or "in another order"


def _check_labels_named(file: _File) -> None:
    count = len(file.class_names or ())
    wrong = file.labels[(file.labels < 0) | (file.labels >= count)]
    if len(wrong):
        raise UserError(
            f"'{file.path}' has the label {wrong[0]}: expected 0 to {count - 1}, as it names {count} classes"
        )
