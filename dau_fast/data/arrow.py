"""Images in Arrow files, as the `datasets` library of Hugging Face writes them.

The files are memory-mapped: only the encoded images that are asked for are read. pyarrow is optional.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dau_fast.data.decoding import Encoded
from dau_fast.data.stored import Stored, check_labels
from dau_fast.errors import UserError

_IMAGE, _LABELS = "image", ("label", "labels")


def arrow(folder: Path, image_size: int | None, threads: int) -> Stored:
    """The .arrow files of folder/train/ and folder/test/, each in the order of their names.

    Columns: `image`, binary or a struct with a binary field `bytes`; `label` or `labels`, integers. Classes
    are named by the ClassLabel in the schema's metadata, else by their numbers. Raises UserError for files
    that hold anything else.
    """
    parts = []
    for part in ("train", "test"):
        # `datasets` leaves the results of its `map` beside the data, in files of that name.
        paths = [
            path for path in sorted((folder / part).glob("*.arrow")) if not path.name.startswith("cache-")
        ]
        if not paths:
            raise UserError(
                f"'{folder / part}' holds no .arrow files: expected train/*.arrow and test/*.arrow, as "
                "DatasetDict.save_to_disk writes them"
            )
        parts.append([_read(path) for path in paths])
    train, test = parts
    names = train[0].class_names
    for file in (*train, *test):
        if file.class_names != names:
            raise UserError(
                f"'{train[0].path}' and '{file.path}' differ in the classes of their labels "
                f"({_differing(names, file.class_names)}): give both the same ClassLabel"
            )
    labels, test_labels = (np.concatenate([file.labels for file in part]) for part in parts)
    if len(labels) == 0 or len(test_labels) == 0:
        empty = "train" if len(labels) == 0 else "test"
        raise UserError(f"the .arrow files in '{folder / empty}' hold no images: expected at least one")
    if names is None:
        count = check_labels((f"'{folder / 'train'}'", labels), (f"'{folder / 'test'}'", test_labels))
        names = tuple(str(label) for label in range(count))
    else:
        for file in (*train, *test):
            _check_named(file, len(names))
    source = ArrowImages([*train, *test], image_size, threads)
    every = torch.from_numpy(np.concatenate([labels, test_labels]))
    return Stored(source, every, names, len(labels))


class _File(NamedTuple):
    """One file. chunks: pyarrow's binary arrays, one after the other. labels: int64 [N]."""

    path: Path
    chunks: Sequence[Any]
    labels: np.ndarray
    class_names: tuple[str, ...] | None


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

    def content(self, number: int) -> BytesIO:
        which = bisect_right(self._ends, number)
        chunk = self._chunks[which][1]
        return BytesIO(chunk[number - self._ends[which] + len(chunk)].as_py())

    def name(self, number: int) -> str:
        path = self._chunks[bisect_right(self._ends, number)][0]
        return f"image {number - self._starts[path]} of '{path}'"


def _read(path: Path) -> _File:
    """What the file `path` holds, checked but for what is in the images."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UserError(
            "--dataset arrow needs pyarrow, which is not installed: pip install 'dau-fast[arrow]'"
        ) from error
    try:
        mapped = pa.memory_map(str(path))
        is_file = mapped.size() >= 6 and mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        table = (pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)).read_all()
        wanted = [name for name in (_IMAGE, *_LABELS) if name in table.column_names]
        # Offsets that lead out of the file would end the process.
        table.select(wanted).validate(full=True)
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"'{path}' is not a readable Arrow file: write it again, or remove it ({reason})"
        ) from error
    found = [name for name in _LABELS if name in wanted]
    if _IMAGE not in wanted or not found:
        raise UserError(
            f"'{path}' has the columns {', '.join(table.column_names)}: expected 'image' and 'label', "
            "rename them with rename_column"
        )
    labels = table.column(found[0])
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise UserError(
            f"column '{found[0]}' of '{path}' is {labels.type} with {labels.null_count} missing: expected an "
            "integer for each image"
        )
    chunks = [_binary(path, chunk) for chunk in table.column(_IMAGE).chunks]
    numbers = np.array(labels.to_numpy(), dtype=np.int64)
    return _File(path, chunks, numbers, _class_names(table.schema.metadata, found[0]))


def _binary(path: Path, images: Any) -> Any:
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


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """The names of the ClassLabel `column` in a schema's metadata; None where there are none."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    good = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return tuple(names) if good else None


def _differing(some: tuple[str, ...] | None, others: tuple[str, ...] | None) -> str:
    if some is None or others is None:
        return "one names them, the other does not"
    return ", ".join(sorted(set(some) ^ set(others))) or "in another order"


def _check_named(file: _File, count: int) -> None:
    wrong = file.labels[(file.labels < 0) | (file.labels >= count)]
    if len(wrong):
        raise UserError(
            f"'{file.path}' has the label {wrong[0]}: expected 0 to {count - 1}, as it names {count} classes"
        )
