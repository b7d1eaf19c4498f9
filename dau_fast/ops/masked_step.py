"""Steps of SGD and AdamW that keep masked weights and their state at 0, all tensors in one call.

In one pass over memory: 20 bytes a weight for SGD with momentum (gradient read, weight and momentum read and
written), 28 for AdamW, and an eighth of a byte for the mask. Separate operations of PyTorch move 68 for SGD.
Contiguous float32 tensors go through C++ on the CPU and through Triton on CUDA, everything else through plain
PyTorch.

Weights and state must be 0 where the mask is False before the first step: what is masked is not read.
Sizes that do not fit raise ValueError before anything is changed: C++ sees to that itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dau_fast.ops._library import Lists, define
from dau_fast.ops._native import arrays
from dau_fast.ops.packed_masks import check_mask
from dau_fast.ops.reference import masked_adamw_reference_, masked_sgd_reference_

# Both ops take lists with an entry a weight, or empty; the learning rate, a float or a tensor with one
# element; numbers. masks: uint8 [ceil(n / 8)] from pack_mask, or None for a weight without one.
_Family = Sequence[Tensor]
_Masks = Sequence[Tensor | None]


# ---- what the ops refuse. C++ and Triton see to the sizes of single tensors, as they walk over them anyway.


def _check_sgd(
    weights: _Family,
    grads: _Family,
    momenta: _Family,
    masks: _Masks,
    first: Sequence[bool],
    lr: float,
    lr_tensor: Tensor | None,
    *_: Any,
) -> None:
    _check_lengths(weights, grads=grads, masks=masks)
    if momenta or first:
        _check_lengths(weights, momenta=momenta, first=first)
    _check_rate(lr_tensor)


def _check_adamw(
    weights: _Family,
    grads: _Family,
    exp_avgs: _Family,
    exp_avg_sqs: _Family,
    steps: _Family,
    masks: _Masks,
    lr: float,
    lr_tensor: Tensor | None,
    *_: Any,
) -> None:
    _check_lengths(weights, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps, masks=masks)
    _check_rate(lr_tensor)


def _check_lengths(weights: _Family, **families: Sequence[Any]) -> None:
    for name, family in families.items():
        if len(family) != len(weights):
            raise ValueError(
                f"{name} has {len(family)} entries: expected one for each of {len(weights)} weights"
            )


def _check_rate(lr_tensor: Tensor | None) -> None:
    if lr_tensor is not None and lr_tensor.numel() != 1:
        raise ValueError(f"lr_tensor has shape {list(lr_tensor.shape)}: expected one element")


def _check_shapes(weights: _Family, masks: _Masks, **families: _Family) -> None:
    for place, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        for name, family in families.items():
            if family and family[place].device != weight.device:
                raise ValueError(_on_two_devices(f"{name}[{place}]", family[place], weight))
            if family and family[place].shape != weight.shape:
                raise ValueError(
                    f"{name}[{place}] has shape {list(family[place].shape)}: expected {list(weight.shape)}, "
                    "its weight's"
                )
        if mask is not None:
            check_mask(f"mask {place}", mask, weight)


# ---- plain PyTorch


def _sgd(
    weights: _Family,
    grads: _Family,
    momenta: _Family,
    masks: _Masks,
    first: Sequence[bool],
    lr: float,
    lr_tensor: Tensor | None,
    *settings: Any,
) -> None:
    _check_shapes(weights, masks, grads=grads, momenta=momenta)
    families = list(weights), list(grads), list(momenta)
    masked_sgd_reference_(*families, masks, first, _rate(lr, lr_tensor), *settings)


def _adamw(
    weights: _Family,
    grads: _Family,
    exp_avgs: _Family,
    exp_avg_sqs: _Family,
    steps: _Family,
    masks: _Masks,
    lr: float,
    lr_tensor: Tensor | None,
    *settings: Any,
) -> None:
    _check_shapes(weights, masks, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    _check_steps(steps)
    families = list(weights), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps)
    masked_adamw_reference_(*families, masks, _rate(lr, lr_tensor), *settings)


def _check_steps(steps: _Family) -> None:
    for place, step in enumerate(steps):
        if step.numel() != 1:
            raise ValueError(f"steps[{place}] has shape {list(step.shape)}: expected one element")


def _rate(lr: float, lr_tensor: Tensor | None) -> float | Tensor:
    return lr if lr_tensor is None else lr_tensor.reshape(())


# ---- which entries C++ and Triton take: contiguous float32, and masks as pack_mask makes them


def _takes_sgd(weights: _Family, grads: _Family, momenta: _Family, masks: _Masks, *_: Any) -> list[bool]:
    return _suited(weights, grads, momenta or weights, masks)


def _takes_adamw(
    weights: _Family,
    grads: _Family,
    exp_avgs: _Family,
    exp_avg_sqs: _Family,
    steps: _Family,
    masks: _Masks,
    *_: Any,
) -> list[bool]:
    fit = zip(_suited(weights, grads, exp_avgs, masks), exp_avg_sqs, steps, strict=True)
    return [one and _is_plain(square) and _is_plain(step) for one, square, step in fit]


def _suited(weights: _Family, grads: _Family, states: _Family, masks: _Masks) -> list[bool]:
    # Written out: what these checks take is what many small tensors cost.
    float32, uint8 = torch.float32, torch.uint8
    return [
        weight.dtype is float32
        and grad.dtype is float32
        and state.dtype is float32
        and weight.is_contiguous()
        and state.is_contiguous()
        and (mask is None or (mask.dtype is uint8 and mask.is_contiguous()))
        for weight, grad, state, mask in zip(weights, grads, states, masks, strict=True)
    ]


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_contiguous()


# ---- C++


def _sgd_cpp(
    extension: ModuleType,
    weights: _Family,
    grads: _Family,
    momenta: _Family,
    masks: _Masks,
    first: Sequence[bool],
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    grads = [grad.contiguous() for grad in grads]
    extension.masked_sgd(
        weights=arrays(weights),
        grads=arrays(grads),
        momenta=arrays(momenta),
        bits=_mask_arrays(masks),
        first=first,
        lr=float(_rate(lr, lr_tensor)),
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        threads=torch.get_num_threads(),
    )


def _adamw_cpp(
    extension: ModuleType,
    weights: _Family,
    grads: _Family,
    exp_avgs: _Family,
    exp_avg_sqs: _Family,
    steps: _Family,
    masks: _Masks,
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    grads = [grad.contiguous() for grad in grads]
    extension.masked_adamw(
        weights=arrays(weights),
        grads=arrays(grads),
        exp_avgs=arrays(exp_avgs),
        exp_avg_sqs=arrays(exp_avg_sqs),
        steps=arrays(steps),
        bits=_mask_arrays(masks),
        lr=float(_rate(lr, lr_tensor)),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        threads=torch.get_num_threads(),
    )


def _mask_arrays(masks: _Masks) -> tuple[list[int], list[int]]:
    addresses = [0 if mask is None else mask.data_ptr() for mask in masks]
    return addresses, [0 if mask is None else mask.numel() for mask in masks]


# ---- Triton


def _sgd_triton(
    kernels: ModuleType,
    weights: _Family,
    grads: _Family,
    momenta: _Family,
    masks: _Masks,
    first: Sequence[bool],
    lr: float,
    lr_tensor: Tensor | None,
    *settings: Any,
) -> None:
    grads = [grad.contiguous() for grad in grads]
    kernels.sgd(weights, grads, momenta, masks, first, _rate(lr, lr_tensor), *settings)


def _adamw_triton(
    kernels: ModuleType,
    weights: _Family,
    grads: _Family,
    exp_avgs: _Family,
    exp_avg_sqs: _Family,
    steps: _Family,
    masks: _Masks,
    lr: float,
    lr_tensor: Tensor | None,
    *settings: Any,
) -> None:
    _check_steps(steps)
    grads = [grad.contiguous() for grad in grads]
    kernels.adamw(weights, grads, exp_avgs, exp_avg_sqs, steps, masks, _rate(lr, lr_tensor), *settings)


# ---- registration


def _nothing(weights: _Family, *families: Any) -> None:
    """The fake. Where one tensor is on "meta", PyTorch calls it for all, and nothing would be done."""
    for family in families:
        if isinstance(family, list):
            for place, (tensor, weight) in enumerate(zip(family, weights, strict=False)):
                if isinstance(tensor, Tensor) and tensor.device != weight.device:
                    raise ValueError(_on_two_devices(f"tensor {place} of a list", tensor, weight))


def _on_two_devices(name: str, tensor: Tensor, weight: Tensor) -> str:
    return f"{name} is on {tensor.device}, its weight on {weight.device}: expected one device"


# lr_tensor stands for lr where it is given, so that captured and compiled code need not know its value.
masked_sgd_op = define(
    "masked_sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor?[] masks, bool[] first,"
    " float lr, Tensor? lr_tensor, float momentum, float dampening, float weight_decay, bool nesterov,"
    " bool maximize) -> ()",
    _sgd,
    _nothing,
    check=_check_sgd,
    cpp=_sgd_cpp,
    triton=("_masked_step_cuda", _sgd_triton),
    takes=_takes_sgd,
    lists=Lists(count=5, changed=(0, 2)),
)
masked_adamw_op = define(
    "masked_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] steps, Tensor?[] masks, float lr, Tensor? lr_tensor, float beta1, float beta2, float eps,"
    " float weight_decay, bool maximize) -> ()",
    _adamw,
    _nothing,
    check=_check_adamw,
    cpp=_adamw_cpp,
    triton=("_masked_step_cuda", _adamw_triton),
    takes=_takes_adamw,
    lists=Lists(count=6, changed=(0, 2, 3, 4)),
)
