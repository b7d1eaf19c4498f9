"""The supervised loop against one written by hand, and BatchNorm statistics against exact means."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR
from toys import batches_of

from dau_fast.data.images import Images
from dau_fast.engine.training import recompute_batchnorm, train
from dau_fast.models import Classifier

COUNT, CLASSES = 24, ("a", "b", "c")


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def a_task() -> tuple[Classifier, Tensor, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    return Classifier(network), seeded(COUNT, 5), torch.arange(COUNT) % 3


def in_turn(size: int = 6) -> Iterator[Tensor]:
    """Batches 0..5, 6..11, ... for ever."""
    return itertools.cycle(torch.arange(COUNT).split(size))


def sgd(model: nn.Module) -> tuple[SGD, MultiStepLR]:
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return optimizer, MultiStepLR(optimizer, [4, 7])


def by_hand(
    model: Classifier, images: Tensor, labels: Tensor, steps: int, sign: float = 1
) -> dict[str, Tensor]:
    """SGD with momentum and weight decay, the learning rate a tenth after 4 and after 7 steps."""
    model.train()
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    batches = in_turn()
    for step in range(steps):
        index = next(batches)
        loss = sign * F.cross_entropy(model.network(images[index]), labels[index])
        gradients = torch.autograd.grad(loss, parameters)
        lr = 0.1 * 0.1 ** ((step >= 4) + (step >= 7))
        with torch.no_grad():
            for p, v, g in zip(parameters, velocity, gradients, strict=True):
                v.mul_(0.9).add_(g + 0.01 * p)
                p.sub_(lr * v)
    return model.state_dict()


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_training_equals_a_loop_written_by_hand(steps: int) -> None:
    model, images, labels = a_task()
    torch.manual_seed(1)
    expected = by_hand(copy.deepcopy(model), images, labels, steps)
    optimizer, scheduler = sgd(model)
    train(
        model,
        batches_of(Images(images, labels, CLASSES), in_turn()),
        steps=steps,
        optimizer=optimizer,
        scheduler=scheduler,
        seed=1,
    )
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=1e-5, atol=1e-6)


def test_training_minimises_the_loss_it_is_given() -> None:
    model, images, labels = a_task()
    torch.manual_seed(1)
    expected = by_hand(copy.deepcopy(model), images, labels, 3, sign=-1)
    optimizer, scheduler = sgd(model)
    train(
        model,
        batches_of(Images(images, labels, CLASSES), in_turn()),
        steps=3,
        optimizer=optimizer,
        scheduler=scheduler,
        loss=lambda logits, targets: -F.cross_entropy(logits, targets),
        seed=1,
    )
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=1e-5, atol=1e-6)


def test_training_takes_exactly_the_asked_for_steps_and_no_batch_more() -> None:
    model, images, labels = a_task()
    optimizer, scheduler = sgd(model)
    done: list[int] = []
    batches = batches_of(Images(images, labels, CLASSES), in_turn())
    train(
        model.eval(),
        batches,
        steps=7,
        optimizer=optimizer,
        scheduler=scheduler,
        on_step=lambda: done.append(1),
    )
    assert len(done) == 7
    assert scheduler.last_epoch == 7
    assert torch.equal(next(batches).indices, next(itertools.islice(in_turn(), 7, None)))
    assert model.training


def test_frozen_parameters_stay_as_they_are() -> None:
    model, images, labels = a_task()
    frozen = model.network[0].weight.requires_grad_(False)
    before, moving = frozen.clone(), model.head.weight.clone()
    optimizer, scheduler = sgd(model)
    batches = batches_of(Images(images, labels, CLASSES), in_turn())
    train(model, batches, steps=3, optimizer=optimizer, scheduler=scheduler)
    assert torch.equal(frozen, before)
    assert not torch.equal(model.head.weight, moving)


# ---- BatchNorm


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3, momentum=0.3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.05), nn.Flatten()
    )


def test_statistics_of_one_batch_are_its_exact_mean_and_unbiased_variance() -> None:
    model, images = convolutional(), 3 * seeded(10, 3, 6, 6) + 2
    model(seeded(4, 3, 6, 6))
    recompute_batchnorm(model, images.__getitem__, torch.arange(10), batch_size=10)
    columns = images.transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[0].running_mean, columns.mean(1))
    torch.testing.assert_close(model[0].running_var, columns.var(1))
    normalised = (images - columns.mean(1).view(-1, 1, 1)) / (
        columns.var(1, correction=0) + 1e-5
    ).sqrt().view(-1, 1, 1)
    inner = model[1](normalised).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[2].running_mean, inner.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[2].running_var, inner.var(1), rtol=1e-4, atol=1e-5)


def test_statistics_are_the_mean_over_batches_of_one_size_and_hold_nothing_of_what_was_before() -> None:
    images = seeded(12, 5)
    found = []
    for before in (0.0, 100.0):
        norm = nn.BatchNorm1d(5)
        norm.running_mean.fill_(before)
        recompute_batchnorm(norm, images.__getitem__, torch.arange(12), batch_size=4)
        torch.testing.assert_close(norm.running_mean, images.mean(0))
        variances = torch.stack([part.var(0) for part in images.split(4)])
        torch.testing.assert_close(norm.running_var, variances.mean(0))
        found.append(norm.running_mean.clone())
    assert torch.equal(*found)


def test_a_layer_that_is_used_twice_has_the_mean_over_all_its_calls() -> None:
    """As PyTorch's own plain mean, bit for bit."""
    images, found = seeded(12, 5), []
    for ours in (True, False):
        norm = nn.BatchNorm1d(5, momentum=0.1 if ours else None)
        model = nn.Sequential(norm, nn.Tanh(), norm)
        if ours:
            recompute_batchnorm(model, images.__getitem__, torch.arange(12), batch_size=4)
        else:
            for part in images.split(4):
                model.train()(part)
        found.append((norm.running_mean, norm.running_var))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_only_the_named_images_count() -> None:
    images = seeded(12, 5)
    norm = nn.BatchNorm1d(5)
    index = torch.tensor([1, 3, 8, 9])
    recompute_batchnorm(norm, images.__getitem__, index, batch_size=4)
    torch.testing.assert_close(norm.running_mean, images[index].mean(0))


