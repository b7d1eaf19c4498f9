"""Somebody who waits sees how long: in a terminal, in a notebook and in a log."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import rich.console

import dau_fast
from dau_fast.report import progress
from dau_fast.report.progress import progress_bars


class Clock:
    """Ten seconds later whenever it is asked."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 10
        return self.now


def work(steps: int = 9) -> None:
    with progress_bars() as bars:
        advance = bars("retrain", steps)
        for _ in range(steps):
            advance()


def test_a_log_gets_a_line_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "time", Clock())
    work()
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "retrain: 3 of 9, 1:00 left",
        "retrain: 6 of 9, 0:30 left",
        "retrain: 9 of 9, 0:00 left",
    ]


def test_short_work_says_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    work()
    assert capsys.readouterr().err == ""


def test_a_notebook_without_widgets_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr(progress, "find_spec", lambda _: None)
    monkeypatch.setattr(progress, "time", Clock())
    work()
    assert len(capsys.readouterr().err.splitlines()) == 9


def test_a_notebook_with_widgets_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    class Output:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...
        def clear_output(self, wait: bool = False) -> None: ...
        def close(self) -> None: ...

    for name, content in {
        "IPython": {},
        "IPython.display": {"display": shown.append},
        "ipywidgets": {"Output": Output},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr(progress, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(rich.console.Console, "print", lambda *_, **__: shown.append("printed"))
    work()
    assert isinstance(shown[0], Output)
    assert "printed" in shown


def test_a_caller_of_the_package_finds_them() -> None:
    assert dau_fast.progress_bars is progress_bars
