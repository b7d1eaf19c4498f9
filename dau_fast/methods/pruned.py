"""Training with pruning: how a pruned original comes about, and a retrained model with masks of its own."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dau_fast.config import PruneConfig, TrainingRecipe
from dau_fast.engine.loop import LoopCost
from dau_fast.methods.supervised import fit
from dau_fast.methods.task import Task
from dau_fast.models import Classifier
from dau_fast.prune import Masks
from dau_fast.prune.pruner import Search
from dau_fast.prune.registry import get_pruner


def fit_pruned(
    model: Classifier,
    index: Tensor,
    task: Task,
    pruning: PruneConfig,
    recipe: TrainingRecipe,
    name: str,
    *,
    trained: bool = False,
) -> tuple[Masks, tuple[LoopCost, ...]]:
    """Find masks as `pruning` says and train `model` with them on images `index`, in place.

    A pruner that trains takes the model up again as it was early in that training (Frankle et al. 2020,
    arXiv 1912.05671); the others prune the untrained one. trained: `model` is already; it is then trained
    on from where it is, with the learning rates it would have had after rewinding (Renda et al. 2020,
    arXiv 2003.02389).
    """
    row = get_pruner(pruning.method)
    begin = pruning.rewind if row.trains else 0.0
    loops: list[LoopCost] = []

    def fit_part(loop: str, masks: Masks | None, part: tuple[float, float]) -> None:
        loops.extend(fit(model, index, replace(task, masks=masks), recipe, loop, part=part))

    if row.trains and not trained:
        fit_part(f"{name} early", None, (0, begin))
    search = Search(
        model.network,
        pruning.sparsity,
        pruning.rate,
        pruning.iterations,
        task.images.shape,
        task.derive_seed(f"{name} masks"),
        train=lambda stage, masks: fit_part(f"{name} {stage}", masks, (begin, 1)),
        trained=trained,
    )
    masks = row.find(search)
    fit_part(name, masks, (begin, 1))
    return masks, tuple(loops)
