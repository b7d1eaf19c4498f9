"""The methods by name, and running one with the clock on."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch

from dau_fast.engine.runtime import Stopwatch, flushed_denormals
from dau_fast.errors import UserError
from dau_fast.methods import finetune, gradient_ascent, retrain
from dau_fast.methods.dau import game
from dau_fast.methods.task import Method, Task
from dau_fast.models import Classifier
from dau_fast.prune import Masks

METHODS: dict[str, Method] = {
    "retrain": retrain.unlearn,
    "retrain_fast": retrain.unlearn_fast,
    "dau": game.unlearn,
    "ft": finetune.unlearn,
    "ga": gradient_ascent.unlearn,
    "retrain_clean": retrain.unlearn_clean,
}


@dataclass(frozen=True)
class Finished:
    """A method's model, its wall-clock seconds from call to finished weights, and its history.

    compile_seconds stands beside seconds and is not part of it. masks: of the model, None for a dense
    one.
    """

    model: Classifier
    seconds: float
    compile_seconds: float
    history: dict[str, Any] | None
    masks: Masks | None = None


def method_named(name: str) -> Method:
    """The method called `name`. Raises UserError for an unknown one."""
    if name not in METHODS:
        raise UserError(f"unknown method '{name}': expected some of {', '.join(METHODS)}")
    return METHODS[name]


def run(name: str, method: Method, task: Task) -> Finished:
    """Run `method`, called `name`, on `task` and time it. Raises UserError where it diverged.

    What its steps took to be rehearsed, compiled and captured stands apart, as compile_seconds. Where
    models are sharded, the finished one rests on the CPU: a device may have no room for several.
    """
    before = task.engine.compile_seconds
    with flushed_denormals(), Stopwatch(task.images.device) as watch:
        result = method(task)
    compile_seconds = task.engine.compile_seconds - before
    if task.engine.shard:
        gc.collect()  # a sharded copy refers to itself
        result.model.to("cpu")
    if not all(torch.isfinite(parameter).all() for parameter in result.model.state_dict().values()):
        raise UserError(
            f"{name} diverged, its weights are no longer finite: leave it out, or train the original longer"
        )
    masks = task.masks if result.masks is None else result.masks
    seconds = watch.seconds - compile_seconds
    return Finished(result.model.eval(), seconds, compile_seconds, result.history, masks)
