"""Accuracy in percent, and the distance to a retrained model."""

from __future__ import annotations

from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows of `logits` [N, C] whose largest entry is at `labels` [N]."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()
