"""BatchNorm in one pass with the addition and the ReLU behind it, for as long as a training step lasts.

PyTorch runs these one after the other, and each reads and writes all of a layer's numbers. Layers keep their
parameters, buffers and hooks; only their classes change inside a step, and back. BatchNorm2d is found
anywhere; what follows it where it is known: in a Sequential, in torchvision's ResNets, and in `small`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dau_fast.models import ResidualBlock
from dau_fast.ops import batch_norm, register_layer


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
        ResidualBlock: _FusedResidualBlock,
    }
    resnet: Any = sys.modules.get("torchvision.models.resnet")
    if resnet is not None:  # else there is no such block
        found |= {
            resnet.BasicBlock: _FusedBasicBlock,
            resnet.Bottleneck: _FusedBottleneck,
            resnet.ResNet: _FusedResNet,
        }
    return found


class FusedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that an addition and a ReLU may follow in the same pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised, of x's shape [B, C, H, W]."""
        return self.follow(x)

    def follow(self, x: Tensor, add: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu(BatchNorm(x) + add), of x's shape [B, C, H, W]."""
        if not self._takes(x, add):
            y = _add(super().forward(x), add)
            return y.relu() if relu else y
        # Statistics may be there and no longer be tracked.
        tracked = (self.running_mean, self.running_var, self.num_batches_tracked)
        mean, var, batches = tracked if self.track_running_stats else (None, None, None)
        return batch_norm(
            x, self.weight, self.bias, mean, var, batches, add=add, relu=relu, momentum=self.momentum or 0.0,
            eps=self.eps,
        )  # fmt: skip

    def _takes(self, x: Tensor, add: Tensor | None) -> bool:
        """Whether `batch_norm` computes what this layer does, and what is added is like x."""
        # Without a momentum PyTorch asks the device at every call how many batches there were.
        known = self.training and self.momentum is not None
        whole = self.weight is not None and self.bias is not None
        like = add is None or (add.shape, add.dtype) == (x.shape, x.dtype)
        return known and whole and like and not torch.compiler.is_compiling()


# In evaluation mode, where alone a sample has a gradient of its own, it is like any other.
register_layer(FusedBatchNorm2d, like=nn.BatchNorm2d)


def _add(x: Tensor, add: Tensor | None) -> Tensor:
    """In x's dtype, as torchvision's blocks add, and `batch_norm`."""
    return x if add is None else (x + add).to(x.dtype)


_RELU = nn.ReLU()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _fuses(norm: nn.Module, activation: nn.Module) -> bool:
    """Whether BatchNorm `norm` may run with `activation`: a ReLU, no hook is skipped, no compiler at work."""
    return (
        isinstance(norm, FusedBatchNorm2d)
        and norm.training
        and type(activation) is nn.ReLU
        and not torch.compiler.is_compiling()
        and not _has_any_global_hook()
        and not any(getattr(part, hooks) for part in (norm, activation) for hooks in _HOOKS)
    )


class _FusedSequential(nn.Sequential):
    def forward(self, x: Any) -> Any:
        """What comes out of the last layer, given x [B, ...]."""
        return _run(list(self), x)


def _run(layers: Sequence[Any], x: Any) -> Any:
    """What comes out of the last of `layers`, given x [B, ...]."""
    left = list(layers)
    while left:
        layer = left.pop(0)
        if left and _fuses(layer, left[0]):
            left.pop(0)
            x = layer.follow(x, relu=True)
        else:
            x = layer(x)
    return x


class _FusedResidualBlock(ResidualBlock):
    def forward(self, x: Tensor) -> Tensor:
        """As a block of `small`."""
        layers: list[Any] = list(self.branch)
        # Its ReLU is a function, which has no hooks.
        if not _fuses(layers[-1], _RELU) or any(getattr(self.branch, hooks) for hooks in _HOOKS):
            return super().forward(x)
        out: Tensor = layers[-1].follow(_run(layers[:-1], x), self.shortcut(x), relu=True)
        return out


class _FusedPart(nn.Module):
    """Of torchvision's ResNets."""

    def _normalise(self, norm: Any, x: Tensor, add: Tensor | None = None) -> Tensor:
        """BatchNorm, addition and ReLU."""
        block: Any = self
        if _fuses(norm, block.relu):
            normalised: Tensor = norm.follow(x, add, relu=True)
            return normalised
        activated: Tensor = block.relu(_add(norm(x), add))
        return activated

    def _shortcut(self, x: Tensor) -> Tensor:
        block: Any = self
        passed: Tensor = x if block.downsample is None else block.downsample(x)
        return passed


class _FusedBasicBlock(_FusedPart):
    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's BasicBlock."""
        block: Any = self
        out = self._normalise(block.bn1, block.conv1(x))
        return self._normalise(block.bn2, block.conv2(out), self._shortcut(x))


class _FusedBottleneck(_FusedPart):
    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's Bottleneck."""
        block: Any = self
        out = self._normalise(block.bn1, block.conv1(x))
        out = self._normalise(block.bn2, block.conv2(out))
        return self._normalise(block.bn3, block.conv3(out), self._shortcut(x))


class _FusedResNet(_FusedPart):
    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's ResNet."""
        net: Any = self
        x = net.maxpool(self._normalise(net.bn1, net.conv1(x)))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        logits: Tensor = net.fc(torch.flatten(net.avgpool(x), 1))
        return logits
