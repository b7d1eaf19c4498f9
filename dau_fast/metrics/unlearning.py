"""What is measured of every model: UA, RA, TA, MIA-efficacy, and the avg gap between two models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dau_fast.data.split import Split
from dau_fast.engine.batches import Load
from dau_fast.engine.evaluation import predict_each
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.metrics.accuracy import balanced_accuracy, percent
from dau_fast.metrics.mia import Answers, Attacks, confidence, correctness
from dau_fast.metrics.plugins import find_attacks
from dau_fast.metrics.roc import FALSE_ALARMS, MARGIN_EDGES, count_margins, margin, true_alarms

_BINS = 20
# Logits of members, and of non-members, that attacks are fitted to at most: half a GB in float32.
_LOGITS = 2**27


@dataclass(frozen=True)
class Measures:
    """All in percent. ua: 100 - accuracy on the forget set. ra, ta: accuracy on retain and test set.

    attacks: share of the forget set that each attack calls non-member. confidence: histograms of
    the true label's probability, by set, in percent a bin; "edges" holds the bins' borders. earlier: "ua" and
    the attacks, of what requests before this one forgot; None where there was none. roc: the share of the
    forget set that a threshold on the margin calls member at each share of the test set that it calls so too;
    "false" and "true". margins: histograms as those of confidence, "edges" in nats. forget_margins: of each
    image of the forget set, in nats. balanced: "ra" and "ta" as means over the classes of each set.
    """

    ua: float
    ra: float
    ta: float
    attacks: dict[str, float]
    confidence: dict[str, list[float]]
    earlier: dict[str, float] | None = None
    roc: dict[str, list[float]] | None = None
    margins: dict[str, list[float]] | None = None
    forget_margins: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    balanced: dict[str, float] | None = None

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
    reference: bool = False,
) -> Measures:
    """Run `model` once over forget, retain, validation and test set and measure it.

    generator: draws the images that stand for members and non-members; seed it alike for every model.
    Attacks are fitted to as many of each as the smaller of retain and test set holds, or as half a GB of
    logits does. ranks: the processes that share the passes; each of them has all measures in the end.
    reference: take the modified entropy of the reference implementation, which is wrong, to compare with
    older tables.
    """

    passes = _Passes(model, load, labels, ranks)
    classes = int(labels.max()) + 1
    size = min(len(split.retain), len(split.test), max(1, _LOGITS // classes))
    members, retain = passes.sample(split.retain, size, generator)
    non_members, test = passes.sample(split.test, size, generator)
    asked_about = labels[split.forget] if reference else None
    attacks = Attacks(members, non_members, reference=asked_about, scores=find_attacks())
    forget, verdicts = passes.attack(split.forget, attacks)
    validation = passes.summarise(split.validation)
    sets = {"forget": forget, "validation": validation, "test": test}
    edges = [bin / _BINS for bin in range(_BINS + 1)]
    return Measures(
        ua=100 - percent(forget[:, 0]),
        ra=percent(retain[:, 0]),
        ta=percent(test[:, 0]),
        attacks=dict(zip(attacks.scores, map(percent, verdicts.unbind(1)), strict=True)),
        confidence={"edges": edges} | {name: _histogram(some[:, 1]) for name, some in sets.items()},
        earlier=passes.measure_earlier(split.earlier, attacks) if len(split.earlier) else None,
        roc={"false": list(FALSE_ALARMS), "true": true_alarms(forget[:, 2], test[:, 2])},
        margins={"edges": list(MARGIN_EDGES)}
        | {name: count_margins(some[:, 2]) for name, some in sets.items()},
        forget_margins=tuple(forget[:, 2].tolist()),
        balanced={
            "ra": balanced_accuracy(retain[:, 0], labels[split.retain]),
            "ta": balanced_accuracy(test[:, 0], labels[split.test]),
        },
    )


@dataclass(frozen=True)
class _Passes:
    """Passes of one model over sets, of which summaries stay: right answers, confidence, margin, [N, 3]."""

    model: nn.Module
    load: Load
    labels: Tensor
    ranks: Ranks

    def _over(self, index: Tensor, keep: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return predict_each(self.model, self.load, index, keep, ranks=self.ranks)

    def summarise(self, index: Tensor) -> Tensor:
        return self._over(index, lambda logits, batch: _summary(Answers(logits, self.labels[batch])))

    def sample(self, index: Tensor, size: int, generator: torch.Generator) -> tuple[Answers, Tensor]:
        """Answers on `size` images, and the summary of all in the order of `index`."""
        order = torch.randperm(len(index), generator=generator, device=index.device)
        some, others = index[order[:size]], index[order[size:]]
        answers = Answers(self._over(some, lambda logits, _: logits), self.labels[some])
        # No pass over nothing.
        rest = [self.summarise(others)] if len(others) else []
        return answers, torch.cat([_summary(answers), *rest])[order.argsort()]

    def attack(self, index: Tensor, attacks: Attacks) -> tuple[Tensor, Tensor]:
        """The summary, and what each attack calls non-member, [N, A]."""

        def attacked(logits: Tensor, batch: Tensor) -> Tensor:
            answers = Answers(logits, self.labels[batch])
            return torch.cat([_summary(answers), attacks.non_members(answers).to(logits)], 1)

        summary, verdicts = self._over(index, attacked).split([3, len(attacks.scores)], 1)
        return summary, verdicts

    def measure_earlier(self, index: Tensor, attacks: Attacks) -> dict[str, float]:
        """Error, and the share that each attack calls non-member, in percent."""
        summary, verdicts = self.attack(index, attacks)
        shares = dict(zip(attacks.scores, map(percent, verdicts.unbind(1)), strict=True))
        return {"ua": 100 - percent(summary[:, 0]), **shares}


def _summary(answers: Answers) -> Tensor:
    """1 for a right answer and else 0, confidence in the true label, and its margin; float64 [B, 3]."""
    scores = (correctness, confidence, margin)
    parts = [torch.cat([score(part) for score in scores], 1) for part in answers.parts()]
    return torch.cat(parts)


def _histogram(scores: Tensor) -> list[float]:
    """Of scores [N] from 0 to 1, in percent a bin."""
    counts = torch.histc(scores.float().cpu(), _BINS, 0, 1)
    return (100 * counts / counts.sum()).tolist()
