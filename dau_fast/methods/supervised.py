"""The one supervised loop behind the original, retraining, fine-tuning and gradient ascent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial

from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR

from dau_fast.config import TrainingRecipe
from dau_fast.engine.batches import steps_for
from dau_fast.engine.loop import LoopCost
from dau_fast.engine.optimizers import sgd
from dau_fast.engine.training import train
from dau_fast.methods.task import Task
from dau_fast.models import Classifier


def fit(
    model: Classifier,
    index: Tensor,
    task: Task,
    recipe: TrainingRecipe,
    name: str,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    part: tuple[float, float] = (0, 1),
) -> tuple[LoopCost, ...]:
    """Train `model` on images `index` by `recipe`, in place, weights that task.masks masks at zero.

    Returns how the loop ran, nothing where it had no step. name: labels progress and randomness. loss:
    None for cross-entropy, with the recipe's label smoothing. part: from and to which share of the recipe.
    """
    steps = steps_for(recipe.epochs, len(index), recipe.batch_size)
    first, last = (round(share * steps) for share in part)
    feed = task.feed(name, recipe.batch_size, index)
    with task.trainee(model) as trainee, closing(feed) as batches:
        optimizer = sgd(
            trainee.network,
            task.masks,
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )
        return train(
            trainee,
            batches,
            steps=last - first,
            optimizer=optimizer,
            scheduler=_schedule(optimizer, recipe, steps, first),
            loss=loss or partial(F.cross_entropy, label_smoothing=recipe.label_smoothing),
            on_step=task.progress(name, last - first),
            runtime=task.runtime,
            name=name,
            seed=task.derive_seed(f"{name} noise"),
        )


def _schedule(optimizer: Optimizer, recipe: TrainingRecipe, steps: int, first: int) -> LRScheduler:
    """The learning rates of all `steps` of `recipe`, from step `first` on."""
    if recipe.warm_up is None:
        return MultiStepLR(optimizer, [round(share * steps) - first for share in recipe.milestones])
    assert first == 0, "only step decay can be taken up in the middle"
    rise = max(1, round(recipe.warm_up * steps))

    def factor(step: int) -> float:
        """From above 0 to 1 at step `rise`, and down again towards 0 after the last one."""
        return min((step + 1) / rise, (steps - step) / max(1, steps - rise))

    return LambdaLR(optimizer, factor)
