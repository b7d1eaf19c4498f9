"""Entry points: what an installed package names as its own registers itself when it is imported."""

from __future__ import annotations

import logging
from functools import cache
from importlib import metadata


@cache
def load_entry_points(group: str) -> None:
    """Import once what installed packages name in `group`, such as dau_fast.methods.

    What cannot be loaded is left out, after a line that says why.
    """
    for point in metadata.entry_points(group=group):
        try:
            point.load()
        except Exception as error:  # whatever a stranger's package raises
            kind = group.rpartition(".")[2].removesuffix("s")
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            logging.getLogger("dau_fast").warning(
                "the %s '%s' of an installed package (%s) cannot be loaded: %s",
                kind, point.name, point.value, reason,
            )  # fmt: skip
