"""Whole audits of networks that train in a moment: retrained ones pass, original and mere new head fail."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from dau_fast.audits.catalogue import find_audits
from dau_fast.audits.comparing import Context
from dau_fast.audits.evidence import Evidence, Scene, examine
from dau_fast.audits.verdicts import Audited, audit_models
from dau_fast.config import AuditConfig, TrainingRecipe
from dau_fast.data.images import Images
from dau_fast.data.split import Forget, hold_out, make_split
from dau_fast.engine.chance import derive_seed
from dau_fast.errors import UserError
from dau_fast.methods import original, retrain
from dau_fast.methods.task import Task
from dau_fast.models import Classifier

INPUTS, REFERENCES = 12, 7
CONFIG = AuditConfig(relearning_lr=0.05, relearning_steps=40, noisy_copies=5)
REPRESENTATION = ("head_accuracy", "information", "relearning")


def points(noise: float) -> Images:
    """Four normal distributions; a share `noise` of labels is drawn anew and can only be memorised."""
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(360) % 4
    places = torch.randn(360, INPUTS, generator=chance) + 2 * torch.eye(4, INPUTS)[labels]
    drawn = torch.rand(360, generator=chance) < noise
    labels = torch.where(drawn, torch.randint(4, (360,), generator=chance), labels)
    return Images(places, labels, tuple("abcd"))


def narrow(seed: int) -> Classifier:
    """Three features for four classes: what a network was not taught does not fit in."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide = [nn.Linear(INPUTS, 64), nn.BatchNorm1d(64), nn.ReLU()]
        features = [nn.Linear(64, 3), nn.BatchNorm1d(3), nn.ReLU()]
        return Classifier(nn.Sequential(*wide, *features, nn.Linear(3, 4)))


@dataclass(frozen=True)
class Trained:
    """An original and retrained models, and what was seen of each."""

    task: Task
    scene: Scene
    original: Evidence
    retrained: list[Evidence]

    @property
    def context(self) -> Context:
        return Context([self.original], self.scene.forget_counts, self.scene.config)

    def look(self, model: Classifier) -> Evidence:
        return examine(model, self.scene, 100 - self.original.measures.ua)


def train(forget: Forget, noise: float) -> Trained:
    images = points(noise)
    roles = hold_out(images.labels, None, 0, validation_share=0.2, test_share=0.3)
    split = make_split(roles, images.labels, forget, 0)
    task = Task(images, split, 0, narrow(0), narrow, TrainingRecipe(epochs=40, batch_size=32, lr=0.1))
    original.train(task)
    scene = Scene(images, split, 0, CONFIG)
    before = examine(task.original.eval(), scene, 100.0)
    made = Trained(task, scene, before, [])
    for i in range(REFERENCES):
        seeded = replace(task, seed=derive_seed(0, f"reference {i}"))
        made.retrained.append(made.look(retrain.unlearn(seeded, task.recipe).model.eval()))
    return made


@pytest.fixture(scope="module")
def one_class() -> Trained:
    return train(Forget("class:3", label=3), 0.0)


@pytest.fixture(scope="module")
def memorised() -> Trained:
    return train(Forget("random:0.2", fraction=0.2), 0.5)


@pytest.fixture(params=["one_class", "memorised"])
def trained(request: pytest.FixtureRequest) -> Trained:
    return request.getfixturevalue(request.param)


def audit(audited: list[Evidence], references: list[Evidence], trained: Trained) -> Audited:
    return audit_models(audited, references, trained.context)


def test_retrained_models_pass_their_own_audits(trained: Trained) -> None:
    """Of seven, one is the most extreme of all; another one or two may be called so, as is stated."""
    told_apart = 0
    for i, one in enumerate(trained.retrained):
        found = audit([one], trained.retrained[:i] + trained.retrained[i + 1 :], trained)
        told_apart += not found.verdict.inside
        assert found.verdict.false_alarm_rate == pytest.approx(1 / REFERENCES)
        assert found.verdict.outside < 2.5 * found.verdict.expected
    assert told_apart <= 3


def test_the_original_fails(trained: Trained) -> None:
    found = audit([trained.original], trained.retrained, trained)
    assert not found.verdict.inside
    assert found.verdict.outside > 15
    for name in ("ua", "gap_to_mean", "margin_distance_forget", "rmia_auc", "rmia_online_auc"):
        assert found.audits[name].outside, name
    assert {name: kept.value for name, kept in found.originals.items()} == {
        name: kept.value for name, kept in found.audits.items()
    }


def test_a_new_head_alone_passes_by_its_rates_and_fails_by_its_features(one_class: Trained) -> None:
    model = copy.deepcopy(one_class.task.original)
    with torch.no_grad():
        model.head.weight[3], model.head.bias[3] = 0, -9
    found = audit([one_class.look(model)], one_class.retrained, one_class)
    assert not found.verdict.inside
    for name in ("ua", "ra", "ta", "attack_confidence", "gap_to_mean"):
        assert not found.audits[name].outside, name
    for name in REPRESENTATION:
        assert found.audits[name].outside, name
    assert found.index == pytest.approx(1)


def test_the_index_is_near_0_for_a_retrained_model(one_class: Trained) -> None:
    found = audit(one_class.retrained[:1], one_class.retrained[1:], one_class)
    assert found.index == pytest.approx(0, abs=0.2)


