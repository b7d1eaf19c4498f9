"""How long work tells of its steps, whoever shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Announces long work, with its number of steps; what it returns is called after each of them."""

    def __call__(self, description: str, steps: int) -> Callable[[], None]: ...


def silent(description: str, steps: int) -> Callable[[], None]:
    """A `Progress` that shows nothing."""
    return lambda: None
