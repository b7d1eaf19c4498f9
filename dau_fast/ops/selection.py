"""Masks that drop the smallest absolute values of many tensors, found by selection and not by a sort.

C++ reads values on the CPU three times, 11 + 10 + 10 bits of them as float32; elsewhere PyTorch's kthvalue
finds the threshold. Exactly as many are dropped as were asked for: of equal values, the first in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from dau_fast.ops._library import define
from dau_fast.ops._native import arrays
from dau_fast.ops.packed_masks import pack_mask, packed_size


def mask_smallest(tensors: Sequence[Tensor], k: int) -> list[Tensor]:
    """Packed masks that drop the k smallest absolute values of all tensors together.

    tensors: any shapes and floating dtypes, one device. Result: uint8 [ceil(n / 8)] a tensor, as from
    `pack_mask`. Equal values are dropped in the order of the tensors and of their row-major elements.
    Raises ValueError for a k that is negative or more than there are, and for NaN.
    """
    if not tensors:
        _check([], k)
        return []
    return list(smallest_op([tensor.detach() for tensor in tensors], k))


def _check(tensors: Sequence[Tensor], k: int) -> None:
    total = sum(_sizes(tensors))
    if not 0 <= k <= total:
        raise ValueError(f"k is {k}: expected 0 to {total}, the number of values")
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors are on {', '.join(sorted(map(str, devices)))}: expected one device")


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.numel() for tensor in tensors]


# ---- plain PyTorch


def _definition(scores: list[Tensor], k: int) -> list[Tensor]:
    if k == 0:
        return _none_dropped(scores)
    for index, score in enumerate(scores):
        if score.isnan().any():
            raise _no_order(index)
    return _packed(_kept(_magnitudes(scores), k), scores)


def _none_dropped(scores: list[Tensor]) -> list[Tensor]:
    return [pack_mask(torch.ones_like(score, dtype=torch.bool)) for score in scores]


def _magnitudes(scores: list[Tensor]) -> Tensor:
    return torch.cat([score.flatten() for score in scores]).abs_()


def _packed(kept: Tensor, scores: list[Tensor]) -> list[Tensor]:
    return [pack_mask(part) for part in kept.split(_sizes(scores))]


def _kept(values: Tensor, k: int) -> Tensor:
    """Bool [n]: all of `values` [n], none negative, but the k smallest, k from 1 to n."""
    threshold = values.kthvalue(k).values
    kept = values > threshold
    ties = (values == threshold).nonzero().squeeze(1)
    surplus = len(values) - k - int(kept.sum())
    kept[ties[len(ties) - surplus :]] = True
    return kept


def _no_order_in(scores: list[Tensor]) -> ValueError:
    return _no_order(next(index for index, score in enumerate(scores) if score.isnan().any()))


def _no_order(index: int) -> ValueError:
    return ValueError(f"tensor {index} has NaN values: expected numbers; NaN is neither small nor large")


# ---- C++


def _cpp(extension: ModuleType, scores: list[Tensor], k: int) -> list[Tensor]:
    if k == 0:
        return _none_dropped(scores)
    if all(score.dtype == torch.float32 for score in scores):
        return _selected(extension, [score.contiguous() for score in scores], k)
    return _packed(_kept_by_rounding(extension, _magnitudes(scores), k, scores), scores)


def _kept_by_rounding(extension: ModuleType, values: Tensor, k: int, scores: list[Tensor]) -> Tensor:
    """`_kept`: rounding to float32 keeps the order, so that only what rounds to the threshold is compared."""
    rounded = values.float()
    threshold, below, _, nan = _select(extension, [rounded], k)
    if nan:
        raise _no_order_in(scores)
    kept = rounded > threshold
    near = (rounded == threshold).nonzero().squeeze(1)
    kept[near] = _kept(values[near], k - below)
    return kept


def _selected(extension: ModuleType, scores: list[Tensor], k: int) -> list[Tensor]:
    threshold, below, equal, nan = _select(extension, scores, k)
    if nan:
        raise _no_order_in(scores)
    masks = [torch.empty(packed_size(score.numel()), dtype=torch.uint8) for score in scores]
    extension.mask_smallest(
        values=arrays(scores),
        bits=arrays(masks),
        threshold=threshold,
        ties=k - below,
        all_ties=k - below == equal,
        threads=torch.get_num_threads(),
    )
    return masks


def _select(extension: ModuleType, scores: list[Tensor], k: int) -> tuple[float, int, int, int]:
    """The k-th smallest of contiguous float32 values; how many are below it, equal to it, and NaN."""
    found: tuple[float, int, int, int] = extension.select(
        values=arrays(scores), k=k, threads=torch.get_num_threads()
    )
    return found


smallest_op = define(
    "mask_smallest(Tensor[] tensors, int k) -> Tensor[]",
    _definition,
    lambda tensors, k: [x.new_empty(packed_size(x.numel()), dtype=torch.uint8) for x in tensors],
    check=_check,
    cpp=_cpp,
)
