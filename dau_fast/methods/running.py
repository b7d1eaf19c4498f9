"""Running a method with the clock on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dau_fast.engine.device import Stopwatch
from dau_fast.engine.loop import LoopCost
from dau_fast.engine.losses import BrokenLoss
from dau_fast.errors import Diverged, UserError
from dau_fast.methods.task import Task, Unlearned
from dau_fast.metrics.finite import find_broken_output, find_broken_weights
from dau_fast.models import Classifier
from dau_fast.prune import Masks


@dataclass(frozen=True)
class Finished:
    """A method's model, its wall-clock seconds from call to finished weights, its loops and its history.

    compile_seconds stands beside seconds and is not part of it. masks: of the model, None for a dense
    one.
    """

    model: Classifier
    seconds: float
    compile_seconds: float
    loops: tuple[LoopCost, ...]
    history: dict[str, Any] | None
    masks: Masks | None = None


def run_timed(name: str, work: Callable[[Task], Unlearned], task: Task) -> Finished:
    """Do `work`, which people know as `name`, on `task` and time it. Raises Diverged where it did.

    What its steps took to be rehearsed, compiled and captured stands apart, as compile_seconds. Where
    models are sharded, the finished one rests on the CPU: a device may have no room for several.
    """
    with Stopwatch(task.images.device) as watch:
        try:
            result = work(task)
        except BrokenLoss as error:
            raise Diverged(f"{name} diverged, {error}: {_reason(task, name)}") from error
        except UserError as error:
            found = _find_broken_output(task)
            if found is None:
                raise
            raise Diverged(f"{name} cannot run: the original itself gives {found}: {_REPAIR}") from error
    compile_seconds = sum(loop.compile_seconds for loop in result.loops)
    if task.runtime.shard:
        gc.collect()  # a sharded copy refers to itself
        result.model.to("cpu")
    broken = find_broken_weights(result.model.network)
    if broken:
        raise Diverged(f"{name} diverged, {_describe(broken)} no longer finite: {_reason(task, name)}")
    masks = task.masks if result.masks is None else result.masks
    seconds = watch.seconds - compile_seconds
    return Finished(result.model.eval(), seconds, compile_seconds, result.loops, result.history, masks)


def _describe(broken: list[str]) -> str:
    others = f" and {len(broken) - 1} more of its tensors are" if len(broken) > 1 else " is"
    return f"'{broken[0]}'{others}"


_REPAIR = "repair that image, or the model"


def _reason(task: Task, name: str) -> str:
    """Why, where the original itself gives no finite outputs, and what to do."""
    if name == "original":  # which is the one that is trained
        return "lower its learning rate, or repair its images"
    found = _find_broken_output(task)
    if found:
        return f"the original itself gives {found}: {_REPAIR}"
    return "leave it out, lower its learning rate, or train the original longer"


def _find_broken_output(task: Task) -> str | None:
    """Where the original gives NaN or infinity; not with several processes, as one may have failed."""
    if not task.ranks.alone:
        return None
    split = task.split
    sets = {"forget": split.forget, "retain": split.retain, "validation": split.validation}
    return find_broken_output(task.original, task.images, sets)
