"""Running a method with the clock on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dau_fast.engine.device import Stopwatch
from dau_fast.engine.loop import LoopCost
from dau_fast.errors import Diverged
from dau_fast.methods.task import Task, Unlearned
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
        result = work(task)
    compile_seconds = sum(loop.compile_seconds for loop in result.loops)
    if task.runtime.shard:
        gc.collect()  # a sharded copy refers to itself
        result.model.to("cpu")
    if not all(torch.isfinite(parameter).all() for parameter in result.model.state_dict().values()):
        raise Diverged(
            f"{name} diverged, its weights are no longer finite: leave it out, or train the original longer"
        )
    masks = task.masks if result.masks is None else result.masks
    seconds = watch.seconds - compile_seconds
    return Finished(result.model.eval(), seconds, compile_seconds, result.loops, result.history, masks)
