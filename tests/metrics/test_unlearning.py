"""UA, RA, TA, attacks, histograms and the gap, on a model whose every output is known."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn

from dau_fast.data.split import Split, range_class_sizes
from dau_fast.metrics.accuracy import accuracy, balanced_accuracy
from dau_fast.metrics.mia import Answers, Attacks
from dau_fast.metrics.unlearning import Measures, avg_gap, measure
from dau_fast.models import Outputs


class Identity(nn.Module):
    """A classifier whose images are its logits."""

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(images, images)


SIZES = {"forget": 10, "retain": 40, "validation": 8, "test": 20}
RIGHT = {"forget": 4, "retain": 38, "validation": 5, "test": 15}


def known(confidence: float = 0.9) -> tuple[Tensor, Tensor, Split]:
    """Logits [78, 2], labels and split; in every set the first `RIGHT` answers are right."""
    labels, sets, rows = [], {}, []
    for name, size in SIZES.items():
        sets[name] = torch.arange(len(labels), len(labels) + size)
        for i in range(size):
            label = i % 2
            predicted = label if i < RIGHT[name] else 1 - label
            p = [1 - confidence, 1 - confidence]
            p[predicted] = confidence
            rows.append([math.log(max(q, 1e-30)) for q in p])
            labels.append(label)
    train = torch.cat([sets["forget"], sets["retain"]])
    return torch.tensor(rows), torch.tensor(labels), Split(train=train, classwise=False, **sets)


def measured(confidence: float = 0.9, seed: int = 0) -> Measures:
    logits, labels, split = known(confidence)
    generator = torch.Generator().manual_seed(seed)
    return measure(Identity(), logits.__getitem__, labels, split, generator)


def measures(ua: float, ra: float, ta: float, mia: float) -> Measures:
    return Measures(ua, ra, ta, {"confidence": mia, "entropy": 77.0}, {})


def test_accuracy_is_the_percentage_of_right_answers() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    assert accuracy(logits, torch.tensor([1, 1, 2])) == pytest.approx(200 / 3)


def test_the_gap_is_the_mean_of_four_absolute_differences() -> None:
    one, other = measures(10, 99, 90, 20), measures(12, 98, 94, 15)
    assert avg_gap(one, other) == pytest.approx((2 + 1 + 4 + 5) / 4)
    assert avg_gap(other, one) == avg_gap(one, other)
    assert avg_gap(one, one) == 0


def test_every_term_counts_in_the_gap() -> None:
    base = [10.0, 99.0, 90.0, 20.0]
    for i in range(4):
        moved = [value + 8 * (i == j) for j, value in enumerate(base)]
        assert avg_gap(measures(*base), measures(*moved)) == pytest.approx(2)


def test_mia_efficacy_is_the_confidence_attack() -> None:
    assert measures(0, 0, 0, 42.0).mia_efficacy == 42.0


def test_accuracies_of_a_known_model() -> None:
    found = measured()
    assert found.ua == pytest.approx(60)
    assert found.ra == pytest.approx(95)
    assert found.ta == pytest.approx(75)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_are_there() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 40 + [2] * 5 + [5] * 2)
    predicted = torch.where(torch.rand(47, generator=draw) < 0.6, labels, 3)
    expected = 100 * balanced_accuracy_score(labels, predicted, adjusted=False)
    assert balanced_accuracy(predicted == labels, labels) == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("sample", [2**27, 7 * 2 + 1])
def test_every_class_of_retain_and_test_set_counts_alike(
    sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets with few of class 1, and a test set without class 2, whatever the attacks see of them."""
    monkeypatch.setattr("dau_fast.metrics.unlearning._LOGITS", sample)
    draw = torch.Generator().manual_seed(1)
    labels = torch.where(torch.rand(400, generator=draw) < 0.1, 1, 0)
    labels[200:220] = 2
    logits = 2 * nn.functional.one_hot(labels, 3) + 2 * torch.randn(400, 3, generator=draw)
    logits[:, 0] += 3
    train, validation, test = torch.arange(40, 260), torch.arange(260, 300), torch.arange(300, 400)
    split = Split(train, validation, test, forget=train[:20], retain=train[20:], classwise=False)
    found = measure(Identity(), logits.__getitem__, labels, split, torch.Generator().manual_seed(2))
    assert found.balanced is not None
    for name, index in (("ra", split.retain), ("ta", split.test)):
        expected = 100 * balanced_accuracy_score(labels[index], logits[index].argmax(1))
        assert found.balanced[name] == pytest.approx(expected), name
        assert abs(found.balanced[name] - getattr(found, name)) > 1
    sizes = [labels[index].bincount().tolist() for index in (split.retain, split.test)]
    assert range_class_sizes(split, labels) == {
        "retain": (min(sizes[0]), max(sizes[0])),
        "test": (min(sizes[1]), max(sizes[1])),
    }


