"""Tasks on which one-shot methods can be checked by hand: a linear network, each image a vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dau_fast.config import TrainingRecipe
from dau_fast.data.images import Images
from dau_fast.data.split import TEST, TRAINING, VALIDATION, Forget, make_split
from dau_fast.methods.task import Task
from dau_fast.models import Classifier


def linear_task(
    weight: Tensor, pixels: Tensor, labels: Sequence[int], forget: Sequence[int], seed: int = 0
) -> Task:
    """z = W x in float64, W [C, D]; all of `pixels` [N, D] are trained on, those at `forget` to be forgotten.

    A validation and a test image of each class stand behind them.
    """
    classes = len(weight)
    network = nn.Linear(weight.shape[1], classes, bias=False).double()
    with torch.no_grad():
        network.weight.copy_(weight)
    held_out = torch.arange(classes).repeat(2)
    images = Images(
        torch.cat([pixels.double(), torch.ones(2 * classes, pixels.shape[1], dtype=torch.float64)]),
        torch.cat([torch.tensor(labels), held_out]),
        tuple(map(str, range(classes))),
    )
    roles = torch.tensor([TRAINING] * len(labels) + [VALIDATION] * classes + [TEST] * classes).numpy()
    chosen = Forget("by hand", indices=tuple(forget))
    split = make_split(roles, images.labels, chosen, seed)
    model = Classifier(network).eval()
    return Task(images, split, seed, model, lambda _: model, TrainingRecipe())


def weight_of(model: Classifier) -> Tensor:
    return model.head.weight.detach()
