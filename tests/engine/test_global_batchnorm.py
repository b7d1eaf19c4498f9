"""BatchNorm over several processes against one BatchNorm over all rows, in float64."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from ranks import together
from torch import Tensor, nn

from dau_fast.engine.global_batchnorm import GlobalBatchNorm, synchronise_batchnorm

pytestmark = pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs gloo")

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, affine=False, momentum=None),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2),
    ]  # fmt: skip
    return nn.Sequential(*layers).double()


def rows(count: int) -> Tensor:
    """Far from centred, and different from row to row."""
    x = torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return 3 * x + torch.arange(count).view(-1, 1, 1, 1) + 50


def compare(rank: int, borders: list[int]) -> None:
    """Each rank holds the rows between two borders; gradients are those of the sum of all ranks' losses."""
    expected, x = convolutional(), rows(borders[-1])
    model = synchronise_batchnorm(copy.deepcopy(expected))
    assert [type(layer) for layer in model if isinstance(layer, nn.modules.batchnorm._BatchNorm)] == [
        GlobalBatchNorm
    ] * 3
    mine = slice(borders[rank], borders[rank + 1])
    weights = torch.randn(len(x), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        all_rows, my_rows = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
        (expected(all_rows) * weights).sum().backward()
        out = model(my_rows)
        torch.testing.assert_close(out, expected(x)[mine], **CLOSE)
        (out * weights[mine]).sum().backward()
        torch.testing.assert_close(my_rows.grad, all_rows.grad[mine], **CLOSE)
        x = x + 1
    expected.load_state_dict(model.state_dict())
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        total = ours.grad.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, theirs.grad, **CLOSE)


def statistics(rank: int, borders: list[int]) -> None:
    expected, x = convolutional(), rows(borders[-1])
    model = synchronise_batchnorm(copy.deepcopy(expected))
    for shift in range(3):
        expected(x + shift)
        model((x + shift)[borders[rank] : borders[rank + 1]])
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), **CLOSE)
    torch.testing.assert_close(model.eval()(x), expected.eval()(x), **CLOSE)


@pytest.mark.parametrize("borders", [[0, 4, 8], [0, 5, 6], [0, 1, 4, 9], [0, 3, 3, 7]], ids=str)
def test_outputs_gradients_and_statistics_are_those_of_all_rows(borders: list[int]) -> None:
    together(len(borders) - 1, both, borders)


def both(rank: int, borders: list[int]) -> None:
    compare(rank, borders)
    statistics(rank, borders)


def low_precision(rank: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.BatchNorm2d(4), torch.randn(6, 4, 3, 3)
    expected = layer(x)
    model = synchronise_batchnorm(layer)
    found = model(x.bfloat16()[3 * rank : 3 * rank + 3])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected[3 * rank : 3 * rank + 3], rtol=2e-2, atol=2e-2)


def test_bfloat16_rows_are_normalised_in_float32() -> None:
    together(2, low_precision)


def test_a_network_that_is_a_batchnorm_itself_is_replaced_and_a_copy_can_be_made() -> None:
    layer = nn.BatchNorm1d(3).eval()
    replaced = synchronise_batchnorm(layer)
    assert isinstance(replaced, GlobalBatchNorm)
    assert not replaced.training
    assert replaced.weight is layer.weight
    copied = copy.deepcopy(replaced)
    assert copied.weight is not layer.weight
    assert pickle.loads(pickle.dumps(replaced)).num_features == 3
