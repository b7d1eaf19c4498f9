"""Outputs of a model over a set, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
    parts = [outputs for outputs, _ in _outputs(model, load, index, batch_size, ranks)]
    columns = (torch.cat(column) for column in zip(*parts, strict=True))
    return Outputs(*(ranks.gather(column, ranks.rows(len(index))) for column in columns))


def predict_each(
    model: nn.Module,
    load: Load,
    index: Tensor,
    keep: Callable[[Tensor, Tensor], Tensor],
    *,
    batch_size: int | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """What `keep` makes of the logits [B, C] and indices [B] of each batch of `index` [N]; [N, ...].

    keep: gives [B, ...]. Nothing else stays of a batch: at scale all logits may not fit.
    """
    parts = _outputs(model, load, index, batch_size, ranks)
    kept = [keep(outputs.logits, batch) for outputs, batch in parts]
    return ranks.gather(torch.cat(kept), ranks.rows(len(index)))


@torch.no_grad()
def _outputs(
    model: nn.Module, load: Load, index: Tensor, batch_size: int | None, ranks: Ranks
) -> Iterator[tuple[Outputs, Tensor]]:
    """Of this rank's part of `index`, batch by batch: outputs, and the indices that they are of."""
    # Few launches on CUDA; on a CPU activations that stay in the cache.
    batches = ranks.batches(index, batch_size or (1024 if index.is_cuda else 256))
    mode = model.training
    model.eval()
    try:
        for batch, images in zip(batches, load_each(load, batches), strict=True):
            yield model(images), batch
    finally:
        model.train(mode)
