"""SFRon: ascent on the forget set by the weights it touches more than the retain set does, between descents.

Huang et al. 2024, "Unified Gradient-Based Machine Unlearning with Remain Geometry Enhancement", NeurIPS 2024,
arXiv 2409.19732. The slow descents on the retain set stand for the Hessian of its loss. With `dual` ascent
and descent have optimisers of their own: DualOptim, Zhong et al. 2025, NeurIPS 2025, arXiv 2504.15827.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dau_fast.config import UnlearningRecipe
from dau_fast.engine.loop import Forward
from dau_fast.engine.optimizers import adamw
from dau_fast.engine.ranks import Ranks
from dau_fast.errors import UserError
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.objectives import Objective, descend, pursue, steps_of
from dau_fast.methods.saliency import check_whole_model, mask_gradients, sum_gradients
from dau_fast.methods.task import Task, Unlearned
from dau_fast.models import Classifier


@dataclass(frozen=True)
class SFRonConfig(UnlearningRecipe):
    """Passes are those over the retain set. Defaults: the authors' for 10 % of CIFAR-10."""

    epochs: int = 5  # 1,500 steps there
    batch_size: int = 128
    forget_every: int = 5  # descents for each ascent
    forget_weight: float = 25.0  # of the ascent's loss, falling to 0 as half a cosine as learning rates do
    power: float = 0.5  # images are weighed by their loss to the power of -power, in the mean by 1
    threshold: float = 1.0  # of squared gradients, forget over retain set, from which on weights ascend
    max_norm: float = 7.0  # of the ascent's gradient, which is cut down to it
    dual: bool = False  # ascend by AdamW and descend by SGD
    forget_lr: float = 1e-4  # of that AdamW; its authors search it for each task
    forget_weight_decay: float = 0.05  # of that AdamW

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("forget_every", low=1, whole=True)
        self.check("forget_weight", "power", "threshold", "forget_weight_decay")
        self.check("max_norm", "forget_lr", open_low=True)
        self.check_switch("dual")
        if self.milestones:
            raise UserError(
                f"`milestones={self.milestones}`: the learning rates of sfron fall as half a cosine: leave "
                "it out"
            )


def unlearn(task: Task, config: SFRonConfig) -> Unlearned:
    """Ascend on the forget set before every few descents on the retain set, on a copy of the original."""
    model, split = copy.deepcopy(task.original), task.split
    salient = find_salient(task, config)
    steps = steps_of(config, split.retain)
    strength = torch.tensor(config.forget_weight, device=task.images.device)
    with task.trainee(model) as trainee:
        descent = descend(trainee, task, config)
        ascent = _ascent_optimizer(trainee, task, config) if config.dual else descent
        schedulers = [
            LambdaLR(optimizer, lambda number: half_cosine(number, steps))
            for optimizer in dict.fromkeys((ascent, descent))
        ]

        def ascend(forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
            losses = F.cross_entropy(forward(images).logits, labels, reduction="none")
            return -strength * weigh(losses, config.power, task.ranks)

        def confine() -> None:
            mask_gradients(trainee.network, salient)
            torch.nn.utils.clip_grad_norm_(trainee.parameters(), config.max_norm)

        def decay(number: int) -> None:
            strength.fill_(config.forget_weight * half_cosine(number, steps))
            for scheduler in schedulers:
                scheduler.step()

        parts = [
            Objective(
                "sfron forget", (split.forget,), config.batch_size, ascent, ascend, before_step=confine
            ),
            Objective("sfron retain", (split.retain,), config.batch_size, descent, after=decay),
        ]
        turns = plan_turns(steps, config.forget_every)
        return Unlearned(model, pursue(trainee, task, "sfron", parts, turns))


def find_salient(task: Task, config: SFRonConfig) -> dict[str, Tensor]:
    """Where squared gradients of the forget set's batches are large beside those of the retain set's."""
    forget, retain = (
        _mean_squares(task, index, config.batch_size) for index in (task.split.forget, task.split.retain)
    )
    tiny = 1e-15  # decides for weights that neither set touches
    return {name: forget[name] + tiny >= config.threshold * (retain[name] + tiny) for name in forget}


def weigh(losses: Tensor, power: float, ranks: Ranks) -> Tensor:
    """The mean of `losses` [B] with weights losses^-power, whose own mean over all ranks' rows is 1."""
    with torch.no_grad():
        weights = 1 / (losses**power + 1e-15)
        total, rows = ranks.total(torch.stack([weights.sum(), torch.ones_like(weights).sum()]))
    return (weights * losses).mean() * rows / total


def half_cosine(number: int, steps: int) -> float:
    """From 1 at step 0 to 0 after `steps`."""
    return (1 + math.cos(math.pi * number / steps)) / 2


def plan_turns(steps: int, forget_every: int) -> list[int]:
    """1 for each of `steps` descents, and 0 for an ascent before every so many of them."""
    turns = []
    for number in range(steps):
        turns += [0, 1] if number % forget_every == 0 else [1]
    return turns


def _ascent_optimizer(trainee: Classifier, task: Task, config: SFRonConfig) -> Optimizer:
    return adamw(trainee.network, task.masks, lr=config.forget_lr, weight_decay=config.forget_weight_decay)


def _mean_squares(task: Task, index: Tensor, batch_size: int) -> dict[str, Tensor]:
    batches = math.ceil(len(index) / batch_size)
    sums = sum_gradients(task, index, batch_size, torch.square)
    return {name: total / batches for name, total in sums.items()}


METHODS = (
    Method(
        name="sfron",
        label="SFRon",
        about="ascent on the forget set by its own weights, between descents on the retain set",
        run=unlearn,
        choose=recipe_chooser(lambda task: SFRonConfig()),
        check=check_whole_model,
        space={
            "lr": (1e-3, 3e-3, 0.01, 0.03, 0.1),
            "epochs": (1, 2, 5, 10),
            "forget_weight": (1.0, 5.0, 25.0, 100.0),
        },
    ),
)
