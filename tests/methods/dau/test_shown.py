"""What the attacker is shown beside outputs: wrong labels are found, and validation is shown with as many."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import TENTH, trained

from dau_fast.config import DauConfig
from dau_fast.methods.dau.shown import draw_wrong_labels, estimate_wrong_share, prepare_shown
from dau_fast.methods.task import Task

CONFIG = DauConfig(label_conditioned=True, alpha=1.0, turns=5)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_wrong_label_is_another_one_of_the_forget_set() -> None:
    labels, among = torch.tensor([0, 1, 2, 3] * 500), torch.tensor([0, 0, 0, 1])
    found = draw_wrong_labels(labels, among, chance())
    assert (found != labels).all()
    assert set(found.tolist()) == {0, 1}
    # Of what is left when an image's own label is taken out.
    assert (found[labels == 0] == 1).all()
    assert found[labels == 2].float().mean() == pytest.approx(0.25, abs=0.08)


def test_where_there_is_no_other_label_it_stays() -> None:
    labels = torch.tensor([0, 1, 1])
    assert draw_wrong_labels(labels, torch.tensor([1]), chance()).tolist() == [1, 1, 1]


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_the_share_of_a_mixture_is_found(share: float) -> None:
    rng = np.random.default_rng(0)
    right, wrong = rng.normal(0.5, 1, 500), rng.normal(-1.5, 1, 500)
    count = round(400 * share)
    known = np.concatenate([rng.normal(-1.5, 1, count), rng.normal(0.5, 1, 400 - count)])
    assert estimate_wrong_share(known, right, wrong) == pytest.approx(share, abs=0.08)


def test_where_all_labels_are_right_none_is_called_wrong() -> None:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(50):
        right, wrong = rng.normal(0.5, 1, 300), rng.normal(-1.5, 1, 300)
        found.append(estimate_wrong_share(rng.normal(0.5, 1, 200), right, wrong))
    assert found.count(0.0) >= 49


def test_one_image_far_from_all_others_does_not_decide() -> None:
    rng = np.random.default_rng(2)
    right, wrong = rng.normal(0.5, 0.1, 300), rng.normal(-0.5, 0.1, 300)
    known = np.concatenate([rng.normal(0.5, 0.1, 100), [-3.0]])
    assert estimate_wrong_share(known, right, wrong) == 0.0


def test_of_constants_nothing_is_estimated() -> None:
    assert estimate_wrong_share(np.zeros(5), np.zeros(5), np.ones(5)) == 0.0


def mislabelled(task: Task) -> Task:
    """Its forget set with wrong labels, all of them."""
    labels = task.labels.clone()
    labels[task.split.forget] = (labels[task.split.forget] + 1) % 3
    return replace(task, images=replace(task.images, labels=labels))


def test_right_labels_are_left_as_they_are() -> None:
    task = trained(TENTH)
    shown = prepare_shown(task, CONFIG)
    assert shown.wrong_labels == 0.0
    assert torch.equal(shown.labels, task.labels)
    assert shown.difficulty is not None
    rated = torch.cat([task.split.forget, task.split.validation])
    assert (shown.difficulty[rated] != 0).all()


def test_beside_mislabelled_images_validation_is_shown_with_wrong_labels() -> None:
    task = mislabelled(trained(TENTH))
    shown = prepare_shown(task, CONFIG)
    assert shown.wrong_labels > 0.9
    validation = task.split.validation
    changed = shown.labels[validation] != task.labels[validation]
    assert changed.float().mean() > 0.8
    others = torch.ones(len(task.labels), dtype=torch.bool)
    others[validation] = False
    assert torch.equal(shown.labels[others], task.labels[others])
    # Difficulty is that of the label which is shown.
    assert shown.difficulty is not None
    assert (shown.difficulty[validation[changed]] < 0).float().mean() > 0.8
    assert (shown.difficulty[task.split.forget] < 0).float().mean() > 0.8


def test_a_share_that_is_given_is_not_estimated() -> None:
    task = trained(TENTH)
    shown = prepare_shown(task, replace(CONFIG, wrong_labels=0.5, difficulty=False))
    assert (shown.wrong_labels, shown.difficulty) == (0.5, None)
    changed = shown.labels != task.labels
    assert 0.3 < changed[task.split.validation].float().mean() < 0.7
