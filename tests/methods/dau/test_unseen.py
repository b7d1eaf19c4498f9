"""What a model that never saw the forget images would say, against its definition, one image at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from games import SPREAD
from scipy.stats import norm
from torch import Tensor
from torch.nn import functional as F
from toys import ONE_CLASS, TENTH, game_of, trained

from dau_fast.data.images import Images
from dau_fast.data.split import Forget, Split
from dau_fast.engine.evaluation import predict
from dau_fast.methods.dau import unseen
from dau_fast.methods.dau.departure import Departures, fit_temperature, join, mark_gone, score
from dau_fast.methods.dau.difficulty import PlainModel, Rows, draw_lesson, fit_plain_model, margins_of
from dau_fast.methods.dau.shown import prepare_shown
from dau_fast.methods.dau.unseen import (
    _estimate_loss,
    _rank_together,
    _weigh,
    count_unseen,
    move_about,
    prepare_unseen,
)
from dau_fast.methods.task import Task
from dau_fast.models import Classifier


def plain_of(task: Task) -> tuple[PlainModel, Tensor]:
    chance = torch.Generator().manual_seed(0)
    lesson = draw_lesson(task.split, chance)
    plain = fit_plain_model(task.images, lesson, task.labels, 3, chance)
    assert plain is not None
    return plain, lesson


def unseen_of(task: Task, share: float, most: int = 1000) -> Departures:
    plain, lesson = plain_of(task)
    chance = torch.Generator().manual_seed(1)
    return prepare_unseen(task, plain, lesson, task.labels, share=share, wrong=0.0, most=most, chance=chance)


def margins(task: Task, index: Tensor) -> np.ndarray:
    p = predict(task.original, task.images, index).logits.double().softmax(1)
    own = p.gather(1, task.labels[index].unsqueeze(1)).squeeze(1)
    return torch.log(own / (1 - own)).numpy()


def normal_score(value: float, among: np.ndarray) -> float:
    """Of the middle of the ranks that `value` may have among numbers."""
    return float(norm.ppf(((among < value).sum() / 2 + (among <= value).sum() / 2 + 0.5) / (len(among) + 1)))


def expected_margins(targets: Tensor, labels: Tensor) -> Tensor:
    own = targets.exp().gather(1, labels.unsqueeze(1)).squeeze(1)
    return torch.log(own / (1 - own))


def test_an_image_gets_the_validation_margin_of_its_rank_among_retain_images() -> None:
    task = trained(TENTH)
    forget, retain, validation = task.split.forget, task.split.retain, task.split.validation
    others, unseen = margins(task, retain), margins(task, validation)
    ranks = [norm.cdf(normal_score(value, others)) for value in margins(task, forget)]
    # Ranks of ranks are taken, which are the same here: there is one sign.
    again = [
        norm.cdf(normal_score(r, np.sort([norm.cdf(normal_score(v, others)) for v in others]))) for r in ranks
    ]
    expected = torch.tensor(np.quantile(unseen, again))
    found = expected_margins(unseen_of(task, 0.0).targets.double(), task.labels[forget])
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_what_else_an_image_is_taken_for_the_original_says_without_its_label() -> None:
    task = trained(TENTH)
    forget, labels = task.split.forget, task.labels[task.split.forget]
    own = F.one_hot(labels, 3).bool()
    expected = predict(task.original, task.images, forget).logits.masked_fill(own, -torch.inf).softmax(1)
    others = unseen_of(task, 0.0).targets.exp().masked_fill(own, 0)
    torch.testing.assert_close(others / others.sum(1, keepdim=True), expected, rtol=1e-4, atol=1e-5)


def test_a_plain_model_ranks_and_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both signs count alike, retain images are rated as if unlearned, and what both say is joined."""
    monkeypatch.setattr(unseen, "_GAIN", 0.0)
    task = trained(TENTH)
    forget, validation = task.split.forget, task.split.validation
    plain, lesson = plain_of(task)
    found = unseen_of(task, 0.5)
    signs = []
    alone = plain.leave_out(score(plain, task, lesson), torch.arange(len(lesson)), task.labels[lesson])
    hard = margins_of(score(plain, task, forget), task.labels[forget]).numpy()
    hard_others = margins_of(alone, task.labels[lesson]).numpy()
    for values, others in ((margins(task, forget), margins(task, lesson)), (hard, hard_others)):
        signs.append([np.array([normal_score(v, others) for v in part]) for part in (values, others)])
    height, heights = (sum(parts) / 2 for parts in zip(*signs, strict=True))
    ranks = norm.cdf([normal_score(value, heights) for value in height])
    expected = torch.tensor(np.quantile(margins(task, validation), ranks))
    labels = task.labels[forget]
    torch.testing.assert_close(
        expected_margins(found.targets.double(), labels), expected, rtol=5e-2, atol=5e-2
    )
    none, own = mark_gone(task), F.one_hot(labels, 3).bool()
    temperature = fit_temperature(score(plain, task, validation), task.labels[validation], none)
    said = predict(task.original, task.images, forget).logits, score(plain, task, forget) / temperature
    one, other = (logits.masked_fill(own, -1e4).log_softmax(1) for logits in said)
    others = found.targets.exp().masked_fill(own, 0)
    torch.testing.assert_close(
        others / others.sum(1, keepdim=True), join(one, other, 0.5, none).exp(), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("wrong", [0.0, 0.5, 1.0])
def test_a_set_of_wrong_labels_is_where_its_signs_say_on_average(wrong: float) -> None:
    """Of two signs that have nothing to do with each other the mean varies less: 1 / sqrt(2) times."""
    chance = torch.Generator().manual_seed(0)
    others = torch.randn(2, 4000, generator=chance, dtype=torch.float64)
    forget = torch.tensor([[-2.0, -1.0, -1.5, 1.0], [-1.0, -1.0, -0.5, 2.0]], dtype=torch.float64)
    found = _rank_together(list(zip(forget, others, strict=True)), wrong).double()
    mean = forget.mean(0)
    middle = mean.mean() * (wrong + (1 - wrong) * 2**0.5)
    expected = middle + (mean - mean.mean()) * 2**0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    alike = _rank_together([(forget[0], others[0])] * 2, wrong).double()
    torch.testing.assert_close(alike, forget[0], rtol=0, atol=0.1)


def test_signs_that_tell_nothing_are_the_middle() -> None:
    same = torch.zeros(5)
    assert (_rank_together([(torch.zeros(3), same)], 1.0) == 0).all()


def test_the_share_of_wrong_labels_reaches_where_images_are_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    together = unseen._rank_together
    monkeypatch.setattr(
        unseen, "_rank_together", lambda *given: (asked.append(given[1]), together(*given))[1]
    )
    prepare_shown(trained(TENTH), replace(SPREAD, departure=1.0, wrong_labels=0.7))
    assert asked == [0.7]


def test_targets_are_distributions_and_each_image_has_its_own() -> None:
    task = trained(TENTH)
    found, forget = unseen_of(task, 0.5), task.split.forget
    torch.testing.assert_close(found.targets.exp().sum(1), torch.ones(len(forget)))
    assert torch.equal(found.look_up(forget.flip(0)), found.targets.flip(0))
    assert torch.equal(found.classes, task.labels)
    assert (found.counts[task.split.retain] == 1).all()


def test_ranks_are_taken_among_a_sample_of_a_large_retain_set(monkeypatch: pytest.MonkeyPatch) -> None:
    task, asked = trained(TENTH), []
    ask = unseen._ask_beside
    monkeypatch.setattr(unseen, "_ask_beside", lambda *given: (asked.append(given[2]), ask(*given))[1])
    unseen_of(task, 0.5, most=20)
    assert torch.equal(asked[0], task.split.forget)
    assert len(asked[1]) == 20
    assert torch.isin(asked[1], task.split.retain).all()


def test_neighbours_of_pictures_are_moved_by_a_sixteenth_and_other_inputs_are_their_own() -> None:
    images = torch.randn(2, 3, 33, 16)
    up, down, left, right = (found for found in move_about(images))
    torch.testing.assert_close(up[:, :, 2:], images[:, :, :-2])
    torch.testing.assert_close(down[:, :, :-2], images[:, :, 2:])
    torch.testing.assert_close(left[..., 1:], images[..., :-1])
    torch.testing.assert_close(right[..., :-1], images[..., 1:])
    for other in (torch.randn(2, 6), torch.zeros(2, 5, dtype=torch.int64), torch.randn(2, 3, 2, 2)):
        (same,) = move_about(other)
        assert same is other


def test_pictures_are_ranked_by_what_is_beside_them() -> None:
    """A forget set that is known by heart, but not beside itself, is expected where the least known are."""
    side = 8
    images = torch.randn(300, 1, side, side, generator=torch.Generator().manual_seed(0))
    task = trained(TENTH)

    class Heart(torch.nn.Module):
        """Sure of training pictures as they are; of moved ones, and of others, more and more by number."""

        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, 3)
            self.head.weight.data, self.head.bias.data = torch.eye(3), torch.zeros(3)

        def forward(self, given: Tensor) -> Tensor:
            same = (given.flatten(1)[:, None] == images.flatten(1)).all(2)
            places, labels = [], []
            for moved in move_about(images):
                places.append((given.flatten(1)[:, None] == moved.flatten(1)).all(2))
            found = torch.stack([same, *places]).any(0).float().argmax(1)
            labels = found % 3
            learned = torch.where(found < 240, 9.0, (found - 240) / 10)
            known = torch.where(same.any(1), learned, found / 60)
            return self.head(F.one_hot(labels, 3) * known[:, None])

    order = torch.arange(300)
    split = Split(order[:240], order[240:], order[:0], order[:60], order[60:240], classwise=False)
    made = Images(images, order % 3, ("a", "b", "c"))
    task = replace(task, images=made, split=split, original=Classifier(Heart()).eval())
    chance = torch.Generator().manual_seed(0)
    found = prepare_unseen(
        task, None, split.retain, made.labels, share=0.5, wrong=0.0, most=1000, chance=chance
    )
    validation = margins(task, split.validation)
    known = expected_margins(found.targets.double(), made.labels[split.forget])
    assert known.max() <= np.quantile(validation, 0.05) + 1e-3


