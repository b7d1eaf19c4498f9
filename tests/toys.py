"""Data and a network small enough to train in a tenth of a second: overlapping blobs and a perceptron."""

from __future__ import annotations

import torch
from torch import nn

from dau_fast.data import Images
from dau_fast.models import Classifier


def blobs(count: int) -> Images:
    """Three overlapping normal distributions in six dimensions."""
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    return Images(3 * torch.eye(3, 6)[labels] + noise, labels, ("a", "b", "c"))


def perceptron(seed: int) -> Classifier:
    """A newly initialised network for `blobs`, with a BatchNorm to keep honest."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)]
        return Classifier(nn.Sequential(*layers))
