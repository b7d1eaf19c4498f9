"""What the modules of `dau_fast.data` import: little, and nothing that stands above them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from calling import environment

import dau_fast.data

ROOM = Path(dau_fast.data.__file__).parent
NAMES = sorted(path.stem for path in ROOM.glob("*.py") if path.stem != "__init__")


def imported(name: str) -> set[str]:
    """The modules of the package that module `name` imports anywhere in it, in a function too."""
    nodes = list(ast.walk(ast.parse((ROOM / f"{name}.py").read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found = plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {module for module in found if module.partition(".")[0] == "dau_fast"}


def test_data_imports_nothing_of_the_package_but_ops_and_errors() -> None:
    modules = {f"dau_fast.data.{name}" for name in NAMES}
    for name in NAMES:
        assert imported(name) <= modules | {"dau_fast.ops", "dau_fast.errors"}, name


def test_no_circle_of_imports_wherever_they_stand() -> None:
    left = {f"dau_fast.data.{name}": imported(name) for name in NAMES}
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_importing_all_of_data_loads_no_reader_of_images() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {NAMES}: importlib.import_module('dau_fast.data.' + name)\n"
        "print(sorted({'torchvision', 'PIL', 'pyarrow', 'sklearn', 'scipy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