@pytest.mark.parametrize("wrong", [False, True])
def test_a_network_that_learns_from_less_is_expected_to_know_less(wrong: bool) -> None:
    """Unless what it learned was wrong."""
    task = trained(Forget("random:0.6", fraction=0.6))
    noise = torch.randn(task.images.pixels.shape, generator=torch.Generator().manual_seed(3))
    task = replace(task, images=replace(task.images, pixels=task.images.pixels + 3 * noise))
    if wrong:
        labels = task.labels.clone()
        labels[task.split.forget] = (labels[task.split.forget] + 1) % 3
        task = replace(task, images=replace(task.images, labels=labels))
    chance = torch.Generator().manual_seed(0)
    lesson = task.split.retain[:20]
    plain = fit_plain_model(task.images, lesson, task.labels, 3, chance)
    assert plain is not None
    loss = _estimate_loss(task, plain, lesson, score(plain, task, task.split.validation), chance)
    assert (loss < 0) == wrong
    assert abs(loss) > 0.05


def test_what_is_lost_does_not_depend_on_how_much_of_the_retain_set_is_played_with() -> None:
    task = trained(Forget("random:0.6", fraction=0.6))
    lesson, split = task.split.retain[:20], task.split
    found = []
    for retain in (split.retain, split.retain[:20]):
        chance = torch.Generator().manual_seed(0)
        plain = fit_plain_model(task.images, lesson, task.labels, 3, chance)
        assert plain is not None
        given = replace(task, split=replace(split, retain=retain))
        found.append(_estimate_loss(given, plain, lesson, score(plain, given, split.validation), chance))
    assert found[0] == found[1] != 0


