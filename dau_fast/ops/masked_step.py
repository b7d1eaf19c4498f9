"""Steps of SGD and AdamW that keep masked weights and their state at 0, all tensors in one call.

In one pass over memory: 20 bytes a weight for SGD with momentum (gradient read, weight and momentum read and
written), 28 for AdamW, and an eighth of a byte for the mask. Separate operations of PyTorch move 68 for SGD.
Contiguous float32 tensors on the CPU go through C++, everything else through plain PyTorch.

Weights and state must be 0 where the mask is False before the first step: where most cache lines are wholly
masked, C++ leaves those out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dau_fast.ops import _native
from dau_fast.ops._library import define
from dau_fast.ops.packed_masks import addresses, sizes
from dau_fast.ops.reference import masked_adamw_reference_, masked_sgd_reference_

# ---- the ops
# masks: uint8 [ceil(n / 8)] from pack_mask, contiguous, or None for a weight without one. lr_tensor: a
# scalar that stands for lr, so that a captured graph or compiled code need not know its value.


def _sgd(
    weights: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    masks: list[Tensor | None],
    first: list[bool],
    lr: float,
    lr_tensor: Tensor | None,
    *settings: Any,
) -> None:
    rate = lr if lr_tensor is None else lr_tensor
    masked_sgd_reference_(weights, grads, momenta, masks, first, rate, *settings)


def _adamw(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masks: list[Tensor | None],
    lr: float,
    lr_tensor: Tensor | None,
    *settings: Any,
) -> None:
    rate = lr if lr_tensor is None else lr_tensor
    masked_adamw_reference_(weights, grads, exp_avgs, exp_avg_sqs, steps, masks, rate, *settings)


# ---- C++, in float32


def _sgd_cpu(
    weights: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    masks: list[Tensor | None],
    first: list[bool],
    lr: float,
    lr_tensor: Tensor | None,
    *settings: Any,
) -> None:
    def native(chosen: list[int]) -> None:
        w, m = (_take(x, chosen) for x in (weights, momenta))
        g = [grads[place].contiguous() for place in chosen]
        _extension().masked_sgd(
            addresses(w), addresses(g), addresses(m), _mask_addresses(_take(masks, chosen)), sizes(w),
            _take(first, chosen), lr if lr_tensor is None else lr_tensor.item(), *settings,
            torch.get_num_threads(),
        )  # fmt: skip
        increment_version([*w, *m])

    def plain(chosen: list[int]) -> None:
        w, g, m, bits, begins = (_take(x, chosen) for x in (weights, grads, momenta, masks, first))
        _sgd(w, g, m, bits, begins, lr, lr_tensor, *settings)

    _divide(grads, (weights, momenta), native, plain)


def _adamw_cpu(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masks: list[Tensor | None],
    lr: float,
    lr_tensor: Tensor | None,
    *settings: Any,
) -> None:
    def native(chosen: list[int]) -> None:
        w, m, v, t = (_take(x, chosen) for x in (weights, exp_avgs, exp_avg_sqs, steps))
        g = [grads[place].contiguous() for place in chosen]
        _extension().masked_adamw(
            addresses(w), addresses(g), addresses(m), addresses(v), addresses(t),
            _mask_addresses(_take(masks, chosen)), sizes(w), lr if lr_tensor is None else lr_tensor.item(),
            *settings, torch.get_num_threads(),
        )  # fmt: skip
        increment_version([*w, *m, *v, *t])

    def plain(chosen: list[int]) -> None:
        w, g, m, v, t, bits = (
            _take(x, chosen) for x in (weights, grads, exp_avgs, exp_avg_sqs, steps, masks)
        )
        _adamw(w, g, m, v, t, bits, lr, lr_tensor, *settings)

    _divide(grads, (weights, exp_avgs, exp_avg_sqs, steps), native, plain)


def _divide(
    grads: list[Tensor],
    changed: Sequence[list[Tensor]],
    native: Callable[[list[int]], None],
    plain: Callable[[list[int]], None],
) -> None:
    """Give the places of contiguous float32 tensors to `native` and all others to `plain`."""
    suited: list[int] = []
    others: list[int] = []
    families = [family for family in changed if family]
    for place, grad in enumerate(grads):
        fits = _native.extension is not None and grad.dtype == torch.float32
        fits = fits and all(_is_plain(family[place]) for family in families)
        (suited if fits else others).append(place)
    if suited:
        native(suited)
    if others:
        plain(others)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def _extension() -> Any:
    return _native.extension


def _take(items: Sequence[Any], places: list[int]) -> list[Any]:
    return [items[place] for place in places] if items else []


def _mask_addresses(masks: list[Tensor | None]) -> list[int]:
    return [0 if mask is None else mask.data_ptr() for mask in masks]


# ---- registration


def _nothing(*_: Any) -> None:
    """Both ops only change what they are given."""


masked_sgd_op = define(
    "masked_sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor?[] masks, bool[] first,"
    " float lr, Tensor? lr_tensor, float momentum, float dampening, float weight_decay, bool nesterov,"
    " bool maximize) -> ()",
    _sgd,
    _nothing,
    cpu=_sgd_cpu,
)
masked_adamw_op = define(
    "masked_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] steps, Tensor?[] masks, float lr, Tensor? lr_tensor, float beta1, float beta2, float eps,"
    " float weight_decay, bool maximize) -> ()",
    _adamw,
    _nothing,
    cpu=_adamw_cpu,
)
