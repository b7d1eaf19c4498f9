"""A batch of normalised images from uint8 pixels: gathered, cropped, mirrored and scaled in one pass.

The images stay where they are and as small as they are; what a network reads is written once. A pixel
has 256 values, so C++ looks its result up in a table of 256 numbers a channel, and Triton divides as IEEE
754 does: both give the definition's float32 numbers bit for bit, and round them once to other dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dau_fast.ops import _native
from dau_fast.ops._library import define, kernels
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
    _check(pixels, index, mean, std, pad, dtype)
    if (rows is None) != (columns is None):
        raise ValueError("of rows and columns one is None: expected both or neither")
    for name, choice in (("rows", rows), ("columns", columns), ("flip", flip)):
        if choice is not None:
            _check_choice(name, choice, index, boolean=name == "flip")
    batch: Tensor = image_batch_op(pixels, index, mean, std, rows, columns, flip, pad, dtype)
    return batch


def _check(pixels: Tensor, index: Tensor, mean: Tensor, std: Tensor, pad: int, dtype: torch.dtype) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim != 4:
        raise ValueError(f"pixels are {_said(pixels)}: expected uint8 of shape [N, C, H, W]")
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"index is {_said(index)}: expected int64 of shape [B]")
    for name, given in (("mean", mean), ("std", std)):
        if given.dtype != torch.float32 or given.ndim != 1 or len(given) not in (1, pixels.shape[1]):
            raise ValueError(f"{name} is {_said(given)}: expected float32 of shape [{pixels.shape[1]}]")
    for name, given in (("index", index), ("mean", mean), ("std", std)):
        if given.device != pixels.device:
            raise ValueError(f"{name} is on {given.device}, pixels on {pixels.device}: expected one device")
    if pad < 0:
        raise ValueError(f"pad is {pad}: expected 0 or more")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}: expected one of floating point")


def _check_choice(name: str, choice: Tensor, index: Tensor, *, boolean: bool) -> None:
    """ValueError unless `choice` holds an integer, or with `boolean` a bool, for each of `index`."""
    fits = not (choice.is_floating_point() or choice.is_complex()) and (boolean or choice.dtype != torch.bool)
    if choice.shape != index.shape or not fits:
        raise ValueError(
            f"{name} is {_said(choice)}: expected {'bool or ' if boolean else ''}integers of shape "
            f"{list(index.shape)}"
        )
    if choice.device != index.device:
        raise ValueError(f"{name} is on {choice.device}, pixels on {index.device}: expected one device")


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"


# ---- the op, and its paths


def _plain(
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
    batch = image_batch_reference(pixels, index, mean, std, rows, columns, flip, pad, dtype)
    # Where a side is 1 many strides are channels_last; a compiler is promised these.
    return _empty(pixels, index, dtype).copy_(batch)


def _cpu(
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
    name = str(dtype).removeprefix("torch.")
    if _native.extension is None or name not in ("float32", "float16", "bfloat16"):
        _check_inside(pixels, index, rows, columns, pad)
        return _plain(pixels, index, mean, std, rows, columns, flip, pad, dtype)
    channels = pixels.shape[1]
    scales = [(x if len(x) == channels else x.expand(channels)).contiguous() for x in (mean, std)]
    choices = [
        None if choice is None else choice.to(torch.int64).contiguous()
        for choice in (index, rows, columns, flip)
    ]
    out = _empty(pixels, index, dtype)
    written = _native.extension.image_batch(
        pixels.data_ptr(), pixels.shape, pixels.stride(),
        *(scale.data_ptr() for scale in scales),
        *(0 if choice is None else choice.data_ptr() for choice in choices),
        len(index), pad, getattr(_native.extension.Number, name), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if written < len(index):
        _check_inside(pixels, index, rows, columns, pad)
    return out


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


def _cuda(pixels: Tensor, *rest: Any) -> Tensor:
    fused = kernels("_image_batch_cuda")
    batch: Tensor = (fused.image_batch if fused else _plain)(pixels, *rest)
    return batch


def _fake(pixels: Tensor, index: Tensor, mean: Tensor, std: Tensor, *rest: Any) -> Tensor:
    return _empty(pixels, index, rest[-1])


def _empty(pixels: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the batch, [B, C, H, W] in channels_last."""
    _, channels, height, width = pixels.shape
    return pixels.new_empty((len(index), height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


image_batch_op = define(
    "image_batch(Tensor pixels, Tensor index, Tensor mean, Tensor std, Tensor? rows, Tensor? columns,"
    " Tensor? flip, int pad, ScalarType dtype) -> Tensor",
    _plain,
    _fake,
    cpu=_cpu,
    cuda=_cuda,
)
