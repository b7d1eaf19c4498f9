"""Attacks of others: a function that is decorated, or an installed package's entry point, becomes an attack.

@attack("margin")
def margin(answers):
    top = answers.logits.topk(2, dim=1).values
    return top[:, :1] - top[:, 1:]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from dau_fast.errors import UserError
from dau_fast.metrics.mia import ATTACKS, Answers, Score
from dau_fast.plugins.entry_points import load_entry_points

# Installed packages name their decorated functions there.
ENTRY_POINTS = "dau_fast.attacks"

F = TypeVar("F", bound=Score)

_ROWS: dict[str, Score] = {}


def attack(name: str) -> Callable[[F], F]:
    """Register the decorated function as the membership attack `name`, beside the five, for table and page.

    The function is called with Answers, logits [B, C] and labels [B], and returns scores [B] or [B, K], by
    which a support vector machine then tells members from non-members. Raises UserError for a name that
    cannot be typed as one word or is taken; the attack, for scores of another shape.
    """

    def register(function: F) -> F:
        def score(answers: Answers) -> Tensor:
            found = function(answers)
            rows = found.shape[:1] if isinstance(found, Tensor) else None
            if rows != (len(answers),) or found.ndim > 2:
                told = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise UserError(f"attack '{name}' gave {told}: expected scores [{len(answers)}] or that x K")
            return found.reshape(len(answers), -1).double()

        _ROWS[name] = score
        return function

    if not name.isidentifier() or name in ATTACKS:
        raise UserError(
            f"attack '{name}': expected a name of letters, digits and underscores that is not taken"
        )
    return register


def find_attacks() -> dict[str, Score]:
    """The five of the literature, those that were registered and those of installed packages, by name."""
    load_entry_points(ENTRY_POINTS)
    return ATTACKS | _ROWS
