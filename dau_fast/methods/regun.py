"""ReGUn: forget images are to look as held-out images of their class do (Mirlach et al. 2026).

"Reference-Guided Machine Unlearning", arXiv 2603.11210. The source's are: a held-out set as reference, the
original as the network that says how held-out images look, one reference by class, distilled into the forget
set. Ours are: all held-out images of a class where the source draws some for each batch, with the classes
that the batch has; the weights of the two terms; and the recipe, which is that of fine-tuning.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.config import UnlearningRecipe
from dau_fast.engine.evaluation import predict
from dau_fast.engine.loop import Forward
from dau_fast.engine.sharding import placed
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.objectives import divergence, minimise
from dau_fast.methods.task import Task, Unlearned


@dataclass(frozen=True)
class ReGUnConfig(UnlearningRecipe):
    """Passes are those over the retain set."""

    weight: float = 1.0  # of the divergence from the reference on the forget set

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("weight")


def unlearn(task: Task, config: ReGUnConfig) -> Unlearned:
    """Minimise CE(retain) + weight KL(reference of the label || forget) on a copy of the original."""
    model, split = copy.deepcopy(task.original), task.split
    references = find_references(task)
    references = references.clamp_min(torch.finfo(references.dtype).tiny).log()

    def loss(forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
        retain, forget = forward(images).logits.chunk(2)
        of_retain, of_forget = labels.chunk(2)
        apart = divergence(forget, references[of_forget]).mean()
        return F.cross_entropy(retain, of_retain) + config.weight * apart

    return Unlearned(model, minimise(model, task, config, "regun", (split.retain, split.forget), loss))


def find_references(task: Task) -> Tensor:
    """The original's mean probabilities [C, C] over the validation images of each class.

    A class without any, as where it is forgotten whole, has the mean over all validation images.
    """
    index = task.split.validation
    with placed(task.images.device, task.original):
        probabilities = predict(task.original, task.images, index, ranks=task.ranks).logits.softmax(1)
    members = F.one_hot(task.labels[index], probabilities.shape[1]).to(probabilities)
    counts = members.sum(0)[:, None]
    means = members.T @ probabilities / counts.clamp_min(1)
    return torch.where(counts > 0, means, probabilities.mean(0))


METHODS = (
    Method(
        name="regun",
        label="ReGUn",
        about="the forget set is to look as held-out images of its classes do",
        run=unlearn,
        choose=recipe_chooser(lambda task: ReGUnConfig()),
        space={
            "lr": (1e-3, 3e-3, 0.01, 0.03, 0.1),
            "epochs": (2, 5, 10, 20),
            "weight": (0.1, 0.3, 1.0, 3.0, 10.0),
        },
    ),
)
