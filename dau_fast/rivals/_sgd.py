"""The one supervised loop behind the original, retraining, fine-tuning and gradient ascent."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR

from dau_fast.config import TrainingRecipe
from dau_fast.engine.batches import index_stream, steps_for
from dau_fast.engine.optimizers import sgd
from dau_fast.engine.training import train
from dau_fast.models import Classifier
from dau_fast.task import Task


def fit(
    model: Classifier,
    index: Tensor,
    task: Task,
    recipe: TrainingRecipe,
    name: str,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    *,
    part: tuple[float, float] = (0, 1),
) -> Classifier:
    """Train `model` on images `index` by `recipe`, in place, weights that task.masks masks at zero.

    name: labels progress and randomness. part: from and to which share of the recipe.
    """
    steps = steps_for(recipe.epochs, len(index), recipe.batch_size)
    first, last = (round(share * steps) for share in part)
    optimizer = sgd(
        model.network,
        task.masks,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    train(
        model,
        index_stream(index, recipe.batch_size, task.generator(name)),
        task.augmented(name),
        task.labels,
        steps=last - first,
        optimizer=optimizer,
        scheduler=MultiStepLR(optimizer, [round(share * steps) - first for share in recipe.milestones]),
        loss=loss,
        on_step=task.progress(name, last - first),
    )
    return model
