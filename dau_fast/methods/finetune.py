"""Fine-tuning on the retain set: forgetting by catastrophic forgetting (Warnecke et al. 2023)."""

from __future__ import annotations

import copy

from dau_fast.config import FINE_TUNE
from dau_fast.methods.supervised import fit
from dau_fast.methods.task import Task, Unlearned


def unlearn(task: Task) -> Unlearned:
    """Go on training a copy of the original on the retain set; settings["ft"] replaces the recipe."""
    recipe = task.settings.get("ft", FINE_TUNE)
    return Unlearned(fit(copy.deepcopy(task.original), task.split.retain, task, recipe, "ft"))
