"""The methods by name: those in the files of this room, and those that others have registered."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from dau_fast import methods
from dau_fast.errors import UserError, suggest
from dau_fast.methods.method import Method
from dau_fast.methods.plugins import find_plugins


def find_methods() -> dict[str, Method[Any]]:
    """Every method: references first, then by name, then those of others.

    Raises UserError where somebody else's has the name of one of ours.
    """
    ours, others = _find_ours(), find_plugins()
    if taken := sorted(ours.keys() & others.keys()):
        raise UserError(f"there is a method '{taken[0]}' already: give yours another name")
    return ours | others


@cache
def _find_ours() -> dict[str, Method[Any]]:
    """Every row in a `METHODS` of a module below dau_fast.methods."""
    rows: list[Method[Any]] = []
    for module in pkgutil.walk_packages(methods.__path__, f"{methods.__name__}."):
        rows += getattr(importlib.import_module(module.name), "METHODS", ())
    rows.sort(key=lambda row: (not row.reference, row.name))
    return {row.name: row for row in rows}


def get_method(name: str) -> Method[Any]:
    """The method called `name`. Raises UserError for an unknown one."""
    found = find_methods()
    if name not in found:
        raise UserError(f"unknown method '{name}': expected some of {', '.join(found)}{suggest(name, found)}")
    return found[name]
