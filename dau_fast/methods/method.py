"""What a method is: one row, that the registry finds in the method's own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dau_fast.config import change
from dau_fast.errors import UserError
from dau_fast.methods.task import Task, Unlearned

S = TypeVar("S")


def _nothing_to_check(_task: Task, _settings: Any) -> None:
    return None


@dataclass(frozen=True)
class Method(Generic[S]):
    """A way to unlearn. Whatever lists methods lists them from these rows.

    name: as it is asked for and stored. label: what people read. about: what it does, one phrase.
    run: carries it out and leaves the task as it is. choose: its settings for a task, where nothing else is
    asked for but the fields that the mapping names. check: raises UserError where task and settings do not
    go together, before anything runs. reference: whether it is what others are held to, and trains a network
    from scratch. control: whether it is there to be found out, and never to be recommended. moves_images:
    whether it needs images that can be changed a little. space: values that tuning may try, by field of the
    settings; the published one among them.
    """

    name: str
    label: str
    about: str
    run: Callable[[Task, S], Unlearned]
    choose: Callable[[Task, Mapping[str, Any]], S]
    check: Callable[[Task, S], None] = _nothing_to_check
    reference: bool = False
    control: bool = False
    moves_images: bool = False
    space: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def resolve(self, task: Task, asked: S | Mapping[str, Any] | None = None) -> S:
        """The settings for `task`: those `asked` for, whole or some fields by name, and the method's own.

        Raises UserError for settings of another method, for unknown fields and for wrong values.
        """
        if asked is None or isinstance(asked, Mapping):
            fields = asked or {}
            return change(self.choose(task, fields), fields, self.name)
        usual = self.choose(task, {})
        if type(asked) is not type(usual):
            raise UserError(
                f"the settings of method '{self.name}' are a {type(usual).__name__}, not a "
                f"{type(asked).__name__}: give one, or a dict of some of its fields"
            )
        return asked


def recipe_chooser(usual: Callable[[Task], S]) -> Callable[[Task, Mapping[str, Any]], S]:
    """`choose` of a method whose settings do not depend on what is asked for."""
    return lambda task, _: usual(task)