@pytest.mark.parametrize("count", [6, 5], ids=["a batch of 4 and one of 2", "a batch of 4 and one of 1"])
def test_every_image_weighs_the_same_in_the_mean_also_where_batches_are_not_full(count: int) -> None:
    images = seeded(count, 5)
    images[-1] += 10
    norm = nn.BatchNorm1d(5)
    recompute_batchnorm(norm, images.__getitem__, torch.arange(count), batch_size=4)
    # Batches of 3 and 2 are as even as 5 images can be shared out.
    low, high = (images[:3].mean(0) + images[3:].mean(0)) / 2, images.mean(0)
    between = (norm.running_mean >= torch.minimum(low, high) - 1e-5) & (
        norm.running_mean <= torch.maximum(low, high) + 1e-5
    )
    assert between.all()


def test_statistics_are_not_thrown_away_where_one_image_is_all_there_is() -> None:
    norm = nn.BatchNorm1d(5)
    norm.running_mean.fill_(3)
    recompute_batchnorm(norm, seeded(1, 5).__getitem__, torch.arange(1), batch_size=4)
    assert (norm.running_mean != 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_momentum_mode_and_weights_are_as_before(training: bool) -> None:
    model = convolutional().train(training)
    parameters = [p.clone() for p in model.parameters()]
    recompute_batchnorm(model, seeded(10, 3, 6, 6).__getitem__, torch.arange(10), batch_size=5)
    assert (model[0].momentum, model[2].momentum) == (0.3, 0.05)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(p, q) for p, q in zip(parameters, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_parts_that_a_caller_put_into_another_mode_stay_in_it() -> None:
    model = convolutional().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    recompute_batchnorm(model, seeded(10, 3, 6, 6).__getitem__, torch.arange(10), batch_size=5)
    assert [module.training for module in model.modules()] == modes


def test_a_model_without_batchnorm_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False))

    def load(index: Tensor) -> Tensor:
        raise AssertionError("nothing to compute")

    recompute_batchnorm(model, load, torch.arange(10), batch_size=5)
    assert model.training
    assert model[2].momentum == 0.1
