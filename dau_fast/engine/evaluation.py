"""What a model says of a set, in evaluation mode: batch by batch, shared by all processes."""

from __future__ import annotations

import logging
import math
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


def count_batches(images: int, most: int) -> int:
    """In how many batches of at most `most` a pass over `images` is taken: of one size, where that is near.

    Each size is another shape, for which a GPU plans its convolutions anew.
    """
    fewest = max(1, math.ceil(images / most))
    even = (count for count in range(fewest, fewest + fewest // 4 + 1) if images % count == 0)
    return next(even, fewest)


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
    own = sum(map(len, batches))
    if _plans_by_shape(index.device):
        batches = of_one_shape(batches)
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
    columns = (torch.cat(column)[:own] for column in zip(*parts, strict=True))
    return [ranks.gather(column, ranks.rows(len(index))) for column in columns]


def _plans_by_shape(device: torch.device) -> bool:
    """Whether a shape that was not seen before takes the device longer."""
    return device.type == "cuda"


def of_one_shape(batches: list[Tensor]) -> list[Tensor]:
    """`batches` of indices, the last one filled up with copies of its last index to the size of the first."""
    missing = len(batches[0]) - len(batches[-1])
    if not missing or not len(batches[-1]):
        return batches
    return [*batches[:-1], torch.cat([batches[-1], batches[-1][-1:].expand(missing)])]


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
