"""Where images of a class that is gone go, and what is left of its row in the classifier layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from games import CLASSWISE
from torch import Tensor
from torch.nn import functional as F
from toys import ONE_CLASS, game_of, trained

from dau_fast.data.split import Forget
from dau_fast.engine.evaluation import predict
from dau_fast.methods.dau import game
from dau_fast.methods.dau.departure import (
    Departures,
    _leave_out,
    fit_temperature,
    join,
    level_gone,
    mark_gone,
    score,
)
from dau_fast.methods.dau.difficulty import PlainModel, draw_lesson, fit_plain_model
from dau_fast.methods.dau.shown import prepare_shown
from dau_fast.methods.task import Task
from dau_fast.models import Classifier
from dau_fast.prune import omp


def departures_of(task: Task, share: float) -> Departures:
    found = prepare_shown(task, replace(CLASSWISE, difficulty=False, plain_share=share)).departures
    assert found is not None
    return found


def fitted_temperature(task: Task, plain: PlainModel) -> float:
    validation = task.split.validation
    return fit_temperature(score(plain, task, validation), task.labels[validation], mark_gone(task))


def plain_model_of(task: Task) -> PlainModel:
    chance = torch.Generator().manual_seed(0)
    found = fit_plain_model(task.images, draw_lesson(task.split, chance), task.labels, 3, chance)
    assert found is not None
    return found


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_nothing_goes_to_a_class_that_is_gone(share: float) -> None:
    task = trained(ONE_CLASS)
    found = departures_of(task, share)
    assert found.targets.shape == (len(task.split.forget), 3)
    torch.testing.assert_close(found.targets.exp().sum(1), torch.ones(len(task.split.forget)))
    assert (found.targets.exp()[:, 2] == 0).all()
    assert (found.classes[task.split.forget] < 2).all()
    assert torch.equal(found.classes[task.split.retain], task.labels[task.split.retain])


def test_without_the_plain_model_they_go_where_the_original_would_put_them() -> None:
    task = trained(ONE_CLASS)
    logits = predict(task.original, task.images, task.split.forget).logits
    torch.testing.assert_close(departures_of(task, 0.0).targets.exp()[:, :2], logits[:, :2].softmax(1))


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_images_go_where_both_models_say_and_as_many_as_they_say_on_average(share: float) -> None:
    chance = torch.Generator().manual_seed(0)
    gone = torch.tensor([False, True, False, False])
    one, other = (_leave_out(3 * torch.randn(200, 4, generator=chance).double(), gone) for _ in range(2))
    found = join(one, other, share, gone)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(200).double())
    assert (found.exp()[:, 1] == 0).all()
    mean = (1 - share) * one.exp() + share * other.exp()
    torch.testing.assert_close(found.exp().mean(0), mean.mean(0), rtol=1e-3, atol=1e-4)
    scale = (found - 2 * ((1 - share) * one + share * other))[:, ~gone].diff(dim=1)
    torch.testing.assert_close(scale, scale[:1].expand_as(scale))  # one class to another, of every image


def test_with_the_plain_model_they_go_where_both_say() -> None:
    task = trained(ONE_CLASS)
    plain, forget, gone = plain_model_of(task), task.split.forget, mark_gone(task)
    temperature = fitted_temperature(task, plain)
    believed = _leave_out(plain(task.images.batch(forget)) / temperature, gone)
    expected = join(departures_of(task, 0.0).targets, believed, 0.3, gone)
    torch.testing.assert_close(departures_of(task, 0.3).targets.exp(), expected.exp())


def test_a_temperature_makes_validation_labels_likely() -> None:
    task = trained(ONE_CLASS)
    plain, validation = plain_model_of(task), task.split.validation
    scores, labels = plain(task.images.batch(validation))[:, :2], task.labels[validation]

    def loss(temperature: float) -> float:
        return float(F.cross_entropy(scores / temperature, labels))

    best = fitted_temperature(task, plain)
    assert loss(best) <= min(loss(best * factor) for factor in (0.8, 1.25, 4.0, 0.25))


def test_each_image_has_its_own_target() -> None:
    task = trained(ONE_CLASS)
    found, forget = departures_of(task, 0.5), task.split.forget
    order = torch.randperm(len(forget), generator=torch.Generator().manual_seed(3))
    assert torch.equal(found.look_up(forget[order]), found.targets[order])


def test_validation_says_as_much_of_a_class_as_goes_to_it() -> None:
    task = trained(ONE_CLASS)
    found, validation = departures_of(task, 0.5), task.split.validation
    labels, counts = task.labels[validation], found.counts[validation]
    said = torch.stack([counts[labels == label].sum() for label in (0, 1)]) / len(validation)
    torch.testing.assert_close(said, found.targets.exp().mean(0)[:2], rtol=1e-4, atol=1e-6)
    assert (found.counts[task.split.forget] == 1).all()


def test_few_images_are_not_all_that_is_learned_from() -> None:
    task = trained(ONE_CLASS)
    labels = task.labels[task.split.validation]
    kept = torch.cat([task.split.validation[labels == 0], task.split.validation[labels == 1][:1]])
    task = replace(task, split=replace(task.split, validation=kept))
    counts = departures_of(task, 0.5).counts[kept]
    assert counts[:-1].max() <= 1.5
    assert counts[-1] <= 10


def test_a_class_is_exposed_by_images_of_other_classes() -> None:
    task = trained(ONE_CLASS)
    with game_of(task, CLASSWISE) as players:
        retain, validation = players._show_margins()
    for found, index in ((retain, task.split.retain), (validation, task.split.validation)):
        log_p = predict(task.original, task.images, index).logits.double().log_softmax(1)
        own = log_p.gather(1, task.labels[index].unsqueeze(1)).squeeze(1)
        expected = own - torch.log(-torch.expm1(own))
        torch.testing.assert_close(found.sort().values.double(), expected.sort().values, rtol=1e-3, atol=1e-3)


# ---- what is left of a class


def logits_of(model: Classifier, task: Task) -> Tensor:
    return predict(model, task.images, task.split.train).logits


@pytest.mark.parametrize("bias", [True, False])
def test_of_a_class_that_is_gone_no_logit_tells_anything(bias: bool) -> None:
    task = trained(ONE_CLASS)
    model, gone = task.original, mark_gone(task)
    if not bias:
        model.head.register_parameter("bias", None)
    before = logits_of(model, task)
    level_gone(model, task, gone, most=10_000)
    after = logits_of(model, task)
    torch.testing.assert_close(after[:, :2], before[:, :2])
    if bias:
        assert after[:, 2].std() < 1e-5
    retain = predict(model, task.images, task.split.retain).logits
    torch.testing.assert_close(retain[:, 2].mean(), retain[:, :2].amin(1).mean(), rtol=1e-4, atol=1e-5)
    assert (retain.argmax(1) < 2).all()


def test_masked_weights_of_a_layer_without_bias_stay_zero() -> None:
    task = trained(ONE_CLASS)
    task.original.head.register_parameter("bias", None)
    masks = omp(task.original.network, 0.5, linear=True)
    masks.apply_(task.original.network)
    level_gone(task.original, replace(task, masks=masks), mark_gone(task), most=100)
    after = task.original.head.weight.clone()
    assert after[2].any()
    masks.apply_(task.original.network)
    assert torch.equal(task.original.head.weight, after)


def test_a_game_leaves_nothing_of_the_class_in_the_last_layer() -> None:
    task = trained(ONE_CLASS)
    model = game.unlearn(task, CLASSWISE).model
    assert (model.head.weight[2] == 0).all()
    assert logits_of(model, task)[:, 2].std() < 1e-5


def test_barlow_twins_pairs_by_where_the_class_goes() -> None:
    task = trained(ONE_CLASS)
    with game_of(task, replace(CLASSWISE, beta=0.1)) as players:
        _, forget, validation = next(players._batches).indices.chunk(3)
        departures = players.shown.departures
    assert departures is not None
    assert torch.equal(task.labels[validation], departures.classes[forget])


def test_where_one_class_stays_there_is_no_level() -> None:
    task = trained(Forget("two of three", indices=tuple(range(10))))
    before = logits_of(task.original, task)
    level_gone(task.original, task, torch.tensor([True, True, False]), most=100)
    assert torch.equal(logits_of(task.original, task), before)
