"""What a model says of a set, in evaluation mode: batch by batch, shared by all processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dau_fast.engine.batches import Load, load_each
from dau_fast.engine.modes import evaluating
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.sharding import is_sharded
from dau_fast.errors import UserError
from dau_fast.models import Outputs

# Images of a batch wherever nothing is trained.
EVALUATION_BATCH = 512

# Images [B, ...] and their indices [B] -> tensors of B rows.
Compute = Callable[[Tensor, Tensor], Sequence[Tensor]]


def predict(
    model: nn.Module, load: Load, index: Tensor, *, batch_size: int = EVALUATION_BATCH, ranks: Ranks = ALONE
) -> Outputs:
    """Outputs over `index` [N]: features [N, D] and logits [N, C]; the model's mode is restored.

    ranks: the processes that share the work; each has all outputs in the end.
    """
    found = map_batches(
        model, load, index, lambda images, _: model(images), batch_size=batch_size, ranks=ranks
    )
    return Outputs(*found)


def predict_each(
    model: nn.Module,
    load: Load,
    index: Tensor,
    keep: Callable[[Tensor, Tensor], Tensor],
    *,
    batch_size: int = EVALUATION_BATCH,
    ranks: Ranks = ALONE,
) -> Tensor:
    """What `keep` makes of the logits [B, C] and indices [B] of each batch of `index` [N]; [N, ...].

    keep: gives [B, ...]. Nothing else stays of a batch: at scale all logits may not fit.
    """

    def kept(images: Tensor, batch: Tensor) -> tuple[Tensor]:
        return (keep(model(images).logits, batch),)

    return map_batches(model, load, index, kept, batch_size=batch_size, ranks=ranks)[0]


@torch.no_grad()
def map_batches(
    model: nn.Module,
    load: Load,
    index: Tensor,
    compute: Compute,
    *,
    batch_size: int = EVALUATION_BATCH,
    ranks: Ranks = ALONE,
) -> list[Tensor]:
    """The tensors that `compute` gives for each batch of `index` [N] in evaluation mode, [N, ...] each.

    Where a GPU's memory is short, batches are taken in smaller parts from there on, and a line says so.
    Raises UserError where a sharded model leaves no room, or a single image none.
    """
    parts: list[Sequence[Tensor]] = []
    batches = ranks.batches(index, batch_size)
    limit = batch_size
    with evaluating(model):
        for batch, images in zip(batches, load_each(load, batches), strict=True):
            start = 0
            # An empty batch is computed too: other processes may wait for this one.
            while start < max(1, len(batch)):
                rows = slice(start, start + limit)
                try:
                    parts.append(compute(images[rows], batch[rows]))
                    start += limit
                except torch.OutOfMemoryError as error:
                    limit = _smaller(min(limit, len(batch)), model, error)
    columns = (torch.cat(column) for column in zip(*parts, strict=True))
    return [ranks.gather(column, ranks.rows(len(index))) for column in columns]


def _smaller(images: int, model: nn.Module, error: torch.OutOfMemoryError) -> int:
    """Half of `images`, after a line that says so. Raises UserError where that does not help."""
    if images <= 1 or is_sharded(model):
        raise UserError(
            f"the GPU's memory does not hold a pass over {images} images: start more processes, or take a "
            "device with more memory"
        ) from error
    torch.cuda.empty_cache()
    logging.getLogger("dau_fast").warning(
        "memory is short in evaluation: %d images are taken at a time from here on", images // 2
    )
    return images // 2