def test_histograms_hold_the_confidence_in_the_true_label_in_percent() -> None:
    found = measured(0.92).confidence
    assert found["edges"] == pytest.approx([i / 20 for i in range(21)])
    for name in ("forget", "validation", "test"):
        expected = [0.0] * 20
        expected[18] = 100 * RIGHT[name] / SIZES[name]
        expected[1] = 100 - expected[18]
        assert found[name] == pytest.approx(expected), name
    assert set(found) == {"edges", "forget", "validation", "test"}


@pytest.mark.parametrize("confidence", [0.5, 0.9, 1.0])
def test_histograms_sum_to_100(confidence: float) -> None:
    found = measured(confidence).confidence
    for name in ("forget", "validation", "test"):
        assert len(found[name]) == 20
        assert sum(found[name]) == pytest.approx(100)


def test_certainty_falls_into_the_last_bin() -> None:
    found = measured(1.0).confidence["test"]
    assert found[19] == pytest.approx(75)
    assert found[0] == pytest.approx(25)


class Watched(Attacks):
    """Remembers whom it was fitted to and asked about: first columns of logits."""

    seen: ClassVar[list[list[list[float]]]] = []

    def __init__(self, *fitted: Answers, **named: Any) -> None:
        super().__init__(*fitted, **named)
        self.seen.append([part.logits[:, 0].tolist() for part in fitted] + [[]])
        assert all(len(part.logits) == len(part.labels) for part in fitted)

    def non_members(self, answers: Answers) -> Tensor:
        self.seen[-1][2] += answers.logits[:, 0].tolist()
        return super().non_members(answers)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[list[float]]]:
    """Members, non-members and targets of every measurement."""
    monkeypatch.setattr("dau_fast.metrics.unlearning.Attacks", Watched)
    monkeypatch.setattr(Watched, "seen", [])
    return Watched.seen


def sizes(seen: list[list[list[float]]]) -> list[list[int]]:
    return [[len(part) for part in one] for one in seen]


def test_members_are_as_many_retain_images_as_the_test_set_has(seen: list[list[list[float]]]) -> None:
    measured()
    assert sizes(seen) == [[20, 20, 10]]


def test_where_retain_is_the_smaller_set_it_decides(seen: list[list[list[float]]]) -> None:
    logits, labels, split = known()
    small = Split(split.train, split.validation, split.test, split.forget, split.retain[:6], False)
    found = measure(Identity(), logits.__getitem__, labels, small, torch.Generator())
    assert sizes(seen) == [[6, 6, 10]]
    assert found.ra == 100
    assert found.ta == pytest.approx(75), "of all test images"


def test_of_logits_that_do_not_fit_the_attacks_see_a_sample(
    seen: list[list[list[float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured()
    monkeypatch.setattr("dau_fast.metrics.unlearning._LOGITS", 7 * 2 + 1)
    found = measured()
    assert sizes(seen) == [[20, 20, 10], [7, 7, 10]]
    assert (found.ua, found.ra, found.ta) == (whole.ua, whole.ra, whole.ta)
    assert found.confidence == whole.confidence


def test_members_and_non_members_are_drawn_from_their_own_sets(seen: list[list[list[float]]]) -> None:
    logits = torch.arange(78.0).unsqueeze(1).repeat(1, 2)
    _, labels, split = known()
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        measure(Identity(), logits.__getitem__, labels, split, generator)
    first, again, other = seen
    members, non_members, target = map(set, first)
    assert members < set(split.retain.tolist())
    assert len(members) == 20
    assert non_members == set(split.test.tolist())
    assert target == set(split.forget.tolist())
    assert first == again
    assert first != other


def test_the_same_seed_measures_the_same() -> None:
    assert measured(seed=3) == measured(seed=3)


def test_a_model_that_answers_forget_like_test_images_looks_unlearned() -> None:
    logits, labels, split = known()
    sure, unsure = torch.tensor([6.0, -6.0]), torch.tensor([0.2, -0.2])
    signs = torch.where(labels == 0, 1.0, -1.0).unsqueeze(1)
    logits = torch.where(
        torch.isin(torch.arange(78), split.retain).unsqueeze(1), signs * sure, signs * unsure
    )
    found = measure(Identity(), logits.__getitem__, labels, split, torch.Generator())
    assert found.mia_efficacy == 100
    logits[split.forget] = (signs * sure)[split.forget]
    found = measure(Identity(), logits.__getitem__, labels, split, torch.Generator())
    assert found.mia_efficacy == 0


def test_measures_in_reference_mode_differ_in_the_modified_entropy_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, labels = 4 * torch.randn(240, 4, generator=generator), torch.arange(240) % 4
    logits[torch.arange(80), labels[:80]] += 6
    train, validation, test = (torch.arange(*ends) for ends in ((0, 80), (80, 120), (120, 240)))
    split = Split(train, validation, test, forget=train[:20], retain=train[20:], classwise=False)
    plain, old = (
        measure(Identity(), logits.__getitem__, labels, split, torch.Generator(), reference=reference)
        for reference in (False, True)
    )
    differing = {name for name, share in plain.attacks.items() if share != old.attacks[name]}
    assert differing == {"modified_entropy"}
    assert (plain.ua, plain.ra, plain.ta) == (old.ua, old.ra, old.ta)