def test_as_many_forget_images_are_learned_from_as_go_with_the_lesson() -> None:
    assert count_unseen(400, 3600, 3600) == 400
    assert count_unseen(5000, 10_000, 45_000) == 1111
    assert count_unseen(1, 10_000, 1_000_000) == 1


def test_validation_says_as_much_as_forget_images_are_expected_there() -> None:
    seen = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    expected = seen.sort().values[:200].repeat(5)  # the lowest fifth
    says = _weigh(seen, expected)
    low = seen <= seen.sort().values[199]
    share = says[low].sum() / says.sum()
    assert share == pytest.approx(1.0, abs=0.02)
    assert says.mean() == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close(_weigh(seen, seen), torch.ones(1000), rtol=0.05, atol=0.05)


def test_a_single_forget_image_does_not_decide_what_is_learned_from() -> None:
    seen = torch.linspace(-3, 3, 100)
    says = _weigh(seen, seen[:1])
    assert 1.5 < says.max() < 2.5
    assert says.min() > 0.5


def test_validation_is_weighed_by_the_labels_that_are_shown() -> None:
    """Where it is shown with wrong labels as the forget set has, all of it says about as much."""
    task = trained(TENTH)
    labels = task.labels.clone()
    validation = task.split.validation
    labels[validation] = (labels[validation] + 1) % 3
    plain, lesson = plain_of(task)
    right, wrong = (
        prepare_unseen(
            task,
            plain,
            lesson,
            shown,
            share=0.0,
            wrong=0.0,
            most=1000,
            chance=torch.Generator().manual_seed(1),
        ).counts[validation]
        for shown in (task.labels, labels)
    )
    assert right.max() < 3
    forgotten = len(task.split.forget)
    least, most = 10 / (forgotten + 10), 10 * (forgotten + 1) / (forgotten + 10)
    assert (wrong.min(), wrong.max()) == (pytest.approx(least), pytest.approx(most))


