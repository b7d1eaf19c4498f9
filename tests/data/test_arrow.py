"""Arrow files: the images and labels of the same folder of files, and a clear line for what cannot be."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calling import call, succeed
from checking import same_tensors
from PIL import Image

from dau_fast.data.images import Images
from dau_fast.data.named import load
from dau_fast.data.streaming import StreamedImages
from dau_fast.errors import UserError

pa = pytest.importorskip("pyarrow")

NAMES = ("blue", "green", "red")


def struct_of(contents: Sequence[bytes | None]) -> Any:
    """As the Image feature of `datasets` stores images."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)], kind)


KINDS: dict[str, Callable[[Sequence[bytes | None]], Any]] = {
    "struct": struct_of,
    "binary": lambda contents: pa.array(contents, pa.binary()),
    "large binary": lambda contents: pa.array(contents, pa.large_binary()),
    "path first": lambda contents: pa.array(
        [{"path": None, "bytes": content} for content in contents],
        pa.struct([("path", pa.string()), ("bytes", pa.binary())]),
    ),
}


def table_of(images: Any, labels: Any, names: Any = NAMES, column: str = "label") -> Any:
    """A table with the metadata that `datasets` writes; none with `names` None. bytes: other metadata."""
    table = pa.table({"image": images, column: labels})
    if names is None:
        return table
    if isinstance(names, bytes):
        return table.replace_schema_metadata({"huggingface": names})
    features = {"image": {"_type": "Image"}, column: {"names": list(names), "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write(path: Path, table: Any, kind: str = "stream", rows: int = 1000) -> None:
    """kind: of Arrow's IPC formats, "stream" or "file". rows: of a record batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind]
    with writer(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=rows)


def write_as(root: Path, folder: Path, images: str, names: Any = NAMES, column: str = "label") -> None:
    """The images below `folder` as Arrow: the training part in two files and many batches."""
    for part in ("train", "test"):
        paths = sorted((folder / part).glob("*/*"))
        labels = [NAMES.index(path.parent.name) for path in paths]
        table = table_of(KINDS[images]([path.read_bytes() for path in paths]), labels, names, column)
        if part == "test":
            write(root / "test/data-00000-of-00001.arrow", table, "file")
        else:
            write(root / "train/data-00000-of-00002.arrow", table[:20], rows=7)
            write(root / "train/data-00001-of-00002.arrow", table[20:], rows=5)


def both_alike(one: Images, other: Images) -> None:
    """Labels, names, normalisation and batches agree bit for bit."""
    for field in ("labels", "test", "mean", "std"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
    assert (one.shape, one.augmentation) == (other.shape, other.augmentation)
    index = torch.arange(len(one.labels)).flip(0)
    for seed in (None, 1):
        chance = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
        assert torch.equal(one.batch(index, chance[0]), other.batch(index, chance[1]))


@pytest.mark.parametrize("image_size", [None, 11])
@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.parametrize("images", KINDS)
def test_arrow_files_are_the_folder_of_the_same_images(
    images: str, stream: str, image_size: int | None, tmp_path: Path, pictures: Path
) -> None:
    write_as(tmp_path, pictures, images)
    found = load("arrow", tmp_path, stream=stream, image_size=image_size)
    assert type(found) is {"on": StreamedImages, "off": Images}[stream]
    assert found.class_names == NAMES
    both_alike(found, load("folder", pictures, image_size=image_size))


def test_jpeg_files_of_any_mode_are_those_of_a_folder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, mode in (("train", "L"), ("train", "RGB"), ("test", "CMYK")):
        path = tmp_path / "files" / part / "red" / f"{mode}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (9, 14, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
        write(
            tmp_path / f"arrow/{part}/{mode}.arrow",
            table_of(struct_of([path.read_bytes()]), [0], ["red"]),
        )
    both_alike(load("arrow", tmp_path / "arrow"), load("folder", tmp_path / "files"))


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "names",
    [None, b"{", b"[]", b"\xff", DEEP, [1, 2, 3], []],
    ids=lambda names: "deep" if names is DEEP else str(names),
)
def test_without_names_classes_are_numbered(names: Any, tmp_path: Path, pictures: Path) -> None:
    write_as(tmp_path, pictures, "struct", names, "labels")
    found = load("arrow", tmp_path)
    assert found.class_names == ("0", "1", "2")
    both_alike(found, load("folder", pictures))


def test_what_datasets_keeps_of_its_own_work_is_left_out(tmp_path: Path, pictures: Path) -> None:
    write_as(tmp_path, pictures, "struct")
    (tmp_path / "train/cache-0123456789abcdef.arrow").write_text("results of some map")
    assert len(load("arrow", tmp_path).labels) == 54


def test_an_unused_name_is_a_class_without_images(tmp_path: Path, pictures: Path) -> None:
    write_as(tmp_path, pictures, "struct", (*NAMES, "violet"))
    assert load("arrow", tmp_path).class_names == (*NAMES, "violet")


@pytest.mark.parametrize("compression", [None, "lz4"])
def test_batches_and_slices_and_compressed_files_are_read_alike(
    compression: str | None, tmp_path: Path, pictures: Path
) -> None:
    write_as(tmp_path, pictures, "struct")
    for path in tmp_path.glob("*/*.arrow"):
        with pa.memory_map(str(path)) as mapped:
            kind = "file" if mapped.read(6) == b"ARROW1" else "stream"
            mapped.seek(0)
            table = {"file": pa.ipc.open_file, "stream": pa.ipc.open_stream}[kind](mapped).read_all()
            options = pa.ipc.IpcWriteOptions(compression=compression)
            with {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}[kind](
                str(path) + ".new", table.schema, options=options
            ) as file:
                for batch in table.to_batches():
                    file.write_batch(batch.slice(0, 3))
                    file.write_batch(batch.slice(3))
        Path(f"{path}.new").rename(path)
    both_alike(load("arrow", tmp_path), load("folder", pictures))


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path: Path, pictures: Path) -> None:
    write_as(tmp_path, pictures, "binary")
    images = load("arrow", tmp_path, stream="on")
    for path in tmp_path.glob("train/*.arrow"):
        os.truncate(path, 10)
    with pytest.raises(UserError, match=r"train/data-0000.*\.arrow' was cut short while it was read"):
        images.batch(torch.arange(36))


# ---- mistakes


def test_a_column_whose_name_is_no_text_is_an_error(tmp_path: Path, pictures: Path) -> None:
    write_as(tmp_path, pictures, "struct")
    (path,) = tmp_path.glob("test/*.arrow")
    path.write_bytes(path.read_bytes().replace(b"label\0", b"\xff\xfebel\0"))
    with pytest.raises(UserError, match="is not a readable Arrow file"):
        load("arrow", tmp_path)


def png(height: int = 4) -> bytes:
    content = BytesIO()
    Image.fromarray(np.full((height, 4, 3), 7, dtype=np.uint8)).save(content, "png")
    return content.getvalue()


GOOD = struct_of([png()] * 4)
TABLE = table_of(GOOD, [0, 1, 2, 1])


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def wrong_offset(path: Path) -> None:
    """An image that would end far behind the end of the file, though the last one ends where it should."""
    offsets = np.arange(5, dtype=np.int32) * len(png())
    moved = offsets + np.array([0, 0, 1, 0, 0], dtype=np.int32) * 2**30
    assert path.read_bytes().count(offsets.tobytes()) == 1
    path.write_bytes(path.read_bytes().replace(offsets.tobytes(), moved.tobytes()))


# What happens to train/0.arrow, or stands in its place; and what the message must name.
WRONG: dict[str, tuple[Any, str]] = {
    "missing": (Path.unlink, r"train' holds no \.arrow files: expected train/\*\.arrow and test/\*\.arrow"),
    "text": (lambda path: path.write_text("this is no table"), r"0\.arrow' is not a readable Arrow file"),
    "empty": (lambda path: path.write_bytes(b""), r"0\.arrow' is not a readable Arrow file"),
    "cut": (cut_short, r"0\.arrow' is not a readable Arrow file"),
    "magic alone": (lambda path: path.write_bytes(b"ARROW1\0\0"), "is not a readable Arrow file"),
    "offset": (wrong_offset, r"0\.arrow' is not a readable Arrow file"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), r"0\.arrow' is not a readable Arrow file"),
    "no rows": (TABLE[:0], r"train' hold no images: expected at least one"),
    "no image": (TABLE.drop(["image"]), "has the columns label: expected 'image' and 'label'"),
    "no label": (TABLE.drop(["label"]), "has the columns image: expected 'image' and 'label'"),
    "other names": (TABLE.rename_columns(["img", "fine_label"]), "has the columns img, fine_label: expected"),
    "paths": (
        table_of(pa.array(["a.png"] * 4), [0, 1, 2, 1]), r"column 'image' of .*0\.arrow' is string: expected"
    ),
    "pixels": (table_of(pa.array([[1, 2]] * 4), [0, 1, 2, 1]), r"is list<.*int64>: expected encoded images"),
    "no bytes field": (table_of(pa.array([{"path": "a"}] * 4), [0, 1, 2, 1]), "is struct<path: string>: "),
    "bytes of text": (table_of(pa.array([{"bytes": "a"}] * 4), [0, 1, 2, 1]), "is struct<bytes: string>: "),
    "missing image": (table_of(struct_of([png(), None, png(), png()]), [0, 1, 2, 1]), "has 1 images that "),
    "missing struct": (
        table_of(pa.array([{"bytes": png()}, None, {"bytes": png()}, None]), [0, 1, 2, 1]),
        "has 2 images that are missing, or stored as paths only",
    ),
    "float labels": (table_of(GOOD, [0.0, 1.0, 2.0, 1.0]), "column 'label' of .* is double with 0 missing"),
    "text labels": (table_of(GOOD, list("abcb")), "column 'label' of .* is string with 0 missing"),
    "missing label": (table_of(GOOD, pa.array([0, None, 2, 1])), "is int64 with 1 missing"),
    "large label": (table_of(GOOD, [0, 1, 3, 1]), r"0\.arrow' has the label 3: expected 0 to 2"),
    "no label there": (table_of(GOOD, [0, 1, -1, 1]), r"0\.arrow' has the label -1: expected 0 to 2"),
    "unsigned": (table_of(GOOD, pa.array([0, 1, 2**64 - 1, 1], pa.uint64())), "has the label -1: expected 0"),
    "other classes": (table_of(GOOD, [0, 1, 2, 1], ("a", *NAMES[1:])), r"differ in .*\(a, blue\)"),
    "other order": (table_of(GOOD, [0, 1, 2, 1], NAMES[::-1]), r"differ in .*\(in another order\)"),
    "some names": (table_of(GOOD, [0, 1, 2, 1], None), r"differ in .*\(one names them, the other does not\)"),
    "undecodable": (
        table_of(struct_of([png(), png(), b"no image", png()]), [0, 1, 2, 1]),
        r"image 2 of '.*0\.arrow' is not a readable image of .*: remove or replace it",
    ),
    "truncated": (
        table_of(struct_of([png()[:50], png(), png(), png()]), [0, 1, 2, 1]),
        r"image 0 of '.*0\.arrow' is not a readable image",
    ),
    "sizes": (
        table_of(struct_of([png(), png(), png(), png(5)]), [0, 1, 2, 1]),
        r"image 3 of '.*0\.arrow' is not like image 0 of '.*0\.arrow'\): add `image_size=PIXELS`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error_in_one_line(name: str, stream: str, tmp_path: Path) -> None:
    change, message = WRONG[name]
    for part in ("train", "test"):
        write(tmp_path / part / "0.arrow", TABLE)
    path = tmp_path / "train/0.arrow"
    change(path) if callable(change) else write(path, change)
    with pytest.raises(UserError, match=message) as raised:
        load("arrow", tmp_path, stream=stream)
    assert "\n" not in str(raised.value)


def test_a_pipe_in_place_of_a_file_is_an_error_and_not_waited_for(tmp_path: Path, pipe: Path) -> None:
    write(tmp_path / "train/0.arrow", TABLE)
    (tmp_path / "train/1.arrow").symlink_to(pipe)
    write(tmp_path / "test/0.arrow", TABLE)
    with pytest.raises(UserError, match=r"1\.arrow' is a pipe or a device: expected a regular file"):
        load("arrow", tmp_path)


def test_unnamed_labels_count_from_0_and_the_test_part_has_no_others(tmp_path: Path) -> None:
    for labels, test, message in (
        ([0, 1, 3, 1], [0] * 4, r"train' has labels from 0 to 3 but no 2"),
        ([0, 1, 2, 1], [0, 7, 0, 0], r"test' has the label 7, which no training image has"),
    ):
        write(tmp_path / "train/0.arrow", table_of(GOOD, labels, None))
        write(tmp_path / "test/0.arrow", table_of(GOOD, test, None))
        with pytest.raises(UserError, match=message):
            load("arrow", tmp_path)


def test_an_image_is_named_by_its_row_in_its_file(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / part / "0.arrow", TABLE, rows=2)
        broken = table_of(struct_of([png(), png(), png(), b"no image"]), [0, 1, 2, 1])
        write(tmp_path / part / "1.arrow", broken if part == "test" else TABLE, rows=3)
    streamed = load("arrow", tmp_path, stream="on")
    assert len(streamed.batch(torch.arange(15))) == 15
    with pytest.raises(UserError, match=r"image 3 of '.*test.1\.arrow' is not a readable image"):
        streamed.batch(torch.tensor([0, 15]))


def test_without_pyarrow_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("train", "test"):
        write(tmp_path / part / "0.arrow", TABLE)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    called = call(tmp_path / "out", "--dataset", "arrow", "--data", tmp_path)
    assert called.code == 2
    assert called.stderr == (
        "error: --dataset arrow needs pyarrow, which is not installed: pip install 'dau-fast[arrow]'\n"
    )


# ---- whole runs


def test_runs_on_arrow_files_give_the_numbers_of_the_folder(tmp_path: Path, pictures: Path) -> None:
    write_as(tmp_path / "data", pictures, "struct")
    arguments = ("--epochs", 3, "--methods", "dau,ft", "--forget", "class:green")
    folder = succeed(tmp_path / "folder", "--dataset", "folder", "--data", pictures, *arguments, turns=16)
    for stream in ("on", "off"):
        given = ("--dataset", "arrow", "--data", tmp_path / "data", "--stream", stream, *arguments)
        called = succeed(tmp_path / stream, *given, turns=16)
        assert called.report["run"]["dataset"] == "arrow"
        assert called.report["run"]["streamed"] == (stream == "on")
        for method in ("original", "dau", "ft"):
            assert same_tensors(called.weights(method), folder.weights(method))


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for arguments, message in (
        ((), "needs --data DIR"),
        (("--data", tmp_path / "data"), r"holds no \.arrow"),
    ):
        called = call(tmp_path / "out", "--dataset", "arrow", *arguments)
        assert called.code == 2
        assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", called.stderr)
        assert not (tmp_path / "out").exists()
