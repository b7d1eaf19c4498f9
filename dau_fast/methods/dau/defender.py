"""The defender's side of the game: what it minimises."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dau_fast.engine.profiling import section
from dau_fast.methods.dau.attacker import Attacker
from dau_fast.models import Outputs
from dau_fast.ops import barlow_twins_loss


def defender_loss(
    retain: Outputs,
    forget: Outputs,
    validation: Outputs,
    retain_labels: Tensor,
    u_forget: Tensor,
    attacker: Attacker,
    *,
    alpha: float,
    beta: float,
    lambd: float,
    sizes: Sequence[int] = (),
) -> Tensor:
    """CE(retain) + alpha E_f[-log(1 - A(u))] + beta L_BT(h_f, h_v); scalar.

    forget and validation must have one batch size; u_forget is what the attacker sees of forget,
    with its graph. sizes: where a batch is shared by several processes, its rows by rank; the average
    over ranks, each weighed by its rows, is then the loss of the whole batch.
    """
    fit = F.cross_entropy(retain.logits, retain_labels)
    exposed = F.softplus(attacker(u_forget)).mean()
    with section("Barlow Twins"):
        alignment = _alignment(forget.features, validation.features, lambd, sizes)
    return fit + alpha * exposed + beta * alignment


def _alignment(forget: Tensor, validation: Tensor, lambd: float, sizes: Sequence[int]) -> Tensor:
    if len(sizes) < 2:
        return barlow_twins_loss(forget, validation, lambd)
    whole = barlow_twins_loss(forget, validation, lambd, group=dist.group.WORLD, rows=sizes)
    # Every rank has the loss of the whole batch, and not a mean over its own rows.
    return whole * (sum(sizes) / (len(sizes) * len(forget)))
