"""Rivals that give forget images other labels: which labels, what learns them, and steps written by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from by_hand import FORGET, ONE_CLASS, RETAIN, drawn, exact, flat, pixels_of, run, same, take_steps
from torch import Tensor, nn
from torch.nn import functional as F

from dau_fast.data.images import Images
from dau_fast.engine.batches import Batch
from dau_fast.engine.ranks import Ranks
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError
from dau_fast.methods import amun, boundary_expand, boundary_shrink
from dau_fast.methods.adversarial import Units, attack, fgsm, pgd
from dau_fast.methods.registry import get_method
from dau_fast.methods.saliency import keep_share, sum_gradients
from dau_fast.methods.task import Task
from dau_fast.models import Classifier
from dau_fast.prune import Masks

PLAIN = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}


def cross_entropy(task: Task, index: Tensor, labels: Tensor, model: Classifier) -> Tensor:
    return F.cross_entropy(model(task.images.batch(index)).logits, labels)


# ---- random labels


def test_random_labels_are_drawn_for_every_batch_and_each_epoch_ends_on_the_retain_set() -> None:
    task = exact()
    forget, retain = (
        drawn(task, f"rl {part}", 36, getattr(task.split, part)) for part in ("forget", "retain")
    )
    chance, losses, labels = task.generator("rl labels"), [], []
    for _ in range(2):
        labels.append(torch.randint(3, (36,), generator=chance))
        losses.append(partial(cross_entropy, task, next(forget), labels[-1]))
        for _ in range(RETAIN // 36):
            index = next(retain)
            losses.append(partial(cross_entropy, task, index, task.labels[index]))
    assert not torch.equal(*labels)
    expected = take_steps(task, losses, lr=0.1, momentum=0.9, weight_decay=0.01)
    found = run("rl", task, epochs=2, batch_size=36, lr=0.1, momentum=0.9, weight_decay=0.01)
    same(found.model, expected)
    assert [loop.loop for loop in found.loops] == ["rl forget", "rl retain"]


# ---- SalUn


def test_salun_moves_the_half_of_the_weights_with_the_largest_summed_gradients() -> None:
    task = exact()
    model = run("salun", task, weight_decay=0.1, lr=0.1).model
    images, labels = pixels_of(task, task.split.forget)
    before = dict(task.original.network.named_parameters())
    loss = F.cross_entropy(task.original(images).logits, labels)
    sizes = [slope.abs() for slope in torch.autograd.grad(loss, list(before.values()))]
    least = torch.cat([size.flatten() for size in sizes]).median()
    moved = 0
    for (name, weight), size in zip(model.network.named_parameters(), sizes, strict=True):
        assert torch.equal(weight[size <= least], before[name][size <= least]), name
        moved += int((weight != before[name]).sum())
    total = sum(size.numel() for size in sizes)
    assert 0.45 * total < moved <= total / 2  # a weight that leads to a dead unit does not move


def test_salun_with_all_weights_is_random_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    task = exact()
    monkeypatch.setattr(type(task), "generator", lambda task, purpose: torch.Generator().manual_seed(3))
    same(run("salun", task, share=1.0, **PLAIN).model, run("rl", task, **PLAIN).model)


def test_gradients_are_summed_over_batches_in_evaluation_mode() -> None:
    task = exact()
    index, weight = task.split.retain, task.original.head.weight
    expected = squares = torch.zeros_like(weight)
    for batch in index.split(50):
        (slope,) = torch.autograd.grad(cross_entropy(task, batch, task.labels[batch], task.original), weight)
        expected, squares = expected + slope, squares + slope**2
    torch.testing.assert_close(sum_gradients(task, index, 50)["3.weight"], expected)
    torch.testing.assert_close(sum_gradients(task, index, 50, torch.square)["3.weight"], squares)


def test_a_share_is_exact_and_pruned_weights_do_not_count() -> None:
    scores = {"a": torch.tensor([5.0, -4.0, 3.0, -2.0]), "b": torch.tensor([[1.0, -6.0]])}
    found = keep_share(scores, 0.5, None)
    assert found["a"].tolist() == [True, True, False, False]
    assert found["b"].tolist() == [[False, True]]
    pruned = Masks({"a": torch.tensor([False, False, True, True])})
    found = keep_share(scores, 0.5, pruned)
    assert found["a"].tolist() == [False, False, True, False]
    assert found["b"].tolist() == [[False, True]]
    assert scores["a"][0] == 5


@pytest.mark.parametrize("name", ["salun", "sfron"])
def test_weights_are_not_chosen_where_models_are_shared_out(name: str) -> None:
    task, method = exact(), get_method(name)
    given = replace(task, runtime=Runtime(ranks=Ranks(0, 2), shard=True))
    with pytest.raises(UserError, match="where `shard=True` shares these out: leave `shard` out"):
        method.check(given, method.resolve(given))
    method.check(task, method.resolve(task))


# ---- adversarial neighbours


def linear(task: Task) -> Task:
    """The task with a known network: an image is of the class whose number is largest."""
    layer = nn.Linear(6, 3, bias=False).double()
    layer.weight.data = 2 * torch.eye(3, 6, dtype=torch.float64)
    return replace(task, original=Classifier(layer).eval())


POINTS = torch.tensor([[1.0, 0.9, 0, 0, 0, 0], [0.2, 0.3, 1.0, 0, 0, 0], [0.1, 3.0, 0, 0, 0, 0]])
LABELS = torch.tensor([0, 2, 1])


def test_fgsm_moves_every_pixel_by_the_bound_towards_other_classes() -> None:
    model, units = linear(exact()).original, Units.of(Images(POINTS, LABELS, ("a", "b", "c")))
    moved = fgsm(model, POINTS.double(), LABELS, 0.1, units)
    assert torch.allclose(moved[0], torch.tensor([0.9, 1.0, 0.1, 0, 0, 0]).double())
    assert model(moved).logits.argmax(1).tolist() == [1, 2, 1], "the last two are too far from a boundary"


def test_pgd_stops_soon_after_the_nearest_boundary() -> None:
    model, units = linear(exact()).original, Units.of(Images(POINTS, LABELS, ("a", "b", "c")))
    images = POINTS.double()
    moved, classes = pgd(model, images, LABELS, 0.04, 50, units)
    assert classes.tolist() == [1, 1, 0]
    assert torch.equal(model(moved).logits.argmax(1), classes)
    # From x0 > x1 the boundary is (x0 - x1) / sqrt(2) away.
    least = torch.tensor([0.1, 0.7, 2.9]).double() / 2**0.5
    lengths = (moved - images).norm(dim=1)
    assert (lengths >= least - 1e-12).all()
    assert (lengths <= 2 * least).all()


def test_what_is_wrong_already_is_its_own_neighbour() -> None:
    model, units = linear(exact()).original, Units.of(Images(POINTS, LABELS, ("a", "b", "c")))
    wrong = torch.tensor([1, 0, 2])
    moved, classes = pgd(model, POINTS.double(), wrong, 0.04, 50, units)
    assert torch.equal(moved, POINTS.double())
    assert classes.tolist() == [0, 2, 1]


def test_what_nothing_turns_has_its_second_class() -> None:
    layer = nn.Linear(6, 3).double()
    layer.weight.data.zero_()
    layer.bias.data = torch.tensor([0.0, 2.0, 1.0]).double()
    units = Units.of(Images(POINTS, LABELS, ("a", "b", "c")))
    moved, classes = pgd(Classifier(layer), POINTS.double(), torch.ones(3).long(), 0.04, 2, units)
    assert torch.equal(moved, POINTS.double())
    assert classes.tolist() == [2, 2, 2]


def test_normalised_images_are_moved_in_units_of_pixels_and_stay_pixels() -> None:
    pixels = torch.tensor([0, 128, 250], dtype=torch.uint8).view(3, 1, 1, 1)
    images = Images(
        pixels, torch.tensor([0, 1, 1]), ("a", "b"), mean=torch.tensor([0.5]), std=torch.tensor([0.25])
    )
    layer = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    layer[1].weight.data = torch.tensor([[-1.0], [1.0]])
    moved = fgsm(
        Classifier(layer), images.batch(torch.arange(3)), torch.tensor([0, 1, 0]), 0.1, Units.of(images)
    )
    back = (moved * 0.25 + 0.5).flatten().tolist()
    assert back == pytest.approx([0.1, 128 / 255 - 0.1, 1.0])


# ---- boundary shrink and expand


def test_boundary_shrink_fits_the_neighbours_labels() -> None:
    task = exact()
    images, labels = pixels_of(task, task.split.forget)
    inputs = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(task.original(inputs).logits, labels), inputs)
    expected = task.original(images + 1.5 * slope.sign()).logits.argmax(1)
    assert (expected != labels).float().mean() > 0.5
    assert torch.equal(boundary_shrink.find_neighbours(task, 1.5), expected)
    step = take_steps(task, [partial(cross_entropy, task, task.split.forget, expected)], lr=0.1)
    same(run("boundary_shrink", task, bound=1.5, epochs=1, batch_size=FORGET, **PLAIN).model, step)


@pytest.mark.parametrize("head", ["last", "all"])
def test_widening_adds_a_class_and_changes_no_other(head: str) -> None:
    task = exact()
    model = task.original if head == "last" else linear(task).original
    images = task.images.batch(task.split.test)
    wide = boundary_expand.widen(model, 1).eval()
    logits = wide(images).logits
    assert logits.shape[1] == 4
    torch.testing.assert_close(logits[:, :3], model(images).logits)
    torch.testing.assert_close(wide(images).features, model(images).features)
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.data.zero_()
    boundary_expand.narrow(wide, other)
    same(other, model)
    assert model.head.out_features == 3
    again = boundary_expand.widen(model, 1).head.weight
    assert torch.equal(again, wide.head.weight)


def test_boundary_expand_puts_the_forget_set_into_a_class_that_is_dropped() -> None:
    task = exact()
    wide = boundary_expand.widen(task.original, task.derive_seed("boundary_expand"))
    given = replace(task, original=wide)
    shadow = torch.full((FORGET,), 3)
    expected = take_steps(given, [partial(cross_entropy, task, task.split.forget, shadow)], lr=0.1)
    found = run("boundary_expand", task, epochs=1, batch_size=FORGET, **PLAIN).model
    assert found.head.out_features == 3
    torch.testing.assert_close(found.head.weight, expected.head.weight[:3])
    torch.testing.assert_close(found.network[0].weight, expected.network[0].weight)
    images, labels = pixels_of(task, task.split.forget)
    before, after = (F.cross_entropy(m.eval()(images).logits, labels) for m in (task.original, found))
    assert after > before


def test_masks_of_a_classifier_layer_keep_the_new_class() -> None:
    masks = Masks({"0.weight": torch.rand(32, 6) < 0.5, "3.weight": torch.rand(3, 32) < 0.5})
    found = boundary_expand.widen_masks(masks, boundary_expand.widen(exact().original, 0))
    assert torch.equal(found["0.weight"], masks["0.weight"])
    assert torch.equal(found["3.weight"][:3], masks["3.weight"])
    assert found["3.weight"][3].all()
    assert boundary_expand.widen_masks(None, exact().original) is None


# ---- AMUN


def test_half_of_the_forget_images_are_shown_as_their_neighbours() -> None:
    task = exact(ONE_CLASS)
    split = task.split
    neighbours, classes = (
        -torch.arange(len(split.forget)).double()[:, None].expand(-1, 6),
        torch.zeros(1000).long(),
    )
    index = torch.cat([split.retain, split.forget, split.forget])
    show = amun.mix_in(task, len(index), neighbours, classes)
    images, labels = show(Batch(*pixels_of(task, index), index))
    plain, of_plain = pixels_of(task, index)
    retained = len(split.retain)
    assert torch.equal(images[:retained], plain[:retained])
    assert torch.equal(labels[:retained], of_plain[:retained])
    places = torch.arange(len(split.forget)).repeat(2)
    swapped = (images[retained:] == neighbours[places]).all(1)
    assert torch.equal(images[retained:][~swapped], plain[retained:][~swapped])
    assert torch.equal(labels[retained:] == 1, ~swapped)
    assert 0.3 < swapped.float().mean() < 0.7


def test_amun_fits_retain_forget_and_neighbours_together() -> None:
    task = exact(network=flat)
    split = task.split
    images, labels = pixels_of(task, split.forget)
    units = Units.of(task.images)
    neighbours, classes = pgd(task.original, images, labels, 0.04, 50, units)
    found, of_found = attack(
        task, split.forget, partial(pgd, task.original, radius=0.04, steps=50, units=units)
    )
    torch.testing.assert_close(found, neighbours)
    assert torch.equal(of_found, classes)
    assert (classes != labels).all()
    together = torch.cat([split.retain, split.forget, split.forget])
    index = next(drawn(task, "amun", len(together), together))
    show = amun.mix_in(task, len(together), neighbours, classes)
    shown, targets = show(Batch(*pixels_of(task, index), index))
    step = take_steps(task, [lambda model: F.cross_entropy(model(shown).logits, targets)], lr=0.1)
    same(run("amun", task, epochs=1, batch_size=len(together), milestones=(), **PLAIN).model, step)
