"""Weight masks at one bit a weight, and zeroing weights by them.

A mask is True where a weight is kept. Packed, bit i of its row-major elements is bit i % 8, least
significant first, of byte i // 8; the unused bits of the last byte are 0 and never read.
Contiguous float32 tensors on the CPU go through C++, everything else through plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dau_fast.ops import _native
from dau_fast.ops.reference import (
    apply_masks_reference_,
    pack_mask_reference,
    unpack_mask_reference,
)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask: bool of n elements, any shape -> uint8 [ceil(n / 8)] on the same device.

    Raises ValueError for another dtype.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {_name(mask.dtype)}: expected bool; convert it with mask.bool()")
    if _native.extension is None or not has_cpu_memory(mask):
        return pack_mask_reference(mask)
    mask = mask.contiguous()
    packed = torch.empty(packed_size(mask.numel()), dtype=torch.uint8)
    _native.extension.pack(mask.data_ptr(), packed.data_ptr(), mask.numel())
    return packed


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack_mask`: uint8 [ceil(n / 8)] -> bool of `shape`, n elements.

    Raises ValueError for another dtype or size.
    """
    n = math.prod(shape)
    _check_packed("packed mask", packed, n)
    if _native.extension is None or not has_cpu_memory(packed):
        return unpack_mask_reference(packed, shape)
    packed = packed.contiguous()
    mask = torch.empty(tuple(shape), dtype=torch.bool)
    _native.extension.unpack(packed.data_ptr(), mask.data_ptr(), n)
    return mask


def count_kept(packed: Tensor, n: int) -> int:
    """How many of the n weights of a packed mask, uint8 [ceil(n / 8)], are kept.

    Waits for the device. Raises ValueError for another dtype or size.
    """
    _check_packed("packed mask", packed, n)
    if _native.extension is None or not has_cpu_memory(packed):
        return int(unpack_mask_reference(packed, (n,)).sum())
    packed = packed.contiguous()
    return int(_native.extension.count(packed.data_ptr(), n))


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
    for index, (tensor, mask) in enumerate(zip(tensors, masks, strict=True)):
        check_mask(f"mask {index}", mask, tensor)
    native: list[Tensor] = []
    bits: list[Tensor] = []
    for tensor, mask in zip(tensors, masks, strict=True):
        if _native.extension is None or not _is_plain_float32(tensor, mask):
            apply_masks_reference_([tensor], [mask])
            continue
        native.append(tensor)
        bits.append(pack_mask(mask) if mask.dtype == torch.bool else mask.contiguous())
    if native and _native.extension is not None:
        _native.extension.apply(addresses(native), addresses(bits), sizes(native), torch.get_num_threads())
        increment_version(native)  # autograd cannot see a write through data_ptr


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """What the extension takes for a list of tensors."""
    return [tensor.data_ptr() for tensor in tensors]


def sizes(tensors: Sequence[Tensor]) -> list[int]:
    """How many elements each tensor has."""
    return [tensor.numel() for tensor in tensors]


def _is_plain_float32(tensor: Tensor, mask: Tensor) -> bool:
    contiguous = tensor.dtype == torch.float32 and tensor.is_contiguous()
    return contiguous and has_cpu_memory(tensor) and has_cpu_memory(mask)


def has_cpu_memory(tensor: Tensor) -> bool:
    """Whether data_ptr() may be read: not while compiling, where plain PyTorch fuses anyway.

    Subclasses (fake and distributed tensors) keep their elements elsewhere or nowhere.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.device.type == "cpu" and tensor.layout == torch.strided


def packed_size(n: int) -> int:
    return -(-n // 8)


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
