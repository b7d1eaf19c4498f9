"""Masked optimisers under DistributedDataParallel: every rank has the same weights, and its zeros stay."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
from ranks import together
from test_optim import KINDS, assert_exactly_zero, mask, network, random_masks, states
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs gloo")


def train(rank: int, ranks: int) -> None:
    """Each rank sees its share of a batch; the measure is one process with all of it."""
    for kind in ("momentum", "nesterov", "adamw"):
        make, usual, given = KINDS[kind]
        ours, theirs = network(seed=3), network(seed=3)
        for model in (ours, theirs):
            model[1] = nn.Identity()  # type: ignore[operator]  # BatchNorm would see its own rank's share alone
        masks = random_masks(ours)
        mask(theirs, masks)
        optimizer = make(ours.named_parameters(), masks, **given)
        expected = usual(theirs.parameters(), **given)
        model = DistributedDataParallel(ours)
        generator = torch.Generator().manual_seed(5)
        for _ in range(5):
            x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)
            mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
            optimizer.step()
            expected.zero_grad()
            nn.functional.cross_entropy(theirs(x), y).backward()
            expected.step()
            mask(theirs, masks)
        assert_exactly_zero(ours, optimizer, masks)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            for tensor in (one.detach(), *states(optimizer, one)):
                assert_the_same_on_every_rank(tensor, ranks)


def assert_the_same_on_every_rank(tensor: Tensor, ranks: int) -> None:
    found = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(found, copy.deepcopy(tensor.contiguous()))
    for other in found:
        assert torch.equal(other.view(torch.int32), tensor.view(torch.int32))


def test_two_ranks_train_one_pruned_model() -> None:
    together(2, train, 2)
