"""Who watches the game: how far it has come, and whether the defender was ruined.

The referee holds back a part of the forget and validation images as an exam that the attacker never
trains on, looks at a sample of all three sets now and then, and writes down what it sees. A model that no
longer knows its retain set is ruined: nobody is given such a one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dau_fast.data.split import Split, draw_sample
from dau_fast.engine.batches import Load
from dau_fast.engine.profiling import section
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.methods.dau.attacker import Attacker, auc
from dau_fast.methods.dau.shown import Shown
from dau_fast.methods.dau.view import View
from dau_fast.metrics.accuracy import percent
from dau_fast.models import Classifier

# Points of retain accuracy that a finished game may cost, and those that a longer one may win back; the share
# of it that must be left in the middle of a game, where the learning rate is still high.
_LOSS, _COLLAPSE, _LEFT = 1.0, 10.0, 0.5


@dataclass
class History:
    """One entry a look, the first at the original, the last at the finished model.

    auc: of the attacker on the exam. forget_accuracy, validation_accuracy, retain_accuracy: percent.
    exposure: how far the original's margins tell forget from validation, 1 for surely. wrong_labels: share of
    validation that was shown with wrong labels.
    """

    step: list[int] = field(default_factory=list)
    auc: list[float] = field(default_factory=list)
    forget_accuracy: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    retain_accuracy: list[float] = field(default_factory=list)
    exposure: float = 1.0
    wrong_labels: float = 0.0


class Referee:
    """Looks at all three sets, images that `load` turns from indices into batches.

    exam_share: part of forget and validation that the attacker does not train on; a set too small to spare
    any is its own exam. look_images: of each set that are looked at, at most. view: what the attacker sees,
    of what it is shown. ranks: the processes that share the looking.
    """

    def __init__(
        self,
        split: Split,
        labels: Tensor,
        load: Load,
        *,
        exam_share: float,
        look_images: int,
        view: View,
        shown: Shown,
        generator: torch.Generator,
        ranks: Ranks = ALONE,
    ) -> None:
        self.labels, self.load, self.ranks, self.view, self.shown = labels, load, ranks, view, shown
        self.history = History(wrong_labels=shown.wrong_labels)
        self.ended = False  # before all turns were taken
        self._exam = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        # Nothing is learned from images that stand beside the forget set in its batches.
        self._exam[split.retain] = True
        self._exam[split.earlier] = True
        for index in (split.forget, split.validation):
            order = torch.randperm(len(index), generator=generator, device=index.device)
            self._exam[index[order[: round(exam_share * len(index))]]] = True
        self._forget, self._validation, self._retain = (
            draw_sample(index, look_images, generator)
            for index in (split.forget, split.validation, split.retain)
        )

    def grant_study(self, index: Tensor) -> Tensor:
        """1 for each of the images `index` [B] that the attacker may learn from, 0 for the exam's."""
        return (~self._exam[index]).float()

    def reveal(self, defender: Classifier, index: Tensor) -> Tensor:
        """u [N, U]: what the attacker sees of the images `index` [N]."""
        return self._reveal(defender, index, lambda u, logits, batch: u)

    def _reveal(
        self, defender: Classifier, index: Tensor, keep: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        labels, difficulty = self.shown.labels, self.shown.difficulty
        return self.view.reveal_all(
            defender, self.load, index, labels, keep, difficulty=difficulty, ranks=self.ranks
        )

    def look(self, defender: Classifier, attacker: Attacker, step: int) -> bool:
        """Write down where the game stands after `step`; true where the defender is beyond help."""
        with section("referee"):
            lost = self._look(defender, attacker, step)
        self.ended = self.ended or lost
        return lost

    def _look(self, defender: Classifier, attacker: Attacker, step: int) -> bool:
        def judged(u: Tensor, logits: Tensor, batch: Tensor) -> Tensor:
            return torch.stack([attacker(u), (logits.argmax(1) == self.labels[batch]).to(u)], 1)

        (forget, forget_right), (validation, validation_right), (_, retain_right) = (
            self._reveal(defender, index, judged).unbind(1)
            for index in (self._forget, self._validation, self._retain)
        )
        seen = self.history
        seen.step.append(step)
        seen.auc.append(auc(self._tested(forget, self._forget), self._tested(validation, self._validation)))
        seen.forget_accuracy.append(percent(forget_right))
        seen.validation_accuracy.append(percent(validation_right))
        seen.retain_accuracy.append(percent(retain_right))
        lost = bool(torch.isnan(forget).any()) or seen.retain_accuracy[-1] < _LEFT * seen.retain_accuracy[0]
        return self.ranks.agree(lost, self.labels.device)

    def finds_ruin(self) -> bool:
        """Whether the model of the last look knows clearly less of its retain set than the original did.

        Clearly: beyond what is allowed by two standard errors, as a few images more or less tell nothing.
        """
        return self.ended or self._lost_more_than(_LOSS)

    def finds_collapse(self) -> bool:
        """Whether it knows so much less that more turns of the same size would not win it back."""
        return self.ended or self._lost_more_than(_COLLAPSE)

    def _lost_more_than(self, points: float) -> bool:
        before, after = self.history.retain_accuracy[0], self.history.retain_accuracy[-1]
        error = math.sqrt(before * (100 - before) / len(self._retain))
        return self.ranks.agree(after < before - points - 2 * error, self.labels.device)

    def _tested(self, scores: Tensor, index: Tensor) -> Tensor:
        """Those of the exam, from `scores` of the images `index` [N]."""
        rows = scores[self._exam[index]]
        return rows if len(rows) else scores
