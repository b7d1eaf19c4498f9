"""Boundary expanding: forget images go to a class of their own, which is then dropped (Chen et al. 2023).

"Boundary Unlearning", CVPR 2023, arXiv 2303.11570.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dau_fast.config import UnlearningRecipe
from dau_fast.engine.batches import Batch
from dau_fast.engine.chance import seeded
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.objectives import minimise
from dau_fast.methods.task import Task, Unlearned
from dau_fast.models import Classifier
from dau_fast.prune import Masks


@dataclass(frozen=True)
class BoundaryExpandConfig(UnlearningRecipe):
    """Passes are those over the forget set. Defaults are those of the authors' code."""

    batch_size: int = 64
    lr: float = 1e-5
    weight_decay: float = 0.0


def unlearn(task: Task, config: BoundaryExpandConfig) -> Unlearned:
    """Train a copy of the original, with one more class, to put the forget set there; drop that class."""
    model, forget = copy.deepcopy(task.original), task.split.forget
    wide = widen(model, task.derive_seed("boundary_expand"))
    shadow = model.head.out_features

    def relabel(batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.images, torch.full_like(batch.labels, shadow)

    wider = replace(task, masks=widen_masks(task.masks, wide))
    loops = minimise(wide, wider, config, "boundary_expand", (forget,), show=relabel)
    narrow(wide, model)
    return Unlearned(model, loops)


@torch.no_grad()
def widen(model: Classifier, seed: int) -> Classifier:
    """A copy of `model` with one more class, the last; its weights are drawn as those of a new layer."""
    wide = copy.deepcopy(model)
    network, name, head = wide.network, wide.head_name, wide.head
    weight = head.weight
    with seeded(seed, weight.device):
        more = nn.Linear(head.in_features, head.out_features + 1, head.bias is not None).to(weight)
    more.weight[:-1] = weight
    if head.bias is not None:
        more.bias[:-1] = head.bias
    if not name:  # the network is nothing but the layer
        return wide.wrap(more)
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, more)
    return wide.wrap(network)


@torch.no_grad()
def narrow(wide: Classifier, model: Classifier) -> None:
    """Weights and statistics of `wide` into `model`, in place, without the last class."""
    state = model.network.state_dict()
    for name, tensor in wide.network.state_dict().items():
        state[name].copy_(tensor if tensor.shape == state[name].shape else tensor[:-1])


def widen_masks(masks: Masks | None, wide: Classifier) -> Masks | None:
    """`masks` for `wide`: where the classifier layer has one, the new class is kept."""
    if masks is None:
        return None
    shapes = {name: weight.shape for name, weight in wide.network.named_parameters()}

    def fit(mask: Tensor, shape: torch.Size) -> Tensor:
        return mask if mask.shape == shape else torch.cat([mask, mask.new_ones(1, *shape[1:])])

    return Masks({name: fit(masks[name], shapes[name]) for name in masks})


METHODS = (
    Method(
        name="boundary_expand",
        label="boundary expand",
        about="the forget set goes to a class of its own, which is then dropped",
        run=unlearn,
        choose=recipe_chooser(lambda task: BoundaryExpandConfig()),
        space={"lr": (1e-6, 1e-5, 1e-4, 1e-3, 0.01), "epochs": (2, 5, 10, 20)},
    ),
)
