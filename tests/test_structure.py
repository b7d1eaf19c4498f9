"""The house: which room may know which, no circles, and nothing that outgrows its place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dau_fast.methods.registry import find_methods
from dau_fast.prune.registry import find_pruners

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dau_fast"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from running(child)


def imports_of(module: str) -> set[str]:
    """The package's modules that `module` imports, inside functions too."""
    found: set[str] = set()
    for node in running(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return (found & FILES.keys()) - {module}


IMPORTS = {module: imports_of(module) for module in FILES}


def room_of(module: str) -> str:
    """The folder that `module` lies in, or its own name at the package's root."""
    return [*module.split("."), ""][1]


def known_to(room: str) -> set[str]:
    """The rooms that `room` imports from."""
    inside = [module for module in FILES if room_of(module) == room]
    return {room_of(other) for module in inside for other in IMPORTS[module]} - {room}


def circle_from(start: str, graph: dict[str, set[str]]) -> list[str] | None:
    """A way from `start` back to it."""
    waiting: list[list[str]] = [[start]]
    seen: set[str] = set()
    while waiting:
        way = waiting.pop()
        for following in graph[way[-1]]:
            if following == start:
                return [*way, start]
            if following not in seen:
                seen.add(following)
                waiting.append([*way, following])
    return None


def test_no_module_imports_itself_by_a_detour() -> None:
    assert [circle for module in FILES if (circle := circle_from(module, IMPORTS))] == []


def test_no_room_imports_itself_by_a_detour() -> None:
    rooms = {room_of(module) for module in FILES}
    graph = {room: known_to(room) for room in rooms}
    assert [circle for room in rooms if (circle := circle_from(room, graph))] == []


@pytest.mark.parametrize(
    ("room", "others"),
    [
        ("ops", set()),
        ("data", {"errors", "ops"}),
        ("prune", {"errors", "ops", "plugins"}),
        ("engine", {"errors", "ops", "models", "optim", "prune"}),
        ("metrics", {"errors", "data", "engine", "plugins"}),
        ("audits", {"config", "errors", "data", "engine", "metrics", "models"}),
        ("commands", {"checkpoints", "engine", "errors", "job", "ops", "report"}),
        ("report", None),
    ],
)
def test_a_room_knows_only_those_before_it(room: str, others: set[str] | None) -> None:
    if others is None:
        assert {name for name in FILES if room in map(room_of, IMPORTS[name])} - {
            name for name in FILES if room_of(name) == room
        } == {
            "dau_fast.api",
            "dau_fast.unlearn",
            *(
                f"dau_fast.commands.{name}"
                for name in ("attest", "audit", "env", "evaluate", "page", "selfcheck", "verify")
            ),
        }
    else:
        assert known_to(room) <= others


def test_nothing_but_the_package_itself_starts_the_command_line() -> None:
    assert [module for module in FILES if "dau_fast.unlearn" in IMPORTS[module]] == ["dau_fast.__main__"]


def test_the_root_holds_few_modules() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 10


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for module in FILES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module}.{node.name}", node


def test_no_function_has_more_than_40_lines_of_code() -> None:
    def lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        first = node.body[0]
        text = first if ast.get_docstring(node) is not None else None
        held = 0 if text is None else (text.end_lineno or 0) - text.lineno + 1
        return (node.end_lineno or 0) - node.lineno + 1 - held

    assert {name: lines(node) for name, node in functions() if lines(node) > 40} == {}


def test_no_file_has_more_than_400_lines() -> None:
    long = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert {module: count for module, count in long.items() if count > 400} == {}


def test_errors_name_fields_and_not_flags() -> None:
    for module in FILES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "ValueError"):
                text = ast.unparse(node)
                assert not re.search(r"(?<![\w-])--[a-z]", text), f"{module}: {text}"


@pytest.mark.parametrize("rows", [find_methods, find_pruners])
def test_a_row_says_what_people_read(rows: object) -> None:
    found = rows()  # type: ignore[operator]
    assert len(found) >= 4
    for name, row in found.items():
        assert row.name == name
        assert row.about
        assert not row.about.endswith(".")
