"""SynFlow: prune an untrained network without data (Tanaka et al. 2020, arXiv 2006.05467)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dau_fast.errors import UserError
from dau_fast.prune.masks import Masks
from dau_fast.prune.prunable import is_finite, prunable_weights
from dau_fast.prune.pruner import Pruner, Search
from dau_fast.prune.select import check_scope, check_sparsity, keep_largest, warn_of_emptied


def synflow(
    model: nn.Module,
    sparsity: float,
    *,
    input_shape: Sequence[int],
    iterations: int = 100,
    scope: str = "global",
    linear: bool = False,
) -> Masks:
    """Masks of the share `sparsity`, in [0, 1), that keep the paths through which most flows.

    input_shape: of one input, without the batch. The density falls exponentially over `iterations`.
    `model` maps inputs to logits and stays as it is; a copy is scored, in evaluation mode, with the
    absolute values of all parameters and buffers, BatchNorm's included, as in the authors' code
    (ganguli-lab/Synaptic-Flow), and in double precision. scope, linear: as in `omp`.
    Raises UserError as `omp` does, and where the model cannot take such an input.
    """
    check_sparsity(sparsity)
    check_scope(scope)
    if iterations < 1:
        raise UserError(f"`iterations={iterations}`: expected 1 or more, such as 100")
    prunable_weights(model, linear)
    linearised = copy.deepcopy(model).eval().double()
    with torch.no_grad():
        for tensor in linearised.state_dict().values():
            tensor.abs_()
    weights = prunable_weights(linearised, linear)
    ones = torch.ones(1, *input_shape, dtype=torch.float64, device=next(iter(weights.values())).device)
    masks: Masks | None = None
    for iteration in range(1, iterations + 1):
        target = 1 - (1 - sparsity) ** (iteration / iterations)
        # A kept weight may score zero: a masked one goes before it.
        masks = keep_largest(_scores(linearised, weights, ones), target, scope, pruned=masks)
        masks.apply_(linearised)
    assert masks is not None
    return warn_of_emptied(masks)


def _scores(model: nn.Module, weights: dict[str, nn.Parameter], ones: Tensor) -> dict[str, Tensor]:
    """|theta * dR / dtheta| for the sum of logits R on an input of `ones` (equation 1)."""
    try:
        flow = model(ones).sum()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the model cannot take an input of shape {list(ones.shape[1:])}: {reason}: name the shape of "
            "one input with `input_shape`"
        ) from error
    gradients = torch.autograd.grad(flow, list(weights.values()), materialize_grads=True)
    scores = {
        name: (weight * gradient).detach().abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    if not all(is_finite(score) for score in scores.values()):
        raise UserError(
            "SynFlow's scores are not finite: the network is too deep for the sum over all its paths, or its "
            "BatchNorm statistics are damaged; prune an untrained network"
        )
    return scores


def _find(search: Search) -> Masks:
    return synflow(
        search.network, search.sparsity, input_shape=search.input_shape, iterations=search.iterations
    )


PRUNER = Pruner(
    name="synflow",
    about="where least flows through untrained weights, without data",
    find=_find,
    source="its initial weights, no data",
)
