"""Membership inference by a support vector machine on one score: the attacks papers report.

An SVM is fitted to tell members (retain images) from non-members (test images) by a score of the
model's output, and is then asked about the forget set. MIA-efficacy is the share of the forget set
that it calls non-member (Jia et al. 2023, arXiv 2304.04934); papers report the confidence attack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.metrics import svm

# Entries of a distribution that are worked on at a time: 8 MB each in float64.
_ENTRIES = 2**20


@dataclass(frozen=True)
class Answers:
    """What a model said about some images: logits [B, C], and the true labels [B]."""

    logits: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def p(self) -> Tensor:
        return F.softmax(self.logits.double(), 1)

    @cached_property
    def log_p(self) -> Tensor:
        return F.log_softmax(self.logits.double(), 1)

    def parts(self) -> Iterator[Answers]:
        """The same answers, some rows at a time: a float64 copy of all of them may not fit."""
        rows = max(1, _ENTRIES // self.logits.shape[1])
        for logits, labels in zip(self.logits.split(rows), self.labels.split(rows), strict=True):
            yield Answers(logits, labels)


def correctness(answers: Answers) -> Tensor:
    """1 where the predicted label is right, else 0; [B, 1]."""
    return (answers.logits.argmax(1) == answers.labels).double().unsqueeze(1)


def confidence(answers: Answers) -> Tensor:
    """Probability of the true label; [B, 1]."""
    return answers.p.gather(1, answers.labels.unsqueeze(1))


def entropy(answers: Answers) -> Tensor:
    """Entropy of the predicted distribution, in nats; [B, 1]."""
    return -(answers.log_p.exp() * answers.log_p).sum(1, keepdim=True)


def modified_entropy(answers: Answers) -> Tensor:
    """-(1 - p_y) log p_y - sum_{i != y} p_i log(1 - p_i), in nats; [B, 1].

    Song and Mittal 2021 (arXiv 2003.10595), equation 8: unlike entropy it tells a confident right
    answer from a confident wrong one.
    """
    log_p, right = answers.log_p, answers.labels.unsqueeze(1)
    p = log_p.exp()
    # log(1 - p_i) is exact by log1p but where p_i is near 1: there, from the sum of the others.
    largest = answers.logits.argmax(1, keepdim=True)
    others = log_p.scatter(1, largest, -torch.inf).logsumexp(1, keepdim=True)
    log_rest = torch.log1p(-p).scatter_(1, largest, others)
    log_rest.clamp_min_(-745.0)  # exp(-745) is the smallest double
    right_term = -(log_rest.gather(1, right).exp() * log_p.gather(1, right))
    wrong_terms = -p.mul_(log_rest).scatter_(1, right, 0).sum(1, keepdim=True)
    return right_term + wrong_terms


def reference_modified_entropy(answers: Answers, present: Tensor) -> Tensor:
    """What the reference implementation computed in its place until June 2026; [B, 1].

    -sum_i w_i log p_i, with w_i = 1 - p_i for every class i that some image of the whole set is of, and
    else p_i: it meant one entry a row and wrote whole columns, and takes log p for log(1 - p). In float32,
    where p = 0 counts as 1e-30. present: bool [C], which classes the set that `answers` are of holds.
    """
    p = F.softmax(answers.logits.float(), 1)
    log_p = torch.where(p > 0, p, torch.full_like(p, 1e-30)).log()
    return -(torch.where(present, 1 - p, p) * log_p).sum(1, keepdim=True).double()


def probability(answers: Answers) -> Tensor:
    """The whole predicted distribution; [B, C]."""
    return answers.p


# Of answers [B], numbers [B, K] by which members are told from non-members.
Score = Callable[[Answers], Tensor]

ATTACKS: dict[str, Score] = {
    "correctness": correctness,
    "confidence": confidence,
    "entropy": entropy,
    "modified_entropy": modified_entropy,
    "probability": probability,
}


class Attacks:
    """Attacks, each a machine that tells `members` from `non_members`, of which there are as many.

    The SVM is the reference implementation's, SVC(C=3, gamma="auto", kernel="rbf"); svm.fit tells how
    near. reference: the labels [N] of all images that will be asked about, for the reference implementation's
    wrong modified entropy, which older tables show; None for Song and Mittal's. scores: the attacks by name.
    Raises UserError for outputs that are not finite, here and when asked about such.
    """

    def __init__(
        self,
        members: Answers,
        non_members: Answers,
        *,
        reference: Tensor | None = None,
        scores: Mapping[str, Score] = ATTACKS,
    ) -> None:
        self.scores, self.reference = scores, reference
        inside, outside = (
            _score_all(side, self._scores_on(None if reference is None else side.labels, side))
            for side in (members, non_members)
        )
        self.machines = {name: svm.fit(inside.pop(name), outside.pop(name)) for name in scores}

    def non_members(self, answers: Answers) -> Tensor:
        """What each attack calls non-member, bool [B, A] on the CPU, in the order of `scores`."""
        attacks = self._scores_on(self.reference, answers)
        return torch.cat(
            [
                torch.stack([self.machines[name](score(part)).cpu() for name, score in attacks.items()], 1)
                for part in answers.parts()
            ]
        )

    def _scores_on(self, labels: Tensor | None, answers: Answers) -> dict[str, Score]:
        """With the reference's modified entropy on a set of those `labels` [N], where they are given."""
        if labels is None:
            return dict(self.scores)
        present = torch.zeros(answers.logits.shape[1], dtype=torch.bool, device=answers.logits.device)
        present[labels] = True
        wrong = {"modified_entropy": lambda some: reference_modified_entropy(some, present)}
        return {**self.scores, **wrong}


def _score_all(answers: Answers, attacks: Mapping[str, Score]) -> dict[str, Tensor]:
    parts = [{name: score(part) for name, score in attacks.items()} for part in answers.parts()]
    return {name: torch.cat([part[name] for part in parts]) for name in attacks}
