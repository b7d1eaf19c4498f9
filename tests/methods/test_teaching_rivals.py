"""SCRUB, bad teacher and SFRon: the teachers' roles, whose turn it is, and steps written by hand."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from by_hand import FORGET, RETAIN, drawn, exact, pixels_of, run, same, take_steps
from torch import Tensor
from torch.nn import functional as F

from dau_fast.engine.ranks import Ranks
from dau_fast.errors import UserError
from dau_fast.methods import bad_teacher, scrub, sfron
from dau_fast.methods.objectives import alternate, divergence, frozen
from dau_fast.methods.task import Task
from dau_fast.models import Classifier

PLAIN = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}


def kl(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """PyTorch's, as the authors of SCRUB and of bad teaching use it."""
    log_q, p = (logits / temperature).log_softmax(1), (target / temperature).softmax(1)
    return F.kl_div(log_q, p, reduction="batchmean")


# ---- what they share


def test_the_divergence_is_of_the_softened_outputs() -> None:
    logits, target = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = divergence(logits, target, 3.0)
    assert found.shape == (5,)
    torch.testing.assert_close(found.mean(), kl(logits, target, 3.0))
    assert divergence(target, target).abs().max() < 1e-15


def test_a_frozen_teacher_is_a_copy_that_learns_nothing() -> None:
    task = exact()
    images = task.images.batch(task.split.test)
    before = task.original(images).logits.detach()
    model = copy.deepcopy(task.original).train()
    with frozen(task, model) as teacher:
        model.head.weight.data.zero_()
        found = teacher(images)
    assert torch.equal(found, before)
    assert not found.requires_grad
    assert model.training


def test_turns_alternate_by_epochs() -> None:
    assert alternate(2, 1, 3) == [0, 1, 1, 1, 0, 1, 1, 1]


# ---- SCRUB


def test_scrub_begins_with_max_epochs_and_ends_with_min_epochs() -> None:
    task = exact()
    config = scrub.ScrubConfig(epochs=3, max_epochs=2, batch_size=54, forget_batch_size=12)
    assert scrub.plan_turns(task, config) == 2 * [0, 0, 0, 1, 1] + [1, 1]


def test_scrub_leaves_the_teacher_on_forget_and_keeps_to_it_on_retain() -> None:
    task = exact()
    forget, retain = (pixels_of(task, index) for index in (task.split.forget, task.split.retain))
    teacher = {len(images): task.original(images).logits.detach() for images, _ in (forget, retain)}

    def max_loss(model: Classifier) -> Tensor:
        return -16 * kl(model(forget[0]).logits, teacher[FORGET], 4.0)

    def min_loss(model: Classifier) -> Tensor:
        logits = model(retain[0]).logits
        return 0.9 * F.cross_entropy(logits, retain[1]) + 0.2 * 16 * kl(logits, teacher[RETAIN], 4.0)

    expected = take_steps(task, [max_loss, min_loss, min_loss], lr=0.1, momentum=0.9, weight_decay=0.01)
    found = run(
        "scrub", task, epochs=2, max_epochs=1, batch_size=RETAIN, forget_batch_size=FORGET, gamma=0.9,
        alpha=0.2, temperature=4.0, lr=0.1, momentum=0.9, weight_decay=0.01,
    )  # fmt: skip
    same(found.model, expected)


def test_scrub_without_max_steps_and_distillation_is_fine_tuning() -> None:
    task = exact()
    once = {"epochs": 1, "batch_size": RETAIN, **PLAIN}
    same(
        run("scrub", task, max_epochs=0, alpha=0.0, gamma=1.0, **once).model,
        run("ft", task, milestones=(), **once).model,
    )


# ---- bad teacher


def test_the_untrained_network_teaches_forget_and_the_original_retain() -> None:
    task = exact()
    split = task.split
    bad = bad_teacher.forget_all(task.original, task.derive_seed("bad teacher")).eval()
    index = next(drawn(task, "bad_teacher", FORGET + RETAIN, torch.cat([split.retain, split.forget])))
    images = task.images.batch(index)
    forgotten = torch.isin(index, split.forget)
    target = torch.where(forgotten[:, None], bad(images).logits, task.original(images).logits).detach()
    model = copy.deepcopy(task.original).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    kl(model(images).logits, target).backward()
    optimizer.step()
    found = run("bad_teacher", task, retain_share=1.0, batch_size=FORGET + RETAIN, lr=0.01).model
    same(found, model)


def test_bad_teaching_takes_a_sample_of_the_retain_set() -> None:
    task = exact()
    for share, images in ((0.25, 63), (1.0, 144)):
        config = bad_teacher.BadTeacherConfig(retain_share=share)
        sample = bad_teacher.draw_lesson(task, config)
        assert len(sample) == len(set(sample.tolist())) == images
        assert torch.isin(task.split.forget, sample).all()
        assert torch.isin(sample, task.split.train).all()


