"""What an audit would say of a retrained model, and so how much its word against another one counts.

References are retrained models. Each in turn is held out and audited against the others, as if it had been
unlearned; the audited models are scored against the same others. An audited model that is beyond all held-out
ones is outside the band. Among K retrained models and one more, each is as likely as another to be the most
extreme: a further retraining falls outside on a given side with probability 1 / (K + 1). No verdict from K
references can have a lower false alarm rate, and it is no measure of how far outside something lies.

Scores that depend on the references are not quite exchangeable, as references are compared among themselves,
too: there the rate may be up to twice as large (Barber et al. 2021, arXiv 1905.02928, on leaving one out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# On which side of retraining a score is held against a model.
Side = Literal["above", "below", "both"]


def leave_out(count: int, size: int) -> list[tuple[list[int], list[int]]]:
    """Which of `count` references are held out together, `size` of them, and which are left; each once.

    `count` // `size` such folds; references that are left over are never held out.
    """
    folds = []
    for start in range(0, count - size + 1, size):
        out = list(range(start, start + size))
        folds.append((out, [i for i in range(count) if i not in out]))
    return folds


@dataclass(frozen=True)
class Calibrated:
    """An audit's scores in its own unit, one a fold of references, at least two folds.

    audited: of the audited models, against the references that the fold leaves. held_out: of the references
    that it holds out, against the same. resolution: the smallest difference that means something, above 0.
    """

    audited: tuple[float, ...]
    held_out: tuple[float, ...]
    side: Side
    resolution: float

    @property
    def value(self) -> float:
        """The audited models' score: the mean over folds."""
        return float(np.mean(self.audited))

    @property
    def band(self) -> tuple[float, float]:
        """The least and the largest score of held-out references."""
        return min(self.held_out), max(self.held_out)

    @property
    def false_alarm_rate(self) -> float:
        """How often a further retraining would be outside, 0 to 1."""
        return (2 if self.side == "both" else 1) / (len(self.held_out) + 1)

    @property
    def p_value(self) -> float:
        """How often a further retraining would be at least as extreme, 0 to 1; never below the rate."""
        pairs = list(zip(self.audited, self.held_out, strict=True))
        above = (1 + sum(theirs >= ours for ours, theirs in pairs)) / (len(pairs) + 1)
        below = (1 + sum(theirs <= ours for ours, theirs in pairs)) / (len(pairs) + 1)
        return min(1.0, {"above": above, "below": below, "both": 2 * min(above, below)}[self.side])

    @property
    def outside(self) -> bool:
        """Whether the audited models are beyond all held-out references on a side that counts."""
        return self.p_value <= self.false_alarm_rate + 1e-12

    def deviations(self, fold: int) -> tuple[float, float]:
        """How far the audited and the held-out models of `fold` are from all other held-out ones.

        From their median, in standard deviations of theirs, of at least `resolution`; 0 on a side that does
        not count.
        """
        others = np.delete(self.held_out, fold)
        spread = others.std(ddof=1) if len(others) > 1 else 0.0
        scores = np.array([self.audited[fold], self.held_out[fold]])
        apart = (scores - np.median(others)) / max(float(spread), self.resolution)
        counted = {"above": np.maximum(apart, 0), "below": np.maximum(-apart, 0), "both": np.abs(apart)}
        ours, theirs = counted[self.side]
        return float(ours), float(theirs)


@dataclass(frozen=True)
class Verdict:
    """Of all audits together.

    audited, held_out: one a fold, the mean over audits of log(1 + deviation). outside: audits that the
    audited models are outside of; expected: how many a further retraining would be outside of, in the mean.
    """

    audited: tuple[float, ...]
    held_out: tuple[float, ...]
    outside: int
    expected: float
    audits: int

    @property
    def p_value(self) -> float:
        """How often a further retraining would be at least as far from the others, 0 to 1."""
        further = sum(theirs >= ours for ours, theirs in zip(self.audited, self.held_out, strict=True))
        return (1 + further) / (len(self.held_out) + 1)

    @property
    def false_alarm_rate(self) -> float:
        """How often a further retraining would be called told apart, 0 to 1; about, see this module."""
        return 1 / (len(self.held_out) + 1)

    @property
    def inside(self) -> bool:
        """Whether some held-out reference is as far from the others as the audited models are."""
        return self.p_value > self.false_alarm_rate + 1e-12


def judge(audits: Sequence[Calibrated]) -> Verdict:
    """The verdict of `audits`, at least one, all on the same folds."""
    folds = range(len(audits[0].held_out))
    deviations = np.array([[audit.deviations(fold) for fold in folds] for audit in audits])
    audited, held_out = np.log1p(deviations).mean(0).T  # [folds] each
    return Verdict(
        audited=tuple(audited.tolist()),
        held_out=tuple(held_out.tolist()),
        outside=sum(audit.outside for audit in audits),
        expected=sum(audit.false_alarm_rate for audit in audits),
        audits=len(audits),
    )
