"""Accuracy, in percent."""

from __future__ import annotations

from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows of `logits` [N, C] whose largest entry is at `labels` [N]."""
    return percent(logits.argmax(1) == labels)


def percent(right: Tensor) -> float:
    """How many of `right` [N] are true, or 1."""
    return 100 * right.double().mean().item()
