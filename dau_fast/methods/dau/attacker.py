"""The attacker: says member or non-member from what the defender shows of a sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

threshold_backward = torch.ops.aten.threshold_backward

# A column that varies less tells samples apart by nothing but rounding.
_LEAST_SPREAD = 1e-3


class Attacker(nn.Module):
    """A two-layer perceptron on u [B, U] -> logit of "member" [B].

    seen: u of the frozen original, [M, U]; the inputs are standardised by its statistics.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, seen: Tensor, hidden: int) -> None:
        super().__init__()
        std = seen.std(0)
        self.register_buffer("mean", seen.mean(0))
        self.register_buffer("std", torch.where(std > _LEAST_SPREAD, std, 1.0))
        self.layers = nn.Sequential(
            nn.Linear(seen.shape[1], hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, u: Tensor) -> Tensor:
        return self.layers((u - self.mean) / self.std).squeeze(1)


def attacker_loss(
    attacker: Attacker,
    u_forget: Tensor,
    u_validation: Tensor,
    forget_weights: Tensor,
    validation_weights: Tensor,
) -> Tensor:
    """-(E_f log A(u) + E_v log(1 - A(u))) / 2, which the attacker minimises; scalar, nats.

    u_forget [F, U], u_validation [V, U]: rows count as their weights [F], [V] say, 0 for not at
    all; both sets weigh the same whatever their sizes. A set without weight counts 0.
    """
    member = _mean(F.softplus(-attacker(u_forget)), forget_weights)
    non_member = _mean(F.softplus(attacker(u_validation)), validation_weights)
    return (member + non_member) / 2


@torch.no_grad()
def attacker_gradients(
    attacker: Attacker,
    u_forget: Tensor,
    u_validation: Tensor,
    forget_weights: Tensor,
    validation_weights: Tensor,
) -> list[Tensor]:
    """The gradients of `attacker_loss` in the attacker's parameters, in their order.

    By formula: on so few rows recording for autograd costs as much as the arithmetic.
    """
    first, first_bias, second, second_bias, last, last_bias = attacker.parameters()
    x = (torch.cat([u_forget, u_validation]) - attacker.mean) / attacker.std
    h = F.relu(F.linear(x, first, first_bias))
    k = F.relu(F.linear(h, second, second_bias))
    # Half of a mean; members are to be scored up, and the others down.
    shares = (_share(given.to(x)) for given in (-forget_weights, validation_weights))
    weights = torch.cat(list(shares)).unsqueeze(1)
    of_logit = weights * torch.sigmoid(weights.sign() * F.linear(k, last, last_bias))
    of_second = threshold_backward(of_logit @ last, k, 0)
    of_first = threshold_backward(of_second @ second, h, 0)
    pairs = (of_first, x), (of_second, h), (of_logit, k)
    return [part for out, into in pairs for part in (out.T @ into, out.sum(0))]


def _share(weights: Tensor) -> Tensor:
    return weights / (2 * weights.sum().abs().clamp_min(1))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of `values` [B] by `weights` [B]; rows are left out without a shape that depends on data."""
    return (values * weights).sum() / weights.sum().clamp_min(1)


def auc(member_scores: Tensor, non_member_scores: Tensor) -> float:
    """Probability that a member [M] scores above a non-member [M'], ties counting half; 0.5 is chance."""
    others, members = non_member_scores.sort().values, member_scores.contiguous()
    below = torch.searchsorted(others, members)
    not_above = torch.searchsorted(others, members, right=True)
    return (below + not_above).double().mean().item() / (2 * len(others))