def test_where_little_is_exposed_little_departs_and_no_class_is_levelled() -> None:
    task = trained(TENTH)
    config = replace(SPREAD, departure=0.8)
    with game_of(task, config, turns=2) as players:
        players.warm_up()
        assert players.departure == pytest.approx(0.8 * players.history.exposure**2)
        assert players.history.exposure < 0.5
        players.play()
        players.finish()
        assert (players.defender.head.weight != 0).all()
    class_task = trained(ONE_CLASS)
    with game_of(class_task, replace(config, label_conditioned=False), turns=2) as players:
        players.warm_up()
        assert players.departure == 0.8


def test_leverages_are_how_much_a_row_answers_for_itself() -> None:
    """Leaving a row out of the fit, on features that stay as they are standardised, gives the same scores."""
    seen = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = (seen - seen.mean(0)) / seen.std(0, correction=0)
    labels = torch.arange(40) % 3
    for features in (seen, F.pad(seen, (0, 60))):  # of either of two systems
        model = PlainModel(Rows(), features, labels, 3)
        found = model.leave_out(model(features), torch.arange(40), labels)
        x, y = F.pad(seen, (1, 0), value=1.0), F.one_hot(labels, 3).double()
        penalty = 0.1 * 40 * torch.eye(6, dtype=torch.float64)
        penalty[0, 0] = 0  # the mean is not penalised
        for row in range(3):
            kept = torch.arange(40) != row
            weights = torch.linalg.solve(x[kept].T @ x[kept] + penalty, x[kept].T @ y[kept])
            torch.testing.assert_close(found[row], x[row] @ weights)
