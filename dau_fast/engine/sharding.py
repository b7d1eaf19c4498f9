"""Sharding: each process holds its share of a model's weights, gradients and optimiser state.

A unit of the model is put together where it computes, from all processes' shares, and taken apart again
after it: PyTorch's fully_shard (Zhao et al. 2023, arXiv 2304.11277). A device then holds 1/W of all that,
and one unit whole. Whole models rest on the CPU meanwhile. What mixed precision keeps for the backward
pass is not shared out: weights as bfloat16, unless activation checkpointing computes them again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dau_fast.engine.activation_checkpointing import find_blocks
from dau_fast.errors import UserError
from dau_fast.models import Classifier

_CPU = torch.device("cpu")


@contextmanager
def sharded(model: Classifier, device: torch.device, *others: nn.Module) -> Iterator[Classifier]:
    """A copy of `model` on `device`, sharded over all processes of the default group, for the block.

    In the end `model` has its weights and statistics, whole and on every process; if the block raises, it
    is as before. It and `others` rest on the CPU meanwhile. Only calls of the copy put weights together,
    so all processes call it equally often. Raises UserError for a network that cannot be sharded.
    """
    with placed(_CPU, model, *others):
        part = copy.deepcopy(model)
        _shard(part.network, device)
        yield part
        _copy_whole(part.network, model.network)


@contextmanager
def placed(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """`modules` on `device`, and in the end each back where it was; modules without parameters stay."""
    before = {module: parameter.device for module in modules for parameter in _first_of(module)}
    for module in before:
        module.to(device)
    try:
        yield
    finally:
        for module, place in before.items():
            module.to(place)


def is_sharded(model: nn.Module) -> bool:
    """Whether `model` or a part of it is `sharded`'s."""
    # Importing the class to look for takes half a second, which runs without it need not spend.
    return any(hasattr(module, "set_requires_gradient_sync") for module in model.modules())


def own_share(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded model's `tensor`, in the same memory; otherwise all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def share_out(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, the same on all processes, laid out as a sharded model's tensor `like` is; else as it is."""
    if not hasattr(like, "to_local"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole, like.device_mesh, like.placements)


def check_shard(shard: bool, sensitivity: str, *, pruned: bool) -> None:
    """Raises UserError where `shard` does not go with the game's `sensitivity` or a pruned model."""
    if shard and sensitivity not in ("none", "classifier"):
        raise UserError(
            f"`sensitivity={sensitivity}` takes gradients that `shard=True` does not share out: take "
            "none or classifier, or leave `shard` out"
        )
    if shard and pruned:
        raise UserError("`shard=True` does not share out masks, and the model is pruned: leave `shard` out")


def _first_of(module: nn.Module) -> list[nn.Parameter]:
    return [next(module.parameters())] if any(True for _ in module.parameters()) else []


def _shard(network: nn.Module, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    network.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
    try:
        for unit in (*_blocks(network), network):
            # The last unit too: a network looked at and not trained would else stay whole.
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    except (ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{type(network).__name__} cannot take `shard=True`: {reason}") from error


def _blocks(network: nn.Module) -> list[nn.Module]:
    """What is put together apart from the rest of `network`."""
    names = sum(1 for _ in network.named_parameters(remove_duplicate=False))
    if names > len(list(network.parameters())):
        return []  # a parameter of two modules must be in one unit with both
    return [block for block in find_blocks(network) if not isinstance(block, nn.ModuleList)]


@torch.no_grad()
def _copy_whole(part: nn.Module, network: nn.Module) -> None:
    """Values of the sharded `part` into `network`, which has the same tensors whole."""
    whole = network.state_dict()
    for name, tensor in part.state_dict().items():
        # One after the other: never all of them on the device.
        whole[name].copy_(tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)
