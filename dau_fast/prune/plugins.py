"""Pruners of others: a function that is decorated, or an installed package's entry point, becomes a pruner.

@pruner("first", about="the first weights of every layer")
def first(search):
    return Masks({name: torch.arange(w.numel()).view_as(w) >= search.sparsity * w.numel() for ...})
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dau_fast.errors import UserError
from dau_fast.plugins.entry_points import load_entry_points
from dau_fast.prune.masks import Masks
from dau_fast.prune.pruner import Pruner, Search

# Installed packages name their decorated functions there.
ENTRY_POINTS = "dau_fast.pruners"

F = TypeVar("F", bound=Callable[[Search], Masks])

_ROWS: dict[str, Pruner] = {}


def pruner(
    name: str,
    *,
    about: str = "a pruner of yours",
    source: str = "a pruner of the user's",
    trains: bool = False,
    takes_trained: bool = False,
) -> Callable[[F], F]:
    """Register the decorated function as the pruner `name`, for the command line, tables and pages.

    The function is called with a Search and returns Masks of its network; what else it says, see Pruner.
    Raises UserError for a name that cannot be typed as one word; the pruner, for what are no Masks.
    """

    def register(function: F) -> F:
        def find(search: Search) -> Masks:
            found = function(search)
            if not isinstance(found, Masks):
                raise UserError(f"pruner '{name}' returned a {type(found).__name__}: expected Masks")
            return found

        _ROWS[name] = Pruner(name, about.rstrip("."), find, source, trains, takes_trained)
        return function

    if not name.isidentifier() or name == "none":
        raise UserError(f"pruner '{name}': expected a name of letters, digits and underscores, not 'none'")
    return register


def find_plugins() -> dict[str, Pruner]:
    """The pruners that were registered, and those of installed packages, by name."""
    load_entry_points(ENTRY_POINTS)
    return dict(_ROWS)
