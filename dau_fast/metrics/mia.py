"""Membership inference by a support vector machine on one score: the attacks papers report.

An SVM is fitted to tell members (retain images) from non-members (test images) by a score of the
model's output, and is then asked about the forget set. MIA-efficacy is the share of the forget set
that it calls non-member (Jia et al. 2023, arXiv 2304.04934); papers report the confidence attack.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional as F

# Above this many points a one-dimensional SVM is fitted on weighted quantile bins instead.
EXACT_LIMIT = 4000
BINS = 512


def correctness(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the predicted label is right, else 0; [B, 1]."""
    return (logits.argmax(1) == labels).double().unsqueeze(1)


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability of the true label; [B, 1]."""
    return probability(logits, labels).gather(1, labels.unsqueeze(1))


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Entropy of the predicted distribution, in nats; [B, 1]."""
    log_p = F.log_softmax(logits.double(), 1)
    return -(log_p.exp() * log_p).sum(1, keepdim=True)


def modified_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-(1 - p_y) log p_y - sum_{i != y} p_i log(1 - p_i), in nats; [B, 1].

    Song and Mittal 2021 (arXiv 2003.10595), equation 8: unlike entropy it tells a confident right
    answer from a confident wrong one.
    """
    log_p = F.log_softmax(logits.double(), 1)
    p = log_p.exp()
    # log(1 - p_i) is exact by log1p but where p_i is near 1: there, from the sum of the others.
    largest = logits.argmax(1, keepdim=True)
    others = log_p.scatter(1, largest, -torch.inf).logsumexp(1, keepdim=True)
    log_rest = torch.log1p(-p).scatter(1, largest, others)
    log_rest = log_rest.clamp_min(-745.0)  # exp(-745) is the smallest double
    true = F.one_hot(labels, logits.shape[1]).bool()
    wrong_terms = -(p * log_rest).masked_fill(true, 0).sum(1, keepdim=True)
    right = labels.unsqueeze(1)
    right_term = -(log_rest.gather(1, right).exp() * log_p.gather(1, right))
    return right_term + wrong_terms


def probability(logits: Tensor, labels: Tensor) -> Tensor:
    """The whole predicted distribution; [B, C]."""
    return F.softmax(logits.double(), 1)


ATTACKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "correctness": correctness,
    "confidence": confidence,
    "entropy": entropy,
    "modified_entropy": modified_entropy,
    "probability": probability,
}


def non_member_share(members: Tensor, non_members: Tensor, target: Tensor) -> float:
    """Percent of `target` that an SVM fitted on members and non-members calls non-member.

    members [M, K], non_members [M', K], target [T, K]: one attack's scores. The SVM is
    SVC(C=3, gamma="auto", kernel="rbf"), the reference implementation's.
    """
    x = torch.cat([members, non_members]).double().cpu().numpy()
    y = np.repeat([1, 0], [len(members), len(non_members)])
    weight = None
    if x.shape[1] == 1 and len(x) > EXACT_LIMIT:
        x, y, weight = _quantile_bins(x[:, 0], y)
    svm = SVC(C=3, gamma="auto", kernel="rbf").fit(x, y, sample_weight=weight)
    verdicts = svm.predict(target.double().cpu().numpy())
    return float(100 * (verdicts == 0).mean())


def _quantile_bins(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per class, the mean of every quantile bin of `x` [M] and, as weight, how many points it holds."""
    centres, labels, weights = [], [], []
    for label in (1, 0):
        for part in np.array_split(np.sort(x[y == label]), BINS):
            if len(part):
                centres.append(part.mean())
                labels.append(label)
                weights.append(len(part))
    return np.array(centres)[:, None], np.array(labels), np.array(weights, dtype=float)


def attack_all(
    retain: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], forget: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """The five attacks on the forget set, in percent called non-member.

    Each argument is (logits [N, C], labels [N]). retain must already be cut to the test set's size.
    """
    return {
        name: non_member_share(score(*retain), score(*test), score(*forget))
        for name, score in ATTACKS.items()
    }
