"""NegGrad+: descent on the retain set and ascent on the forget set in one step (Kurmanji et al. 2023).

"Towards Unbounded Machine Unlearning", NeurIPS 2023, arXiv 2302.09880, section 4: it minimises
b CE(retain) - (1 - b) CE(forget). Here that is divided by b.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from dau_fast.config import UnlearningRecipe
from dau_fast.engine.loop import Forward
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.objectives import minimise
from dau_fast.methods.task import Task, Unlearned


@dataclass(frozen=True)
class NegGradConfig(UnlearningRecipe):
    """Passes are those over the retain set. Learning rate and length are those of the authors' notebooks."""

    weight: float = 0.05  # of the ascent: (1 - b) / b for the authors' b = 0.95 on small sets;
    # on CIFAR-10 they take 1e-4.
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("weight")


def unlearn(task: Task, config: NegGradConfig) -> Unlearned:
    """Minimise CE(retain) - weight CE(forget) on a copy of the original."""
    model, split = copy.deepcopy(task.original), task.split

    def loss(forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
        retain, forget = forward(images).logits.chunk(2)
        of_retain, of_forget = labels.chunk(2)
        return F.cross_entropy(retain, of_retain) - config.weight * F.cross_entropy(forget, of_forget)

    return Unlearned(model, minimise(model, task, config, "neggrad", (split.retain, split.forget), loss))


METHODS = (
    Method(
        name="neggrad",
        label="NegGrad+",
        about="fine-tuning on the retain set with ascent on the forget set",
        run=unlearn,
        choose=recipe_chooser(lambda task: NegGradConfig()),
        space={
            "lr": (1e-3, 3e-3, 0.01, 0.03, 0.1),
            "epochs": (2, 5, 10, 20),
            "weight": (1e-3, 0.01, 0.05, 0.2, 0.5),
        },
    ),
)
