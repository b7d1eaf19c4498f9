"""The optimiser of every loop: PyTorch's own, with masked weights and momenta at zero after each step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from dau_fast.engine.optimizers import adamw, sgd
from dau_fast.errors import UserError
from dau_fast.prune import Masks

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def some_masks() -> Masks:
    generator = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (8, 2, 3, 3), "4.weight": (3, 32)}
    return Masks({name: torch.rand(shape, generator=generator) < 0.3 for name, shape in shapes.items()})


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    images = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()


def test_without_masks_it_is_pytorchs() -> None:
    model = network()
    other = copy.deepcopy(model)
    ours, theirs = sgd(model, None, **SETTINGS), SGD(other.parameters(), fused=True, **SETTINGS)
    for number in range(5):
        step(model, ours, number)
        step(other, theirs, number)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_masked_weights_and_momenta_are_zero_from_the_start_and_after_every_step() -> None:
    model, masks = network(), some_masks()
    optimizer = sgd(model, masks, **SETTINGS)
    assert Masks.from_zeros(model, linear=True) == masks
    for number in range(5):
        step(model, optimizer, number)
        for name, weight in masks.find_weights(model).items():
            for tensor in (weight, optimizer.state[weight]["momentum_buffer"]):
                assert torch.equal(tensor != 0, masks[name])
                assert not tensor[~masks[name]].signbit().any()  # a file of kept values holds +0 alone


def test_the_other_weights_move_as_if_their_gradients_were_masked() -> None:
    # Before a BatchNorm a bias has no gradient but rounding, which Adam would blow up.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.ReLU(), nn.Linear(32, 3))
    masks = some_masks()
    masks.apply_(model)
    other = copy.deepcopy(model)
    ours, theirs = sgd(model, masks, **SETTINGS), SGD(other.parameters(), fused=True, **SETTINGS)
    for name, weight in masks.find_weights(other).items():
        weight.register_hook(lambda grad, kept=masks[name]: grad * kept)
    for number in range(5):
        step(model, ours, number)
        step(other, theirs, number)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        # Another order of the same operations: a step rounds once where PyTorch's rounds twice.
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def test_masks_work_without_momentum() -> None:
    model, masks = network(), some_masks()
    step(model, sgd(model, masks, lr=0.1, momentum=0, weight_decay=0.1), 0)
    assert Masks.from_zeros(model, linear=True) == masks


def test_masks_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match="another model"):
        sgd(network(), Masks({"stem.weight": torch.ones(3, dtype=torch.bool)}), **SETTINGS)


# ---- AdamW


def test_without_weight_decay_adamw_is_adam() -> None:
    model = network()
    model[1] = nn.Identity()
    others = copy.deepcopy(model), copy.deepcopy(model)
    ours = adamw(model, None, lr=0.01, weight_decay=0)
    assert isinstance(ours, AdamW)
    theirs = Adam(others[0].parameters(), lr=0.01)
    decayed = adamw(others[1], None, lr=0.01, weight_decay=0.5)
    for number in range(5):
        for pair in ((model, ours), (others[0], theirs), (others[1], decayed)):
            step(*pair, number)
    for a, b, c in zip(model.parameters(), *(other.parameters() for other in others), strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, c)


def test_adamw_keeps_masked_weights_at_zero_and_the_others_as_pytorchs() -> None:
    # Before a BatchNorm a bias has no gradient but rounding, which Adam would blow up.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.ReLU(), nn.Linear(32, 3))
    masks = some_masks()
    masks.apply_(model)
    other = copy.deepcopy(model)
    ours = adamw(model, masks, lr=0.01, weight_decay=0.1, betas=(0.8, 0.99))
    theirs = AdamW(other.parameters(), lr=0.01, weight_decay=0.1, betas=(0.8, 0.99))
    for number in range(5):
        step(model, ours, number)
        step(other, theirs, number)
        masks.apply_(other)
        assert Masks.from_zeros(model, linear=True) == masks
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
