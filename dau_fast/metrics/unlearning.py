"""What is measured of every model: UA, RA, TA, MIA-efficacy, and the avg gap between two models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dau_fast.engine.evaluation import predict
from dau_fast.metrics.accuracy import accuracy
from dau_fast.metrics.mia import attack_all
from dau_fast.split import Split


@dataclass(frozen=True)
class Measures:
    """All in percent. ua: 100 - accuracy on the forget set. ra, ta: accuracy on retain and test set.

    attacks: share of the forget set that each attack calls non-member.
    """

    ua: float
    ra: float
    ta: float
    attacks: dict[str, float]

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
    load: Callable[[Tensor], Tensor],
    labels: Tensor,
    split: Split,
    generator: torch.Generator,
) -> Measures:
    """Run `model` once over forget, retain and test set and measure it.

    generator: draws the retain images that stand for members; seed it alike for every model.
    """
    sets = {"forget": split.forget, "retain": split.retain, "test": split.test}
    logits = {name: predict(model, load, index).logits for name, index in sets.items()}
    targets = {name: labels[index] for name, index in sets.items()}
    size = min(len(split.retain), len(split.test))

    def some(name: str) -> tuple[Tensor, Tensor]:
        count = len(sets[name])
        chosen = torch.randperm(count, generator=generator, device=labels.device)[:size]
        return logits[name][chosen], targets[name][chosen]

    attacks = attack_all(some("retain"), some("test"), (logits["forget"], targets["forget"]))
    return Measures(
        ua=100 - accuracy(logits["forget"], targets["forget"]),
        ra=accuracy(logits["retain"], targets["retain"]),
        ta=accuracy(logits["test"], targets["test"]),
        attacks=attacks,
    )
