"""How fast a model learns again what it was made to forget.

What was only hidden comes back in a few steps (relearn time: Golatkar et al. 2020, arXiv 1911.04933). Steps
are counted on forget and retain images in equal parts, as forget images alone would teach one class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.engine.batches import index_stream
from dau_fast.engine.evaluation import predict_each
from dau_fast.engine.modes import evaluating
from dau_fast.models import Classifier

# Images of each set in a batch.
BATCH = 32


def count_relearning(
    model: Classifier,
    load: Callable[[Tensor], Tensor],
    labels: Tensor,
    forget: Tensor,
    retain: Tensor,
    *,
    target: float,
    most: int,
    lr: float,
    generator: torch.Generator,
) -> int:
    """Steps of SGD on a copy of `model` until its accuracy on `forget` is `target` percent again.

    From 0, where it is; `most` where it never is. load: images by index. labels [N]: of all images. forget,
    retain: indices. BatchNorm's statistics stay, so that the weights alone do the learning. generator: on
    the images' device, decides the batches; seed it alike for all models.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    streams = zip(*(index_stream(index, BATCH, generator) for index in (forget, retain)), strict=True)

    def accuracy() -> float:
        right = predict_each(
            model, load, forget, lambda logits, batch: (logits.argmax(1) == labels[batch]).double()
        )
        return 100 * right.mean().item()

    with evaluating(model):
        for step in range(most):
            if accuracy() >= target:
                return step
            index = torch.cat(next(streams))
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(load(index)).logits, labels[index]).backward()
            optimizer.step()
    return most
