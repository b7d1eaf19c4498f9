"""What per-sample gradient norms are held against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 3


class Flat(nn.Module):
    """Any layer before a mean over positions and a classifier that is not trained."""

    def __init__(self, layer: nn.Module, width: int, channels_first: bool) -> None:
        super().__init__()
        self.layer = layer
        self.channels_first = channels_first
        self.mix = nn.Linear(width, CLASSES).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x))
        if x.ndim > 2:
            x = (x.flatten(2) if self.channels_first else x.flatten(1, -2).mT).square().mean(2)
        return self.mix(x)


def one_by_one(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: Callable[..., Tensor] = F.cross_entropy
) -> Tensor:
    """The definition: a backward pass of its own for every sample."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for i in range(len(inputs)):
        loss = loss_fn(model(inputs[i : i + 1]), targets[i : i + 1], reduction="sum")
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        norms.append(sum(g.square().sum() for g in grads if g is not None) ** 0.5)
    return torch.stack(norms)


def batch_for(shape: tuple[int, ...], batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *shape, dtype=torch.float64, generator=generator)
    return x, torch.randint(CLASSES, (batch,), generator=generator)
