"""The one exception type for mistakes that are the caller's."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class UserError(ValueError):
    """A request that cannot be carried out as asked.

    The message is one line: what was wrong, what was expected, what to do. The command line prints
    it and exits with code 2; from Python it is an ordinary `ValueError`.
    """


class Diverged(UserError):
    """A model's weights or outputs are no longer finite: its training went wrong, or its settings."""


class Ruined(Diverged):
    """A method left a model that no longer knows what it was to keep."""


def check_choice(field: str, value: object, known: Iterable[str]) -> None:
    """UserError unless `value`, which `field` was given, is one of `known`."""
    if value not in (choices := tuple(known)):
        told = f"expected one of {', '.join(choices)}{suggest(value, choices)}"
        raise UserError(f"`{field}={brief(value)}`: {told}")


def suggest(value: object, known: Iterable[str]) -> str:
    """The one of `known` that is like `value`, as the end of a message; nothing where none is."""
    near = get_close_matches(brief(value).lower(), list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def brief(value: object) -> str:
    """`value` on one short line."""
    try:
        text = " ".join(str(value).split())
    except ValueError:  # Python refuses to write very long integers
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


def printable(text: str) -> str:
    """`text` with everything written out that would steer a terminal, or that no character stands for."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def exists(path: Path, kind: str) -> bool:
    """Whether `path` is a "file" or "folder"; a path the system will not even look up is neither."""
    try:
        return path.is_file() if kind == "file" else path.is_dir()
    except OSError:
        return False
