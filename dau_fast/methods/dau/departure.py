"""Where images of classes that are gone would go: what a model that never saw such a class says of them.

Retrained models see something of other classes in them. The original without the classes that are gone does
too, but it has learned these very images as what they are. A plain model of the retain set has not, but it
sees little. What both say is nearer to retrained models than either: of single images their product, which is
as sure as one network, and of all images together their mean, as a product prefers what is likely anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.data.split import draw_sample
from dau_fast.engine.evaluation import map_batches, predict_each
from dau_fast.engine.sharding import share_out
from dau_fast.methods.dau.difficulty import PlainModel, widen
from dau_fast.methods.task import Task
from dau_fast.models import Classifier

# In place of the logit of a class that is gone: its probability is 0, and 0 times its logarithm too.
GONE = -1e4
# Power of the two models' geometric mean: of equal parts it is their product.
_SHARPENED = 2.0
# Of scaling its columns and rows in turn. Where neither model is all but sure the columns are right by then.
_ROUNDS = 30
# How much a single image says to the attacker at most: few images would else be all that it learns from.
MOST = 10.0
# By which scores of the plain model, regressions of 0 and 1, may be divided.
_TEMPERATURES = torch.logspace(-3, 1, 41)


@dataclass(frozen=True)
class Departures:
    """targets: float [F, C], log-probabilities of the forget images, 0 of the classes that are gone.

    rows: int64 [N], of each image of all its row in them, 0 where it has none. classes: int64 [N], labels of
    all images, of a forget image whose class is gone one that is drawn from its target. counts: float [N],
    how much an image says to the attacker: validation images as much as forget images are to become like
    them, on average 1, and all others 1.
    """

    targets: Tensor
    rows: Tensor
    classes: Tensor
    counts: Tensor

    def look_up(self, index: Tensor) -> Tensor:
        """Targets [B, C] of the images `index` [B]; of any but forget images they mean nothing."""
        return self.targets[self.rows[index]]


def mark_gone(task: Task) -> Tensor:
    """bool [C]: the classes that are forgotten as a whole."""
    gone = torch.zeros(task.original.head.out_features, dtype=torch.bool, device=task.labels.device)
    if task.split.classwise:
        gone[task.labels[task.split.forget]] = True
    return gone


@torch.no_grad()
def prepare_departures(
    task: Task, plain: PlainModel | None, share: float, chance: torch.Generator
) -> Departures:
    """For a class-wise `task`. plain: of its retain set, None for none; share: of it in the mean, 0 to 1."""
    forget, labels, gone = task.split.forget, task.labels, mark_gone(task)
    with task.teacher() as original:
        targets = predict_each(
            original, task.images, forget, lambda logits, _: _leave_out(logits, gone), ranks=task.ranks
        )
    if plain is not None and share:
        validation = task.split.validation
        temperature = fit_temperature(score(plain, task, validation), labels[validation], gone)
        believed = _leave_out(score(plain, task, forget) / temperature, gone)
        targets = join(targets, believed.to(targets), share, gone)
    # The largest after Gumbel noise is a draw, and no number that is not finite ends it.
    noise = torch.empty_like(targets).exponential_(generator=chance).log()
    drawn = (targets - noise).argmax(1)
    rows = torch.zeros_like(labels).index_put((forget,), torch.arange(len(forget), device=labels.device))
    return Departures(targets, rows, labels.index_put((forget,), drawn), _count(task, targets))


def join(one: Tensor, other: Tensor, share: float, gone: Tensor) -> Tensor:
    """What two models say together, as log-probabilities like theirs, [F, C]; share: of `other`, 0 to 1.

    The product of their probabilities (Hinton 2002), scaled by class so that its mean over all images is the
    mean of both (Sinkhorn 1967).
    """
    wanted = torch.logaddexp(one.logsumexp(0) + _log(1 - share), other.logsumexp(0) + _log(share))
    joined = ((1 - share) * one).add_(other, alpha=share).mul_(_SHARPENED)
    joined -= joined.logsumexp(1, keepdim=True)
    for _ in range(_ROUNDS):
        joined += (wanted - joined.logsumexp(0)).masked_fill(gone, 0)
        joined -= joined.logsumexp(1, keepdim=True)
    return joined


def _count(task: Task, targets: Tensor) -> Tensor:
    """How much each image of all says, [N]."""
    labels, validation = task.labels, task.split.validation
    going = targets.exp().mean(0)
    held = labels[validation].bincount(minlength=len(going)).to(going) / len(validation)
    says = (going / held.clamp_min(torch.finfo(held.dtype).tiny)).clamp_max(MOST)[labels[validation]]
    return says.new_ones(len(labels)).index_put((validation,), says)


@torch.no_grad()
def level_gone(model: Classifier, task: Task, gone: Tensor, most: int) -> None:
    """Put a constant in place of the logits of the classes `gone` [C], in place: it holds nothing of them.

    The mean, over at most `most` retain images, of the least that the classifier layer gives to a class that
    stays: retrained models find a class that they never saw about as unlikely. Nothing happens where fewer
    than two classes stay.
    """
    if (~gone).sum() < 2:
        return
    index = draw_sample(task.split.retain, most, task.generator("level of classes that are gone"))
    head, given = model.head, list[Tensor]()
    handle = head.register_forward_hook(lambda _, inputs, output: given.append(output.detach()))

    def compute(images: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        features = model(images).features
        least = given.pop().to(features).masked_fill(gone, torch.inf).amin(1)
        # Without a bias the mean of the features is all that such a layer has for a constant.
        return (least,) if head.bias is not None else (least, features)

    try:
        least, *rest = map_batches(model, task.images, index, compute, ranks=task.ranks)
    finally:
        handle.remove()
    level, taken = least.mean(), gone.to(least)
    head.weight.mul_(share_out((1 - taken)[:, None].expand_as(head.weight).contiguous(), head.weight))
    if head.bias is not None:
        head.bias.mul_(share_out(1 - taken, head.bias)).add_(share_out(level * taken, head.bias))
    else:
        mean = rest[0].mean(0)
        row = taken[:, None] * (level / mean.square().sum() * mean)
        head.weight.add_(share_out(row, head.weight))
    if task.masks:
        task.masks.apply_(model.network)


def fit_temperature(scores: Tensor, labels: Tensor, gone: Tensor) -> float:
    """By which `scores` [V, C] are divided to make `labels` [V] likeliest in a softmax without `gone` [C].

    (Guo et al. 2017, arXiv 1706.04599, here over a grid.)
    """
    losses = [F.cross_entropy(_leave_out(scores / t, gone), labels) for t in _TEMPERATURES.tolist()]
    return float(_TEMPERATURES[int(torch.stack(losses).argmin())])


def score(plain: PlainModel, task: Task, index: Tensor) -> Tensor:
    """Scores [n, C] by `plain` of the images `index` [n] of `task`."""

    def compute(images: Tensor, _: Tensor) -> tuple[Tensor]:
        return (plain(images),)

    return map_batches(plain, task.images, index, compute, ranks=task.ranks)[0]


def _leave_out(logits: Tensor, gone: Tensor) -> Tensor:
    """Log-probabilities of `logits` [B, C] without the classes `gone` [C], in float32 or wider."""
    return widen(logits).masked_fill(gone, GONE).log_softmax(1)


def _log(share: float) -> float:
    return math.log(share) if share > 0 else GONE
