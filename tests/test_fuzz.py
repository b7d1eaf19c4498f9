"""Readers on damaged files and odd texts, ops on arguments that do not fit; `tests.fuzz` for more."""

from __future__ import annotations

import json
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fuzz import running
from fuzz.damage import damage
from fuzz.readers import Target
from fuzz.running import TARGETS, run_batch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dau_fast.checkpoints import _metadata
from dau_fast.data.split import Forget, decode_roles
from dau_fast.errors import UserError, printable
from dau_fast.job.config_file import read_config
from dau_fast.report.manifest import list_stale

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that may crash")
properties = settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
# What a report has, and something else in its place.
KEYS = st.sampled_from(
    ["run", "options", "methods", "settings", "engine", "asked", "loop_parts", "files", "accumulate", "x"]
)
REPORTS = st.recursive(JSON, lambda inner: st.dictionaries(KEYS, inner), max_leaves=12)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_what_is_damaged_is_read_or_refused(name: str) -> None:
    assert run_batch(name, 1_000_000, 120) == []


def test_damage_depends_on_its_number_alone() -> None:
    content = bytes(range(200))
    found = [damage(content, random.Random(number)) for number in range(50)]
    assert found == [damage(content, random.Random(number)) for number in range(50)]
    assert len(set(found)) > 40


def test_a_crash_and_a_hang_are_found_and_the_cases_after_them_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_content: bytes, folder: Path, chance: random.Random) -> Any:
        number = int(folder.parent.name)
        if number == 3:
            os.abort()
        if number == 5:
            (folder.parent / "outside").touch()
        if number == 6:
            raise ValueError("no UserError")
        if number == 8:
            while True:
                pass

    monkeypatch.setitem(TARGETS, "broken", Target(lambda: [b"x"], run))
    monkeypatch.setattr(running, "HANGS", 1)
    found = dict(run_batch("broken", 0, 10))
    assert sorted(found) == [3, 5, 6, 8]
    assert found[3].startswith("ends the process")
    assert found[5].startswith("wrote outside")
    assert "no UserError" in found[6]
    assert found[8] == "hangs"


@properties
@example({"files": [None]})
@given(REPORTS)
def test_any_json_is_options_or_refused(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(content))
    with suppress(UserError):
        options, chosen = read_config(file)
        assert isinstance(options, dict)
        assert isinstance(chosen, dict)
    assert all("/" not in name for name in list_stale(file, keep=()))


@properties
@given(JSON)
def test_any_metadata_is_texts_or_refused(content: Any) -> None:
    try:
        found = _metadata(json.dumps(content))
    except ValueError:
        return
    assert all(isinstance(value, str) for value in found.values())


@properties
@example("random:1e-400")
@example("random:0x1p-3")
@example("class:\u0663")
@given(st.text() | st.sampled_from(["random:", "class:"]).flatmap(lambda kind: st.text().map(kind.__add__)))
def test_any_request_is_understood_or_refused(text: str) -> None:
    if text.startswith("indices:"):
        return
    try:
        found = Forget.parse(text, ("a", "b"))
    except UserError:
        return
    assert (found.fraction is None) != (found.label is None)


@properties
@given(st.text(), st.integers(0, 20))
def test_any_text_is_roles_or_refused(text: str, count: int) -> None:
    with suppress(UserError):
        assert len(decode_roles(text, count)) == count


@properties
@given(st.text())
def test_nothing_printable_steers_a_terminal(text: str) -> None:
    shown = printable(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    shown.encode()
    if text.isprintable():
        assert shown == text
