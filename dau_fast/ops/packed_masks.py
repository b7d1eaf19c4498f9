"""Weight masks at one bit a weight, and zeroing weights by them.

A mask is True where a weight is kept. Packed, bit i of its row-major elements is bit i % 8, least
significant first, of byte i // 8; the unused bits of the last byte are 0 and never read.
Float32 tensors without gaps go through C++ on the CPU, and are masked by Triton on CUDA, everything else goes
through plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from dau_fast.ops._library import Lists, define
from dau_fast.ops._native import array, arrays
from dau_fast.ops._step_plan import memory_order, permuted
from dau_fast.ops.reference import (
    apply_masks_reference_,
    pack_mask_reference,
    unpack_mask_reference,
)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask: bool of n elements, any shape -> uint8 [ceil(n / 8)] on the same device.

    Raises ValueError for another dtype.
    """
    packed: Tensor = pack_op(mask)
    return packed


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack_mask`: uint8 [ceil(n / 8)] -> bool of `shape`, n elements.

    Raises ValueError for another dtype or size.
    """
    mask: Tensor = unpack_op(packed, shape)
    return mask


def count_kept(packed: Tensor, n: int) -> int:
    """How many of the n weights of a packed mask, uint8 [ceil(n / 8)], are kept.

    Waits for the device. Raises ValueError for another dtype or size.
    """
    return int(count_op(packed, n))


def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set each tensor to 0 in place where its mask is False, NaN and infinity included.

    tensors: any shapes, dtypes and devices; parameters that require grad are changed under no_grad.
    masks: one a tensor, on its device: bool of its shape, or uint8 [ceil(n / 8)] from `pack_mask`.
    Raises ValueError, before any tensor is changed, where the two do not fit.
    """
    if len(tensors) != len(masks):
        raise ValueError(
            f"{len(tensors)} tensors and {len(masks)} masks: expected one mask a tensor; pass "
            "both lists in one order"
        )
    devices = {tensor.device for tensor in tensors}
    with torch.no_grad():
        if len(devices) == 1 and _are_plain(tensors):
            apply_op(*_in_memory_order(tensors, masks))
            return
        _check_pairs(tensors, masks)
        for device in devices:
            ours = [place for place, tensor in enumerate(tensors) if tensor.device == device]
            _apply_on_one_device([tensors[place] for place in ours], [masks[place] for place in ours])


def _in_memory_order(
    tensors: Sequence[Tensor], masks: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Both, of tensors as in channels_last as they lie row by row, which alone the fused paths take."""
    if torch.compiler.is_compiling() or all(tensor.is_contiguous() for tensor in tensors):
        return tensors, masks
    # Also of pairs that do not fit, for the op to name them as they were given.
    pairs = [
        _pair_in_memory_order(*pair) if _fits(*pair) else pair for pair in zip(tensors, masks, strict=True)
    ]
    return [tensor for tensor, _ in pairs], [mask for _, mask in pairs]


def _fits(tensor: Tensor, mask: Tensor) -> bool:
    if mask.device != tensor.device:
        return False
    if mask.dtype == torch.bool:
        return mask.shape == tensor.shape
    return mask.dtype == torch.uint8 and mask.shape == (packed_size(tensor.numel()),)


def _pair_in_memory_order(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    order = memory_order(tensor)
    if order is None or not permuted(tensor, order).is_contiguous():
        return tensor, mask
    # Anew at every call: a mask may change where PyTorch does not see it, and a captured graph reads its own.
    flags = mask if mask.dtype == torch.bool else unpack_mask(mask, tensor.shape)
    return permuted(tensor, order), permuted(flags, order)


def _apply_on_one_device(tensors: list[Tensor], masks: list[Tensor]) -> None:
    # Subclasses that keep their elements elsewhere, such as distributed tensors, know PyTorch's ops alone.
    (apply_op if _are_plain(tensors) else apply_masks_reference_)(tensors, masks)


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    return torch.compiler.is_compiling() or {type(tensor) for tensor in tensors} <= {Tensor, nn.Parameter}


# ---- what the ops refuse


def _check_bool(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {_name(mask.dtype)}: expected bool; convert it with mask.bool()")


def _check_shape(packed: Tensor, shape: Sequence[int]) -> None:
    _check_packed("packed mask", packed, math.prod(shape))
    if any(size < 0 for size in shape):
        raise ValueError(f"shape is {list(shape)}: expected sizes of 0 or more")


def _check_count(packed: Tensor, n: int) -> None:
    _check_packed("packed mask", packed, n)


def _check_pairs(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    if len(tensors) != len(masks):
        raise ValueError(f"{len(tensors)} tensors and {len(masks)} masks: expected one mask a tensor")
    for index, (tensor, mask) in enumerate(zip(tensors, masks, strict=True)):
        check_mask(f"mask {index}", mask, tensor)


def _check_packed(name: str, packed: Tensor, n: int) -> None:
    if packed.dtype != torch.uint8:
        raise ValueError(f"{name} is {_name(packed.dtype)}: expected uint8; pack a bool mask with pack_mask")
    if n < 0 or packed.shape != (packed_size(n),):
        raise ValueError(
            f"{name} has shape {list(packed.shape)}: expected [{packed_size(n)}] for {n} weights; "
            "pass the result of pack_mask for a mask of that size"
        )


def check_mask(name: str, mask: Tensor, tensor: Tensor) -> None:
    """ValueError unless `mask`, bool or packed, is one for `tensor`; `name` is what it is called."""
    if mask.device != tensor.device:
        raise ValueError(
            f"{name} is on {mask.device}, its tensor on {tensor.device}: expected one device; "
            "move the mask with mask.to(tensor.device)"
        )
    if mask.dtype == torch.uint8:
        _check_packed(name, mask, tensor.numel())
    elif mask.dtype != torch.bool:
        raise ValueError(
            f"{name} is {_name(mask.dtype)}: expected bool, or uint8 from pack_mask; convert it "
            "with mask.bool()"
        )
    elif mask.shape != tensor.shape:
        raise ValueError(
            f"{name} has shape {list(mask.shape)}, its tensor {list(tensor.shape)}: expected one "
            "shape; pass both lists in one order"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def packed_size(n: int) -> int:
    """Bytes of a packed mask of n weights."""
    return -(-n // 8)


# ---- C++ and Triton


def _pack_cpp(extension: ModuleType, mask: Tensor) -> Tensor:
    mask = mask.contiguous()
    packed = torch.empty(packed_size(mask.numel()), dtype=torch.uint8)
    extension.pack(flags=array(mask), bits=array(packed))
    return packed


def _unpack_cpp(extension: ModuleType, packed: Tensor, shape: Sequence[int]) -> Tensor:
    packed = packed.contiguous()
    mask = torch.empty(shape, dtype=torch.bool)
    extension.unpack(bits=array(packed), flags=array(mask))
    return mask


def _count(packed: Tensor, n: int) -> Tensor:
    return unpack_mask_reference(packed, (n,)).sum()


def _count_cpp(extension: ModuleType, packed: Tensor, n: int) -> Tensor:
    packed = packed.contiguous()
    return torch.tensor(extension.count(bits=array(packed), n=n))


def _takes_each(tensors: list[Tensor], masks: list[Tensor]) -> list[bool]:
    return [tensor.dtype is torch.float32 and tensor.is_contiguous() for tensor in tensors]


def _apply_cpp(extension: ModuleType, tensors: list[Tensor], masks: list[Tensor]) -> None:
    bits = [_bits(mask) for mask in masks]
    extension.apply(weights=arrays(tensors), bits=arrays(bits), threads=torch.get_num_threads())


def _apply_triton(kernels: ModuleType, tensors: list[Tensor], masks: list[Tensor]) -> None:
    kernels.apply(tensors, [_bits(mask) for mask in masks])


def _bits(mask: Tensor) -> Tensor:
    return pack_mask(mask) if mask.dtype is torch.bool else mask.contiguous()


# ---- registration

pack_op = define(
    "pack_mask(Tensor mask) -> Tensor",
    pack_mask_reference,
    lambda mask: mask.new_empty(packed_size(mask.numel()), dtype=torch.uint8),
    check=_check_bool,
    cpp=_pack_cpp,
)
unpack_op = define(
    "unpack_mask(Tensor packed, SymInt[] shape) -> Tensor",
    unpack_mask_reference,
    lambda packed, shape: packed.new_empty(shape, dtype=torch.bool),
    check=_check_shape,
    cpp=_unpack_cpp,
)
count_op = define(
    "count_kept(Tensor packed, SymInt n) -> Tensor",
    _count,
    lambda packed, n: packed.new_empty((), dtype=torch.int64),
    check=_check_count,
    cpp=_count_cpp,
)
apply_op = define(
    "apply_masks_(Tensor(a!)[] tensors, Tensor[] masks) -> ()",
    apply_masks_reference_,
    lambda tensors, masks: None,
    check=_check_pairs,
    cpp=_apply_cpp,
    triton=("_masked_step_cuda", _apply_triton),
    takes=_takes_each,
    lists=Lists(count=2, changed=(0,)),
)
