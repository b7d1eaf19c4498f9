"""The figure of the rooms shows the imports as they are now, and every room is explained."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_architecture", DOCS / "draw_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_figure_shows_the_imports_of_now(script):
    committed, graph = (DOCS / "architecture.svg").read_text(encoding="utf-8"), script.read_rooms()
    stale = "run python docs/draw_architecture.py"
    assert script.describe_imports(graph) in committed, stale
    # Other versions of Matplotlib write the same picture in other words.
    if f"Matplotlib v{matplotlib.__version__}," in committed:
        assert script.draw_architecture(graph) == committed, stale


def test_no_room_imports_itself_through_others(script):
    assert script.circle_rooms(script.read_rooms()) == []


def test_every_room_is_a_box_and_has_its_row_in_the_text(script):
    rooms = set(script.read_rooms())
    picture = script.draw_architecture(script.read_rooms())
    assert {room for room in rooms if f">{room}</text>" not in picture} == set()
    rows = re.findall(r"^\| `([\w.]+)", (DOCS / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rooms - {row.removesuffix(".py") for row in rows} == set()


def test_imports_are_found_wherever_they_stand(script, tmp_path):
    package = tmp_path / "house"
    (package / "cellar").mkdir(parents=True)
    (package / "__init__.py").write_text("from house import door\n")
    (package / "door.py").write_text("import sys\nfrom house import cellar\nimport elsewhere.roof\n")
    (package / "roof.py").write_text("def climb():\n    from house.cellar.wine import red\n")
    (package / "cellar" / "wine.py").write_text("import house.door\nfrom house.cellar import dark\n")
    (package / "cellar" / "dark.py").write_text("import os\n")
    assert script.read_rooms(package) == {"cellar": {"door"}, "door": {"cellar"}, "roof": {"cellar"}}


def test_arrows_that_follow_from_others_are_left_out_but_none_of_a_circle(script):
    chain = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert script.essential_imports(chain) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert script.circle_rooms(chain) == []
    assert script.room_levels(chain) == {"a": 2, "b": 1, "c": 0}
    circle = {"door": {"a", "b", "c"}, "a": {"b", "c"}, "b": {"a", "c"}, "c": set()}
    found = script.essential_imports(circle)
    assert found["door"] == {"a", "b"}
    assert "b" in found["a"]
    assert "a" in found["b"]
    assert script.circle_rooms(circle) == ["a", "b"]
    levels = script.room_levels(circle)
    assert levels["a"] == levels["b"] == 1
    assert levels["door"] == 2


def test_the_same_graph_gives_the_same_picture(script):
    graph = {"top": {"left", "right"}, "left": {"base"}, "right": {"base"}, "far": {"base"}, "base": set()}
    assert script.draw_architecture(graph) == script.draw_architecture(graph)
    assert script.draw_architecture(graph) != script.draw_architecture({**graph, "far": {"left"}})
