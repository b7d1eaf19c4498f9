"""Make a trained image classifier forget part of its training data in seconds, and prove it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dau_fast.api import Result as Result
    from dau_fast.api import unlearn as unlearn
    from dau_fast.config import DauConfig as DauConfig
    from dau_fast.errors import UserError as UserError
    from dau_fast.methods.plugins import method as method
    from dau_fast.metrics.plugins import attack as attack
    from dau_fast.prune.plugins import pruner as pruner
    from dau_fast.report.progress import progress_bars as progress_bars

__version__ = "0.1.0"

# Where names are that a user needs; PyTorch is imported with the first of them.
_PLACES = {
    "unlearn": "dau_fast.api",
    "Result": "dau_fast.api",
    "DauConfig": "dau_fast.config",
    "UserError": "dau_fast.errors",
    "method": "dau_fast.methods.plugins",
    "progress_bars": "dau_fast.report.progress",
    "pruner": "dau_fast.prune.plugins",
    "attack": "dau_fast.metrics.plugins",
}
_MODULES = ("api", "config", "nn", "ops", "optim", "prune")

__all__ = ["__version__", *_PLACES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if name in _MODULES:
        return import_module(f"dau_fast.{name}")
    raise AttributeError(f"module 'dau_fast' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
