"""Telling how far long work is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Announces long work and returns what is to be called after each step of it."""

    def __call__(self, description: str, steps: int) -> Callable[[], None]: ...


def silent(description: str, steps: int) -> Callable[[], None]:
    """No progress shown."""
    return lambda: None
