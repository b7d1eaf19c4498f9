"""The Barlow Twins loss over several processes against one process with the whole batch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import together
from test_barlow_twins_op import defined, value_and_gradients, views
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dau_fast.nn import BarlowTwinsLoss
from dau_fast.ops import barlow_twins_loss
from dau_fast.ops._barlow_twins_distributed import gathering_is_cheaper

pytestmark = pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs gloo")

# Rows of each rank, and D: few rows are gathered, few columns reduced.
CASES = [([3, 5], 32), ([20, 13], 6), ([4, 1, 6], 24), ([9, 2, 7], 5), ([0, 6], 4), ([0, 4], 20), ([1, 1], 9)]


def compare_with_the_whole_batch(rank: int, cases: list[tuple[list[int], int]]) -> None:
    for rows, d in cases:
        whole = views(sum(rows), d)
        mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        loss, *grads = value_and_gradients(
            lambda x, y: barlow_twins_loss(x, y, 0.1, group=dist.group.WORLD), *(z[mine] for z in whole)
        )
        expected, *wanted = value_and_gradients(lambda x, y: defined(x, y, 0.1), *whole)
        torch.testing.assert_close(loss, expected)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, len(rows) * want[mine])


def train_one_step(rank: int, rows: list[int], d: int) -> None:
    """The mean over ranks that DDP takes leaves the gradient of one process with the whole batch."""
    torch.manual_seed(0)
    layer = nn.Linear(7, d).double()
    single = nn.Linear(7, d).double()
    single.load_state_dict(layer.state_dict())
    model = DistributedDataParallel(layer)
    x = views(sum(rows), 7)
    mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    loss = BarlowTwinsLoss(0.1, gather_distributed=True)
    outputs = model(torch.cat([z[mine] for z in x])).chunk(2)
    (2 * loss(*outputs)).backward()
    (2 * defined(single(x[0]), single(x[1]), 0.1)).backward()
    torch.testing.assert_close(layer.weight.grad, single.weight.grad)
    # A bias moves a column's mean alone, which costs nothing.
    torch.testing.assert_close(layer.bias.grad, torch.zeros(d).double(), atol=1e-12, rtol=0)


def make_mistakes(rank: int) -> None:
    with pytest.raises(ValueError, match=r"shapes \[\[3, 4\], \[3, 5\]\]: expected one number of columns"):
        barlow_twins_loss(*views(3, 4 + rank), group=dist.group.WORLD)
    with pytest.raises(ValueError, match="2 rows in all"):
        barlow_twins_loss(*(z[: 1 - rank] for z in views(2, 4)), group=dist.group.WORLD)


def ignore_the_other_ranks(rank: int) -> None:
    a, b = views(6, 4, seed=rank)
    assert BarlowTwinsLoss()(a, b) == barlow_twins_loss(a, b)


def everything_on_two_ranks(rank: int) -> None:
    """All in one go, because starting processes takes longer than what they do."""
    compare_with_the_whole_batch(rank, [case for case in CASES if len(case[0]) == 2])
    train_one_step(rank, [3, 8], 4)
    train_one_step(rank, [3, 2], 16)
    make_mistakes(rank)
    ignore_the_other_ranks(rank)


def test_two_ranks_are_one_batch_also_under_ddp_and_share_their_mistakes() -> None:
    together(2, everything_on_two_ranks)


def test_three_ranks_are_one_batch() -> None:
    together(3, compare_with_the_whole_batch, [case for case in CASES if len(case[0]) == 3])


def test_the_way_is_chosen_by_bytes() -> None:
    assert gathering_is_cheaper(99, torch.zeros(0, 100))
    assert not gathering_is_cheaper(100, torch.zeros(0, 100))
    assert gathering_is_cheaper(199, torch.zeros(0, 100, dtype=torch.bfloat16))


def test_one_process_needs_no_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        a, b = views(6, 4)
        both: list[Tensor] = [BarlowTwinsLoss(gather_distributed=g)(a, b) for g in (True, False)]
        torch.testing.assert_close(*both)
    finally:
        dist.destroy_process_group()
