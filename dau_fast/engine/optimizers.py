"""The optimiser of every training loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD

from dau_fast.ops import apply_masks_
from dau_fast.prune import Masks


def sgd(model: nn.Module, masks: Masks | None, *, lr: float, momentum: float, weight_decay: float) -> SGD:
    """Stochastic gradient descent on all parameters of `model`.

    masks: weights to be zero, from now on and after every step, and their momenta with them, which
    weight decay and momentum would otherwise move. Raises UserError for masks of another model.
    """
    optimizer = SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    if masks is not None:
        masks.apply_(model)
        _keep_at_zero(optimizer, masks, model)
    return optimizer


def _keep_at_zero(optimizer: SGD, masks: Masks, model: nn.Module) -> None:
    weights = masks.of(model)
    # Bits are read in memory order alone; a tensor of another layout takes bools, unpacked once.
    forms = [masks.packed(name) if p.is_contiguous() else masks[name] for name, p in weights.items()]
    parameters = list(weights.values())

    @torch.no_grad()
    def zero(*_: object) -> None:
        momenta: list[Tensor] = []
        momentum_forms: list[Tensor] = []
        for parameter, form in zip(parameters, forms, strict=True):
            momentum = optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                momenta.append(momentum)
                momentum_forms.append(form)
        apply_masks_([*parameters, *momenta], forms + momentum_forms)

    optimizer.register_step_post_hook(zero)
