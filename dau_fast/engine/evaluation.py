"""Outputs of a model over a set, in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dau_fast.engine.batches import Load, load_each
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.models import Outputs


def predict(
    model: nn.Module,
    load: Load,
    index: Tensor,
    *,
    batch_size: int | None = None,
    ranks: Ranks = ALONE,
) -> Outputs:
    """Outputs over `index` [N]: features [N, D] and logits [N, C]; the model's mode is restored.

    batch_size: None for what suits the device. ranks: the processes that share the work; each has all
    outputs in the end.
    """
    parts = _outputs(model, load, index, batch_size, ranks)
    columns = (torch.cat(column) for column in zip(*parts, strict=True))
    return Outputs(*(ranks.gather(column, ranks.rows(len(index))) for column in columns))


def predict_logits(
    model: nn.Module,
    load: Load,
    index: Tensor,
    *,
    batch_size: int | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Logits [N, C] over `index` [N], like predict's; no features, which at scale may not fit."""
    parts = _outputs(model, load, index, batch_size, ranks)
    return ranks.gather(torch.cat([part.logits for part in parts]), ranks.rows(len(index)))


@torch.no_grad()
def _outputs(
    model: nn.Module, load: Load, index: Tensor, batch_size: int | None, ranks: Ranks
) -> Iterator[Outputs]:
    """Of this rank's part of `index`, batch by batch."""
    # Few launches on CUDA; on a CPU activations that stay in the cache.
    batch_size = batch_size or (1024 if index.is_cuda else 256)
    mode = model.training
    model.eval()
    try:
        for images in load_each(load, ranks.batches(index, batch_size)):
            yield model(images)
    finally:
        model.train(mode)
