"""The one supervised loop behind the original, retraining, fine-tuning and gradient ascent."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from dau_fast.config import TrainingRecipe
from dau_fast.engine.batches import index_stream, steps_for
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
) -> Classifier:
    """Train `model` on images `index` by `recipe`, in place; `name` labels progress and randomness."""
    steps = steps_for(recipe.epochs, len(index), recipe.batch_size)
    optimizer = SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    train(
        model,
        index_stream(index, recipe.batch_size, task.generator(name)),
        task.augmented(name),
        task.labels,
        steps=steps,
        optimizer=optimizer,
        scheduler=MultiStepLR(optimizer, [round(share * steps) for share in recipe.milestones]),
        loss=loss,
        on_step=task.progress(name, steps),
    )
    return model
