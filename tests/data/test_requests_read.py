"""Deletion requests in files: indices and names of several kinds, and one line for everything else."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dau_fast.data.requests import find_images, read_request
from dau_fast.errors import UserError

NAMES = ("train/a/1.png", "train/a/2.png", "train/b/1.png", "val/b/7.png")


def written(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if name.endswith(".npy"):
        np.save(path, content)
    else:
        path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("r.txt", "1 2\n3\n", [1, 2, 3]),
        ("r.txt", "a/1.png\n b c.png \n\n", ["a/1.png", "b c.png"]),
        ("r.txt", "7\na.png", ["7", "a.png"]),
        ("r", "4", [4]),
        ("r.csv", "id,date\nx1,today\nx2,tomorrow\n", ["x1", "x2"]),
        ("r.csv", "date,index\ntoday,4\nnow,7\n", [4, 7]),
        ("r.csv", '"a,b.png"\nc.png\n', ["a,b.png", "c.png"]),
        ("r.csv", "\ufeffpath;n\na.png;1\n", ["a.png"]),
        ("r.tsv", "n\tfilename\n1\ta.png\n", ["a.png"]),
        ("r.csv", "3\n4\n", [3, 4]),
        ("r.json", "[1, 2]", [1, 2]),
        ("r.json", '["a", "2"]', ["a", "2"]),
        ("r.json", '{"forget": ["1", "2"]}', [1, 2]),
        ("r.json", '[{"file": "a.png", "why": 3}]', ["a.png"]),
        ("r.npy", np.array([3, 1]), [3, 1]),
        ("r.npy", np.array(["a.png"]), ["a.png"]),
    ],
)
def test_a_file_lists_indices_or_names(name: str, content: Any, expected: list[Any], tmp_path: Path) -> None:
    assert read_request(written(tmp_path, name, content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("r.txt", " \n", "lists nothing"),
        ("r.csv", "", "lists nothing"),
        ("r.csv", "date,owner\n1,2\n", "has the columns date, owner: expected one called index, path"),
        ("r.csv", "index,b\n1,2\n,\n", "row 3 has no 'index'"),
        ("r.csv", "index,b\n1,2\none,2\n", "'one' is not an index from 0 up"),
        ("r.csv", "a,index\n1\n", "row 2 has no 'index'"),
        ("r.json", "{", "cannot be read"),
        ("r.json", "[" * 99999, "cannot be read"),
        ("r.json", "3", "lists nothing"),
        ("r.json", '{"what": [1]}', "lists nothing"),
        ("r.json", "[-1]", "'-1' is neither an index from 0 up nor a name"),
        ("r.json", "[1.5]", "'1.5' is neither"),
        ("r.json", "[true]", "'True' is neither"),
        ("r.json", "[[1]]", "is neither"),
        ("r.json", '[{"why": 1}]', "'None' is neither"),
        ("r.npy", np.array([1.5]), "is neither"),
        ("r.npy", np.array(3), "lists nothing"),
        ("r.npy", np.zeros((2, 2), dtype=int), "is neither"),
    ],
)
def test_what_is_no_request_costs_one_line(name: str, content: Any, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint) as raised:
        read_request(written(tmp_path, name, content))
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "r.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_request(tmp_path / "r.npy")


@pytest.mark.parametrize(
    ("entry", "index"),
    [
        ("train/a/2.png", 1), ("a/2.png", 1), ("2.png", 1), ("7.png", 3), ("b/1.png", 2), (3, 3),
        ("/home/me/data/train/a/1.png", 0), ("./train/a/1.png", 0),
    ],
)  # fmt: skip
def test_an_image_is_found_by_its_name_or_the_end_of_it(entry: int | str, index: int) -> None:
    assert find_images([entry], NAMES, "it") == (index,)


def test_numbering_that_starts_again_in_every_part_means_the_training_image() -> None:
    parts = [f"{part}/{kind}/1.png" for kind in "ab" for part in ("test", "train", "val")]
    assert find_images(["b/1.png"], parts, "it") == (4,)
    with pytest.raises(UserError, match=r"'1\.png', which 6 images end in"):
        find_images(["1.png"], parts, "it")
    # Classes may be called so, too.
    with pytest.raises(UserError, match=r"'1\.png', which 2 images end in"):
        find_images(["1.png"], ["train/1.png", "bus/1.png"], "it")
    with pytest.raises(UserError, match=r"'1\.png', which 2 images end in"):
        find_images(["1.png"], ["train/1.png", "val/a/1.png"], "it")


@pytest.mark.parametrize(
    ("entries", "names", "complaint"),
    [
        (
            ["1.png"],
            NAMES,
            r"'1.png', which 2 images end in \(train/a/1.png, train/b/1.png\): name the folder",
        ),
        (["a/3.png"], NAMES, "which no image is called: did you mean"),
        (["zebra"], NAMES, "they are called such as 'train/a/1.png'"),
        (["a"], (), "the images have no names: give their indices"),
        (["a/1.png", "train/a/1.png"], NAMES, "names 'train/a/1.png' twice"),
        ([0, "train/a/1.png"], NAMES, "twice"),
    ],
)
def test_a_name_must_be_that_of_one_image(entries: list[Any], names: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        find_images(entries, names, "it")


@given(
    st.one_of(st.text(), st.binary(), st.recursive(st.none() | st.integers() | st.text(), st.lists)),
    st.data(),
)
def test_no_content_raises_anything_else(tmp_path_factory: Any, content: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["r.txt", "r.csv", "r.tsv", "r.json", "r.npy", "r"]))
    path = tmp_path_factory.mktemp("r") / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), errors="replace")
    with suppress(UserError):
        found = read_request(path)
        assert found
        assert all(isinstance(entry, int | str) for entry in found)
