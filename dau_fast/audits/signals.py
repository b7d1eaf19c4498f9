"""What audits read from a model's logits: margins in the true label, and the probabilities they stand for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """log p_y - log(1 - p_y) of logits [N, C] at `labels` [N], in nats; float64 [N].

    z_y - logsumexp of the other logits, which is exact where p_y rounds to 0 or 1. Likelihood-ratio attacks
    call it the logit-scaled confidence (Carlini et al. 2022, arXiv 2112.03570), KLoM the margin.
    """
    z, y = logits.double(), labels.unsqueeze(1)
    others = z.scatter(1, y, -torch.inf).logsumexp(1)
    return z.gather(1, y).squeeze(1) - others


def log_probabilities(margins: Array) -> Array:
    """log p_y of margins of any shape, in nats."""
    return -np.logaddexp(0.0, -margins)
