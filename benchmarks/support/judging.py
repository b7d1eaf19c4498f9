"""How far a model is from retrained ones, on a task of the bank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean

import torch
from torch import Tensor

from dau_fast.audits.evidence import Scene, measure_new_head
from dau_fast.config import AuditConfig
from dau_fast.errors import UserError
from dau_fast.metrics.accuracy import accuracy
from dau_fast.metrics.unlearning import Measures, avg_gap
from dau_fast.models import Classifier
from support.bank import Bank
from support.outputs import Outputs, margins
from support.tasks import Problem

# A task can tell methods apart where all three hold.
TELLING_FLOORS = 5.0  # the original's avg gap, in noise floors, at least
TELLING_TRAIN = 99.0  # its accuracy on the training images, in percent, at least
TELLING_TEST = 20.0  # points by which its accuracy on the test images is lower, at least

# Sets on which margins are compared.
_COMPARED = ("forget", "retain", "validation")


@dataclass(frozen=True)
class Judgement:
    """A model beside K retrained ones; percentage points but for `margins`.

    avg_gap: mean of the avg gaps to each of them. gap_to_mean: avg gap to the mean of their measures (the
    definition of AMUN, arXiv 2503.00917). rates: in percent, ua, ra, ta and each attack's efficacy. signed:
    rates less their mean.
    extra: measures of the task's kind, in percent, for a class `new_head` too: how many of its images a new
    last layer on the features recognises; extra_signed: less the mean of the retrained models.
    margins: by set, root mean square of (margin - mean retrained margin) in units of what is expected between
    a retrained model and the mean of K others: 1 for another retraining, on average.
    """

    avg_gap: float
    gap_to_mean: float
    rates: dict[str, float]
    signed: dict[str, float]
    extra: dict[str, float]
    extra_signed: dict[str, float]
    margins: dict[str, float]


@dataclass(frozen=True)
class Telling:
    """Whether a task can tell methods apart, by its original.

    floor, original_gap: percentage points, the mean avg gap between two retrained models, and from the
    original to one. train, test: accuracy of the original, in percent.
    """

    floor: float
    original_gap: float
    train: float
    test: float

    @property
    def floors(self) -> float:
        """The original's gap in noise floors."""
        return self.original_gap / self.floor if self.floor else float("inf")

    @property
    def tells(self) -> bool:
        memorises = self.train >= TELLING_TRAIN and self.test <= self.train - TELLING_TEST
        return memorises and self.floors >= TELLING_FLOORS


@dataclass(frozen=True)
class _Reference:
    """One retrained model: logits [N, C] and what is measured of them."""

    logits: Tensor
    measures: Measures
    extra: dict[str, float]


class Judge:
    """Compares models with `retrained` retrained ones, two at least, that the bank keeps or trains."""

    def __init__(self, problem: Problem, bank: Bank, retrained: int = 3) -> None:
        if retrained < 2:
            raise UserError(f"`retrained={retrained}`: expected 2 or more, as one has no spread")
        self.outputs = Outputs(problem, bank)
        self._references = [
            self._refer(self.outputs.retrained(number), bank.get(problem.retrained(number)))
            for number in range(retrained)
        ]

    @property
    def floor(self) -> float:
        """The noise floor: mean avg gap between two retrained models, in percentage points."""
        return mean(avg_gap(a.measures, b.measures) for a, b in combinations(self._references, 2))

    def judge(self, model: Classifier) -> Judgement:
        """`model` beside all retrained ones."""
        return self._compare(self._refer(self.outputs.compute(model), model), self._references)

    def judge_logits(self, logits: Tensor) -> Judgement:
        """The same of a model of which nothing is known but its logits [N, C] on all images of the task."""
        return self._compare(self._refer(logits), self._references)

    def judge_original(self) -> Judgement:
        """What doing nothing comes to."""
        outputs = self.outputs
        model = outputs.bank.get(outputs.problem.original())
        return self._compare(self._refer(outputs.original(), model), self._references)

    def judge_retrained(self, number: int) -> Judgement:
        """What another retraining comes to: one of the retrained models beside the others.

        Raises UserError where there are only two, whose spread one cannot tell.
        """
        others = [each for i, each in enumerate(self._references) if i != number]
        if len(others) < 2:
            raise UserError("`retrained=2`: expected 3 or more to judge one of them by the others")
        return self._compare(self._references[number], others)

    def telling(self) -> Telling:
        """Whether the task can tell methods apart."""
        outputs, logits = self.outputs, self.outputs.original()
        train, test = (
            accuracy(logits[outputs.index(part)], outputs.labels(part)) for part in ("train", "test")
        )
        return Telling(self.floor, self.judge_original().avg_gap, train, test)

    def _refer(self, logits: Tensor, model: Classifier | None = None) -> _Reference:
        problem = self.outputs.problem
        extra = problem.measure_extra(logits)
        if model is not None and problem.split.classwise:
            scene = Scene(problem.images, problem.split, problem.seed, AuditConfig())
            extra["new_head"] = measure_new_head(model, scene)
        return _Reference(logits, self.outputs.measure(logits), extra)

    def _compare(self, one: _Reference, others: Sequence[_Reference]) -> Judgement:
        own, means = _collect(one.measures), _average([_collect(each.measures) for each in others])
        signed = {name: own[name] - means[name] for name in own}
        extra_means = _average([each.extra for each in others])
        return Judgement(
            avg_gap=mean(avg_gap(one.measures, each.measures) for each in others),
            gap_to_mean=mean(abs(signed[name]) for name in ("ua", "ra", "ta", "confidence")),
            rates=own,
            signed=signed,
            extra=one.extra,
            extra_signed={name: one.extra[name] - extra_means[name] for name in one.extra},
            margins={part: self._distance(part, one.logits, others) for part in _COMPARED},
        )

    def _distance(self, part: str, logits: Tensor, others: Sequence[_Reference]) -> float:
        index, labels = self.outputs.index(part), self.outputs.labels(part)
        spread_of = margins(torch.stack([each.logits[index] for each in others]), labels)
        return standardised_distance(margins(logits[index], labels), spread_of)


def standardised_distance(margin: Tensor, retrained: Tensor) -> float:
    """Root mean square over images of margin [n] less the mean of `retrained` [K, n], in standard deviations.

    The standard deviation is one for all images, pooled over those of `retrained`, and that of the difference
    of one model from the mean of K: times sqrt(1 + 1/K). 0 where nothing differs at all.
    """
    difference = (margin - retrained.mean(0)).square().mean()
    variance = retrained.var(0).mean() * (1 + 1 / len(retrained))
    return float((difference / variance).sqrt()) if difference else 0.0


def _collect(measures: Measures) -> dict[str, float]:
    return {"ua": measures.ua, "ra": measures.ra, "ta": measures.ta, **measures.attacks}


def _average(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: mean(each[name] for each in found) for name in found[0]}
