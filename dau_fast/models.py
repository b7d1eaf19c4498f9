"""Architectures as (features, logits).

Any network that ends in a Linear layer will do: `Classifier` reads the features at that layer's
input, so torchvision's models and a caller's own need no change and keep their parameter names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dau_fast.errors import UserError

# Up to this many pixels a ResNet keeps its resolution: 3x3 stem, no max-pool (He et al. 2016, section 4.2).
SMALL_IMAGE = 64


class Outputs(NamedTuple):
    """features [B, D] and logits [B, C], both float32 or, for a float64 network, float64."""

    features: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """A network and its classifier layer, called for features and logits at once.

    network: any module that maps images [B, ...] to logits [B, C].
    head: name of its last Linear layer; found when not given.
    precision: dtype of the convolutions and matrix products under autocast; None keeps float32.
    Raises UserError where the network has no Linear layer of that name.
    """

    def __init__(
        self, network: nn.Module, head: str | None = None, precision: torch.dtype | None = None
    ) -> None:
        super().__init__()
        linears = [name for name, m in network.named_modules() if isinstance(m, nn.Linear)]
        name = head if head is not None else (linears[-1] if linears else None)
        if name is None or name not in linears:
            raise UserError(
                f"{type(network).__name__} has no Linear layer{f' {head!r}' if head else ''} to "
                "read features from: name its classifier layer"
            )
        self.network = network
        self.head_name = name
        self.precision = precision
        self._features: Tensor | None = None
        # It stays: a hook that comes and goes with every call cannot be compiled.
        self._hook = self.head.register_forward_pre_hook(self._keep_features)

    @property
    def head(self) -> nn.Linear:
        """The classifier layer, W [C, D] and b [C]."""
        head = self.network.get_submodule(self.head_name)
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, images: Tensor) -> Outputs:
        """Outputs of `images` [B, ...]; one pass through the network."""
        self._features = None
        with torch.autocast(images.device.type, self.precision, enabled=self.precision is not None):
            logits = self.network(images)
        # Not kept beyond the call, with its graph.
        features, self._features = self._features, None
        if features is None:
            raise UserError(
                f"layer {self.head_name!r} takes no part in the forward pass: name the classifier layer"
            )
        return Outputs(_wide(features), _wide(logits))

    def release(self) -> nn.Module:
        """The network, without the hook that reads its features: `self` is not to be called any more."""
        self._hook.remove()
        return self.network

    def _keep_features(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def build(arch: str, classes: int, image_shape: tuple[int, ...]) -> nn.Module:
    """A freshly initialised network `arch` for images of `image_shape` (channels, H, W).

    arch: `small`, `resnet18`, `resnet50`, `vgg16`, or any torchvision classifier by its name there.
    Draws from torch's global generator. Raises UserError for an unknown name or an unfit image size.
    """
    channels, height, width = image_shape
    small_image = max(height, width) <= SMALL_IMAGE
    if arch == "small":
        return SmallResNet(channels, classes)
    network = _torchvision(arch, classes, small_image)
    if channels != 3:
        _replace_stem(network, channels)
    try:
        with torch.no_grad():
            logits = network.eval()(torch.zeros(1, *image_shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"`arch={arch}` cannot take {height}x{width} images: {reason}") from error
    assert logits.shape == (1, classes)
    return network.train()


def _torchvision(arch: str, classes: int, small_image: bool) -> nn.Module:
    from torchvision import models

    name = "vgg16_bn" if arch == "vgg16" and small_image else arch
    if name not in models.list_models(models):
        raise UserError(
            f"`arch={arch}`: expected small, resnet18, resnet50, vgg16, or the name of a torchvision "
            "classifier"
        )
    options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    network = models.get_model(name, weights=None, num_classes=classes, **options)
    if small_image and isinstance(network, models.ResNet):
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    if small_image and isinstance(network, models.VGG):
        # The literature's CIFAR form: one linear layer on the pooled 512 channels.
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        network.classifier = nn.Linear(512, classes)
    return network


def _replace_stem(network: nn.Module, channels: int) -> None:
    """Let the first convolution take `channels` instead of 3."""
    name, old = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    new: dict[str, Any] = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding")}
    parent, _, attribute = name.rpartition(".")
    stem = nn.Conv2d(channels, old.out_channels, **new, bias=old.bias is not None)
    setattr(network.get_submodule(parent), attribute, stem)


class SmallResNet(nn.Module):
    """Three residual blocks of 16, 32 and 64 channels (He et al. 2016, section 4.2, with n = 1)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(channels, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(_Block(16, 16, 1), _Block(16, 32, 2), _Block(32, 64, 2))
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _conv(channels, out, stride=stride),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            _conv(out, out),
            nn.BatchNorm2d(out),
        )
        same = stride == 1 and channels == out
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(_conv(channels, out, size=1, stride=stride), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.branch(x))


def _conv(channels: int, out: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False)
