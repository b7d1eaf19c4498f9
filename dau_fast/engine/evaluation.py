"""Outputs of a model over a set, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dau_fast.models import Outputs


def predict(
    model: nn.Module, load: Callable[[Tensor], Tensor], index: Tensor, *, batch_size: int | None = None
) -> Outputs:
    """Outputs over `index` [N]: features [N, D] and logits [N, C]; the model's mode is restored.

    batch_size: None for what suits the device.
    """
    parts = _outputs(model, load, index, batch_size)
    return Outputs(*(torch.cat(column) for column in zip(*parts, strict=True)))


def predict_logits(
    model: nn.Module, load: Callable[[Tensor], Tensor], index: Tensor, *, batch_size: int | None = None
) -> Tensor:
    """Logits [N, C] over `index` [N], like predict's; no features, which at scale may not fit."""
    return torch.cat([part.logits for part in _outputs(model, load, index, batch_size)])


@torch.no_grad()
def _outputs(
    model: nn.Module, load: Callable[[Tensor], Tensor], index: Tensor, batch_size: int | None
) -> Iterator[Outputs]:
    # Few launches on CUDA; on a CPU activations that stay in the cache.
    batch_size = batch_size or (1024 if index.is_cuda else 256)
    mode = model.training
    model.eval()
    try:
        for batch in index.split(batch_size):
            yield model(load(batch))
    finally:
        model.train(mode)
