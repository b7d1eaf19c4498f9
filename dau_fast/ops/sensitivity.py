"""How strongly a sample pulls at the classifier layer: the norm of its own gradient, in closed form.

For cross-entropy the gradient of one sample with respect to W is (p - e_y) h^T and with respect to b
is p - e_y, so its norm needs no backward pass: s = ||p - e_y||_2 * sqrt(||h||^2 + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sensitivity(logits: Tensor, features: Tensor, targets: Tensor, bias: bool = True) -> Tensor:
    """Norm of the per-sample cross-entropy gradient with respect to the classifier layer, [B].

    logits: [B, C]. features: [B, D], the layer's input. targets: int64 [B]. bias: whether the layer
    has one. Differentiable in logits and features; the gradient is 0 where p equals e_y.
    """
    true = targets.unsqueeze(1)
    others = F.softmax(logits, 1).scatter(1, true, 0.0)
    # 1 - p_y as the sum of the others stays exact where p_y rounds to 1.
    error = others.scatter(1, true, -others.sum(1, keepdim=True))
    pull = torch.linalg.vector_norm(error, dim=1)
    if not bias:
        return pull * torch.linalg.vector_norm(features, dim=1)
    return pull * (features.square().sum(1) + 1).sqrt()


def attack_features(logits: Tensor, features: Tensor, targets: Tensor | None) -> Tensor:
    """What an attacker sees of each sample: softmax and sensitivity, [B, C + 1].

    Arguments as in `sensitivity`; targets None means the predicted label.
    """
    labels = logits.argmax(1) if targets is None else targets
    s = sensitivity(logits, features, labels)
    return torch.cat([F.softmax(logits, 1), s.unsqueeze(1)], 1)
