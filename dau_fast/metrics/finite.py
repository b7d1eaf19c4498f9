"""Which weight of a model, or which image and layer, gives NaN or infinity."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dau_fast.data.images import Images
from dau_fast.engine.evaluation import predict_each
from dau_fast.engine.losses import find_broken_layer
from dau_fast.engine.modes import evaluating


def find_broken_weights(network: nn.Module) -> list[str]:
    """Names of the parameters and buffers that hold NaN or infinity."""
    return [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]


def find_broken_output(model: nn.Module, images: Images, sets: Mapping[str, Tensor]) -> str | None:
    """In words, the first image of `sets` for which `model` gives NaN or infinity, and the layer; else None.

    model: gives features and logits; its layers are called as in its `network`. sets: index tensors by name.
    """

    def is_finite(logits: Tensor, _: Tensor) -> Tensor:
        return logits.isfinite().all(1)

    for name, index in sets.items():
        finite = predict_each(model, images, index, is_finite)
        if not bool(finite.all()):
            place = int(finite.logical_not().nonzero()[0])
            with evaluating(model):
                found = find_broken_layer(model, images.batch(index[place : place + 1]))
            layer = found[0] if found else "its outputs"
            many = int(finite.logical_not().sum())
            return (
                f"NaN or infinity for image {place} of the {name} set ({many} such), first in {layer} (image "
                f"{int(index[place])} of all)"
            )
    return None
