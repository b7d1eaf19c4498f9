"""Ops with arguments of which one or two do not fit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dau_fast.ops
import dau_fast.optim  # noqa: F401  which registers the masked steps
from dau_fast.ops import pack_mask

from .readers import Target

_OPS: dict[str, Callable[[random.Random], list[Any]]] = {}


def _sizes(chance: random.Random, count: int) -> list[int]:
    return [chance.choice((1, 1, 2, 3, 7, 16, 17, 64, 300)) for _ in range(count)]


def _sensitivity(chance: random.Random) -> list[Any]:
    rows, classes, width = _sizes(chance, 3)
    targets = torch.randint(0, classes, (rows,)) if chance.random() < 0.7 else None
    switches = [chance.random() < 0.5, chance.random() < 0.5]
    return [torch.randn(rows, classes), torch.randn(rows, width), targets, *switches]


def _sensitivity_backward(chance: random.Random) -> list[Any]:
    logits, features, targets, _, softmax = given = _sensitivity(chance)
    shown, *kept = torch.ops.dau_fast.sensitivity_forward(*given)
    labels, stats = sorted(kept, key=lambda tensor: tensor.is_floating_point())
    labels = labels if targets is None else targets
    return [torch.randn_like(shown), logits, features, labels, stats, softmax, True, chance.random() < 0.5]


def _linear(chance: random.Random) -> list[Any]:
    rows, classes, width = _sizes(chance, 3)
    bias = torch.randn(classes) if chance.random() < 0.7 else None
    return [torch.randn(rows, width), torch.randn(classes, width), bias, torch.randint(0, classes, (rows,))]


def _linear_backward(chance: random.Random) -> list[Any]:
    given = _linear(chance)
    s, *kept = torch.ops.dau_fast.linear_sensitivity_forward(*given)
    return [torch.randn_like(s), *given, *kept, True, chance.random() < 0.5, given[2] is not None]


def _families(chance: random.Random, count: int) -> tuple[list[list[Tensor]], list[Tensor | None]]:
    sizes = _sizes(chance, chance.choice((1, 2, 3)))
    masks = [pack_mask(torch.rand(n) < 0.5) if chance.random() < 0.7 else None for n in sizes]
    return [[torch.rand(n) for n in sizes] for _ in range(count)], masks


def _sgd(chance: random.Random) -> list[Any]:
    families, masks = _families(chance, 3)
    first = [chance.random() < 0.5 for _ in masks]
    rate = torch.tensor(0.1) if chance.random() < 0.3 else None
    return [*families, masks, first, 0.1, rate, 0.9, 0.0, 1e-3, chance.random() < 0.5, chance.random() < 0.5]


def _adamw(chance: random.Random) -> list[Any]:
    families, masks = _families(chance, 4)
    steps = [torch.zeros(()) for _ in masks]
    return [*families, steps, masks, 0.1, None, 0.9, 0.999, 1e-8, 1e-2, chance.random() < 0.5]


def _image_batch(chance: random.Random) -> list[Any]:
    count, rows, height, width = _sizes(chance, 4)
    channels, pad = chance.choice((1, 2, 3)), chance.choice((0, 1, 3))
    starts = [torch.randint(0, 2 * pad + 1, (rows,)) for _ in range(2)]
    return [
        torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8),
        torch.randint(0, count, (rows,)), torch.rand(channels), torch.rand(channels) + 0.1, *starts,
        torch.randint(0, 2, (rows,)) if chance.random() < 0.5 else None, pad,
        chance.choice((torch.float32, torch.float16, torch.bfloat16)),
    ]  # fmt: skip


def _barlow(chance: random.Random) -> list[Any]:
    rows, width = _sizes(chance, 2)
    return [torch.randn(rows, width), torch.randn(rows, width), 5e-3, 1e-5, chance.random() < 0.5, "ieee"]


def _barlow_backward(chance: random.Random) -> list[Any]:
    z_a, z_b, lambd, _, gram, precision = given = _barlow(chance)
    loss, stats, products = torch.ops.dau_fast.barlow_twins_forward(*given)
    return [torch.ones_like(loss), z_a, z_b, stats, products, lambd, gram, precision, True, True]


def _flags(chance: random.Random) -> Tensor:
    return torch.rand(_sizes(chance, 1)[0]) < 0.5


def _packed(chance: random.Random) -> list[Any]:
    flags = _flags(chance)
    return [pack_mask(flags), len(flags)]


def _smallest(chance: random.Random) -> list[Any]:
    tensors = [torch.rand(n) for n in _sizes(chance, 2)]
    return [tensors, chance.randrange(sum(map(len, tensors)) + 1)]


def _apply(chance: random.Random) -> list[Any]:
    families, masks = _families(chance, 1)
    every = zip(*families, masks, strict=True)
    return [*families, [pack_mask(torch.ones(len(w)) > 0) if mask is None else mask for w, mask in every]]


def _gram(chance: random.Random) -> list[Any]:
    shapes = [chance.choice((1, 2, 5)) for _ in range(5)]
    return [torch.randn(*shapes[:2], shapes[2], shapes[4]), torch.randn(*shapes[:2], shapes[3], shapes[4])]


def _batch_norm(chance: random.Random) -> list[Any]:
    rows, channels = _sizes(chance, 2)
    height, width = (chance.choice((1, 2, 3, 7)) for _ in range(2))
    rows += rows * height * width == 1
    x, add = (
        torch.randn(rows, channels, height, width).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    tracked = [torch.zeros(channels), torch.ones(channels), torch.tensor(0)]
    return [
        x, torch.randn(channels), torch.randn(channels), *(tracked if chance.random() < 0.7 else [None] * 3),
        add if chance.random() < 0.5 else None, chance.random() < 0.5, 0.1, 1e-5,
    ]  # fmt: skip


def _batch_norm_backward(chance: random.Random) -> list[Any]:
    x, *rest = _batch_norm(chance)
    y, lines = torch.ops.dau_fast.batch_norm(x, *rest)
    relu, added = rest[-3], rest[-4] is not None
    return [torch.randn_like(x), x, y, lines, relu, relu and added]


_OPS |= {
    "sensitivity_forward": _sensitivity, "sensitivity_backward": _sensitivity_backward,
    "linear_sensitivity_forward": _linear, "linear_sensitivity_backward": _linear_backward,
    "masked_sgd_": _sgd, "masked_adamw_": _adamw, "image_batch": _image_batch,
    "barlow_twins_forward": _barlow, "barlow_twins_backward": _barlow_backward,
    "batch_norm": _batch_norm, "batch_norm_backward": _batch_norm_backward,
    "pack_mask": lambda chance: [_flags(chance)], "count_kept": _packed,
    "unpack_mask": lambda chance: [(given := _packed(chance))[0], [given[1]]],
    "mask_smallest": _smallest, "apply_masks_": _apply, "gram_squares": _gram,
}  # fmt: skip


# ---- what does not fit


def _other_tensor(tensor: Tensor, chance: random.Random, others: list[Tensor]) -> Any:
    """Something in place of `tensor`: of another size, type, layout or device, or values that lead astray."""
    kind = chance.randrange(10)
    if kind == 0:
        return tensor[..., :-1].clone() if tensor.ndim else tensor[None].expand(3).clone()
    if kind == 1:
        return tensor[:0] if tensor.ndim else tensor.new_empty(0)
    if kind == 2:
        return torch.cat([tensor, tensor]) if tensor.ndim else torch.stack([tensor, tensor])
    if kind == 3:
        return tensor.to(chance.choice((torch.float64, torch.int32, torch.int64, torch.bool, torch.float16)))
    if kind == 4:
        return tensor.repeat(*[2] * tensor.ndim)[tuple([slice(None, None, 2)] * tensor.ndim)]
    if kind == 5:
        return tensor[:1].expand(tensor.shape) if tensor.ndim and len(tensor) else 3
    if kind == 6 and not tensor.is_floating_point() and tensor.numel() and tensor.dtype == torch.int64:
        changed = tensor.clone()
        changed.view(-1)[-1] = chance.choice((-1, 10**9, 2**40, -(2**63), 2**63 - 1))
        return changed
    if kind == 7:
        return chance.choice(others)
    if kind == 8:
        return tensor.to("meta") if chance.random() < 0.3 else tensor.flatten()
    return tensor[None] if chance.random() < 0.5 or not tensor.is_floating_point() else tensor * float("nan")


def _other(value: Any, chance: random.Random, others: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return _other_tensor(value, chance, others)
    if isinstance(value, list):
        changed = list(value)
        if changed and chance.random() < 0.6:
            place = chance.randrange(len(changed))
            changed[place] = _other(changed[place], chance, others)
            return changed
        return chance.choice((changed[:-1], changed + changed, []))
    if isinstance(value, bool) or value is None:
        return chance.choice((True, False, None, *others[:1]))
    if isinstance(value, int):
        return chance.choice((0, 1, -1, value + 1, 2**31, 2**62, -(2**63), 2**63))
    if isinstance(value, float):
        return chance.choice((0.0, -1.0, float("nan"), float("inf"), 1e308))
    return chance.choice(("tf32", "", 3, torch.int64, None))


def _call(_content: bytes, _folder: Path, chance: random.Random) -> Any:
    torch.manual_seed(chance.getrandbits(30))
    name = chance.choice(sorted(_OPS))
    given = _OPS[name](chance)
    flat = [entry for value in given for entry in (value if isinstance(value, list) else [value])]
    tensors = [entry for entry in flat if isinstance(entry, Tensor)]
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3))):
        place = chance.randrange(len(given))
        given[place] = _other(given[place], chance, tensors)
    return getattr(torch.ops.dau_fast, name)(*given)


OPS = Target(lambda: [b""], _call, (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError))
