"""The pruners by name, found in the files of this room."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from dau_fast import prune
from dau_fast.errors import check_choice
from dau_fast.prune.pruner import Pruner


@cache
def find_pruners() -> dict[str, Pruner]:
    """Every `PRUNER` of a module of dau_fast.prune: those that train first, then by name."""
    found = []
    for module in pkgutil.iter_modules(prune.__path__, f"{prune.__name__}."):
        row = getattr(importlib.import_module(module.name), "PRUNER", None)
        found += [] if row is None else [row]
    found.sort(key=lambda row: (not row.trains, row.name))
    return {row.name: row for row in found}


def get_pruner(name: str) -> Pruner:
    """The pruner called `name`. Raises UserError for an unknown one."""
    found = find_pruners()
    check_choice("prune", name, found)
    return found[name]
