"""The output folder: all files or none, and what was there before stays."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from dau_fast.errors import UserError
from dau_fast.report.output import OutputFolder

STOPPED = [ValueError, KeyboardInterrupt, SystemExit]


def names(folder: Path) -> list[str]:
    """Everything below `folder`, hidden things too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_files_appear_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OutputFolder(out) as staging:
        (staging / "report.json").write_text("1")
        (staging / "dau.safetensors").write_bytes(b"2")
        (hidden,) = out.iterdir()
        assert hidden == staging
        assert hidden.name.startswith(".unfinished-")
    assert names(out) == ["dau.safetensors", "report.json"]
    assert (out / "report.json").read_text() == "1"


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "a" / "b" / "c") as staging:
        (staging / "file").touch()
    assert names(tmp_path) == ["a", "a/b", "a/b/c", "a/b/c/file"]


def test_a_relative_path_is_below_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with OutputFolder(Path("a/b")) as staging:
        (staging / "file").touch()
    with OutputFolder(Path()) as staging:
        (staging / "here").touch()
    assert names(tmp_path) == ["a", "a/b", "a/b/file", "here"]


def test_success_replaces_files_of_the_same_name_and_keeps_the_others(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("older")
    (tmp_path / "notes.txt").write_text("mine")
    with OutputFolder(tmp_path) as staging:
        (staging / "report.json").write_text("newer")
        assert (tmp_path / "report.json").read_text() == "older"
    assert names(tmp_path) == ["notes.txt", "report.json"]
    assert (tmp_path / "report.json").read_text() == "newer"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def fail(path: Path, error: type[BaseException]) -> None:
    """Write into the output folder `path` and raise `error`."""
    with OutputFolder(path) as staging:
        (staging / "report.json").write_text("newer")
        (staging / "folder").mkdir()
        raise error


@pytest.mark.parametrize("error", STOPPED)
def test_an_error_goes_through_and_takes_the_missing_folders_away_again(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(error):
        fail(tmp_path / "here" / "a" / "b", error)
    assert names(tmp_path) == ["here"]


@pytest.mark.parametrize("error", STOPPED)
def test_an_error_leaves_a_folder_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "report.json").write_text("older")
    (tmp_path / "empty").mkdir()
    with pytest.raises(error):
        fail(tmp_path, error)
    assert names(tmp_path) == ["empty", "report.json"]
    assert (tmp_path / "report.json").read_text() == "older"


def test_a_file_that_somebody_else_put_there_meanwhile_is_kept(tmp_path: Path) -> None:
    def run() -> None:
        with OutputFolder(tmp_path / "a" / "b"):
            (tmp_path / "a" / "other").touch()
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 it is the one raised above
        run()
    assert names(tmp_path) == ["a", "a/other"]


@pytest.mark.parametrize("below", ["file", "file/a", "file/a/b", "new/" + "x" * 300])
def test_a_path_that_cannot_be_a_folder_is_the_users_mistake(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="another `out`") as caught, OutputFolder(tmp_path / below):
        pytest.fail("there is nothing to write to")
    assert str(tmp_path / below) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_folders_are_taken_away_again_where_the_last_step_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(UserError, match="Permission denied"), OutputFolder(tmp_path / "a" / "b"):
        pytest.fail("there is nothing to write to")
    assert names(tmp_path) == []


def test_a_folder_where_a_file_should_go_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(UserError, match=r"report\.json"), OutputFolder(tmp_path) as staging:
        (staging / "report.json").write_text("newer")
    assert names(tmp_path) == ["report.json"]


def test_an_interrupt_while_files_are_moved_leaves_no_hidden_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with OutputFolder(tmp_path) as staging:
            (staging / "report.json").write_text("newer")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_listed_is_the_users_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(UserError, match="cannot take the results: Permission denied"), OutputFolder(tmp_path):
        monkeypatch.setattr(Path, "iterdir", fail)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
