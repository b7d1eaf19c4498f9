"""Masks that drop the smallest absolute values of many tensors, found by selection and not by a sort.

C++ reads values on the CPU three times, 11 + 10 + 10 bits of them as float32; elsewhere PyTorch's kthvalue
finds the threshold. Exactly as many are dropped as were asked for: of equal values, the first in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dau_fast.ops import _native
from dau_fast.ops.packed_masks import addresses, has_cpu_memory, pack_mask, packed_size, sizes


def mask_smallest(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """Packed masks that drop the k smallest absolute values of all tensors together.

    tensors: any shapes and floating dtypes, one device. Result: uint8 [ceil(n / 8)] a tensor, as from
    `pack_mask`. Equal values are dropped in the order of the tensors and of their row-major elements.
    Raises ValueError for a k that is negative or more than there are, and for NaN.
    """
    total = sum(sizes(tensors))
    if not 0 <= k <= total:
        raise ValueError(f"k is {k}: expected 0 to {total}, the number of values")
    scores = [tensor.detach() for tensor in tensors]
    if k == 0:
        return [pack_mask(torch.ones_like(score, dtype=torch.bool)) for score in scores]
    if _native.extension is None or not all(has_cpu_memory(score) for score in scores):
        for index, score in enumerate(scores):
            if score.isnan().any():
                raise _no_order(index)
        return _packed(_kept(_magnitudes(scores), k), scores)
    if all(score.dtype == torch.float32 for score in scores):
        return _selected([score.contiguous() for score in scores], k)
    return _packed(_kept_by_rounding(_magnitudes(scores), k, scores), scores)


def _magnitudes(scores: list[Tensor]) -> Tensor:
    return torch.cat([score.flatten() for score in scores]).abs_()


def _packed(kept: Tensor, scores: list[Tensor]) -> list[Tensor]:
    return [pack_mask(part) for part in kept.split(sizes(scores))]


def _kept(values: Tensor, k: int) -> Tensor:
    """Bool [n]: all of `values` [n], none negative, but the k smallest, k from 1 to n."""
    threshold = values.kthvalue(k).values
    kept = values > threshold
    ties = (values == threshold).nonzero().squeeze(1)
    surplus = len(values) - k - int(kept.sum())
    kept[ties[len(ties) - surplus :]] = True
    return kept


def _kept_by_rounding(values: Tensor, k: int, scores: list[Tensor]) -> Tensor:
    """`_kept`: rounding to float32 keeps the order, so that only what rounds to the threshold is compared."""
    rounded = values.float()
    threshold, below, _, nan = _select([rounded], k)
    if nan:
        raise _no_order_in(scores)
    kept = rounded > threshold
    near = (rounded == threshold).nonzero().squeeze(1)
    kept[near] = _kept(values[near], k - below)
    return kept


def _selected(scores: list[Tensor], k: int) -> list[Tensor]:
    threshold, below, equal, nan = _select(scores, k)
    if nan:
        raise _no_order_in(scores)
    counts, ties = sizes(scores), k - below
    masks = [torch.empty(packed_size(n), dtype=torch.uint8) for n in counts]
    assert _native.extension is not None
    _native.extension.mask_smallest(
        addresses(scores), addresses(masks), counts, threshold, ties, ties == equal, torch.get_num_threads()
    )
    return masks


def _select(scores: list[Tensor], k: int) -> tuple[float, int, int, int]:
    """The k-th smallest of contiguous float32 values; how many are below it, equal to it, and NaN."""
    assert _native.extension is not None
    threads = torch.get_num_threads()
    found: tuple[float, int, int, int] = _native.extension.select(
        addresses(scores), sizes(scores), k, threads
    )
    return found


def _no_order_in(scores: list[Tensor]) -> ValueError:
    return _no_order(next(index for index, score in enumerate(scores) if score.isnan().any()))


def _no_order(index: int) -> ValueError:
    return ValueError(f"tensor {index} has NaN values: expected numbers; NaN is neither small nor large")
