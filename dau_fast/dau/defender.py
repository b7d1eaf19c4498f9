"""The defender's side of the game: what it minimises."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dau_fast.dau.attacker import Attacker
from dau_fast.engine.profiling import section
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
) -> Tensor:
    """CE(retain) + alpha E_f[-log(1 - A(u))] + beta L_BT(h_f, h_v); scalar.

    forget and validation must have one batch size; u_forget is what the attacker sees of forget,
    with its graph.
    """
    fit = F.cross_entropy(retain.logits, retain_labels)
    exposed = F.softplus(attacker(u_forget)).mean()
    with section("Barlow Twins"):
        alignment = barlow_twins_loss(forget.features, validation.features, lambd)
    return fit + alpha * exposed + beta * alignment
