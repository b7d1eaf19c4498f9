"""A classifier, counted: FLOPs, kernels, parameters, and what autograd keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dau_fast.engine.modes import find_batchnorms, training
from dau_fast.models import Classifier


@dataclass(frozen=True)
class Network:
    """A classifier, counted. flops: of a forward pass of one image. operations: kernels of a forward pass.

    activations: bytes that autograd keeps for an image. largest: bytes of the largest layer's output for
    one, logits left out. norms: BatchNorm layers; of all of them, channels, and normed: numbers of an image.
    """

    flops: float
    operations: int
    parameters: int
    features: int
    classes: int
    activations: float
    largest: float
    norms: int
    channels: int
    normed: float


def count_network(model: Classifier, images: Tensor) -> Network:
    """`model` on `images` [B, ...], two or more, which may be fake tensors: nothing is computed then.

    FLOPs are those of convolutions and matrix products, as PyTorch counts them. BatchNorm statistics of
    `model` move, as in training.
    """
    norms = find_batchnorms(model)
    with training(model):
        return _count(model, norms, images)


def _count(model: Classifier, norms: Sequence[_BatchNorm], images: Tensor) -> Network:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        model(images)
    with torch.no_grad(), _Dispatched(len(images), model.head.out_features) as calls:
        model(images)
    return Network(
        flops=flops.get_total_flops() / len(images),
        operations=calls.count,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        features=model.head.in_features,
        classes=model.head.out_features,
        activations=_activation_bytes(model, images),
        largest=calls.largest / len(images),
        norms=len(norms),
        channels=sum(norm.num_features for norm in norms),
        normed=_count_normed(model, norms, images) / len(images),
    )


def has_batchnorm(network: nn.Module) -> bool:
    """Whether the game ends with a pass for BatchNorm's statistics."""
    return any(norm.track_running_stats for norm in find_batchnorms(network))


def _count_normed(model: Classifier, norms: Sequence[nn.Module], images: Tensor) -> int:
    """Numbers that come out of `norms` in a pass."""
    seen: list[int] = []

    def note(_: nn.Module, __: Any, out: Tensor) -> None:
        seen.append(out.numel())

    hooks = [norm.register_forward_hook(note) for norm in norms]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return sum(seen)


class _Dispatched(TorchDispatchMode):
    """Counts the operations that reach a device, and the bytes of the largest result of `rows` rows.

    classes: of logits, which do not count as such a result.
    """

    def __init__(self, rows: int, classes: int) -> None:
        super().__init__()
        self.rows, self.logits, self.count, self.largest = rows, (rows, classes), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views launch nothing; fake tensors add operations of their own.
        launches = func.namespace == "aten" and not func.is_view and "empty" not in func.__name__
        self.count += launches and "view" not in func.__name__
        if isinstance(result, Tensor) and result.shape[:1] == (self.rows,) and result.shape != self.logits:
            self.largest = max(self.largest, result.nbytes)
        return result


def _activation_bytes(model: Classifier, images: Tensor) -> float:
    """What autograd keeps for one image; what is kept once a batch, such as low-precision weights, is not."""
    half = len(images) // 2
    more = _kept_bytes(model, images) - _kept_bytes(model, images[:half].clone())
    return more / (len(images) - half)


def _kept_bytes(model: Classifier, images: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Held here, so that no other storage gets its address.
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(storage.nbytes() for storage in kept.values())
