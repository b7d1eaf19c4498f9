"""What a network draws itself, dropout and stochastic depth: the seed decides it, and nothing else."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import together
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from dau_fast.api import unlearn

# Long enough that every loop draws, short enough to cost nothing.
DAU = {"warmup_steps": 2, "turns": 6, "batch_size": 16}
TRAINING = {"epochs": 2, "batch_size": 16}


class Skipping(nn.Module):
    """A residual block, left out by chance for some of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.drop = StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.inner(x))


NOISES = {"dropout": lambda: nn.Dropout(0.5), "stochastic depth": Skipping}


def noisy_network(noise: str) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), NOISES[noise](), nn.Linear(8, 3))


def some_sets() -> dict[str, tuple[Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(0)
    counts = {"forget": 12, "retain": 36, "validation": 18}
    return {
        name: (torch.randn(count, 6, generator=chance), torch.arange(count) % 3)
        for name, count in counts.items()
    }


def unlearned(noise: str, seed: int, *, state: int, method: str = "dau", **more: Any) -> dict[str, Tensor]:
    """Weights of a run that begins with the global generator at `state`, which must not move."""
    torch.manual_seed(state)
    before = torch.get_rng_state()
    config = DAU if method == "dau" else TRAINING
    model = noisy_network(noise)
    result = unlearn(
        model, **some_sets(), config=config, method=method, seed=seed, device="cpu", precision="fp64", **more
    )
    assert torch.equal(torch.get_rng_state(), before)
    return copy.deepcopy(result.model.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("method", ["dau", "ft", "ga"])
def test_noise_follows_the_seed_and_not_the_callers_generator(noise: str, method: str) -> None:
    first = unlearned(noise, 0, state=1, method=method)
    assert same(first, unlearned(noise, 0, state=2, method=method))
    assert not same(first, unlearned(noise, 1, state=1, method=method))


@pytest.mark.parametrize("noise", NOISES)
def test_another_seed_draws_other_noise_for_the_same_batches(
    noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else that a seed decides is held fast here."""
    first = unlearned(noise, 0, state=1, method="ft")
    monkeypatch.setattr("dau_fast.methods.task.Task.derive_seed", lambda task, purpose: 7)
    held = unlearned(noise, 0, state=1, method="ft")
    assert not same(first, held)
    monkeypatch.setattr("dau_fast.methods.task.Task.derive_seed", lambda task, purpose: 8)
    assert not same(held, unlearned(noise, 0, state=1, method="ft"))


def check_processes(rank: int) -> None:
    """Every rank has its own state of the generator, and all end with the same weights, twice."""
    for noise in NOISES:
        first = unlearned(noise, 0, state=10 + rank, distributed=True)
        assert same(first, unlearned(noise, 0, state=20 + 3 * rank, distributed=True))
        assert not same(first, unlearned(noise, 1, state=10 + rank, distributed=True))
        for tensor in first.values():
            assert torch.equal(*gathered(tensor))
    drawn: list[Tensor] = []
    network = nn.Sequential(nn.Linear(6, 8), Recording(drawn), nn.Linear(8, 3))
    unlearn(network, **some_sets(), config=TRAINING, method="ft", device="cpu", distributed=True)
    # The same numbers would drop the same units in both halves of a batch.
    assert not torch.equal(*gathered(drawn[0]))


class Recording(nn.Module):
    """Notes what a layer that draws would have got."""

    def __init__(self, drawn: list[Tensor]) -> None:
        super().__init__()
        self.drawn = drawn

    def __deepcopy__(self, memo: object) -> Recording:
        return Recording(self.drawn)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.drawn.append(torch.rand(4))
        return x


def gathered(tensor: Tensor) -> list[Tensor]:
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, tensor)
    return everywhere


@pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs gloo")
def test_noise_of_two_processes_follows_the_seed_and_differs_between_them() -> None:
    together(2, check_processes)
