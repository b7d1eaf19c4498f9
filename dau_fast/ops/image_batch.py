"""A batch of normalised images from uint8 pixels: gathered, cropped, mirrored and scaled in one pass.

The images stay where they are and as small as they are; what a network reads is written once. A pixel
has 256 values, so C++ looks its result up in a table of 256 numbers a channel, and Triton divides as IEEE
754 does: both give the definition's float32 numbers bit for bit, and round them once to other dtypes.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dau_fast.ops._library import check_devices, define
from dau_fast.ops._native import array
from dau_fast.ops.reference import image_batch_reference


def image_batch(
    pixels: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    flip: Tensor | None = None,
    pad: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(pixels[index] / 255 - mean) / std, cropped and mirrored before, [B, C, H, W] in channels_last.

    pixels: uint8 [N, C, H, W], any strides; channels_last is fastest. index: int64 [B]. mean, std: float32
    [C] or [1], in units of pixel / 255. rows, columns: both or neither, integers [B]: where each image's
    window of H x W begins in the image padded with `pad` zero pixels on every side, 0 to 2 pad; as
    tensors, so that a captured CUDA graph takes new ones. flip: bool or integers [B], which windows are
    mirrored. dtype: floating point; computed in float32 and rounded once. Not differentiable.
    Raises ValueError where arguments do not fit, IndexError for an index outside 0 to N - 1 and
    ValueError for a window outside the padded image; on CUDA those two are device-side assertions.
    """
    batch: Tensor = image_batch_op(pixels, index, mean, std, rows, columns, flip, pad, dtype)
    return batch


# ---- what the op refuses

# Twice as much still fits the 32 bits in which Triton counts.
_MOST_PAD = 2**30 - 1


def _check(
    pixels: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    flip: Tensor | None,
    pad: int,
    dtype: torch.dtype,
) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim != 4:
        raise ValueError(f"pixels are {_said(pixels)}: expected uint8 of shape [N, C, H, W]")
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index is {_said(index)}: expected int64 of shape [B]")
    for name, given in (("mean", mean), ("std", std)):
        if given.dtype != torch.float32 or given.ndim != 1 or len(given) not in (1, pixels.shape[1]):
            raise ValueError(f"{name} is {_said(given)}: expected float32 of shape [{pixels.shape[1]}]")
    check_devices(pixels=pixels, index=index, mean=mean, std=std, rows=rows, columns=columns, flip=flip)
    if not 0 <= pad <= _MOST_PAD:
        raise ValueError(f"pad is {pad}: expected 0 or more, and at most {_MOST_PAD}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}: expected one of floating point")
    if (rows is None) != (columns is None):
        raise ValueError("of rows and columns one is None: expected both or neither")
    for name, choice in (("rows", rows), ("columns", columns), ("flip", flip)):
        if choice is not None:
            _check_choice(name, choice, index, boolean=name == "flip")


def _check_choice(name: str, choice: Tensor, index: Tensor, *, boolean: bool) -> None:
    """ValueError unless `choice` holds an integer, or with `boolean` a bool, for each of `index`."""
    fits = not (choice.is_floating_point() or choice.is_complex()) and (boolean or choice.dtype != torch.bool)
    if choice.shape != index.shape or not fits:
        raise ValueError(
            f"{name} is {_said(choice)}: expected {'bool or ' if boolean else ''}integers of shape "
            f"{list(index.shape)}"
        )


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"


# ---- the op, and its paths


def _definition(
    pixels: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    flip: Tensor | None,
    pad: int,
    dtype: torch.dtype,
) -> Tensor:
    if pixels.device.type == "cpu":  # elsewhere the host would wait
        _check_inside(pixels, index, rows, columns, pad)
    batch = image_batch_reference(pixels, index, mean, std, rows, columns, flip, pad, dtype)
    # Where a side is 1 many strides are channels_last; a compiler is promised these.
    return _empty(pixels, index, dtype).copy_(batch)


_NUMBERS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def _takes(pixels: Tensor, *rest: Any) -> bool:
    return pixels.is_cuda or rest[-1] in _NUMBERS


def _cpp(
    extension: ModuleType,
    pixels: Tensor,
    index: Tensor,
    mean: Tensor,
    std: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    flip: Tensor | None,
    pad: int,
    dtype: torch.dtype,
) -> Tensor:
    channels = pixels.shape[1]
    # Written out: on small images the call itself is the cost.
    mean = (mean if len(mean) == channels else mean.expand(channels)).contiguous()
    std = (std if len(std) == channels else std.expand(channels)).contiguous()
    index = index.contiguous()
    rows, columns, flip = _int64(rows), _int64(columns), _int64(flip)
    out = _empty(pixels, index, dtype)
    extension.image_batch(
        # The pixels may lie anywhere in their memory: what counts is how much of it comes after the first.
        pixels=(pixels.data_ptr(), pixels.untyped_storage().nbytes() - pixels.storage_offset()),
        shape=pixels.shape,
        strides=pixels.stride(),
        mean=array(mean),
        std=array(std),
        index=array(index),
        rows=array(rows),
        columns=array(columns),
        flip=array(flip),
        pad=pad,
        number=getattr(extension.Number, _NUMBERS[dtype]),
        out=array(out),
        threads=torch.get_num_threads(),
    )
    return out


def _int64(choice: Tensor | None) -> Tensor | None:
    if choice is None:
        return None
    return (choice if choice.dtype == torch.int64 else choice.long()).contiguous()


def _check_inside(
    pixels: Tensor, index: Tensor, rows: Tensor | None, columns: Tensor | None, pad: int
) -> None:
    """IndexError or ValueError where an image or a window does not exist."""
    if len(index) == 0:
        return
    low, high = (int(edge) for edge in index.aminmax())
    if low < 0 or high >= len(pixels):
        raise IndexError(f"index holds {low} to {high}: expected 0 to {len(pixels) - 1}")
    for name, starts in (("rows", rows), ("columns", columns)):
        if starts is not None:
            low, high = (int(edge) for edge in starts.aminmax())
            if low < 0 or high > 2 * pad:
                raise ValueError(f"{name} hold {low} to {high}: expected 0 to {2 * pad}, twice the padding")


def _fake(pixels: Tensor, index: Tensor, mean: Tensor, std: Tensor, *rest: Any) -> Tensor:
    return _empty(pixels, index, rest[-1])


def _empty(pixels: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the batch, [B, C, H, W] in channels_last."""
    _, channels, height, width = pixels.shape
    return pixels.new_empty((len(index), height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


image_batch_op = define(
    "image_batch(Tensor pixels, Tensor index, Tensor mean, Tensor std, Tensor? rows, Tensor? columns,"
    " Tensor? flip, int pad, ScalarType dtype) -> Tensor",
    _definition,
    _fake,
    check=_check,
    cpp=_cpp,
    triton=("_image_batch_cuda", "image_batch"),
    takes=_takes,
)
