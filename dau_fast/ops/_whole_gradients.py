"""Squared norms of per-sample gradients of layers without a rule: the whole model, differentiated a sample.

torch.func's vmap takes the samples together; what it cannot, such as an LSTM, they are taken one by one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dau_fast.ops._layer_gradients import most_numbers, square_sums

Losses = Callable[[object, Tensor], Tensor]


def whole_squares(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    losses: Losses,
    create_graph: bool,
) -> dict[str, Tensor]:
    """Of each of `parameters`, by its name in `model`, the squared norm [B] of every sample's gradient.

    losses(outputs, targets): one loss a sample. create_graph: keep what it takes to differentiate the result.
    Raises ValueError where the model draws at random, as each pass would draw anew.
    """
    _refuse_chance(model)

    def loss(chosen: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return losses(functional_call(model, chosen, (x.unsqueeze(0),)), y.unsqueeze(0)).sum()

    def squares(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        found = grad(loss)(dict(parameters), x, y)
        return {name: square_sums(one.unsqueeze(0))[0] for name, one in found.items()}

    numbers = sum(parameter.numel() for parameter in parameters.values())
    step = max(1, most_numbers(inputs.device) // max(1, numbers))
    with torch.set_grad_enabled(create_graph):
        try:
            with warnings.catch_warnings():
                # It is said once already that this is slow.
                warnings.filterwarnings("ignore", "There is a performance drop")
                return vmap(squares, chunk_size=step)(inputs, targets)
        except (RuntimeError, NotImplementedError) as error:
            _say_once(" ".join(str(error).split())[:100])
        rows = [_one(model, parameters, losses, inputs[i : i + 1], targets[i : i + 1], create_graph)
                for i in range(len(inputs))]  # fmt: skip
        return {name: torch.stack([row[name] for row in rows]) for name in parameters}


def _one(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    losses: Losses,
    x: Tensor,
    y: Tensor,
    create_graph: bool,
) -> dict[str, Tensor]:
    """The squares [] of one sample, x and y [1, ...], by a backward pass of its own."""
    with torch.enable_grad():
        loss = losses(model(x), y).sum()
        tensors = list(parameters.values())
        found = torch.autograd.grad(loss, tensors, create_graph=create_graph, materialize_grads=True)
    return {name: square_sums(one.unsqueeze(0))[0] for name, one in zip(parameters, found, strict=True)}


def _refuse_chance(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        chance = getattr(layer, "p", None) or getattr(layer, "dropout", None)
        if layer.training and isinstance(chance, float) and chance > 0:
            raise ValueError(
                f"{name or 'the model'} ({type(layer).__name__}) draws at random, and layers without a rule "
                "take a pass of their own: call model.eval()"
            )


@cache
def _say_once(reason: str) -> None:
    logging.getLogger("dau_fast").warning(
        "per-sample gradients take one backward pass a sample, as vmap cannot take this model: %s", reason
    )
