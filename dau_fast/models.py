"""Architectures as (features, logits), and checkpoints.

Any network that ends in a Linear layer will do: `Classifier` reads the features at that layer's
input, so torchvision's models and a caller's own need no change and keep their parameter names.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from dau_fast.errors import UserError, exists
from dau_fast.prune import Masks
from dau_fast.prune.sparse_file import compress, expand, note, recover

# Up to this many pixels a ResNet keeps its resolution: 3x3 stem, no max-pool (He et al. 2016, section 4.2).
SMALL_IMAGE = 64
# Metadata of pruned models alone: the shapes of a sparse file's masks, the note of a dense one's.
_SPARSE, _MASKED = "sparse", "masked"


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
        raise UserError(f"architecture '{arch}' cannot take {height}x{width} images: {reason}") from error
    assert logits.shape == (1, classes)
    return network.train()


def _torchvision(arch: str, classes: int, small_image: bool) -> nn.Module:
    from torchvision import models

    name = "vgg16_bn" if arch == "vgg16" and small_image else arch
    if name not in models.list_models(models):
        raise UserError(
            f"unknown architecture '{arch}': expected small, resnet18, resnet50, vgg16 or the name "
            "of a torchvision classifier"
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


# ---- checkpoints


def save(path: Path, network: nn.Module, metadata: dict[str, str], masks: Masks | None = None) -> None:
    """Write the weights of `network` to `path` as safetensors, with `metadata`.

    The metadata is one JSON text under "dau_fast": several keys would come out in any order.
    masks: of a pruned network, whose zeros they are; the file is a dense one for every reader, and its
    metadata says which tensors are masked, so that `load_masks` finds the masks again.
    Raises UserError where the masks are of another model, or a masked weight is not zero.
    """
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if masks is not None:
        metadata = {**metadata, _MASKED: note(tensors, masks)}
    path.write_bytes(serialize(tensors, metadata={"dau_fast": json.dumps(metadata)}))


def save_sparse(path: Path, network: nn.Module, masks: Masks, metadata: dict[str, str]) -> None:
    """Write `network` to `path` as `save` does, without the weights that `masks` mask: `load` reads it.

    Raises UserError where the masks are of another model, or a masked weight is not zero.
    """
    tensors, shapes = compress(network.state_dict(), masks)
    text = json.dumps({**metadata, _SPARSE: shapes})
    path.write_bytes(serialize(tensors, metadata={"dau_fast": text}))


def load(path: Path, network: nn.Module) -> dict[str, str]:
    """Load weights from a safetensors file, or from a PyTorch one without running its code, in place.

    Returns the metadata (empty for a PyTorch file). A file of `save_sparse` gives the weights that were
    saved, zeros included; `load_masks` gives their masks. Raises UserError for a file that is missing,
    damaged, executable or of another architecture; `network` is then unchanged.
    """
    if not exists(path, "file"):
        raise UserError(f"checkpoint '{path}' does not exist: name a .safetensors or .pt file")
    tensors, metadata, _ = _read(path)
    wanted = network.state_dict()
    wrong = [
        name
        for name in wanted.keys() | tensors.keys()
        if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape
    ]
    if wrong:
        raise UserError(
            f"checkpoint '{path}' is of another architecture ({len(wrong)} of its tensors differ, "
            f"such as '{min(wrong)}'): name the one it was saved from with --arch"
        )
    network.load_state_dict(tensors)
    return metadata


def load_masks(path: Path) -> Masks | None:
    """The masks of a pruned model's file, None for any other. Raises UserError as `load` does.

    Exact for files of `save_sparse`, and of `save` with masks: there all zeros of a masked tensor are
    masked weights but for those that the metadata names.
    """
    return _read(path)[2]


def _metadata(text: str) -> dict[str, str]:
    """What `save` wrote; ValueError for anything else."""
    found = json.loads(text)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its dau_fast metadata is damaged")
    return found


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], Masks | None]:
    """The tensors by name, the metadata, and the masks of a pruned model."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = _metadata((file.metadata() or {}).get("dau_fast", "{}"))
            shapes, masked = metadata.pop(_SPARSE, None), metadata.pop(_MASKED, None)
            masks = None if masked is None else recover(tensors, masked)
            if shapes is not None:
                tensors, masks = expand(tensors, shapes)
            return tensors, metadata, masks
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"checkpoint '{path}' cannot be read: {error}") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # on pickle protocols, before it refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets in a strange file
        raise UserError(
            f"checkpoint '{path}' is damaged or holds more than weights, and nothing in it was run: "
            "save the state_dict as .safetensors"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise UserError(f"checkpoint '{path}' holds no state_dict: save model.state_dict()")
    # DataParallel prefixes every name.
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}, {}, None
