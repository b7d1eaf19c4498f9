"""The output folder: all files or none, and what was there before stays."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dau_fast.errors import UserError
from dau_fast.report.output import KEPT, OutputFolder

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


# ---- one run at a time, and what dead ones left


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path: Path) -> None:
    with OutputFolder(tmp_path) as staging:
        (staging / "file").touch()
        with pytest.raises(UserError, match="in use by another run: wait"), OutputFolder(tmp_path):
            pytest.fail("two at a time")
        assert staging.exists()
    with OutputFolder(tmp_path) as staging:
        (staging / "other").touch()
    assert names(tmp_path) == ["file", "other"]


def killed(work: Callable[[], None]) -> int:
    """Do `work` in a process of its own; how that ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_in(path: Path, resume: bool = False) -> None:
    def work() -> None:
        with OutputFolder(path, resume=resume) as staging:
            (staging / "dau.safetensors").write_text("half")
            (staging / KEPT).mkdir(exist_ok=True)
            (staging / KEPT / f"{len(list((staging / KEPT).iterdir()))}.json").touch()
            os._exit(9)

    assert killed(work) == 9


def test_what_dead_processes_left_holds_nobody_up_and_is_removed(tmp_path: Path) -> None:
    for _ in range(3):
        die_in(tmp_path)
    assert len([name for name in names(tmp_path) if "/" not in name]) == 1
    with OutputFolder(tmp_path) as staging:
        assert names(staging) == []
        (staging / "report.json").write_text("{}")
    assert names(tmp_path) == ["report.json"]


def test_what_a_killed_run_kept_is_there_for_one_that_resumes(tmp_path: Path) -> None:
    die_in(tmp_path)
    die_in(tmp_path, resume=True)
    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path, resume=True):
        raise KeyboardInterrupt
    with OutputFolder(tmp_path, resume=True) as staging:
        assert names(staging) == [KEPT, f"{KEPT}/0.json", f"{KEPT}/1.json"]
        (staging / "report.json").write_text("{}")
    assert names(tmp_path) == ["report.json"]


def write_run(path: Path, run: str, files: list[str]) -> None:
    """The results of `run`: every file says which it is of."""
    with OutputFolder(path) as staging:
        for name in files:
            (staging / name).write_text(run)
        (staging / "report.html").write_text(run)
        (staging / "report.json").write_text(json.dumps({"run": run, "files": {name: {} for name in files}}))


def test_files_that_only_the_earlier_report_names_go_with_it(tmp_path: Path) -> None:
    write_run(tmp_path, "old", ["original.safetensors", "dau.sparse.safetensors", "ga.safetensors"])
    (tmp_path / "mine.safetensors").touch()
    write_run(tmp_path, "new", ["original.safetensors", "dau.safetensors"])
    assert names(tmp_path) == [
        "dau.safetensors", "mine.safetensors", "original.safetensors", "report.html", "report.json"
    ]  # fmt: skip


def test_weights_of_methods_that_an_older_report_without_a_list_names_go_too(tmp_path: Path) -> None:
    for name in ("original", "ga", "dau.sparse", "mine"):
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "report.json").write_text(json.dumps({"methods": {"original": {}, "ga": {}, "dau": {}}}))
    write_run(tmp_path, "new", ["original.safetensors"])
    assert names(tmp_path) == ["mine.safetensors", "original.safetensors", "report.html", "report.json"]


def test_an_audit_goes_with_the_results_that_it_is_of_and_its_models_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(tmp_path, "old", ["dau.safetensors"])
    with OutputFolder(tmp_path, "audit.json") as staging:
        (staging / "reference_0.safetensors").touch()
        (staging / "audit.html").touch()
        (staging / "audit.json").write_text(json.dumps({"files": {"reference_0.safetensors": {}}}))
    assert {"audit.json", "audit.html", "report.json"} < set(names(tmp_path)), "an audit leaves the results"
    assert caplog.messages == []
    write_run(tmp_path, "new", ["dau.safetensors"])
    assert names(tmp_path) == ["dau.safetensors", "reference_0.safetensors", "report.html", "report.json"]
    assert caplog.messages == ["audit.json of the results that were there before is removed: audit again"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[", b"[]", b"7", b"null", b'{"files": 3}', b'{"files": [[]]}', b'{"methods": [[1]]}',
        b"[" * 100_000,
        b'{"files": {"../outside.json": 0, "/etc/hosts": 0, "..": 0, "notes.txt": 0, ".hidden.json": 0}}',
    ],
)  # fmt: skip
def test_an_earlier_report_that_lies_costs_nobody_a_file(content: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("outside.json", "out/notes.txt", "out/.hidden.json"):
        (tmp_path / name).touch()
    (out / "report.json").write_bytes(content)
    write_run(out, "new", [])
    assert names(tmp_path) == [
        "out", "out/.hidden.json", "out/notes.txt", "out/report.html", "out/report.json", "outside.json"
    ]  # fmt: skip


@contextmanager
def dying_at(step: int) -> Iterator[None]:
    """The process dies, as by kill -9, in place of the call number `step` that changes the disk for good."""
    left = [step]

    def deadly(call: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object, **named: object) -> object:
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return call(*arguments, **named)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "unlink", "rmdir", "fsync"):
            patch.setattr(os, name, deadly(getattr(os, name)))
        yield


def consistent(path: Path, old: list[str], new: list[str]) -> str | None:
    """Which run's results are in `path`; None where there is no report. Never a mixture."""
    if not (path / "report.json").exists():
        return None
    report = json.loads((path / "report.json").read_text())
    assert report["files"].keys() == set(old if report["run"] == "old" else new)
    assert report["run"] == "old" or not (path / "audit.json").exists()
    for name in (*report["files"], "report.html"):
        assert (path / name).read_text() == report["run"], name
    return str(report["run"])


def test_killed_at_any_moment_the_folder_never_holds_a_mixture(tmp_path: Path) -> None:
    old, new = ["a.safetensors", "b.safetensors", "gone.safetensors"], ["a.safetensors", "b.safetensors"]
    found = []
    for step in range(60):
        path = tmp_path / str(step)
        write_run(path, "old", old)
        (path / "audit.json").write_text("old")

        def work(path: Path = path, step: int = step) -> None:
            with dying_at(step):
                write_run(path, "new", new)
            os._exit(0)

        code = killed(work)
        found.append(consistent(path, old, new))
        with OutputFolder(path):
            pass  # the next run there moves what was complete
        after = consistent(path, old, new)
        assert after == "new" or found[-1] == after == "old"
        assert sorted(name for name in names(path) if name.startswith(".")) == []
        if code == 0:
            break
    assert code == 0
    assert found == sorted(found, key=["old", None, "new"].index)
    assert {"old", None, "new"} == set(found)


def test_a_full_disk_costs_one_line(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("older")
    with pytest.raises(UserError, match="cannot be written: No space left on device"), OutputFolder(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == ["report.json"]


def test_another_thread_may_write_too(tmp_path: Path) -> None:
    thread = threading.Thread(target=write_run, args=(tmp_path, "new", []))
    thread.start()
    thread.join()
    assert names(tmp_path) == ["report.html", "report.json"]
