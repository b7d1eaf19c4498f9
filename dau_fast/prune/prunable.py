"""Which weights of a model may be pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dau_fast.errors import UserError


def prunable_weights(model: nn.Module, linear: bool = False) -> dict[str, nn.Parameter]:
    """The weights of all convolutions of `model` by parameter name, each once, in the model's order.

    linear: those of Linear layers too. Raises UserError where there are none, where one holds NaN
    or infinity, and where a layer's weight is computed from something else.
    """
    check_plain(model, linear)
    kinds = _kinds(linear)
    found: dict[str, nn.Parameter] = {}
    for layer, module in model.named_modules():
        weight = module.weight if isinstance(module, kinds) else None
        if isinstance(weight, nn.Parameter) and all(weight is not other for other in found.values()):
            found[f"{layer}.weight".lstrip(".")] = weight
    if not sum(weight.numel() for weight in found.values()):
        more = "" if linear else ", or pass linear=True to prune Linear layers"
        raise UserError(
            f"{type(model).__name__} has no convolution{' and no Linear layer' if linear else ''} to prune: "
            f"expected at least one{more}"
        )
    for name, weight in found.items():
        if not is_finite(weight):
            raise UserError(
                f"weight '{name}' holds NaN or infinity and cannot be ranked: prune a model whose training "
                "did not diverge"
            )
    return found


def _kinds(linear: bool) -> tuple[type[_ConvNd | nn.Linear], ...]:
    return (_ConvNd, nn.Linear) if linear else (_ConvNd,)


def is_finite(tensor: Tensor) -> bool:
    """Whether `tensor` holds neither NaN nor infinity; waits for the device."""
    return not tensor.numel() or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def check_plain(model: nn.Module, linear: bool = True) -> None:
    """UserError where a prunable weight is no parameter of its own, such as under torch.nn.utils.prune."""
    for name, module in model.named_modules():
        if isinstance(module, _kinds(linear)) and "weight" not in module._parameters:
            raise UserError(
                f"the weight of layer '{name}' is computed from other parameters (torch.nn.utils.prune, a "
                "parametrization): make it permanent first, such as by torch.nn.utils.prune.remove"
            )
