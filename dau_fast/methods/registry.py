"""The methods by name, found in the files of this room."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from dau_fast import methods
from dau_fast.errors import UserError
from dau_fast.methods.method import Method


@cache
def find_methods() -> dict[str, Method[Any]]:
    """Every row in a `METHODS` of a module below dau_fast.methods: references first, then by name."""
    rows: list[Method[Any]] = []
    for module in pkgutil.walk_packages(methods.__path__, f"{methods.__name__}."):
        rows += getattr(importlib.import_module(module.name), "METHODS", ())
    rows.sort(key=lambda row: (not row.reference, row.name))
    return {row.name: row for row in rows}


def get_method(name: str) -> Method[Any]:
    """The method called `name`. Raises UserError for an unknown one."""
    found = find_methods()
    if name not in found:
        raise UserError(f"unknown method '{name}': expected some of {', '.join(found)}")
    return found[name]