def test_an_untrained_copy_knows_nothing_and_follows_its_seed() -> None:
    task = exact()
    first, again, other = (bad_teacher.forget_all(task.original, seed) for seed in (0, 0, 1))
    same(first, again)
    for weight, theirs, was in zip(
        first.network[0].parameters(), other.network[0].parameters(), task.original.network[0].parameters(),
        strict=True,
    ):  # fmt: skip
        assert not torch.equal(weight, theirs)
        assert not torch.equal(weight, was)
    norm = first.network[1]
    assert (norm.running_mean == 0).all()
    assert (norm.weight == 1).all()


def test_parameters_without_a_layer_of_their_own_are_drawn_as_wide_as_they_are() -> None:
    model = Classifier(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    model.network.token = torch.nn.Parameter(5 + 3 * torch.randn(10_000))
    found = bad_teacher.forget_all(model, 0).network.token
    assert not torch.equal(found, model.network.token)
    assert found.mean().item() == pytest.approx(5, abs=0.2)
    assert found.std().item() == pytest.approx(3, abs=0.2)


# ---- SFRon


def test_an_ascent_comes_before_every_few_descents() -> None:
    assert sfron.plan_turns(5, 2) == [0, 1, 1, 0, 1, 1, 0, 1]


def test_images_are_weighed_by_their_losses() -> None:
    losses = torch.tensor([1.0, 4.0])
    # Weights 1 and 1/2, of mean 3/4: (1 + 2) / 2 over that.
    assert sfron.weigh(losses, 0.5, Ranks()).item() == pytest.approx(2.0)
    assert sfron.weigh(losses, 0.0, Ranks()).item() == pytest.approx(2.5)
    assert sfron.weigh(torch.tensor([0.0, 1.0]), 0.5, Ranks()).isfinite()


def test_the_cosine_falls_from_one_to_zero() -> None:
    assert [sfron.half_cosine(step, 2) for step in range(3)] == pytest.approx([1, 0.5, 0])


def test_salient_weights_have_larger_squared_gradients_on_forget_than_on_retain() -> None:
    task = exact()
    squares = []
    for index in (task.split.forget, task.split.retain):
        batches = index.split(50)
        total = torch.zeros(3, 32, dtype=torch.float64)
        for batch in batches:
            images, labels = pixels_of(task, batch)
            loss = F.cross_entropy(task.original(images).logits, labels)
            total += torch.autograd.grad(loss, task.original.head.weight)[0] ** 2
        squares.append(total / len(batches))
    for threshold in (1.0, 4.0):
        config = sfron.SFRonConfig(batch_size=50, threshold=threshold)
        found = sfron.find_salient(task, config)["3.weight"]
        assert torch.equal(found, squares[0] >= threshold * squares[1])
        assert 0 < found.sum() < found.numel()


def ascent(task: Task, strength: float, power: float, model: Classifier) -> Tensor:
    images, labels = pixels_of(task, task.split.forget.repeat(RETAIN // FORGET))
    losses = F.cross_entropy(model(images).logits, labels, reduction="none")
    weights = losses.detach() ** -power
    return -strength * (weights * losses).sum() / weights.sum()


def descent(task: Task, model: Classifier) -> Tensor:
    images, labels = pixels_of(task, task.split.retain)
    return F.cross_entropy(model(images).logits, labels)


SFRON = {"epochs": 2, "forget_every": 1, "forget_weight": 2.0, "max_norm": 0.05, "batch_size": RETAIN}


@pytest.mark.parametrize("dual", [False, True])
def test_sfron_ascends_by_salient_weights_alone(dual: bool) -> None:
    task = exact()
    config = sfron.SFRonConfig(**SFRON)
    salient = sfron.find_salient(task, config)
    model = copy.deepcopy(task.original).train()
    down = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    up = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.03) if dual else down
    for share in (1.0, 0.5):
        for optimizer, rate in ((down, 0.1), (up, 0.02 if dual else 0.1)):
            optimizer.param_groups[0]["lr"] = share * rate
        for optimizer, loss in (
            (up, partial(ascent, task, share * 2.0, 0.5)),
            (down, partial(descent, task)),
        ):
            optimizer.zero_grad()
            loss(model).backward()
            if loss.func is ascent:
                for name, weight in model.network.named_parameters():
                    weight.grad *= salient[name]
                assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05, (
                    "or clipping is not tested"
                )
            optimizer.step()
    found = run(
        "sfron", task, **SFRON, lr=0.1, momentum=0.9, weight_decay=0.01, dual=dual, forget_lr=0.02,
        forget_weight_decay=0.03,
    )  # fmt: skip
    same(found.model, model)


def test_sfron_without_ascent_is_fine_tuning_along_a_cosine() -> None:
    task = exact()
    found = run("sfron", task, **SFRON | {"forget_weight": 0.0, "epochs": 1}, **PLAIN).model
    # The ascent's pass leaves its mark on BatchNorm's statistics, and there alone.
    expected = take_steps(task, [partial(descent, task)], lr=0.1)
    for weight, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, theirs)


def test_milestones_are_not_for_sfron() -> None:
    with pytest.raises(UserError, match="the learning rates of sfron fall as half a cosine: leave it out"):
        sfron.SFRonConfig(milestones=(0.5,))
    with pytest.raises(UserError, match="`dual=1`: expected True or False"):
        sfron.SFRonConfig(dual=1)
