"""The game among the methods: its settings, what it asks of a task, and its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from dau_fast.config import DauConfig
from dau_fast.engine.modes import find_batchnorms
from dau_fast.engine.sharding import check_shard, placed
from dau_fast.methods.dau.game import unlearn
from dau_fast.methods.dau.view import check_sensitivity
from dau_fast.methods.method import Method
from dau_fast.methods.task import Task

# Of the usual step, in networks with LayerNorm and no BatchNorm: a whole one ruins transformers.
_SMALL_STEPS = 0.25
# In networks with BatchNorm, which bear it: less is left in features, and of large sets less is left at all.
_LARGE_STEPS = 2.0


def choose(task: Task, asked: Mapping[str, Any]) -> DauConfig:
    """The usual settings for `task`; they follow the sample of the retain set that `asked` may name."""
    split = task.split
    config = DauConfig.default(
        classwise=split.classwise,
        retain_images=len(split.retain),
        forget_images=len(split.forget),
        retain_sample=asked.get("retain_sample"),
    )
    few = not split.classwise and len(split.forget) < config.batch_size
    return replace(config, lr=config.lr * _scale_steps(task.original, few=few))


def _scale_steps(model: nn.Module, *, few: bool) -> float:
    """few: whether fewer images than a batch are to be forgotten, for which nothing need be bent."""
    if find_batchnorms(model):
        return 1.0 if few else _LARGE_STEPS
    layer_normed = any(isinstance(module, (nn.LayerNorm, nn.RMSNorm)) for module in model.modules())
    return _SMALL_STEPS if layer_normed else 1.0


def check(task: Task, config: DauConfig) -> None:
    """UserError where settings do not fit the original's layers, or how the task runs."""
    check_shard(task.runtime.shard, config.sensitivity, pruned=task.pruned)
    with placed(task.images.device, task.original):
        check_sensitivity(config.sensitivity, task.original, task.images.batch(task.split.train[:2]))


METHODS = (
    Method(
        name="dau",
        label="DAU",
        about="discriminative adversarial unlearning",
        run=unlearn,
        choose=choose,
        check=check,
        space={
            "lr": (0.003, 0.01, 0.02, 0.04),
            "alpha": (0.2, 1.0, 4.0, 10.0),
            "anchor": (0.3, 1.0, 3.0),
        },
    ),
)
