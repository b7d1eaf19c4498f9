"""Methods of others: one decorated function appears in command line, table, page and Python."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import call, succeed
from test_api import CONFIG, perceptron, some_sets
from torch import nn

import dau_fast
from dau_fast.errors import UserError
from dau_fast.methods import plugins
from dau_fast.methods.registry import find_methods, get_method

# Fifteen lines, as docs/own-method.md shows them.
SHRINK = """
import copy
from dataclasses import dataclass
import torch
import dau_fast

@dataclass(frozen=True)
class Shrinking:
    factor: float = 0.5  # of the last layer's weights

@dau_fast.method("shrink", label="Shrunk", about="the last layer's weights, shrunk", settings=Shrinking)
def shrink(task, settings):
    model = copy.deepcopy(task.original)
    with torch.no_grad():
        model.head.weight.mul_(settings.factor)
    return model
"""


@pytest.fixture(autouse=True)
def nobody_elses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    monkeypatch.setattr(plugins, "_ROWS", {})
    monkeypatch.setattr(plugins, "_FUNCTIONS", {})
    plugins._load_entry_points.cache_clear()
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name.startswith("dau_fast_user_"):
            del sys.modules[name]
    plugins._load_entry_points.cache_clear()


def test_a_file_with_a_method_appears_on_the_command_line_in_the_table_and_on_the_page(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SHRINK)
    called = succeed(tmp_path / "out", "--plugin", file, "--methods", "shrink,retrain", "--epochs", 1)
    report = called.report
    assert list(report["methods"]) == ["original", "retrain", "shrink"]
    assert report["run"]["settings"]["shrink"] == {"factor": 0.5}
    assert report["run"]["methods"]["shrink"]["about"] == "the last layer's weights, shrunk"
    assert "Shrunk" in called.stdout
    assert "the last layer&#39;s weights, shrunk" in (called.folder / "report.html").read_text()
    halved = called.weights("original")["head.weight"] / 2
    assert torch.equal(called.weights("shrink")["head.weight"], halved)
    # The report brings it along, and settings by field.
    again = succeed(tmp_path / "again", "--config", called.folder / "report.json", "--epochs", 1)
    assert torch.equal(again.weights("shrink")["head.weight"], called.weights("shrink")["head.weight"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import nothing_like_it", "cannot be loaded: ModuleNotFoundError"),
        ("1 / 0", "cannot be loaded: ZeroDivisionError"),
        ("def (", "cannot be loaded: SyntaxError"),
        ("import dau_fast\\n@dau_fast.method('a b')\\ndef f(task): pass", "expected a name of letters"),
        ("import dau_fast\\n@dau_fast.method('x', settings=int)\\ndef f(t): pass", "expected a frozen data"),
        ("import dau_fast\\n@dau_fast.method('dau')\\ndef f(task): pass", "there is a method 'dau' already"),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_loaded_costs_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text.replace("\\n", "\n"))
    called = call(tmp_path / "out", "--plugin", file)
    assert (called.code, called.stdout) == (2, "")
    assert complaint in called.stderr
    assert called.stderr.count("\n") == 1
    missing = call(tmp_path / "out", "--plugin", tmp_path / "no.py")
    assert "is not a file" in missing.stderr


def test_a_decorated_function_is_a_method_from_python() -> None:
    @dataclass(frozen=True)
    class Settings:
        factor: float = 0.5

    @dau_fast.method("halve", about="half of everything.", settings=Settings)
    def halve(task: Any, settings: Settings) -> Any:
        model = copy.deepcopy(task.original)
        with torch.no_grad():
            model.head.weight.mul_(settings.factor)
        return model

    row = get_method("halve")
    assert (row.label, row.about, row.reference) == ("halve", "half of everything", False)
    assert list(find_methods())[-1] == "halve"
    network = perceptron()
    for asked in ("halve", halve):
        result = dau_fast.unlearn(network, **some_sets(), method=asked, config={"factor": 0.25})
        assert torch.equal(result.model[3].weight, network[3].weight / 4)
        assert result.settings == Settings(0.25)
        assert repr(result).startswith("Result(halve: ")


def test_any_function_is_a_method_from_python() -> None:
    def quarter(task: Any) -> nn.Module:
        network: nn.Module = copy.deepcopy(task.original.network)
        with torch.no_grad():
            network[3].weight.mul_(0.25)
        return network

    network = perceptron()
    result = dau_fast.unlearn(network, **some_sets(), method=quarter)
    assert result.method == "quarter"
    assert torch.equal(result.model[3].weight, network[3].weight / 4)
    with pytest.raises(UserError, match="unknown method 'quarter'"):
        dau_fast.unlearn(network, **some_sets(), method="quarter", config=CONFIG)


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (lambda task: None, "returned a NoneType: expected a changed copy of task.original"),
        (lambda task: task.original, "returned task.original itself"),
    ],
)
def test_what_a_function_returns_must_be_another_model(made: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        dau_fast.unlearn(perceptron(), **some_sets(), method=made)


def test_installed_packages_bring_methods_and_broken_ones_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "somebodys_methods.py").write_text(SHRINK)
    (tmp_path / "broken_methods.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    points = EntryPoints(
        EntryPoint(name, value, plugins.ENTRY_POINTS)
        for name, value in (("shrink", "somebodys_methods:shrink"), ("broken", "broken_methods:f"))
    )
    monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: points.select(group=group))
    assert get_method("shrink").label == "Shrunk"
    (told,) = [record.getMessage() for record in caplog.records]
    assert "the method 'broken' of an installed package (broken_methods:f) cannot be loaded" in told
    assert "ZeroDivisionError" in told
