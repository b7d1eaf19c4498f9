"""The defender's side of the game: what it minimises."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dau_fast.config import DauConfig
from dau_fast.engine.profiling import section
from dau_fast.methods.dau.attacker import Attacker
from dau_fast.methods.dau.departure import GONE
from dau_fast.models import Outputs
from dau_fast.ops import barlow_twins_loss


def defender_loss(
    sets: tuple[Outputs, Outputs, Outputs],
    retain_labels: Tensor,
    u_forget: Tensor,
    asked: Tensor,
    held: Tensor,
    attacker: Attacker,
    taught: Tensor | None,
    gone: Tensor,
    departures: Tensor | None = None,
    *,
    alpha: float,
    departure: float,
    anchor_logits: float,
    config: DauConfig,
    sizes: Sequence[int] = (),
) -> Tensor:
    """What the defender minimises, equation (3) of `dau_fast/methods/dau/game.py`; scalar.

    sets: outputs on as many images of retain, forget and validation. u_forget: what the attacker sees of
    forget, with its graph. asked [B]: 1 for rows of forget that are to be forgotten, 0 for those that stand
    beside them; held [B]: 1 for those of earlier requests. taught: the original's logits [B, C] on retain,
    or [2B, C] on retain and forget after earlier requests, where there is an anchor. gone: bool [C], the
    classes that are forgotten as a whole. departures [B, C]: the targets of forget. alpha, departure,
    anchor_logits: in place of config's. sizes: where a batch is shared by several processes, its rows by
    rank; the average over ranks, each weighed by its rows, is then the loss of the whole batch.
    """
    retain, forget, validation = sets
    loss = F.cross_entropy(retain.logits, retain_labels)
    if taught is not None:
        # No image is of a class that is gone.
        of_retain, *of_forget = taught.masked_fill(gone, GONE).split(len(retain.logits))
        loss = loss + config.anchor * _divergences(of_retain, retain.logits).mean()
        if anchor_logits:
            loss = loss + config.anchor * anchor_logits * _distance(of_retain, retain.logits)
        for target in of_forget:  # what it knows of images that were forgotten is all it may know
            loss = loss + config.anchor * (held * _divergences(target, forget.logits)).mean()
    if alpha:
        loss = loss + alpha * (asked * F.softplus(attacker(u_forget))).mean()
    if departures is not None:
        loss = loss + departure * (asked * _divergences(departures, forget.logits)).mean()
    if config.beta:
        with section("Barlow Twins"):
            alignment = _alignment(forget.features, validation.features, config.lambd, sizes)
        loss = loss + config.beta * alignment
    return loss


def _divergences(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) of each row of logits [B, C], in nats; [B]."""
    found = F.kl_div(logits.log_softmax(1), target.log_softmax(1), log_target=True, reduction="none")
    return found.sum(1)


def _distance(target: Tensor, logits: Tensor) -> Tensor:
    """Squared distance of rows of logits [B, C], but for what all classes share; their mean, a scalar."""
    return (target - logits).var(1, correction=0).mean() * logits.shape[1]


def _alignment(forget: Tensor, validation: Tensor, lambd: float, sizes: Sequence[int]) -> Tensor:
    if len(sizes) < 2:
        return barlow_twins_loss(forget, validation, lambd)
    whole = barlow_twins_loss(forget, validation, lambd, group=dist.group.WORLD, rows=sizes)
    # Every rank has the loss of the whole batch, and not a mean over its own rows.
    return whole * (sum(sizes) / (len(sizes) * len(forget)))
