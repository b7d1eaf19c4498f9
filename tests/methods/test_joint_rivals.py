"""Rivals with one loss on batches of one or two sets, against the same step by plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from by_hand import FORGET, ONE_CLASS, RETAIN, exact, flat, pixels_of, run, same, take_steps
from torch import Tensor
from torch.nn import functional as F

from dau_fast.errors import UserError
from dau_fast.methods.regun import find_references
from dau_fast.methods.task import Task
from dau_fast.methods.weight_noise import disturb
from dau_fast.models import Classifier

ONCE = {"epochs": 1, "batch_size": RETAIN, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.01}
NOTHING = 1e-300  # a learning rate of which float64 sees nothing; 0 is none


def on_both(
    task: Task, loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> Callable[[Classifier], Tensor]:
    """`loss` of the logits and labels of the retain set, and of the forget set as often as fits beside it."""
    split = task.split
    images, labels = pixels_of(task, torch.cat([split.retain, *[split.forget] * (RETAIN // FORGET)]))

    def found(model: Classifier) -> Tensor:
        logits = model(images).logits
        return loss(logits[:RETAIN], labels[:RETAIN], logits[RETAIN:], labels[RETAIN:])

    return found


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_neggrad_descends_on_retain_and_ascends_on_forget(weight: float) -> None:
    task = exact()

    def loss(retain: Tensor, of_retain: Tensor, forget: Tensor, of_forget: Tensor) -> Tensor:
        return F.cross_entropy(retain, of_retain) - weight * F.cross_entropy(forget, of_forget)

    expected = take_steps(task, [on_both(task, loss)], lr=0.1, weight_decay=0.01)
    same(run("neggrad", task, weight=weight, **ONCE).model, expected)


def test_the_uniform_target_is_every_class_alike() -> None:
    task = exact()

    def loss(retain: Tensor, of_retain: Tensor, forget: Tensor, _: Tensor) -> Tensor:
        thirds = torch.full_like(forget, 1 / 3)
        return F.cross_entropy(retain, of_retain) + 0.3 * F.cross_entropy(forget, thirds)

    expected = take_steps(task, [on_both(task, loss)], lr=0.1, weight_decay=0.01)
    same(run("uniform", task, weight=0.3, **ONCE).model, expected)


def test_regun_pulls_forget_images_to_held_out_images_of_their_class() -> None:
    task = exact()
    references = find_references(task)

    def loss(retain: Tensor, of_retain: Tensor, forget: Tensor, of_forget: Tensor) -> Tensor:
        apart = F.kl_div(forget.log_softmax(1), references[of_forget], reduction="batchmean")
        return F.cross_entropy(retain, of_retain) + 0.3 * apart

    expected = take_steps(task, [on_both(task, loss)], lr=0.1, weight_decay=0.01)
    same(run("regun", task, weight=0.3, **ONCE).model, expected)


def test_references_are_mean_probabilities_of_the_validation_images_of_a_class() -> None:
    task = exact()
    images, labels = pixels_of(task, task.split.validation)
    probabilities = task.original(images).logits.softmax(1)
    for label, reference in enumerate(find_references(task)):
        torch.testing.assert_close(reference, probabilities[labels == label].mean(0))


def test_a_class_without_held_out_images_is_referred_to_all_of_them() -> None:
    task = exact(ONE_CLASS)
    images, labels = pixels_of(task, task.split.validation)
    assert 1 not in labels
    expected = task.original(images).logits.softmax(1).mean(0)
    torch.testing.assert_close(find_references(task)[1], expected)


@pytest.mark.parametrize(("name", "off"), [
    ("neggrad", {"weight": 0}), ("uniform", {"weight": 0}), ("regun", {"weight": 0}),
    ("l1_sparse", {"alpha": 0}), ("noise", {"noise": 0}),
])  # fmt: skip
def test_without_its_own_term_each_is_fine_tuning(name: str, off: dict[str, float]) -> None:
    task = exact(network=flat)
    tuned = run("ft", task, milestones=(), **ONCE).model
    same(run(name, task, **ONCE, **off).model, tuned)


def test_the_l1_penalty_falls_linearly_over_the_steps() -> None:
    task = exact()
    images, labels = pixels_of(task, task.split.retain)

    def loss(alpha: float) -> Callable[[Classifier], Tensor]:
        def found(model: Classifier) -> Tensor:
            size = sum(weight.abs().sum() for weight in model.parameters())
            return F.cross_entropy(model(images).logits, labels) + alpha * size

        return found

    steps = [loss(0.02 * left / 4) for left in (4, 3, 2, 1)]
    expected = take_steps(task, steps, lr=0.1, momentum=0.9, weight_decay=0.01)
    again = ONCE | {"epochs": 4, "momentum": 0.9}
    same(run("l1_sparse", task, alpha=0.02, **again).model, expected)


def test_the_l1_penalty_makes_weights_small() -> None:
    task = exact()
    small, large = (
        run("l1_sparse", task, alpha=alpha, batch_size=32).model.head.weight for alpha in (0.1, 0.0)
    )
    assert small.abs().sum() < 0.7 * large.abs().sum()


def test_noise_is_as_wide_as_asked_for_beside_each_tensor() -> None:
    model = Classifier(torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.Linear(100, 1)))
    before = [weight.detach().clone() for weight in model.parameters()]
    disturb(model, 0.8, torch.Generator().manual_seed(0))
    for weight, was in zip(model.parameters(), before, strict=True):
        moved = weight.detach() - was
        if weight.numel() == 1:
            assert (moved == 0).all()
        elif weight.numel() >= 100:
            assert moved.std() / was.std() == pytest.approx(0.8, rel=0.25)
            assert abs(moved.mean()) < 0.3 * was.std()
    moved = model.network[0].weight.detach() - before[0]
    assert moved.std() / before[0].std() == pytest.approx(0.8, rel=0.02)


def test_noise_is_what_recovery_begins_at() -> None:
    task = exact()
    found = run("noise", task, noise=0.5, **ONCE | {"lr": NOTHING}).model
    again = run("noise", task, noise=1.0, **ONCE | {"lr": NOTHING}).model
    for weight, twice, was in zip(
        found.parameters(), again.parameters(), task.original.parameters(), strict=True
    ):
        torch.testing.assert_close(2 * (weight - was), twice - was)
        assert not torch.equal(weight, was)


def test_weights_of_terms_are_checked() -> None:
    task = exact()
    for name, asked in {
        "neggrad": {"weight": -0.1}, "uniform": {"weight": float("nan")}, "regun": {"weight": "1"},
        "l1_sparse": {"alpha": -1}, "noise": {"noise": -0.5},
    }.items():  # fmt: skip
        field = next(iter(asked))
        with pytest.raises(UserError, match=f"`{field}={asked[field]}`: expected a number from 0 up"):
            run(name, task, **asked)
