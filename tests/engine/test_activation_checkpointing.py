"""Activation checkpointing: the same numbers, fewer activations kept, nothing left on the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR
from toys import batches_of

from dau_fast import models
from dau_fast.data.images import Images
from dau_fast.engine.activation_checkpointing import checkpointed, require_blocks
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.training import train
from dau_fast.errors import UserError
from dau_fast.models import Classifier


def classifier(arch: str = "resnet18") -> Classifier:
    torch.manual_seed(0)
    return Classifier(models.build(arch, 10, (3, 32, 32)).double())


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def kept(model: Callable[[Tensor], models.Outputs], x: Tensor) -> tuple[Tensor, int]:
    """The loss, and the bytes that its graph keeps for the backward pass; weights are not among them."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model(x)
        loss = outputs.logits.logsumexp(1).sum() + outputs.features.square().sum()
    return loss, sum(saved.values())


@pytest.mark.parametrize("arch", ["small", "resnet18"])
def test_loss_gradients_and_statistics_are_the_same_and_less_is_kept(arch: str) -> None:
    plain, other, x = classifier(arch), classifier(arch), images()
    forward = checkpointed(other, require_blocks(other))
    for _ in range(2):
        expected, whole = kept(plain, x)
        found, some = kept(forward, x)
        expected.backward()
        found.backward()
        assert torch.equal(found, expected)
        assert some < whole / 2
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(other.state_dict()), dict(plain.state_dict()))
    assert all(m.momentum == 0.1 for m in other.modules() if isinstance(m, nn.BatchNorm2d))


def test_nothing_stays_on_the_model() -> None:
    model = classifier("small")
    checkpointed(model, require_blocks(model))(images())
    assert not any("forward" in vars(module) for module in model.modules())
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(images()).logits, model.eval()(images()).logits)


@pytest.mark.parametrize(
    ("arch", "count"), [("small", 3), ("resnet18", 8), ("resnet50", 16), ("vit_b_16", 12)]
)
def test_blocks_are_residual_blocks_and_encoder_layers(arch: str, count: int) -> None:
    size = 224 if arch == "vit_b_16" else 32
    network = models.build(arch, 10, (3, size, size))
    assert len(require_blocks(network)) == len(require_blocks(nn.Sequential(network, nn.ReLU()))) == count


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="Sequential has no blocks in a row"):
        require_blocks(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))


def test_it_runs_eagerly() -> None:
    model = classifier("small")
    optimizer = SGD(model.parameters(), lr=0.1)
    held = Images(images(), torch.arange(4), tuple("abcd"), dtype=torch.float64)
    (cost,) = train(
        model,
        batches_of(held, [torch.arange(4)]),
        steps=1,
        optimizer=optimizer,
        scheduler=ConstantLR(optimizer, 1.0),
        runtime=Runtime(engine="auto", activation_checkpointing=True),
    )
    assert (cost.engine, cost.reason) == ("eager", "steps with activation checkpointing are not compiled")
    asked = "`engine=compiled` does not go with `activation_checkpointing=True`"
    with pytest.raises(UserError, match=asked):
        Runtime(engine="compiled", activation_checkpointing=True)
