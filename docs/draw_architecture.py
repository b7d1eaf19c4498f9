"""Draws docs/architecture.svg: the rooms of dau_fast, and which of them import which.

    python docs/draw_architecture.py

A room is a module or a package directly below dau_fast. Only the source is read, nothing is imported. An
arrow that follows from others is left out: what a room imports is all that can be reached from it.
"""

from __future__ import annotations

import ast
import io
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import mean

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

PACKAGE = "dau_fast"
ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"

Graph = dict[str, set[str]]
Point = tuple[float, float]

# Readable on a white page and on a black one: boxes have a ground of their own, arrows a middling grey.
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "architecture", "font.size": 11}
_BOX, _EDGE, _TEXT, _ARROW, _CIRCLE = "#eaf1f8", "#0072B2", "#111111", "#808080", "#D55E00"
_WIDTH, _HEIGHT = 1.5, 0.42  # of a box
_ACROSS, _DOWN = 1.95, 0.95  # from one box to the next


# ---- reading the imports


def read_rooms(package: Path = ROOT / PACKAGE) -> Graph:
    """Room -> the other rooms that its files import, whether at their top or inside a function."""
    rooms = {path.stem for path in package.glob("*.py")}
    rooms |= {path.parent.name for path in package.glob("*/*.py")}
    graph: Graph = {room: set() for room in sorted(rooms - {"__init__"})}
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).with_suffix("").parts[0]
        if room in graph:
            imported = {name.split(".")[1] for name in _imported(path, package.name) if "." in name}
            graph[room] |= imported & graph.keys() - {room}
    return graph


def _imported(path: Path, package: str) -> Iterator[str]:
    """Dotted names below `package` that the file at `path` imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.startswith(f"{package}."))


def reachable(graph: Mapping[str, set[str]], room: str) -> set[str]:
    """All rooms that `room` imports, directly or not; itself among them where it lies on a circle."""
    found: set[str] = set()
    waiting = set(graph[room])
    while waiting:
        found |= waiting
        waiting = set().union(*(graph[one] for one in waiting)) - found
    return found


def circle_rooms(graph: Mapping[str, set[str]]) -> list[str]:
    """The rooms that import themselves through others."""
    return [room for room in graph if room in reachable(graph, room)]


def essential_imports(graph: Mapping[str, set[str]]) -> Graph:
    """`graph` without the arrows that follow from others; those on circles stay."""
    beyond = {room: reachable(graph, room) for room in graph}

    def follows(room: str, other: str) -> bool:
        ways = [one for one in graph[room] - {other} if other in beyond[one]]
        return any(one not in beyond[other] and room not in beyond[one] for one in ways)

    return {room: {other for other in graph[room] if not follows(room, other)} for room in graph}


# ---- laying out


def room_levels(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """How many rooms lie below each room at most; the rooms of a circle share a level."""
    beyond = {room: reachable(graph, room) for room in graph}
    levels: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in levels:
            circle = {room} | {other for other in beyond[room] if room in beyond[other]}
            below = {other for one in circle for other in graph[one]} - circle
            levels.update(dict.fromkeys(circle, 1 + max(map(level, below), default=-1)))
        return levels[room]

    for room in graph:
        level(room)
    return levels


def arrow_ways(arrows: Mapping[str, set[str]], levels: Mapping[str, int]) -> list[list[str]]:
    """Each arrow as room, a bend "room>other@level" for every level that it crosses, other room."""
    return [
        [room, *(f"{room}>{other}@{level}" for level in range(levels[room] - 1, levels[other], -1)), other]
        for room in sorted(arrows)
        for other in sorted(arrows[room])
    ]


def _places(levels: Mapping[str, int], ways: list[list[str]]) -> dict[str, Point]:
    """Centre of every room and bend, on its level, near to what it is linked with."""
    rows: list[list[str]] = [[] for _ in range(1 + max(levels.values()))]
    for room in sorted(levels):
        rows[levels[room]].append(room)
    links: dict[str, list[str]] = {}
    for way in ways:
        for bend in way[1:-1]:
            rows[int(bend.split("@")[1])].append(bend)
        for upper, lower in pairwise(way):
            links.setdefault(upper, []).append(lower)
            links.setdefault(lower, []).append(upper)
    across = {name: _centred(i, row) for row in rows for i, name in enumerate(row)}
    for _ in range(24):
        for row in (*rows, *reversed(rows)):
            wanted = {name: mean([across[one] for one in links.get(name, [name])]) for name in row}
            row.sort(key=lambda name, wanted=wanted: (wanted[name], name))
            across.update({name: _centred(i, row) for i, name in enumerate(row)})
    return {name: (across[name], _DOWN * height) for height, row in enumerate(rows) for name in row}


def _centred(i: int, row: list[str]) -> float:
    return _ACROSS * (i - (len(row) - 1) / 2)


# ---- drawing


def draw_architecture(graph: Mapping[str, set[str]]) -> str:
    """The picture as SVG text, the same for the same graph and version of Matplotlib."""
    levels = room_levels(graph)
    ways = arrow_ways(essential_imports(graph), levels)
    places = _places(levels, ways)
    wide = max(abs(x) for x, _ in places.values()) + _ACROSS / 2
    high = _DOWN * (max(levels.values()) + 1)
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(2 * wide, high))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-wide, wide), ylim=(-_DOWN / 2, high - _DOWN / 2))
        axes.axis("off")
        for way in ways:
            circle = way[0] in reachable(graph, way[-1])
            axes.add_patch(_arrow([places[name] for name in way], _CIRCLE if circle else _ARROW))
        for room in graph:
            _draw_box(axes, room, *places[room])
        return _to_svg(figure, graph)


def _arrow(way: list[Point], color: str) -> FancyArrowPatch:
    """A curve from the lower side of the first box through the bends to the upper side of the last."""
    (x, y), *bends, (end_x, end_y) = way
    if y == end_y:  # on a circle
        curve = Curve([(x, y), ((x + end_x) / 2, y + _DOWN / 2), (end_x, end_y + _HEIGHT / 2)], [1, 3, 3])
    else:
        points = [(x, y - _HEIGHT / 2), *bends, (end_x, end_y + _HEIGHT / 2)]
        vertices, codes = [points[0]], [1]
        for (x0, y0), (x1, y1) in pairwise(points):
            middle = (y0 + y1) / 2
            vertices += [(x0, middle), (x1, middle), (x1, y1)]
            codes += [4, 4, 4]
        curve = Curve(vertices, codes)
    return FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=11, color=color, lw=1.3)


def _draw_box(axes: Axes, room: str, x: float, y: float) -> None:
    corner = (x - _WIDTH / 2, y - _HEIGHT / 2)
    shape = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, _WIDTH, _HEIGHT, shape, fc=_BOX, ec=_EDGE, lw=1.2, zorder=2))
    axes.text(x, y, room, ha="center", va="center", color=_TEXT, zorder=3)


def _to_svg(figure: Figure, graph: Mapping[str, set[str]]) -> str:
    buffer = io.StringIO()
    metadata = {"Date": None, "Title": "The rooms of dau_fast", "Description": describe_imports(graph)}
    figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def describe_imports(graph: Mapping[str, set[str]]) -> str:
    """All of `graph` in words; the picture carries it, so that it can be read and compared."""
    named = {room: ", ".join(sorted(others)) or "none" for room, others in graph.items()}
    return "; ".join(f"{room} imports {others}" for room, others in named.items())


if __name__ == "__main__":
    PICTURE.write_text(draw_architecture(read_rooms()), encoding="utf-8")
