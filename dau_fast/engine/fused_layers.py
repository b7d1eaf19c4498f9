"""BatchNorm in one pass with the addition and the ReLU behind it, for as long as a training step lasts.

PyTorch runs these one after the other, and each reads and writes all of a layer's numbers. Layers keep their
parameters, buffers and hooks; only their classes change inside a step, and back. BatchNorm2d is found
anywhere; what follows it where it is known: in a Sequential, and in torchvision's residual blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dau_fast.ops import batch_norm


@contextmanager
def fused_layers(model: nn.Module) -> Iterator[None]:
    """Layers of `model` that are known run fused inside, in training mode and eagerly; else as they are."""
    known = _list_known()
    changed = [(layer, type(layer)) for layer in model.modules() if type(layer) in known]
    for layer, kind in changed:
        layer.__class__ = known[kind]
    try:
        yield
    finally:
        for layer, kind in changed:
            layer.__class__ = kind


def _list_known() -> dict[type[nn.Module], type[nn.Module]]:
    found: dict[type[nn.Module], type[nn.Module]] = {
        nn.BatchNorm2d: FusedBatchNorm2d,
        nn.Sequential: _FusedSequential,
    }
    resnet: Any = sys.modules.get("torchvision.models.resnet")
    if resnet is not None:  # else there is no such block
        found |= {resnet.BasicBlock: _FusedBasicBlock, resnet.Bottleneck: _FusedBottleneck}
    return found


class FusedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that an addition and a ReLU may follow in the same pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised, of x's shape [B, C, H, W]."""
        return self.follow(x)

    def follow(self, x: Tensor, add: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu(BatchNorm(x) + add), of x's shape [B, C, H, W]."""
        # Without a momentum PyTorch asks the device at every call how many batches there were.
        fused = self.training and self.affine and self.momentum is not None
        if not fused or torch.compiler.is_compiling():
            y = super().forward(x)
            y = y if add is None else y + add
            return y.relu() if relu else y
        return batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked, add=add,
            relu=relu, momentum=self.momentum or 0.0, eps=self.eps,
        )  # fmt: skip


def _fuses(norm: nn.Module, *others: nn.Module) -> bool:
    """Whether BatchNorm `norm` may run with what follows: no hook is skipped, and no compiler at work."""
    return (
        isinstance(norm, FusedBatchNorm2d)
        and norm.training
        and not torch.compiler.is_compiling()
        and not any(part._forward_hooks or part._forward_pre_hooks for part in (norm, *others))
    )


def _followed(norm: Any, x: Any) -> Any:
    return norm.follow(x, relu=True)


class _FusedSequential(nn.Sequential):
    def forward(self, x: Any) -> Any:
        """What comes out of the last layer, given x [B, ...]."""
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and type(layers[0]) is nn.ReLU and _fuses(layer, layers[0]):
                layers.pop(0)
                x = _followed(layer, x)
            else:
                x = layer(x)
        return x


class _FusedBlock(nn.Module):
    """A residual block of torchvision's."""

    def _normalise(self, norm: Any, x: Tensor, add: Tensor | None = None) -> Tensor:
        """BatchNorm, addition and ReLU."""
        block: Any = self
        if _fuses(norm, block.relu):
            normalised: Tensor = norm.follow(x, add, relu=True)
            return normalised
        x = norm(x)
        activated: Tensor = block.relu(x if add is None else x + add)
        return activated

    def _shortcut(self, x: Tensor) -> Tensor:
        block: Any = self
        passed: Tensor = x if block.downsample is None else block.downsample(x)
        return passed


class _FusedBasicBlock(_FusedBlock):
    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's BasicBlock."""
        block: Any = self
        out = self._normalise(block.bn1, block.conv1(x))
        return self._normalise(block.bn2, block.conv2(out), self._shortcut(x))


class _FusedBottleneck(_FusedBlock):
    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's Bottleneck."""
        block: Any = self
        out = self._normalise(block.bn1, block.conv1(x))
        out = self._normalise(block.bn2, block.conv2(out))
        return self._normalise(block.bn3, block.conv3(out), self._shortcut(x))
