"""l1-sparse: fine-tuning on the retain set with an L1 penalty (Jia et al. 2023, arXiv 2304.04934)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from dau_fast.config import UnlearningRecipe
from dau_fast.engine.sharding import own_share
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.objectives import Objective, descend, pursue, steps_of
from dau_fast.methods.task import Task, Unlearned


@dataclass(frozen=True)
class L1SparseConfig(UnlearningRecipe):
    """Passes are those over the retain set. Learning rate and length: the reference implementation's."""

    alpha: float = 1e-4  # weight of the sum of absolute weights, falling linearly to 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("alpha")


def unlearn(task: Task, config: L1SparseConfig) -> Unlearned:
    """Minimise CE(retain) + alpha_t |weights|_1 on a copy of the original."""
    model = copy.deepcopy(task.original)
    steps = steps_of(config, task.split.retain)
    with task.trainee(model) as trainee:
        optimizer = descend(trainee, task, config)
        strength = torch.tensor(config.alpha, device=task.images.device, dtype=torch.float64)

        def penalise() -> None:
            """Add the penalty's gradient, which is the sign."""
            trained = [weight for weight in trainee.parameters() if weight.grad is not None]
            signs = list(torch._foreach_sign([own_share(weight.detach()) for weight in trained]))
            torch._foreach_mul_(signs, strength.to(signs[0]))
            torch._foreach_add_(
                [own_share(weight.grad) for weight in trained if weight.grad is not None], signs
            )

        def weaken(number: int) -> None:
            strength.fill_(config.alpha * (1 - number / steps))

        sparse = Objective(
            "l1_sparse",
            (task.split.retain,),
            config.batch_size,
            optimizer,
            before_step=penalise,
            after=weaken,
        )
        return Unlearned(model, pursue(trainee, task, "l1_sparse", [sparse], [0] * steps, config.milestones))


METHODS = (
    Method(
        name="l1_sparse",
        label="l1-sparse",
        about="fine-tuning on the retain set towards sparse weights",
        run=unlearn,
        choose=recipe_chooser(lambda task: L1SparseConfig()),
        space={
            "lr": (1e-3, 3e-3, 0.01, 0.03, 0.1),
            "epochs": (2, 5, 10, 20),
            "alpha": (1e-5, 5e-5, 1e-4, 5e-4, 1e-3),
        },
    ),
)
