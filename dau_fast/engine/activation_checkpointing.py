"""Activation checkpointing: a block's activations are computed again in the backward pass, not kept.

Memory then holds what lies between blocks, and one block's inside at a time, for one more forward pass
(Chen et al. 2016, arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dau_fast.engine.modes import batchnorm_momentum, find_batchnorms
from dau_fast.errors import UserError
from dau_fast.models import Outputs


def require_blocks(network: nn.Module) -> list[nn.Module]:
    """The parts of `network` that stand in a row: residual blocks, encoder layers and the like.

    Raises UserError where there is none.
    """
    blocks = find_blocks(network)
    if not blocks:
        raise UserError(
            f"{type(network).__name__} has no blocks in a row whose activations could be computed again: "
            "leave `activation_checkpointing` out, or take `accumulate`"
        )
    return blocks


def find_blocks(network: nn.Module) -> list[nn.Module]:
    """The innermost modules of `network` with parts of their own in a Sequential or ModuleList."""
    found = [
        part
        for row in network.modules()
        if isinstance(row, nn.Sequential | nn.ModuleList)
        for part in row
        if any(True for _ in part.children()) and any(True for _ in part.parameters())
    ]
    known = dict.fromkeys(found)  # a block may stand in several places
    return [part for part in known if known.keys().isdisjoint(list(part.modules())[1:])]


def checkpointed(model: nn.Module, blocks: Sequence[nn.Module]) -> Callable[[Tensor], Outputs]:
    """What to call in place of `model`, of which `blocks` are parts, to compute theirs again.

    Results and gradients are the same; BatchNorm statistics count every image once.
    """

    def call(images: Tensor) -> Outputs:
        with _recomputing(blocks):
            outputs: Outputs = model(images)
        return outputs

    return call


@contextmanager
def _recomputing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    # On the instances and for one call alone: a model that is copied or saved must not hold on to them.
    for block in blocks:
        contexts = partial(_contexts, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first pass through `block`, and around the second one."""
    return nullcontext(), _counted_already(block)


@contextmanager
def _counted_already(block: nn.Module) -> Iterator[None]:
    """BatchNorm layers keep their statistics, and their count of batches, as they are."""
    norms = find_batchnorms(block)
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    before = [count.clone() for count in counts]
    with batchnorm_momentum(norms, 0.0):
        try:
            yield
        finally:
            for count, value in zip(counts, before, strict=True):
                count.copy_(value)
