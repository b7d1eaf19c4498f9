"""Which weights a loss touches: gradients of the original over whole sets, and training of those alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from dau_fast.engine.batches import load_each
from dau_fast.engine.modes import evaluating
from dau_fast.errors import UserError
from dau_fast.methods.task import Task
from dau_fast.prune import Masks
from dau_fast.prune.select import keep_largest


def check_whole_model(task: Task, _settings: Any) -> None:
    """UserError where models are sharded, and no process has a whole gradient to choose weights by."""
    if task.runtime.shard:
        raise UserError(
            "weights cannot be chosen by their gradients where `shard=True` shares these out: leave `shard` "
            "out, or take another method"
        )


def sum_gradients(
    task: Task, index: Tensor, batch_size: int, shape: Callable[[Tensor], Tensor] = lambda grad: grad
) -> dict[str, Tensor]:
    """The original's gradients of the mean cross-entropy of each batch of `index` [N], summed over batches.

    By name of its network's parameters, in evaluation mode, of images as they are. shape: what is summed of
    each gradient. Processes share the batches.
    """
    trained = {
        name: weight for name, weight in task.original.network.named_parameters() if weight.requires_grad
    }
    sums = {name: torch.zeros_like(weight) for name, weight in trained.items()}
    own = index.split(batch_size)[task.ranks.rank :: task.ranks.count]
    with evaluating(task.original):
        for batch, images in zip(own, load_each(task.images, own), strict=True):
            loss = F.cross_entropy(task.original(images).logits, task.labels[batch])
            grads = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
            for total, grad in zip(sums.values(), grads, strict=True):
                total += shape(grad)
    return {name: task.ranks.total(total) for name, total in sums.items()}


def keep_share(scores: Mapping[str, Tensor], share: float, pruned: Masks | None) -> dict[str, Tensor]:
    """Where the largest absolute `scores` are, by name, bool of their shapes: `share` of all together.

    pruned: masks of weights that are zero, which do not count.
    """
    counted = {name: score.clone() for name, score in scores.items()}
    total = left = sum(score.numel() for score in scores.values())
    for name in (pruned or {}).keys() & counted.keys():
        assert pruned is not None
        counted[name][~pruned[name]] = 0  # the smallest, and so never among those that stay
        left -= int((~pruned[name]).sum())
    return dict(keep_largest(counted, 1 - share * left / total, "global"))


def hold_others(optimizer: Optimizer, network: nn.Module, chosen: Mapping[str, Tensor]) -> None:
    """From now on the optimiser's steps leave all weights of `network` but the `chosen` where they are.

    chosen: by parameter name, bool of its shape. Weight decay and momentum would move the others, too.
    """
    held = [(weight, chosen[name], weight.detach().clone()) for name, weight in _named(network, chosen)]

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        for weight, moves, before in held:
            weight.copy_(torch.where(moves, weight, before))

    optimizer.register_step_post_hook(put_back)


def mask_gradients(network: nn.Module, chosen: Mapping[str, Tensor]) -> None:
    """Set gradients of weights that are not `chosen` to zero, in place."""
    for name, weight in _named(network, chosen):
        if weight.grad is not None:
            weight.grad.mul_(chosen[name])


def _named(network: nn.Module, chosen: Mapping[str, Tensor]) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in network.named_parameters() if name in chosen]
