"""Methods of others: a function that is decorated, or an installed package's entry point, becomes a method.

@method("shrink", about="the last layer's weights, shrunk")
def shrink(task):
    model = copy.deepcopy(task.original)
    ...
    return model
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

from torch import nn

from dau_fast.errors import UserError
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.task import Task, Unlearned
from dau_fast.models import Classifier
from dau_fast.plugins.entry_points import load_entry_points

# Installed packages name their decorated functions there.
ENTRY_POINTS = "dau_fast.methods"

F = TypeVar("F", bound=Callable[..., Any])

# Rows by name, and by the function that was decorated.
_ROWS: dict[str, Method[Any]] = {}
_FUNCTIONS: dict[Callable[..., Any], Method[Any]] = {}


@dataclass(frozen=True)
class NoSettings:
    """Of a method that has none."""


def method(
    name: str,
    *,
    label: str | None = None,
    about: str = "a method of yours",
    settings: type[Any] = NoSettings,
    space: Mapping[str, tuple[Any, ...]] | None = None,
    control: bool = False,
) -> Callable[[F], F]:
    """Register the decorated function as the method `name`, for the command line, tables and pages.

    The function is called with the task, and with the settings where it takes two arguments; it returns a
    changed copy of `task.original` (a Classifier), or Unlearned. about: what it does, one phrase. settings: a
    frozen dataclass whose fields all have defaults. space, control: see Method. Raises UserError for a name
    that cannot be typed as one word, and for settings that are no dataclass.
    """

    def register(function: F) -> F:
        row = make_method(
            function, name, label=label, about=about, settings=settings, space=space, control=control
        )
        _ROWS[name], _FUNCTIONS[function] = row, row
        return function

    if not name.isidentifier():
        raise UserError(f"method '{name}': expected a name of letters, digits and underscores")
    if not is_dataclass(settings):
        raise UserError(f"the settings of method '{name}' are {settings!r}: expected a frozen dataclass")
    return register


def make_method(
    function: Callable[..., Any],
    name: str,
    *,
    label: str | None = None,
    about: str = "a method of yours",
    settings: type[Any] = NoSettings,
    space: Mapping[str, tuple[Any, ...]] | None = None,
    control: bool = False,
) -> Method[Any]:
    """The row of a method that `function` carries out; see `method`."""
    takes_settings = len(inspect.signature(function).parameters) > 1

    def run(task: Task, chosen: Any) -> Unlearned:
        return _finish(name, task, function(task, chosen) if takes_settings else function(task))

    return Method(
        name=name,
        label=label or name,
        about=about.rstrip("."),
        run=run,
        choose=recipe_chooser(lambda task: settings()),
        control=control,
        space=space or {},
    )


def _finish(name: str, task: Task, made: Any) -> Unlearned:
    """What a stranger's function returned, as a method's result; the original must be left as it was."""
    if isinstance(made, Unlearned):
        return made
    if isinstance(made, nn.Module) and not isinstance(made, Classifier):
        made = task.original.wrap(made)
    if not isinstance(made, Classifier):
        raise UserError(
            f"method '{name}' returned a {type(made).__name__}: expected a changed copy of task.original"
        )
    if made is task.original:
        raise UserError(f"method '{name}' returned task.original itself: change a copy (copy.deepcopy) of it")
    return Unlearned(made)


def find_plugins() -> dict[str, Method[Any]]:
    """The methods that were registered, and those of installed packages, by name."""
    load_entry_points(ENTRY_POINTS)
    return dict(_ROWS)


def row_of(function: Callable[..., Any]) -> Method[Any]:
    """The method that `function` carries out: as it was registered, or of the function's own name."""
    name = getattr(function, "__name__", type(function).__name__)
    return _FUNCTIONS.get(function) or make_method(function, name if name.isidentifier() else "own")
