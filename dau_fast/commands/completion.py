"""Shell completion: `_DAU_FAST_COMPLETE=bash_source dau_fast` prints what bash reads; zsh and fish alike.

Importing PyTorch takes seconds, too long at a press of a key: options and names are read from the source.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import metadata
from pathlib import Path

import click
from click.shell_completion import CompletionItem, shell_complete

from dau_fast.commands.help import COMMANDS, SHARED

_PACKAGE = Path(__file__).parent.parent
_SOURCES = {"unlearn": "unlearn.py", "report": "commands/page.py"}
# Options whose values begin with a file's name, and may go on.
_FILES = {"model", "plugin"}


def complete(instruction: str) -> int:
    """Print what click's `instruction`, such as bash_source or bash_complete, asks for; the exit code."""
    return shell_complete(make_program(), {}, "dau_fast", "_DAU_FAST_COMPLETE", instruction)


def make_program() -> click.Group:
    """All commands with their options, which complete and do nothing else."""
    unlearning = _read_parameters(_SOURCES["unlearn"])
    commands = {}
    for name, about in COMMANDS.items():
        own = [] if name == "unlearn" else _read_parameters(_SOURCES.get(name, f"commands/{name}.py"))
        shared = [one for one in unlearning if name == "unlearn" or one.name in SHARED.get(name, ())]
        commands[name] = click.Command(name, params=[*own, *shared], short_help=about)
    return click.Group(
        "dau_fast", commands=commands, params=[*unlearning, click.Option(["--version"], is_flag=True)]
    )


def _read_parameters(file: str) -> list[click.Parameter]:
    """The options and arguments that a file of the package makes."""
    found: list[click.Parameter] = []
    for node in ast.walk(_parse(_PACKAGE / file)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr in ("option", "Option"):
            found.append(_make_option(node))
        elif node.func.attr in ("argument", "Argument"):
            found.append(click.Argument(_strings(node.args), nargs=-1, type=click.Path()))
    return found


def _make_option(call: ast.Call) -> click.Option:
    """An option like that which `call` makes, with values to choose from."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    names = _strings(call.args)
    name = names[0].removeprefix("--").partition("/")[0].replace("-", "_")
    is_path = name in _FILES or "Path" in ast.dump(given.get("type", ast.Constant(None)))
    if "is_flag" in given or "/" in names[0]:
        return click.Option(names, is_flag=True)
    if name not in _VALUES:
        return click.Option(names, type=click.Path() if is_path else None, multiple="multiple" in given)
    return click.Option(names, shell_complete=partial(_choose, name))


def _choose(option: str, context: click.Context, _: click.Parameter, begun: str) -> list[CompletionItem]:
    """The values that begin like what is typed; of several with commas between, like the last."""
    before, comma, last = begun.rpartition(",") if option == "methods" else ("", "", begun)
    taken = before.split(",")
    values = dict.fromkeys([*_VALUES[option](), *_list_plugins(option, context)])
    fit = [value for value in values if value.startswith(last) and value not in taken]
    return [CompletionItem(before + comma + value) for value in fit]


# ---- names, from the source


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _strings(nodes: list[ast.expr]) -> list[str]:
    """The texts among `nodes`, in lists too."""
    flat = [part for node in nodes for part in (node.elts if isinstance(node, ast.List) else [node])]
    return [part.value for part in flat if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def _rows(room: str, kind: str) -> Iterator[str]:
    """Names of the rows of `kind`, such as Method, in the files of `room`."""
    for path in sorted((_PACKAGE / room).rglob("*.py")):
        for node in ast.walk(_parse(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == kind:
                yield from _strings([keyword.value for keyword in node.keywords if keyword.arg == "name"])


# By option: what decorates others' functions, and where installed packages name them.
_PLUGINS = {"methods": ("method", "dau_fast.methods"), "prune": ("pruner", "dau_fast.pruners")}


def _list_plugins(option: str, context: click.Context) -> Iterator[str]:
    """Names that installed packages and the --plugin files before the cursor register; none is run."""
    decorator, group = _PLUGINS.get(option, ("", ""))
    if not decorator:
        return
    modules = [point.module for point in metadata.entry_points(group=group)]
    given = context.params.get("plugin") or ()
    for path in filter(None, map(_find_source, dict.fromkeys([*modules, *map(str, given)]))):
        try:
            tree = _parse(path)
        except (OSError, ValueError, SyntaxError):
            continue  # the command tells of it; a line here would stand in the middle of what is typed
        yield from _decorated(tree, decorator)


def _find_source(module: str) -> Path | None:
    """The file of `module`, a path or a name with dots; None where there is none."""
    if module.endswith(".py"):
        return Path(module).expanduser()
    top, *inner = module.split(".")
    try:
        found = importlib.util.find_spec(top)  # of a name with dots it would import what is before them
    except (ImportError, ValueError):
        return None
    if found is None or not (inner or found.origin):
        return None
    if not inner:
        return Path(str(found.origin))
    places = [Path(place, *inner) for place in found.submodule_search_locations or ()]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return next((file for file in files if file.exists()), None)


def _decorated(tree: ast.Module, decorator: str) -> Iterator[str]:
    """The first argument of every call of dau_fast's `decorator`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", None))
        if called == decorator:
            named = [keyword.value for keyword in node.keywords if keyword.arg == "name"]
            yield from _strings([*node.args[:1], *named])


def _literal(file: str, name: str) -> list[str]:
    """The texts of a tuple, or the keys of a dictionary, that stands in `file` as `name`."""
    for node in _parse(_PACKAGE / file).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == name:
            value = node.value  # type: ignore[attr-defined]
            keys = value.keys if isinstance(value, ast.Dict) else value.elts
            return _strings([key for key in keys if key is not None])
    raise LookupError(f"{name} is not in {file}")


def _list_architectures() -> list[str]:
    """Ours, and torchvision's classifiers, which its files mark."""
    found = importlib.util.find_spec("torchvision")
    places = list(found.submodule_search_locations or ()) if found else []
    files = [path for place in places for path in sorted(Path(place, "models").glob("*.py"))]
    marked = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)", re.MULTILINE)
    names = [name for path in files for name in marked.findall(path.read_text(encoding="utf-8"))]
    return ["small", *sorted(names), "timm:"]


def _list_sets() -> list[str]:
    file = "data/named.py"
    return [*_literal(file, "NAMES"), *_literal(file, "_TORCHVISION"), *_literal(file, "STORED")]


_VALUES: dict[str, Callable[[], list[str]]] = {
    "methods": lambda: ["all", *_rows("methods", "Method")],
    "prune": lambda: ["none", *_rows("prune", "Pruner")],
    "dataset": _list_sets,
    "arch": _list_architectures,
    "stream": lambda: _literal("data/named.py", "STREAMING"),
    "mean": lambda: [*_literal("data/normalisation.py", "NORMALISATIONS"), "timm"],
    "std": lambda: _literal("data/normalisation.py", "NORMALISATIONS"),
    "retrain_recipe": lambda: _literal("config.py", "RETRAIN_RECIPES"),
    "sensitivity": lambda: _literal("config.py", "SENSITIVITIES"),
    "engine": lambda: ["auto", *_literal("engine/runtime.py", "ENGINES")],
    "precision": lambda: ["auto", *_literal("engine/runtime.py", "_PRECISIONS")],
    "device": lambda: ["auto", "cpu", "cuda"],
}
