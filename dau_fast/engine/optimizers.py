"""The optimisers of every training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from dau_fast.engine.sharding import check_shard, is_sharded
from dau_fast.optim import MaskedAdamW, MaskedSGD
from dau_fast.prune import Masks


def sgd(
    model: nn.Module,
    masks: Masks | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
) -> Optimizer:
    """Stochastic gradient descent on all parameters of `model`.

    masks: weights to be zero, from now on and after every step, and their momenta with them, which
    weight decay and momentum would otherwise move. Raises UserError for masks of another model, and of
    a sharded one.
    """
    if is_sharded(model):
        check_shard(True, "classifier", pruned=masks is not None)
        return SGD(model.parameters(), lr, momentum, 0, weight_decay, nesterov, foreach=True)
    rate = _rate(model, lr)
    if masks is None:
        return SGD(model.parameters(), rate, momentum, 0, weight_decay, nesterov, fused=True)
    masks.apply_(model)
    return MaskedSGD(model.named_parameters(), masks, rate, momentum, weight_decay, nesterov)


def adamw(
    model: nn.Module,
    masks: Masks | None,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Optimizer:
    """AdamW on all parameters of `model`; Adam where there is no weight decay. masks, errors: as of `sgd`."""
    options: dict[str, Any] = {"betas": betas, "weight_decay": weight_decay}
    if is_sharded(model):
        check_shard(True, "classifier", pruned=masks is not None)
        return AdamW(model.parameters(), lr, foreach=True, **options)
    rate = _rate(model, lr)
    if masks is None:
        return AdamW(model.parameters(), rate, fused=True, capturable=_on_cuda(model), **options)
    masks.apply_(model)
    return MaskedAdamW(model.named_parameters(), masks, rate, **options)


def adam(model: nn.Module, *, lr: float) -> Optimizer:
    """Adam on all parameters of `model`."""
    return Adam(model.parameters(), lr=_rate(model, lr), fused=True, capturable=_on_cuda(model))


def _rate(model: nn.Module, lr: float) -> float | Tensor:
    """`lr`, on CUDA as a tensor there: a captured step reads it anew every time."""
    return torch.tensor(lr, device="cuda") if _on_cuda(model) else lr


def _on_cuda(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda
