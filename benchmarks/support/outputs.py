"""What the models of a task say of all its images, each asked once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from dau_fast.engine.chance import generator_for
from dau_fast.engine.evaluation import predict_each
from dau_fast.metrics.unlearning import Measures, measure
from dau_fast.models import Outputs as ModelOutputs
from support.bank import Bank, Training
from support.tasks import Problem

SETS = ("train", "forget", "retain", "validation", "test")


class Outputs:
    """Logits of the bank's models on the images of `problem`, kept in memory.

    A model that the bank lacks is trained when it is asked for.
    """

    def __init__(self, problem: Problem, bank: Bank) -> None:
        self.problem, self.bank = problem, bank
        self._kept: dict[str, Tensor] = {}

    def compute(self, model: nn.Module) -> Tensor:
        """Logits [N, C] of any model on all N images; rows are found by the split's indices."""
        images = self.problem.images
        everything = torch.arange(len(images.labels), device=images.device)
        return predict_each(model, images, everything, lambda logits, _: logits)

    def of_training(self, training: Training) -> Tensor:
        """Logits [N, C] of the model that the bank keeps of `training`."""
        if training.key not in self._kept:
            self._kept[training.key] = self.compute(self.bank.get(training))
        return self._kept[training.key]

    def original(self, number: int = 0) -> Tensor:
        """Logits [N, C] of the original, or of a further one."""
        return self.of_training(self.problem.original(number))

    def retrained(self, number: int) -> Tensor:
        """Logits [N, C] of one retrained model."""
        return self.of_training(self.problem.retrained(number))

    def stack_originals(self, count: int, part: str) -> Tensor:
        """Logits [count, n, C] of the original and further ones on the set `part`, one of SETS."""
        return self._stack(map(self.original, range(count)), part)

    def stack_retrained(self, count: int, part: str) -> Tensor:
        """Logits [count, n, C] of retrained models on the set `part`, one of SETS."""
        return self._stack(map(self.retrained, range(count)), part)

    def labels(self, part: str) -> Tensor:
        """Labels [n] of the set `part`, one of SETS."""
        return self.problem.images.labels[self.index(part)]

    def index(self, part: str) -> Tensor:
        """Indices [n] of the set `part`, one of SETS."""
        found: Tensor = getattr(self.problem.split, part)
        return found

    def measure(self, logits: Tensor) -> Measures:
        """What `dau_fast.job.assembly.measure_model` measures of a model whose `logits` [N, C] these are."""
        problem, labels = self.problem, self.problem.images.labels
        chance = generator_for(problem.seed, "measures", labels.device)
        return measure(_Recorded(logits), _Rows(), labels, problem.split, chance)

    def _stack(self, logits: Iterable[Tensor], part: str) -> Tensor:
        return torch.stack([each[self.index(part)] for each in logits])


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y - log(1 - p_y): logit of the label less the log-sum-exp of the others; float64 [..., n].

    logits: [..., n, C]. labels: [n]. Source: Georgiev et al. 2024 (arXiv 2410.23232), appendix E.1.
    """
    logits = logits.double()
    own = labels.expand(logits.shape[:-1]).unsqueeze(-1)
    return logits.gather(-1, own).squeeze(-1) - logits.scatter(-1, own, -torch.inf).logsumexp(-1)


class _Rows:
    """Loads nothing: a batch of images is their indices."""

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        return iter(indices)


class _Recorded(nn.Module):
    """A model that was asked before: logits [N, C] by index."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, index: Tensor) -> ModelOutputs:
        rows = self.logits[index]
        return ModelOutputs(rows, rows)
