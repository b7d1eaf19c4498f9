"""What is told on terminals that take no text, know few characters, or could be steered by a name."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path

import click
import pytest
from calling import call

from dau_fast.errors import printable
from dau_fast.report.terminal import terminal
from dau_fast.unlearn import _prepare_streams

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\x7f"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_results_that_cannot_be_shown_are_told_to_be_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled(), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        errors = io.StringIO()
        monkeypatch.setattr(sys, "stderr", errors)
        with pytest.raises(click.exceptions.Exit) as left, terminal(tmp_path) as console:
            console.print("a table")
        full.flush()  # goes nowhere now
    assert left.value.exit_code == 1
    assert errors.getvalue() == (
        f"error: the results are complete in '{tmp_path}', but could not be shown: No space left on device\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_a_terminal_does_not_know_are_written_out(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    _prepare_streams()
    print("0.5 \u00b1 0.1 \u2212 \u65e5 \udcff", flush=True)
    assert b"\\u65e5 \\udcff" in written.getvalue()


def test_what_steers_a_terminal_is_written_out() -> None:
    assert printable("a b\nü 日 ±") == "a b\nü 日 ±"
    assert printable(HOSTILE) == r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\x7f"
    assert printable("\udcff\r\t") == r"\udcff\r\t"


@pytest.mark.parametrize(
    "arguments", [("--forget", f"indices:{HOSTILE}"), ("--checkpoint", HOSTILE), (HOSTILE,)]
)
def test_no_mistake_steers_the_terminal(arguments: tuple[str, ...], tmp_path: Path) -> None:
    called = call(tmp_path / "out", *arguments)
    assert called.code == 2
    assert called.stderr.isascii()
    assert called.stderr.removesuffix("\n").isprintable()


def test_a_warning_does_not_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    _prepare_streams()
    logging.getLogger("dau_fast").warning("%s is odd", HOSTILE)
    assert errors.getvalue() == rf"WARNING: {printable(HOSTILE)} is odd" + "\n"


def test_an_index_file_whose_name_steers_is_shown_harmlessly(tmp_path: Path) -> None:
    file = tmp_path / "a\x1b[31m.txt"
    file.write_text(" ".join(map(str, range(0, 400, 4))))
    called = call(tmp_path / "out", "--forget", f"indices:{file}", "--methods", "ft", "--epochs", 1)
    assert called.code == 0, called.stderr
    assert "\x1b" not in called.stdout + called.stderr
    assert os.sep in called.stdout
