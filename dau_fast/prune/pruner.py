"""What a way of pruning is: one row, that the registry finds in its own file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from dau_fast.prune.masks import Masks


@dataclass(frozen=True)
class Search:
    """What a pruner is given to find masks of `network` with.

    sparsity: share of the weights to mask, in [0, 1). rate: share of those left that a round masks.
    iterations: of a search without data. input_shape: of one image. seed: of what chance decides.
    train(stage, masks): trains the network in place from where it is to the end of its recipe, masked weights
    at zero; stage names the training. trained: whether the network is trained already.
    """

    network: nn.Module
    sparsity: float
    rate: float
    iterations: int
    input_shape: Sequence[int]
    seed: int
    train: Callable[[str, Masks | None], None]
    trained: bool = False


@dataclass(frozen=True)
class Pruner:
    """A way to find masks. Whatever lists pruners lists them from these rows.

    name: as it is asked for. about: how it chooses, one phrase. find: the masks; a network that was given
    early in its training is left as it was, masked weights zero. trains: whether it needs training, and its
    masks so tell of the images trained on. takes_trained: whether it also prunes a trained network.
    source: where its masks come from, a phrase with {model} and {images}.
    """

    name: str
    about: str
    find: Callable[[Search], Masks]
    source: str
    trains: bool = False
    takes_trained: bool = False
