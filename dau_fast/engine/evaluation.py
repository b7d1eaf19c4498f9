"""Outputs of a model over a set, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dau_fast.models import Outputs


@torch.no_grad()
def predict(
    model: nn.Module, load: Callable[[Tensor], Tensor], index: Tensor, *, batch_size: int = 512
) -> Outputs:
    """Outputs over `index` [N]: features [N, D] and logits [N, C]; the model's mode is restored."""
    mode = model.training
    model.eval()
    try:
        parts = [model(load(batch)) for batch in index.split(batch_size)]
    finally:
        model.train(mode)
    return Outputs(*(torch.cat(column) for column in zip(*parts, strict=True)))
