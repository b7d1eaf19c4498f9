"""MU-Mis: forgetting by input sensitivity, without retain data (Cheng et al. 2024, arXiv 2402.15109).

    minimise over the forget set    ||d z_y / d x||^2 - ||d z_c / d x||^2

z: logits, y: an image's label, c: another class, drawn once for each image. A memorised image moves its own
label's logit more than the others; the difference is what training on it left behind. The network stays in
evaluation mode, so that images do not see each other and BatchNorm keeps its statistics.
"""

from __future__ import annotations

import copy
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dau_fast.config import check_numbers
from dau_fast.engine.batches import Batch, steps_for
from dau_fast.engine.loop import Forward, Loop, PartLoss, run_loop
from dau_fast.engine.modes import evaluating
from dau_fast.engine.optimizers import sgd
from dau_fast.engine.profiling import section
from dau_fast.engine.ranks import MicroBatch
from dau_fast.errors import UserError
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.sample_gradients import check_whole, trainable
from dau_fast.methods.task import Task, Unlearned
from dau_fast.models import Classifier

# The attention that has a second derivative.
_TWICE = SDPBackend.MATH


@dataclass(frozen=True)
class MuMisConfig:
    """SGD on the sensitivities of the forget set. The paper chooses rate and length for each data set."""

    epochs: float = 5  # passes over the forget set
    batch_size: int = 256  # images
    lr: float = 3e-4  # guess: on digits 1e-4 changes nothing, 1e-3 costs 4 points of test accuracy
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        check_numbers(self, "batch_size", low=1, whole=True)
        check_numbers(self, "epochs", "lr", open_low=True)
        check_numbers(self, "momentum", high=1, open_high=True)
        check_numbers(self, "weight_decay")


def unlearn(task: Task, config: MuMisConfig) -> Unlearned:
    """Make a copy of the original as insensitive to the forget set's labels as to other classes."""
    model, forget = copy.deepcopy(task.original), task.split.forget
    others = draw_others(task.labels, model.head.out_features, task.generator("mu_mis classes"))
    steps = steps_for(config.epochs, len(forget), config.batch_size)
    with closing(task.feed("mu_mis", config.batch_size, forget)) as batches:
        optimizer = sgd(
            model.network,
            task.masks,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        advance = task.progress("mu_mis", steps)
        loop = Loop(
            "mu_mis", model, optimizer, batches, steps,
            loss=lambda _, forward: _build_loss(model, forward),
            inputs=lambda batch: _show(batch, others),
            after=lambda _: advance(),
            compilable="a gradient inside the step cannot be compiled",
            seed=task.derive_seed("mu_mis noise"),
        )  # fmt: skip
        return Unlearned(model, run_loop(loop, task.runtime))


def draw_others(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """A class of 0 to `classes` - 1 for each of `labels` [N], never the label itself; int64 [N]."""
    shift = torch.randint(1, classes, labels.shape, generator=generator, device=labels.device)
    return (labels + shift) % classes


def sensitivity_gap(logits: Tensor, images: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """||d z_y / d x||^2 - ||d z_c / d x||^2 for every image, [B], with a graph.

    logits [B, C]: of `images` [B, ...], which require a gradient. labels, others: y and c, int64 [B].
    """

    def squares(targets: Tensor) -> Tensor:
        chosen = logits.gather(1, targets.unsqueeze(1)).sum()
        (slope,) = torch.autograd.grad(chosen, images, create_graph=True)
        return slope.flatten(1).square().sum(1)

    return squares(labels) - squares(others)


def check(task: Task, _config: MuMisConfig) -> None:
    """UserError for a sharded model, for a single class, and where there are no second derivatives."""
    check_whole(task, "mu_mis")
    if task.runtime.activation_checkpointing:
        raise UserError(
            "method 'mu_mis' takes second derivatives, which `activation_checkpointing=True` does not give: "
            "take `accumulate` instead"
        )
    if task.original.head.out_features < 2:
        raise UserError("method 'mu_mis' needs a second class, and the model has one: leave it out")
    two = task.split.train[:2]
    model, labels = task.original, task.labels[two]
    try:
        with evaluating(model), sdpa_kernel(_TWICE):
            images = task.images.widened().batch(two).requires_grad_()
            gap = sensitivity_gap(model(images).logits, images, labels, 1 - labels.clamp_max(1))
            torch.autograd.grad(gap.sum(), list(trainable(model).values()), allow_unused=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"method 'mu_mis' takes second derivatives, which this network does not give: {reason}"
        ) from error


def _show(batch: Batch, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return batch.images, batch.labels, others[batch.indices]


def _build_loss(model: Classifier, forward: Forward) -> PartLoss:
    def part_loss(_: MicroBatch, images: Tensor, labels: Tensor, others: Tensor) -> Tensor:
        with section("forward"), evaluating(model), sdpa_kernel(_TWICE):
            images = images.detach().to(torch.promote_types(images.dtype, torch.float32)).requires_grad_()
            logits = forward(images).logits
            # No parameter is left without a gradient, which processes would wait for; a bias has none.
            return sensitivity_gap(logits, images, labels, others).mean() + 0 * logits.sum()

    return part_loss


METHODS = (
    Method(
        name="mu_mis",
        label="MU-Mis",
        about="the forget set's labels made as insensitive to the input as others, without retain data",
        moves_images=True,
        run=unlearn,
        choose=recipe_chooser(lambda task: MuMisConfig()),
        check=check,
        space={
            "lr": (1e-4, 3e-4, 1e-3, 2e-3, 5e-3),
            "epochs": (1, 2, 5, 10, 20),
        },
    ),
)
