"""The head-only trick: outputs that look forgotten, features untouched (Jeon et al. 2024, arXiv 2405.17878).

A control and no unlearning: all that the features know of the forget set stays, so every audit of the
representation must find it. Only the last Linear layer is trained, to match by KL divergence

    on retain images    the original's outputs
    on forget images    where whole classes go: the original's outputs without these classes
                        else: the original's outputs on a validation image of the same label

The first two are the paper's, which forgets classes; the third is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dau_fast.config import check_numbers
from dau_fast.data.split import draw_sample
from dau_fast.engine.batches import index_stream, steps_for
from dau_fast.engine.evaluation import predict
from dau_fast.engine.losses import Losses
from dau_fast.engine.optimizers import adam
from dau_fast.engine.ranks import ALONE
from dau_fast.errors import UserError
from dau_fast.methods.method import Method, recipe_chooser
from dau_fast.methods.sample_gradients import check_whole
from dau_fast.methods.task import Task, Unlearned
from dau_fast.models import Outputs


@dataclass(frozen=True)
class HeadOnlyConfig:
    """Training of the last layer, on features that are computed once."""

    epochs: float = 20  # passes over the retain images taken
    retain_images: int = 20_000  # at most, drawn once: their features are held
    batch_size: int = 256  # images of each of retain and forget set
    lr: float = 1e-2  # Adam
    weight: float = 1.0  # of the forget set's divergence beside the retain set's

    def __post_init__(self) -> None:
        check_numbers(self, "retain_images", "batch_size", low=1, whole=True)
        check_numbers(self, "epochs", "lr", open_low=True)
        check_numbers(self, "weight")


def unlearn(task: Task, config: HeadOnlyConfig) -> Unlearned:
    """Train the last layer of a copy of the original; everything below it stays as it is."""
    model, split = copy.deepcopy(task.original), task.split
    chance = task.generator("head_only")
    retain_index = draw_sample(split.retain, config.retain_images, chance)
    retain, forget = (
        predict(model, task.images, index, ranks=task.ranks) for index in (retain_index, split.forget)
    )
    targets = [outputs.logits.log_softmax(1) for outputs in (retain, _imitated(task, forget, chance))]
    if split.classwise:
        gone = task.labels[split.forget].unique()
        targets = [without_classes(log_p, gone) for log_p in targets]
    steps = steps_for(config.epochs, len(retain_index), config.batch_size)
    advance = task.progress("head_only", steps)
    features = (retain.features, forget.features)
    _match(model.head, features, targets, config, steps=steps, chance=chance, advance=advance)
    if task.masks is not None:
        task.masks.apply_(model.network)
    return Unlearned(model)


def _match(
    head: nn.Linear,
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    config: HeadOnlyConfig,
    *,
    steps: int,
    chance: torch.Generator,
    advance: Callable[[], None],
) -> None:
    """Take `steps` steps of `head` towards log probabilities `targets` [N, C] of `features` [N, D].

    features, targets: of the retain and of the forget set.
    """
    optimizer = adam(head, lr=config.lr)
    losses = Losses(head.weight.device, ALONE)  # every process takes the same steps
    streams = [
        index_stream(torch.arange(len(rows), device=rows.device), config.batch_size, chance)
        for rows in features
    ]
    for _ in range(steps):
        retain, forget = (
            F.kl_div(
                # Not head(...), which a Classifier listens to.
                F.linear(rows[batch], head.weight, head.bias).log_softmax(1),
                target[batch],
                reduction="batchmean",
                log_target=True,
            )
            for rows, target, batch in zip(features, targets, map(next, streams), strict=True)
        )
        loss = retain + config.weight * forget
        losses.note(loss)
        losses.end_step()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        advance()
    losses.require_sound("head_only", steps)


def without_classes(log_p: Tensor, gone: Tensor) -> Tensor:
    """Log probabilities [B, C] after the classes `gone` are taken out and the rest sums to 1 again.

    A class that is gone has a log probability of -100, of which no product with 0 makes NaN.
    """
    return log_p.index_fill(1, gone, -torch.inf).log_softmax(1).clamp_min(-100)


def _imitated(task: Task, forget: Outputs, chance: torch.Generator) -> Outputs:
    """Outputs that the forget images are to be given: their own for whole classes, else of unseen images."""
    split, labels = task.split, task.labels
    if split.classwise:
        return forget
    stand_ins = draw_stand_ins(labels[split.forget], labels[split.validation], chance)
    return predict(task.original, task.images, split.validation[stand_ins], ranks=task.ranks)


def draw_stand_ins(labels: Tensor, unseen: Tensor, generator: torch.Generator) -> Tensor:
    """For each of `labels` [N] a position in `unseen` [M] with the same label, drawn at random; int64 [N].

    Any position where no unseen image has the label.
    """
    found = torch.empty_like(labels)
    for label in labels.unique():
        wanted = labels == label
        same = (unseen == label).nonzero().squeeze(1)
        if not len(same):
            same = torch.arange(len(unseen), device=unseen.device)
        count = (int(wanted.sum()),)
        found[wanted] = same[torch.randint(len(same), count, generator=generator, device=unseen.device)]
    return found


def check(task: Task, _config: HeadOnlyConfig) -> None:
    """UserError for a sharded model, and where the last layer may not change."""
    check_whole(task, "head_only")
    if not task.original.head.weight.requires_grad:
        raise UserError(
            "method 'head_only' changes the last layer, which is frozen: unfreeze it, or leave it out"
        )


METHODS = (
    Method(
        name="head_only",
        label="head only",
        about="a control that hides and does not forget: only the last layer is changed, so audits of the "
        "representation must fail it",
        run=unlearn,
        choose=recipe_chooser(lambda task: HeadOnlyConfig()),
        check=check,
        space={
            "lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
            "epochs": (5, 20, 50, 100),
            "weight": (0.3, 1.0, 3.0, 10.0),
        },
        control=True,
    ),
)
