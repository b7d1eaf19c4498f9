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
from test_commands import run
from torch import nn

import dau_fast
from dau_fast.errors import UserError
from dau_fast.methods import plugins
from dau_fast.methods.registry import find_methods, get_method
from dau_fast.metrics import plugins as attack_plugins
from dau_fast.metrics.mia import Answers
from dau_fast.plugins import entry_points
from dau_fast.plugins.entry_points import load_entry_points
from dau_fast.prune import plugins as prune_plugins
from dau_fast.prune.pruner import Search
from dau_fast.prune.registry import find_pruners, get_pruner

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
    for room in (plugins, prune_plugins, attack_plugins):
        monkeypatch.setattr(room, "_ROWS", {})
    monkeypatch.setattr(plugins, "_FUNCTIONS", {})
    load_entry_points.cache_clear()
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name.startswith("dau_fast_user_"):
            del sys.modules[name]
    load_entry_points.cache_clear()


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


def test_what_a_plugin_made_is_not_taken_for_what_a_changed_one_makes(tmp_path: Path) -> None:
    """A killed run's finished parts go by the users' code, too."""
    from dau_fast.job import loading

    before = set(loading.list_loaded())
    file = tmp_path / "mine.py"
    file.write_text(SHRINK)
    loading.load_module(str(file))
    assert set(loading.list_loaded()) - before == {file}


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
    monkeypatch.setattr(entry_points.metadata, "entry_points", lambda group: points.select(group=group))
    assert get_method("shrink").label == "Shrunk"
    (told,) = [record.getMessage() for record in caplog.records]
    assert "the method 'broken' of an installed package (broken_methods:f) cannot be loaded" in told
    assert "ZeroDivisionError" in told


# As docs/own-method.md shows them.
PRUNER_AND_ATTACK = """
import torch
import dau_fast
from dau_fast.prune import Masks
from dau_fast.prune.prunable import prunable_weights

@dau_fast.pruner("strided", about="weights at even places", source="the place of a weight, no data")
def strided(search):
    dropped = round(1 / max(search.sparsity, 1e-9))
    kept = {}
    for name, weight in prunable_weights(search.network, False).items():
        place = torch.arange(weight.numel(), device=weight.device).view_as(weight)
        kept[name] = place % dropped != 0
    return Masks(kept)

@dau_fast.attack("top_margin")
def top_margin(answers):
    top = answers.logits.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]
"""


def test_a_pruner_and_an_attack_of_others_appear_on_the_command_line_in_the_table_and_on_the_page(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PRUNER_AND_ATTACK)
    called = succeed(
        tmp_path / "out", "--plugin", file, "--prune", "strided", "--sparsity", 0.5,
        "--methods", "ft,retrain", "--epochs", 1,
    )  # fmt: skip
    report = called.report
    assert list(report["methods"]["ft"]["attacks"])[-1] == "top_margin"
    assert "attack_top_margin" in report["methods"]["ft"]["gaps"]
    assert "top margin" in called.stdout
    page = (called.folder / "report.html").read_text()
    assert "top margin" in page
    assert "Bar chart of 6 membership attacks" in page
    assert "the place of a weight, no data" in page
    weight = next(weight for weight in called.weights("ft").values() if weight.ndim == 4).flatten()
    assert not weight[::2].any()
    assert weight[1::2].all()
    original = called.folder / "original.safetensors"
    given = (called.folder / "ft.safetensors", "--original", original, "--plugin", file, "--device", "cpu")
    code, shown, _ = run("evaluate", *given, "--out", tmp_path / "evaluated")
    assert (code, "top margin" in shown) == (0, True)
    missing = call(tmp_path / "out", "--plugin", file, "--prune", "stride")
    assert "strided" in missing.stderr


def test_installed_packages_bring_pruners_and_attacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "somebodys_others.py").write_text(PRUNER_AND_ATTACK)
    (tmp_path / "broken_others.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    named = (
        ("strided", "somebodys_others:strided", prune_plugins.ENTRY_POINTS),
        ("top_margin", "somebodys_others:top_margin", attack_plugins.ENTRY_POINTS),
        ("broken", "broken_others:f", attack_plugins.ENTRY_POINTS),
    )
    points = EntryPoints(EntryPoint(*row) for row in named)
    monkeypatch.setattr(entry_points.metadata, "entry_points", lambda group: points.select(group=group))
    assert get_pruner("strided").about == "weights at even places"
    assert list(find_pruners())[-1] == "strided"
    assert list(attack_plugins.find_attacks())[-1] == "top_margin"
    (told,) = [record.getMessage() for record in caplog.records]
    assert "the attack 'broken' of an installed package (broken_others:f) cannot be loaded" in told
    monkeypatch.delitem(sys.modules, "somebodys_others")


def test_pruners_and_attacks_that_give_something_else_are_told_of() -> None:
    dau_fast.pruner("empty")(lambda search: None)  # type: ignore[arg-type, return-value]
    search = Search(nn.Linear(2, 2), 0.5, 0.2, 1, (2,), 0, train=lambda stage, masks: None)
    with pytest.raises(UserError, match="pruner 'empty' returned a NoneType: expected Masks"):
        get_pruner("empty").find(search)
    dau_fast.attack("scalar")(lambda answers: answers.logits.sum())
    answers = Answers(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(UserError, match=r"attack 'scalar' gave \(\): expected scores \[3\]"):
        attack_plugins.find_attacks()["scalar"](answers)
    with pytest.raises(UserError, match="not taken"):
        dau_fast.attack("entropy")
    dau_fast.pruner("omp")(lambda search: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(UserError, match="there is a pruner 'omp' already"):
        find_pruners()
