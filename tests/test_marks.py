"""Which tests run: those that are marked slow wait for --slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent

MARKED = """
import pytest

def test_of_every_day():
    pass

@pytest.mark.slow
def test_that_takes_long():
    pass

@pytest.mark.parametrize("size", [1, pytest.param(1000, marks=pytest.mark.slow)])
def test_of_two_sizes(size):
    pass

@pytest.mark.interpreter
def test_in_the_interpreter():
    pass
"""


@pytest.mark.parametrize(
    ("arguments", "passed", "left_out"),
    [((), 2, 3), (("--slow",), 4, 1), (("-k", "long"), 0, 5), (("--slow", "-k", "long"), 1, 4)],
)
def test_slow_tests_run_with_their_flag_alone_and_are_counted(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    passed: int,
    left_out: int,
) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyprojecttoml((ROOT / "pyproject.toml").read_text())
    pytester.makepyfile(MARKED)
    found = pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)
    found.assert_outcomes(passed=passed, deselected=left_out)


TIMED = """
import time

def test_of_no_device():
    pass

def test_of_a_device(device):
    assert device.type == "cpu"

def test_that_hangs(device):
    time.sleep(30)

def test_that_comes_after_it(device):
    pass
"""


def test_device_tests_alone_each_under_its_limit_leave_a_line_as_they_end(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyprojecttoml((ROOT / "pyproject.toml").read_text())
    pytester.makepyfile(TIMED)
    options = ("--only-device", "--outcomes", "rows.jsonl", "--seconds-a-test", "1")
    found = pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)
    found.assert_outcomes(passed=2, failed=1, deselected=1)
    rows = [json.loads(line) for line in (pytester.path / "rows.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["passed", "failed", "passed"]
    assert rows[1]["reason"] == "the test takes longer than 1 s"
