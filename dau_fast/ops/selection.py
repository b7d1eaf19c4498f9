"""Masks that drop the smallest absolute values of many tensors, found by selection and not by a sort.

C++ reads float32 values on the CPU three times, 11 + 10 + 10 bits of them; everything else is sorted by
plain PyTorch. Exactly as many are dropped as were asked for: of equal values, the first in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dau_fast.ops import _native
from dau_fast.ops.packed_masks import addresses, has_cpu_memory, pack_mask, packed_size, sizes
from dau_fast.ops.reference import mask_smallest_reference


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
    native = all(score.dtype == torch.float32 and has_cpu_memory(score) for score in scores)
    if _native.extension is None or not native:
        for index, score in enumerate(scores):
            if score.isnan().any():
                raise _no_order(index)
        return [pack_mask(mask) for mask in mask_smallest_reference(scores, k)]
    return _selected([score.contiguous() for score in scores], k)


def _selected(scores: list[Tensor], k: int) -> list[Tensor]:
    extension, places, counts = _native.extension, addresses(scores), sizes(scores)
    assert extension is not None
    threads = torch.get_num_threads()
    threshold, below, equal, nan = extension.select(places, counts, k, threads)
    if nan:
        raise _no_order(next(i for i, score in enumerate(scores) if score.isnan().any()))
    masks = [torch.empty(packed_size(n), dtype=torch.uint8) for n in counts]
    ties = k - below
    extension.mask_smallest(places, addresses(masks), counts, threshold, ties, ties == equal, threads)
    return masks


def _no_order(index: int) -> ValueError:
    return ValueError(f"tensor {index} has NaN values: expected numbers; NaN is neither small nor large")
