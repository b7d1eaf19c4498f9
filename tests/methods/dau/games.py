"""Short games on small tasks, and what is compared of them, for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dau_fast.config import DauConfig
from dau_fast.engine.evaluation import predict
from dau_fast.methods.task import Task
from dau_fast.metrics.accuracy import accuracy
from dau_fast.models import Classifier

CLASSWISE = DauConfig(label_conditioned=False, alpha=0.5, departure=1.0, turns=60, batch_size=32, lr=0.05)
SPREAD = DauConfig(label_conditioned=True, alpha=1.0, turns=30, batch_size=32)
NOTHING = 1e-60  # a learning rate of which float32 sees nothing; 0 is none


def percent_right(task: Task, model: Classifier, index: Tensor) -> float:
    return accuracy(predict(model, task.images.batch, index).logits, task.labels[index])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
