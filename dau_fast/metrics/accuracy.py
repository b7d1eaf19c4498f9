"""Accuracy, in percent."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows of `logits` [N, C] whose largest entry is at `labels` [N]."""
    return percent(logits.argmax(1) == labels)


def percent(right: Tensor) -> float:
    """How many of `right` [N] are true, or 1."""
    return 100 * right.double().mean().item()


def balanced_accuracy(right: Tensor, labels: Tensor) -> float:
    """Percent of `right` [N], true or 1, in each class by itself, averaged over the classes in `labels` [N].

    The mean recall of Brodersen et al. 2010 (doi:10.1109/ICPR.2010.764), as scikit-learn has it.
    """
    right, labels = right.double().cpu(), labels.cpu()
    counts, hits = torch.bincount(labels), torch.bincount(labels, right)
    present = counts > 0
    return percent(hits[present] / counts[present])
