"""Several loops of one model that take turns: whose step it is, what each counts, and what they cost."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from toys import batches_of

from dau_fast.data.images import Images
from dau_fast.engine.batches import Batch
from dau_fast.engine.loop import Loop, run_in_turns
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.training import make_loop
from dau_fast.models import Classifier

IMAGES = Images(
    torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3, ("a", "b", "c")
)
FIRST, SECOND = torch.arange(4), torch.arange(4, 12)


def model_of() -> tuple[Classifier, Optimizer]:
    torch.manual_seed(0)
    model = Classifier(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
    return model, SGD(model.parameters(), lr=0.1, momentum=0.9)


def batches(index: Tensor) -> Iterator[Batch]:
    return batches_of(IMAGES, itertools.repeat(index))


def loops_of(model: Classifier, optimizer: Optimizer) -> tuple[Loop, Loop]:
    """Ascent on four images, descent on eight."""
    up = make_loop(
        model,
        batches(FIRST),
        steps=2,
        optimizer=optimizer,
        loss=lambda z, y: -F.cross_entropy(z, y),
        name="up",
    )
    return up, make_loop(model, batches(SECOND), steps=3, optimizer=optimizer, name="down")


def test_loops_of_one_optimiser_share_its_momentum() -> None:
    model, optimizer = model_of()
    other = copy.deepcopy(model).train()
    by_hand = SGD(other.parameters(), lr=0.1, momentum=0.9)
    turns = [0, 1, 1, 0, 1]
    for turn in turns:
        index = (FIRST, SECOND)[turn]
        by_hand.zero_grad()
        loss = F.cross_entropy(other.network(IMAGES.pixels[index]), IMAGES.labels[index])
        (-loss if turn == 0 else loss).backward()
        by_hand.step()
    costs = run_in_turns(loops_of(model, optimizer), turns, Runtime())
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()))
    assert [cost.loop for cost in costs] == ["up", "down"]


def test_each_loop_counts_its_own_steps_and_any_ends_all() -> None:
    told: list[tuple[str, int]] = []

    def tell(name: str, last: int, number: int) -> bool:
        told.append((name, number))
        return number == last

    up, down = loops_of(*model_of())
    loops = (replace(up, after=lambda n: tell("up", 9, n)), replace(down, after=lambda n: tell("down", 2, n)))
    run_in_turns(loops, [1, 0, 1, 0, 1], Runtime())
    assert told == [("down", 1), ("up", 1), ("down", 2)]


def test_a_loop_without_a_turn_takes_no_batch_and_costs_nothing() -> None:
    up, down = loops_of(*model_of())
    taken: list[int] = []
    unread = replace(up, batches=iter(lambda: taken.append(1), None))
    assert [cost.loop for cost in run_in_turns((unread, down), [1, 1], Runtime())] == ["down"]
    assert run_in_turns((unread, down), [], Runtime()) == ()
    assert taken == []


def test_gradients_can_be_changed_before_a_step() -> None:
    model, optimizer = model_of()
    before = copy.deepcopy(model.state_dict())

    def stop() -> None:
        for weight in model.parameters():
            assert weight.grad is not None
            weight.grad.zero_()

    up, down = loops_of(model, optimizer)
    run_in_turns((replace(up, before_step=stop), down), [0, 0], Runtime())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
    run_in_turns((replace(up, before_step=stop), down), [0, 1], Runtime())
    assert not torch.equal(model.head.weight, before["network.3.weight"])


def test_a_profile_is_of_all_of_them_and_stands_with_the_first(tmp_path: Path) -> None:
    first, second = run_in_turns(loops_of(*model_of()), [0, 1, 1, 0, 1], Runtime(traces=tmp_path))
    assert first.profile is not None
    assert first.profile.steps == 5
    assert second.profile is None
    assert [path.name for path in tmp_path.iterdir()] == ["profile-up.json"]
