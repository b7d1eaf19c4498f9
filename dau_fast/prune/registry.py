"""The pruners by name: those in the files of this room, and those that others have registered."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from dau_fast import prune
from dau_fast.errors import UserError, check_choice
from dau_fast.prune.plugins import find_plugins
from dau_fast.prune.pruner import Pruner


def find_pruners() -> dict[str, Pruner]:
    """Every pruner: those that train first, then by name, then those of others.

    Raises UserError where somebody else's has the name of one of ours.
    """
    ours, others = _find_ours(), find_plugins()
    if taken := sorted(ours.keys() & others.keys()):
        raise UserError(f"there is a pruner '{taken[0]}' already: give yours another name")
    return ours | others


@cache
def _find_ours() -> dict[str, Pruner]:
    """Every `PRUNER` of a module of dau_fast.prune."""
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
