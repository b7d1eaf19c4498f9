"""The image batch as one Triton kernel: the pixels are read once, the result is written once, in order.

A program makes up to `BLOCK` neighbouring numbers of one image in channels_last, or several small images.
Sizes of an image are constants of the build, one a data set; the batch may be of any size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers that a program makes
WARPS = 4
# What lies outside is found by the kernel itself, as a launch of its own would cost more than the op.
CHECKS = {"debug": True, "sanitize_overflow": False}


@triton.jit
def _starts(starts_ptr, samples, stride, pad, B):
    """Where the windows of `samples` begin along one side, counted in the image without its padding."""
    starts = tl.load(starts_ptr + samples.to(tl.int64) * stride, mask=samples < B, other=0).to(tl.int32)
    tl.device_assert((starts >= 0) & (starts <= 2 * pad), "a window lies outside the padded image")
    return (starts - pad)[:, None]


@triton.jit
def image_batch_kernel(
    pixels_ptr, index_ptr, mean_ptr, std_ptr, rows_ptr, columns_ptr, flip_ptr, out_ptr, N, B, pad,
    stride_n, stride_c, stride_h, stride_w, stride_i, stride_mean, stride_std, stride_rows, stride_columns,
    stride_flip, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CROP: tl.constexpr,
    FLIP: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, H, W, C] from pixels [N, C, H, W] of any strides."""
    PARTS: tl.constexpr = (C * H * W + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    samples = (program // PARTS) * SAMPLES + tl.arange(0, SAMPLES)
    image = tl.load(index_ptr + samples.to(tl.int64) * stride_i, mask=samples < B, other=0)
    known = (image >= 0) & (image < N)
    # An empty store knows no image, and the places after the last one of a batch need none.
    tl.device_assert(known | (samples >= B), "an index is no image: expected 0 to N - 1")
    place = (program % PARTS) * BLOCK + tl.arange(0, BLOCK)
    wanted = (samples < B)[:, None] & (place < C * H * W)[None, :]
    c = (place % C)[None, :]
    x = (place // C % W)[None, :]
    y = (place // (C * W))[None, :]
    if FLIP:
        mirrored = tl.load(flip_ptr + samples.to(tl.int64) * stride_flip, mask=samples < B, other=0)
        x = tl.where((mirrored != 0)[:, None], W - 1 - x, x)
    if CROP:
        y = y + _starts(rows_ptr, samples, stride_rows, pad, B)
        x = x + _starts(columns_ptr, samples, stride_columns, pad, B)
    inside = wanted & known[:, None] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    offsets = image[:, None] * stride_n + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    values = tl.load(pixels_ptr + offsets + c.to(tl.int64) * stride_c, mask=inside, other=0)
    # Divided as on the CPU, so that the numbers are the same.
    scaled = tl.div_rn(values.to(tl.float32), 255.0)
    result = tl.div_rn(scaled - tl.load(mean_ptr + c * stride_mean), tl.load(std_ptr + c * stride_std))
    out = out_ptr + samples.to(tl.int64)[:, None] * (C * H * W) + place[None, :]
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=wanted)


def image_batch(
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
    """See image_batch.py."""
    count, channels, height, width = pixels.shape
    batch, numbers = len(index), channels * height * width
    out = pixels.new_empty((batch, height, width, channels), dtype=dtype)
    if out.numel():
        tile = tile_of(numbers)
        programs = triton.cdiv(batch, tile["SAMPLES"]) * triton.cdiv(numbers, tile["BLOCK"])
        strides = [0 if len(x) == 1 else x.stride(0) for x in (mean, std)]
        for choice in (rows, columns, flip):
            strides.append(0 if choice is None else choice.stride(0))
        image_batch_kernel[(programs,)](
            pixels, index, mean, std, *(index if x is None else x for x in (rows, columns, flip)), out,
            count, batch, pad, *pixels.stride(), index.stride(0), *strides,
            C=channels, H=height, W=width, CROP=rows is not None, FLIP=flip is not None, **tile,
            num_warps=WARPS, **CHECKS,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def tile_of(numbers: int) -> dict[str, int]:
    """Images and numbers of each that a program makes."""
    block = max(16, min(BLOCK, triton.next_power_of_2(numbers)))
    return {"SAMPLES": BLOCK // block, "BLOCK": block}
