"""Steps of SGD and AdamW that keep masked weights and their state at 0, all tensors in one call.

In one pass over memory: 20 bytes a weight for SGD with momentum (gradient read, weight and momentum read and
written), 28 for AdamW, and an eighth of a byte for the mask. Separate operations of PyTorch move 68 for SGD.
Contiguous float32 tensors go through C++ on the CPU and through Triton on CUDA, everything else through plain
PyTorch.

Weights and state must be 0 where the mask is False before the first step: what is masked is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dau_fast.ops import _native
from dau_fast.ops._library import define, kernels
from dau_fast.ops.packed_masks import addresses, sizes
from dau_fast.ops.reference import masked_adamw_reference_, masked_sgd_reference_

# Both steps take the arguments of their definitions in reference.py, whichever path they go: lists with an
# entry a weight, or empty; the learning rate, a float or a tensor with one element; numbers. masks: uint8
# [ceil(n / 8)] from pack_mask, contiguous, or None for a weight without one.
_Step = Callable[..., None]


def _cpp_sgd(
    weights: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    masks: list[Tensor | None],
    first: list[bool],
    lr: float | Tensor,
    *settings: Any,
) -> None:
    arrays = addresses(weights), addresses(grads), addresses(momenta), _mask_addresses(masks)
    step = _native.extension.masked_sgd  # type: ignore[union-attr]
    step(*arrays, sizes(weights), first, float(lr), *settings, torch.get_num_threads())


def _cpp_adamw(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masks: list[Tensor | None],
    lr: float | Tensor,
    *settings: Any,
) -> None:
    state = addresses(exp_avgs), addresses(exp_avg_sqs), addresses(steps)
    arrays = addresses(weights), addresses(grads), *state, _mask_addresses(masks)
    step = _native.extension.masked_adamw  # type: ignore[union-attr]
    step(*arrays, sizes(weights), float(lr), *settings, torch.get_num_threads())


def _mask_addresses(masks: list[Tensor | None]) -> list[int]:
    return [0 if mask is None else mask.data_ptr() for mask in masks]


# ---- which tensors take which path


def _implementation(
    plain: _Step, lists: int, changed: Sequence[int] = (), native: Callable[[], _Step | None] = lambda: None
) -> _Step:
    """What an op runs on one kind of device.

    lists: how many of the arguments are lists, weights and gradients first. changed: which of them are
    changed in place. native: finds the fused step, if there is one; the others are stepped by `plain`.
    """

    def run(*arguments: Any) -> None:
        families, (lr, lr_tensor, *settings) = arguments[:lists], arguments[lists:]
        rate = lr if lr_tensor is None else lr_tensor.reshape(())
        fused, state = native(), [families[place] for place in changed if families[place]]
        suited = _suited(families[1], state) if fused else [False] * len(families[0])
        others = [place for place, fits in enumerate(suited) if not fits]
        if others:
            plain(*(_take(family, others) for family in families), rate, *settings)
        if fused is None or len(others) == len(suited):
            return
        if others:
            chosen = [place for place, fits in enumerate(suited) if fits]
            families = tuple(_take(family, chosen) for family in families)
        weights, grads, *rest = families
        fused(weights, [grad.contiguous() for grad in grads], *rest, rate, *settings)
        # Autograd cannot see a write through an address.
        increment_version([tensor for place in changed for tensor in families[place]])

    return run


def _suited(grads: list[Tensor], state: list[list[Tensor]]) -> list[bool]:
    """Whether each weight and its state are contiguous float32, and its gradient is float32."""
    float32 = torch.float32
    suited = [grad.dtype is float32 for grad in grads]
    for family in state:
        fits = [tensor.dtype is float32 and tensor.is_contiguous() for tensor in family]
        suited = [before and now for before, now in zip(suited, fits, strict=True)]
    return suited


def _take(items: Sequence[Any], places: list[int]) -> list[Any]:
    return [items[place] for place in places] if items else []


def _cpp(step: _Step) -> Callable[[], _Step | None]:
    return lambda: step if _native.extension else None


def _triton(name: str) -> Callable[[], _Step | None]:
    return lambda: getattr(kernels("_masked_step_cuda"), name, None)


# ---- registration


def _nothing(*_: Any) -> None:
    """Both ops only change what they are given."""


def _define(schema: str, plain: _Step, cpp: _Step, triton: str, lists: int, changed: tuple[int, ...]) -> Any:
    return define(
        schema,
        _implementation(plain, lists),
        _nothing,
        cpu=_implementation(plain, lists, changed, _cpp(cpp)),
        cuda=_implementation(plain, lists, changed, _triton(triton)),
    )


# lr_tensor stands for lr where it is given, so that captured and compiled code need not know its value.
masked_sgd_op = _define(
    "masked_sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor?[] masks, bool[] first,"
    " float lr, Tensor? lr_tensor, float momentum, float dampening, float weight_decay, bool nesterov,"
    " bool maximize) -> ()",
    masked_sgd_reference_,
    _cpp_sgd,
    "sgd",
    lists=5,
    changed=(0, 2),
)
masked_adamw_op = _define(
    "masked_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] steps, Tensor?[] masks, float lr, Tensor? lr_tensor, float beta1, float beta2, float eps,"
    " float weight_decay, bool maximize) -> ()",
    masked_adamw_reference_,
    _cpp_adamw,
    "adamw",
    lists=6,
    changed=(0, 2, 3, 4),
)
