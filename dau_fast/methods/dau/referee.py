"""When to end the game without a retrained model to look at.

The referee holds back a part of the forget and validation images as an exam that the attacker never
trains on, looks at both sets now and then, writes down what it sees, and says when it is enough:
for forgetting spread over classes, when forget behaves like validation; for whole classes, when the
class is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dau_fast.data.split import Split
from dau_fast.engine.batches import Load
from dau_fast.engine.profiling import section
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.methods.dau.attacker import Attacker, auc
from dau_fast.methods.dau.view import View
from dau_fast.metrics.accuracy import percent
from dau_fast.models import Classifier

# A class counts as gone when at most this percentage of it is still recognised.
_GONE = 1.0
# One look may be luck, on a small exam above all.
_LOOKS_IN_A_ROW = 2


@dataclass
class History:
    """One entry a look, the first at the original.

    auc: of the attacker on the exam. forget_accuracy, validation_accuracy: percent. stopped: why
    the game ended, one sentence.
    """

    step: list[int] = field(default_factory=list)
    auc: list[float] = field(default_factory=list)
    forget_accuracy: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    stopped: str = "the longest game was played"


class Referee:
    """Looks at forget and validation set, images that `load` turns from indices into batches.

    exam_share: part of each set that the attacker does not train on; a set too small to spare any
    is its own exam. view: what the attacker sees. ranks: the processes that share the looking.
    """

    def __init__(
        self,
        split: Split,
        labels: Tensor,
        load: Load,
        *,
        exam_share: float,
        view: View,
        generator: torch.Generator,
        ranks: Ranks = ALONE,
    ) -> None:
        self.split, self.labels, self.load, self.ranks = split, labels, load, ranks
        self.view = view
        self.history = History()
        self._in_a_row = 0
        self._exam = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        for index in (split.forget, split.validation):
            order = torch.randperm(len(index), generator=generator, device=index.device)
            self._exam[index[order[: round(exam_share * len(index))]]] = True

    def grant_study(self, index: Tensor) -> Tensor:
        """1 for each of the images `index` [B] that the attacker may learn from, 0 for the exam's."""
        return (~self._exam[index]).float()

    def reveal(self, defender: Classifier, index: Tensor) -> Tensor:
        """u [N, C + 1]: what the attacker sees of the images `index` [N]."""
        return self.view.reveal_all(defender, self.load, index, self.labels, ranks=self.ranks)

    def look(self, defender: Classifier, attacker: Attacker, step: int) -> bool:
        """Write down where the game stands after `step`; true when it is enough."""
        with section("referee"):
            return self._look(defender, attacker, step)

    def _look(self, defender: Classifier, attacker: Attacker, step: int) -> bool:
        def judged(u: Tensor, labels: Tensor) -> Tensor:
            # u begins with the softmax, whose largest entry is the predicted label.
            right = u[:, :-1].argmax(1) == labels
            return torch.stack([attacker(u), right.to(u)], 1)

        sets = self.split.forget, self.split.validation
        (forget, forget_right), (validation, validation_right) = (
            self.view.reveal_all(defender, self.load, index, self.labels, judged, ranks=self.ranks).unbind(1)
            for index in sets
        )
        seen = self.history
        seen.step.append(step)
        seen.auc.append(auc(self._tested(forget, sets[0]), self._tested(validation, sets[1])))
        seen.forget_accuracy.append(percent(forget_right))
        seen.validation_accuracy.append(percent(validation_right))
        verdict = self._class_gone() if self.split.classwise else self._like_validation()
        enough = self.ranks.agree(verdict is not None, self.labels.device)
        self._in_a_row = self._in_a_row + 1 if enough else 0
        if self._in_a_row < _LOOKS_IN_A_ROW:
            return False
        seen.stopped = f"{verdict}, {_LOOKS_IN_A_ROW} looks in a row"
        return True

    def _tested(self, scores: Tensor, index: Tensor) -> Tensor:
        """Those of the exam, from `scores` of all images `index` [N]."""
        rows = scores[self._exam[index]]
        return rows if len(rows) else scores

    def _class_gone(self) -> str | None:
        left = self.history.forget_accuracy[-1]
        return f"{left:.1f} % of the forgotten class is still recognised" if left <= _GONE else None

    def _like_validation(self) -> str | None:
        seen = self.history
        forget, validation = seen.forget_accuracy[-1], seen.validation_accuracy[-1]
        if forget > validation or seen.auc[-1] > 0.5:
            return None
        return (
            f"forget accuracy {forget:.1f} % is no higher than validation's {validation:.1f} %, and "
            f"the attacker does no better than chance (AUC {seen.auc[-1]:.2f})"
        )
