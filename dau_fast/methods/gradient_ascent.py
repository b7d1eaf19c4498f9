"""Gradient ascent on the forget set (Thudi et al. 2022, arXiv 2109.13398)."""

from __future__ import annotations

import copy

from torch import Tensor
from torch.nn import functional as F

from dau_fast.config import GRADIENT_ASCENT_CLASSWISE, GRADIENT_ASCENT_RANDOM
from dau_fast.methods.supervised import fit
from dau_fast.methods.task import Task, Unlearned


def unlearn(task: Task) -> Unlearned:
    """Maximise a copy's loss on the forget set; settings["ga"] replaces the recipe."""
    usual = GRADIENT_ASCENT_CLASSWISE if task.split.classwise else GRADIENT_ASCENT_RANDOM
    recipe = task.settings.get("ga", usual)
    model = copy.deepcopy(task.original)
    return Unlearned(fit(model, task.split.forget, task, recipe, "ga", loss=_negative_loss))


def _negative_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits, labels)
