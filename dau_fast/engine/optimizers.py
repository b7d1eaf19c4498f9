"""The optimiser of every training loop."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, Optimizer

from dau_fast.optim import MaskedSGD
from dau_fast.prune import Masks


def sgd(
    model: nn.Module, masks: Masks | None, *, lr: float, momentum: float, weight_decay: float
) -> Optimizer:
    """Stochastic gradient descent on all parameters of `model`.

    masks: weights to be zero, from now on and after every step, and their momenta with them, which
    weight decay and momentum would otherwise move. Raises UserError for masks of another model.
    """
    if masks is None:
        return SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    masks.apply_(model)
    return MaskedSGD(model.named_parameters(), masks, lr=lr, momentum=momentum, weight_decay=weight_decay)
