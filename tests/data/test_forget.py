"""What is to be forgotten, as asked for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dau_fast.data.split import TRAINING, VALIDATION, Forget, make_split
from dau_fast.errors import UserError

NAMES = ("cat", "dog", "7", "horse")


def test_a_share_is_read_from_the_request() -> None:
    assert Forget.parse("random:0.25", NAMES) == Forget("random:0.25", fraction=0.25)
    assert Forget.parse("random:1e-2", NAMES).fraction == 0.01


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.1", "nan", "inf", "-inf", "ten", "", "0.1:0.2"])
def test_a_share_outside_0_to_1_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="between 0 and 1") as raised:
        Forget.parse(f"random:{value}", NAMES)
    assert f"random:{value}" in str(raised.value)


@pytest.mark.parametrize(
    ("value", "label"), [("0", 0), ("3", 3), ("cat", 0), ("horse", 3), ("7", 2)], ids=str
)
def test_a_class_is_read_by_number_and_by_name(value: str, label: int) -> None:
    assert Forget.parse(f"class:{value}", NAMES) == Forget(f"class:{value}", label=label)


@pytest.mark.parametrize("value", ["4", "99", "-1", "1.0", "wolf", "", " 1", "²", "9" * 5000])
def test_a_class_that_does_not_exist_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="no such class: expected a number from 0 to 3 or a class name"):
        Forget.parse(f"class:{value}", NAMES)


@pytest.mark.parametrize("spec", ["", "random", "0.1", "Random:0.1", "some:thing", "classes:1"])
def test_a_request_of_another_form_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match="expected"):
        Forget.parse(spec, NAMES)


@pytest.mark.parametrize("text", ["3 1 2", "3\n1\n2\n", "\t3\r\n1   2"])
def test_indices_are_read_with_any_white_space_between_them(text: str, tmp_path: Path) -> None:
    path = tmp_path / "indices.txt"
    path.write_text(text)
    assert Forget.parse(f"indices:{path}", NAMES).indices == (3, 1, 2)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"4 8 15 8 4", "names (8|4) twice"),
        (b"1 01", "names 1 twice"),
        (b"3 -1", "'-1' is not an index"),
        (b"3 1.5", "'1.5' is not an index"),
        (b"1,2", "'1,2' is not an index"),
        (b"one", "'one' is not an index"),
        ("٣".encode(), "is not an index"),
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_damaged_index_file_is_refused_with_the_reason(
    content: bytes, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "indices.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as raised:
        Forget.parse(f"indices:{path}", NAMES)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["absent.txt", "."])
def test_an_index_file_that_cannot_be_opened_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Forget.parse(f"indices:{tmp_path / name}", NAMES)


@pytest.mark.parametrize("word", ["9" * 30, "9" * 5000], ids=["beyond int64", "beyond Python's digits"])
def test_a_monstrous_index_is_a_mistake_of_the_users(word: str, tmp_path: Path) -> None:
    path = tmp_path / "indices.txt"
    path.write_text(f"0 {word}")
    with pytest.raises(UserError):
        make_split(
            np.repeat(np.array([TRAINING, VALIDATION], dtype=np.int8), 5),
            torch.zeros(10, dtype=torch.int64),
            Forget.parse(f"indices:{path}", NAMES),
            0,
        )


def test_a_late_duplicate_in_a_long_index_file_is_found_in_linear_time(tmp_path: Path) -> None:
    """In quadratic time, 300,000 lines took minutes; in linear time, a fifth of a second."""
    path = tmp_path / "indices.txt"
    path.write_text("\n".join(map(str, [*range(300_000), 299_999])))
    began = time.perf_counter()
    with pytest.raises(UserError, match="names 299999 twice"):
        Forget.parse(f"indices:{path}", NAMES)
    assert time.perf_counter() - began < 10


def test_an_index_file_must_be_a_regular_one(pipe: Path) -> None:
    """Reading a pipe may wait for ever, and a device such as /dev/zero never ends."""
    for path in (pipe, Path(os.devnull)):
        with pytest.raises(UserError, match="is a pipe or a device: expected a regular file") as raised:
            Forget.parse(f"indices:{path}", NAMES)
        assert f"index file '{path}'" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_path_that_no_system_knows_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Forget.parse("indices:a\0b", NAMES)


@pytest.mark.parametrize("spec", ["random:2", "class:9", "nothing"])
def test_a_refusal_names_the_setting_and_what_was_given(spec: str) -> None:
    with pytest.raises(UserError, match=f"^`forget` '{spec}'"):
        Forget.parse(spec, NAMES)
