"""Architectures as (features, logits).

Any network that ends in a Linear layer will do: `Classifier` reads the features at that layer's
input, so torchvision's models and a caller's own need no change and keep their parameter names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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

    network: any module that maps images [B, ...] to logits [B, C], or to what `find_logits` finds them in.
    head: name of its last Linear layer; found when not given.
    precision: dtype of the convolutions and matrix products under autocast; None keeps float32.
    unpack: makes of images [B, ...] the arguments that the network takes by name; None for the images
    themselves. answers_at_head: whether logits are what the layer gives, whatever the network makes of it.
    Raises UserError where the network has no Linear layer of that name.
    """

    def __init__(
        self,
        network: nn.Module,
        head: str | None = None,
        precision: torch.dtype | None = None,
        unpack: Callable[[Tensor], dict[str, Tensor]] | None = None,
        *,
        answers_at_head: bool = False,
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
        self.unpack, self.answers_at_head = unpack, answers_at_head
        self._features: Tensor | None = None
        self._answers: Tensor | None = None
        # They stay: a hook that comes and goes with every call cannot be compiled.
        self._hooks = [self.head.register_forward_pre_hook(self._keep_features)]
        if answers_at_head:
            self._hooks.append(self.head.register_forward_hook(self._keep_answers))

    @property
    def head(self) -> nn.Linear:
        """The classifier layer, W [C, D] and b [C]."""
        head = self.network.get_submodule(self.head_name)
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, images: Tensor) -> Outputs:
        """Outputs of `images` [B, ...]; one pass through the network."""
        self._features = self._answers = None
        with torch.autocast(images.device.type, self.precision, enabled=self.precision is not None):
            told = self.network(images) if self.unpack is None else self.network(**self.unpack(images))
        # Not kept beyond the call, with its graph.
        features, answers, self._features, self._answers = self._features, self._answers, None, None
        if features is None:
            raise UserError(
                f"layer {self.head_name!r} takes no part in the forward pass: name the classifier layer"
            )
        return Outputs(_wide(features), _wide(find_logits(told) if answers is None else answers))

    def wrap(self, network: nn.Module) -> Classifier:
        """`network`, changed in place from this one's, called as this one is."""
        return Classifier(
            network, self.head_name, self.precision, self.unpack, answers_at_head=self.answers_at_head
        )

    def release(self) -> nn.Module:
        """The network, without the hook that reads its features: `self` is not to be called any more."""
        for hook in self._hooks:
            hook.remove()
        return self.network

    def _keep_features(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]

    def _keep_answers(self, _: nn.Module, __: tuple[Tensor, ...], answers: Tensor) -> None:
        self._answers = answers


def find_logits(told: Any) -> Tensor:
    """The logits [B, C] in what a network returns: a tensor, something with `logits`, or several tensors.

    Of several, in a tuple or list, the first that has two dimensions. Raises UserError where there are none.
    """
    if isinstance(told, Tensor):
        return told
    named = told.get("logits") if isinstance(told, Mapping) else getattr(told, "logits", None)
    if isinstance(named, Tensor):
        return named
    for part in list_tensors(told):
        if part.ndim == 2:
            return part
    raise UserError(
        f"the model returns a {type(told).__name__} without logits: expected a tensor [B, C], a tuple or "
        "dict that holds one, or an object with `.logits`"
    )


def list_tensors(told: Any) -> list[Tensor]:
    """The tensors in a tuple, list or dict that a network returns."""
    parts = told.values() if isinstance(told, Mapping) else told if isinstance(told, list | tuple) else ()
    return [part for part in parts if isinstance(part, Tensor)]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def build(arch: str, classes: int, image_shape: tuple[int, ...]) -> nn.Module:
    """A freshly initialised network `arch` for images of `image_shape` (channels, H, W).

    arch: `small`, `resnet18`, `resnet50`, `vgg16`, or any torchvision classifier by its name there, which for
    small images get stems for these; `torchvision:NAME` as it is there; `timm:NAME`, where timm is installed.
    Draws from torch's global generator. Raises UserError for an unknown name or an unfit image size.
    """
    channels, height, width = image_shape
    small_image = max(height, width) <= SMALL_IMAGE
    if arch == "small":
        return SmallResNet(channels, classes)
    library, _, name = arch.rpartition(":")
    if library == "timm":
        network = _timm(arch, name, classes, image_shape)
    else:
        network = _torchvision(
            name if library == "torchvision" else arch, classes, small_image and not library
        )
    if channels != 3 and library != "timm":
        _replace_stem(network, channels)
    try:
        with torch.no_grad():
            logits = network.eval()(torch.zeros(1, *image_shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"`arch={arch}` cannot take {height}x{width} images: {reason}") from error
    assert logits.shape == (1, classes)
    return network.train()


def _timm(arch: str, name: str, classes: int, image_shape: tuple[int, ...]) -> nn.Module:
    create = partial(_import_timm(arch).create_model, name, num_classes=classes, in_chans=image_shape[0])
    try:
        try:
            made: nn.Module = create(img_size=image_shape[1:])
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            made = create()  # a convolutional one, which takes images of any size
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise UserError(f"`arch={arch}` cannot be made: {str(error).splitlines()[0]}") from error
    return made


def _import_timm(arch: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"`arch={arch}` needs timm, which is not installed: pip install timm") from error
    return timm


def find_normalisation(arch: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation, in units of pixel / 255, that timm's weights of `arch` were trained with.

    arch: `timm:NAME`. Raises UserError for any other, and where timm does not say it.
    """
    library, _, name = arch.rpartition(":")
    if library != "timm":
        raise UserError(f"`mean=timm` is for architectures of timm, not for `arch={arch}`: give numbers")
    config = _import_timm(arch).get_pretrained_cfg(name)
    if config is None:
        raise UserError(f"timm does not say what `arch={arch}` was trained with: give `mean` and `std`")
    return config.mean, config.std


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
        self.blocks = nn.Sequential(
            ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 64, 2)
        )
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class ResidualBlock(nn.Module):
    """Two convolutions, with BatchNorm, beside a shortcut."""

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