def test_a_constant_shift_of_margins_shows_with_its_sign(memorised: Trained) -> None:
    one = memorised.retrained[0]
    shifted = replace(one, margins={name: values + 30 for name, values in one.margins.items()})
    found = audit([shifted], memorised.retrained[1:], memorised)
    before = audit([one], memorised.retrained[1:], memorised)
    for name in ("forget", "retain", "validation"):
        moved = found.audits[f"margin_shift_{name}"].value - before.audits[f"margin_shift_{name}"].value
        assert moved == pytest.approx(30)
        assert found.audits[f"margin_distance_{name}"].outside


def test_audits_of_distributions_need_several_models_and_say_so(memorised: Trained) -> None:
    found = audit(memorised.retrained[:1], memorised.retrained[1:], memorised)
    assert {name for name in found.skipped if not name.startswith(("klom", "ulira"))} == {
        "forgetting_quality", "challenge_score",
    }  # fmt: skip
    assert "needs 3 audited models" in found.skipped["ulira_auc"]
    assert set(found.skipped) | set(found.audits) == set(find_audits())


def noisy_copies(one: Evidence, count: int, seed: int, shift: float = 0.0) -> list[Evidence]:
    """Models whose margins on the forget set vary around those of `one`, by 1 nat."""
    chance = np.random.default_rng(seed)
    return [
        replace(
            one,
            margins={
                name: values + chance.normal(shift if name == "forget" else 0, 1, len(values))
                for name, values in one.margins.items()
            },
        )
        for _ in range(count)
    ]


def test_several_models_are_audited_as_distributions(memorised: Trained) -> None:
    references = noisy_copies(memorised.retrained[0], 12, 0)
    same = audit(noisy_copies(memorised.retrained[0], 4, 1), references, memorised)
    moved = audit(noisy_copies(memorised.retrained[0], 4, 2, shift=3.0), references, memorised)
    assert same.skipped == {}
    assert not {name for name, kept in same.originals.items() if name.startswith(("klom", "ulira"))}
    for name in ("klom_forget_mean", "klom_forget_p95", "ulira_accuracy", "ulira_auc", "forgetting_quality"):
        assert moved.audits[name].outside, name
    assert not moved.audits["klom_retain_mean"].value > 2 * same.audits["klom_retain_mean"].value
    # Shifted by 3 of a spread of 1: the closed form is 4.5, which estimates from few models exceed.
    assert moved.audits["klom_forget_mean"].value > 3
    assert same.audits["ulira_accuracy"].value == pytest.approx(50, abs=8)


def test_too_few_references_are_refused_in_one_line(memorised: Trained) -> None:
    with pytest.raises(UserError, match="1 references for 1 audited models: expected at least 2"):
        audit(memorised.retrained[:1], memorised.retrained[1:2], memorised)
    with pytest.raises(UserError, match="expected at least 6"):
        audit(memorised.retrained[:3], memorised.retrained[3:], memorised)


def test_the_same_is_seen_again_and_nothing_of_the_model_changes(memorised: Trained) -> None:
    model = memorised.task.original
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = memorised.look(model)
    assert again.relearning == 0
    for name, values in memorised.original.margins.items():
        np.testing.assert_array_equal(again.margins[name], values)
    np.testing.assert_array_equal(again.noisy, memorised.original.noisy)
    assert again.measures == memorised.original.measures
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_look_runs_on_the_device(device: torch.device) -> None:
    images = points(0.0).to(device)
    roles = hold_out(images.labels, None, 0, validation_share=0.2, test_share=0.3)
    split = make_split(roles, images.labels, Forget("class:3", label=3), 0).to(device)
    found = examine(narrow(0).to(device), Scene(images, split, 0, CONFIG), 90.0)
    assert {name: len(values) for name, values in found.margins.items()} == {
        name: len(getattr(split, name)) for name in ("forget", "retain", "validation", "test")
    }
    assert all(np.isfinite(values).all() for values in (*found.margins.values(), found.noisy))


def test_sets_that_are_large_are_looked_at_in_part() -> None:
    images = points(0.0)
    roles = hold_out(images.labels, None, 0, validation_share=0.2, test_share=0.3)
    split = make_split(roles, images.labels, Forget("class:3", label=3), 0)
    scene = Scene(images, split, 0, AuditConfig(most_images=20))
    assert {name: len(index) for name, index in scene.sets.items()} == dict.fromkeys(scene.sets, 20)
    assert torch.isin(scene.sets["forget"], split.forget).all()
    assert int(scene.forget_counts.sum()) == 20
    assert np.bincount(images.labels[Scene(images, split, 0, AuditConfig()).shown]).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("changed", "message"), [("test", "no test images"), ("forget", "2 images to forget")]
)
def test_a_split_that_cannot_be_audited_is_refused(changed: str, message: str) -> None:
    images = points(0.0)
    roles = hold_out(images.labels, None, 0, validation_share=0.2, test_share=0.3)
    split = make_split(roles, images.labels, Forget("class:3", label=3), 0)
    few = replace(split, **{changed: getattr(split, changed)[: 0 if changed == "test" else 2]})
    with pytest.raises(UserError, match=message):
        Scene(images, few, 0, AuditConfig())
