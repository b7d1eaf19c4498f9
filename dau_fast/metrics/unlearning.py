"""What is measured of every model: UA, RA, TA, MIA-efficacy, and the avg gap between two models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dau_fast.engine.batches import Load
from dau_fast.engine.evaluation import predict_logits
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.metrics.accuracy import accuracy
from dau_fast.metrics.mia import Answers, attack_all, confidence
from dau_fast.split import Split

_BINS = 20


@dataclass(frozen=True)
class Measures:
    """All in percent. ua: 100 - accuracy on the forget set. ra, ta: accuracy on retain and test set.

    attacks: share of the forget set that each attack calls non-member. confidence: histograms of
    the true label's probability, by set, in percent a bin; "edges" holds the bins' borders.
    """

    ua: float
    ra: float
    ta: float
    attacks: dict[str, float]
    confidence: dict[str, list[float]]

    @property
    def mia_efficacy(self) -> float:
        """The confidence attack, which is the number papers report."""
        return self.attacks["confidence"]


def avg_gap(one: Measures, other: Measures) -> float:
    """Mean absolute difference of UA, RA, TA and MIA-efficacy, in percentage points."""
    pairs = (
        (one.ua, other.ua),
        (one.ra, other.ra),
        (one.ta, other.ta),
        (one.mia_efficacy, other.mia_efficacy),
    )
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def measure(
    model: nn.Module,
    load: Load,
    labels: Tensor,
    split: Split,
    generator: torch.Generator,
    *,
    ranks: Ranks = ALONE,
) -> Measures:
    """Run `model` once over forget, retain, validation and test set and measure it.

    generator: draws the images that stand for members and non-members; seed it alike for every model.
    ranks: the processes that share the passes; each of them has all measures in the end.
    """
    sets = {
        "forget": split.forget,
        "retain": split.retain,
        "validation": split.validation,
        "test": split.test,
    }
    seen = {
        name: Answers(predict_logits(model, load, index, ranks=ranks), labels[index])
        for name, index in sets.items()
    }
    size = min(len(split.retain), len(split.test))

    def some(name: str) -> Answers:
        logits, targets = seen[name].logits, seen[name].labels
        order = torch.randperm(len(targets), generator=generator, device=targets.device)
        return Answers(logits[order[:size]], targets[order[:size]])

    def right(name: str) -> float:
        return accuracy(seen[name].logits, seen[name].labels)

    return Measures(
        ua=100 - right("forget"),
        ra=right("retain"),
        ta=right("test"),
        attacks=attack_all(some("retain"), some("test"), seen["forget"]),
        confidence={
            "edges": [bin / _BINS for bin in range(_BINS + 1)],
            **{name: _histogram(seen[name]) for name in ("forget", "validation", "test")},
        },
    )


def _histogram(answers: Answers) -> list[float]:
    scores = torch.cat([confidence(part) for part in answers.parts()])
    counts = torch.histc(scores.float().cpu(), _BINS, 0, 1)
    return (100 * counts / counts.sum()).tolist()
