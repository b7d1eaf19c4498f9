"""The membership attack by one threshold on the margin, at every rate of false alarms that counts."""

from __future__ import annotations

import torch
from torch import Tensor

from dau_fast.metrics.mia import Answers

# Percent of non-members that may be called members. Attacks are judged by the low ones: an attack that is
# certain of few members does harm though it guesses the others (Carlini et al. 2022, arXiv 2112.03570).
FALSE_ALARMS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
# Nats; more is as sure.
_LIMIT = 20
MARGIN_EDGES = tuple(float(edge) for edge in range(-_LIMIT, _LIMIT + 1))


def margin(answers: Answers) -> Tensor:
    """log p_y - log(1 - p_y) of the true label y, in nats, exact where p_y is near 1; float64 [B, 1]."""
    logits, right = answers.logits.double(), answers.labels.unsqueeze(1)
    others = logits.scatter(1, right, -torch.inf).logsumexp(1, keepdim=True)
    return logits.gather(1, right) - others


def true_alarms(members: Tensor, non_members: Tensor) -> list[float]:
    """Percent of `members` [M] above the threshold that each of FALSE_ALARMS of `non_members` [N] pass.

    Of fewer than 100 / rate non-members none may pass.
    """
    falling, count = non_members.sort(descending=True).values, len(non_members)
    found = []
    for rate in FALSE_ALARMS:
        allowed = int(rate * count / 100 + 1e-9)
        above = members > falling[allowed] if allowed < count else torch.ones_like(members)
        found.append(100 * above.double().mean().item())
    return found


def count_margins(margins: Tensor) -> list[float]:
    """Percent of `margins` [N] in each bin of MARGIN_EDGES; those outside count in the outermost."""
    inside = margins.float().cpu().clamp(-_LIMIT, _LIMIT)
    counts = torch.histc(inside, len(MARGIN_EDGES) - 1, -_LIMIT, _LIMIT)
    return (100 * counts / counts.sum()).tolist()
