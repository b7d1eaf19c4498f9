"""Membership inference: scores against loops by the definitions, verdicts against scikit-learn's."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from torch import Tensor

from dau_fast.metrics import mia
from dau_fast.metrics.mia import ATTACKS, attack_all, non_member_share

Score = Callable[[list[float], int], float]


def random_logits(rows: int = 40, classes: int = 5, scale: float = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(rows, classes, generator=generator)
    return logits, torch.randint(classes, (rows,), generator=generator)


def softmax(row: list[float]) -> list[float]:
    largest = max(row)
    powers = [math.exp(z - largest) for z in row]
    return [power / sum(powers) for power in powers]


def correctness(row: list[float], y: int) -> float:
    return float(row.index(max(row)) == y)


def confidence(row: list[float], y: int) -> float:
    return softmax(row)[y]


def entropy(row: list[float], y: int) -> float:
    return -sum(p * math.log(p) for p in softmax(row))


def modified_entropy(row: list[float], y: int) -> float:
    """Song and Mittal 2021, equation 8, term by term."""
    p = softmax(row)
    total = -(1 - p[y]) * math.log(p[y])
    for i in range(len(p)):
        if i != y:
            total -= p[i] * math.log(1 - p[i])
    return total


BY_HAND: dict[str, Score] = {
    "correctness": correctness,
    "confidence": confidence,
    "entropy": entropy,
    "modified_entropy": modified_entropy,
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("classes", [2, 5, 100])
def test_a_score_equals_its_definition_row_by_row(name: str, classes: int) -> None:
    logits, labels = random_logits(classes=classes)
    score = ATTACKS[name](logits, labels)
    rows = logits.double().tolist()
    expected = [[BY_HAND[name](row, y)] for row, y in zip(rows, labels.tolist(), strict=True)]
    assert score.dtype == torch.float64
    torch.testing.assert_close(score, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_the_probability_score_is_the_whole_distribution() -> None:
    logits, labels = random_logits()
    score = ATTACKS["probability"](logits, labels)
    expected = torch.tensor([softmax(row) for row in logits.double().tolist()], dtype=torch.float64)
    torch.testing.assert_close(score, expected)


def test_modified_entropy_of_known_distributions() -> None:
    logits = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.9, 0.1]], dtype=torch.float64).log()
    labels = torch.tensor([0, 0, 1])
    expected = [math.log(2), 0.2 * -math.log(0.9), 1.8 * -math.log(0.1)]
    found = ATTACKS["modified_entropy"](logits, labels).squeeze(1).tolist()
    assert found == pytest.approx(expected, rel=1e-12)


def test_modified_entropy_tells_a_confident_right_answer_from_a_confident_wrong_one() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    right, wrong = ATTACKS["modified_entropy"](logits, torch.tensor([0, 1])).squeeze(1).tolist()
    assert right < 0.01
    assert wrong > 10
    entropies = ATTACKS["entropy"](logits, torch.tensor([0, 1]))
    assert entropies[0] == entropies[1]


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    "row",
    [[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [800.0, 0.0, 0.0], [1e30, -1e30, 1e30], [0.0, 0.0, 0.0]],
    ids=str,
)
def test_scores_of_extreme_logits_are_finite(name: str, row: list[float]) -> None:
    for label in range(3):
        score = ATTACKS[name](torch.tensor([row]), torch.tensor([label]))
        assert score.isfinite().all()
        assert (score >= 0).all()


@pytest.mark.parametrize("margin", [20.0, 40.0, 200.0, 700.0])
def test_modified_entropy_keeps_its_precision_where_a_wrong_probability_rounds_to_1(margin: float) -> None:
    """Both terms are (1 - q) times log q with q = exp(-margin) / (1 + exp(-margin))."""
    score = ATTACKS["modified_entropy"](torch.tensor([[margin, 0.0]]), torch.tensor([1])).item()
    assert score == pytest.approx(2 * margin, rel=1e-8)


# ---- the support vector machine


def shares(members: Tensor, non_members: Tensor, target: Tensor) -> float:
    """What scikit-learn says when asked directly."""
    x = np.concatenate([members.numpy(), non_members.numpy()])
    y = np.array([1] * len(members) + [0] * len(non_members))
    verdicts = SVC(C=3, gamma="auto", kernel="rbf").fit(x, y).predict(target.numpy())
    return 100 * float(np.sum(verdicts == 0)) / len(target)


def confidences(count: int, mean: float, spread: float, seed: int) -> Tensor:
    """Confidences [count, 1] as trained networks have them: most near 1, some anywhere."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, dtype=torch.float64, generator=generator)
    return torch.sigmoid(mean + spread * noise)


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize(("members", "non_members"), [(60, 60), (80, 30), (90, 60)])
def test_the_share_is_what_scikit_learn_says(members: int, non_members: int, columns: int) -> None:
    scores = [
        torch.cat([confidences(count, mean, 2, 10 * i + j) for j in range(columns)], 1)
        for i, (count, mean) in enumerate([(members, 4.0), (non_members, 1.0), (50, 2.0)])
    ]
    found = non_member_share(*scores)
    assert found == shares(*scores)
    assert 0 < found < 100


def test_the_share_is_that_of_non_members() -> None:
    members, non_members = torch.ones(20, 1), torch.zeros(20, 1)
    target = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    assert non_member_share(members, non_members, target) == 25
    assert non_member_share(non_members, members, target) == 75


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[SVC]:
    """Every SVM that the package fits, in order."""
    machines: list[SVC] = []

    def remembered(**settings: object) -> SVC:
        machines.append(SVC(**settings))
        return machines[-1]

    monkeypatch.setattr(mia, "SVC", remembered)
    return machines


@pytest.mark.parametrize(
    ("retain", "test"), [((8.0, 2.0), (4.0, 4.0)), ((5.0, 2.0), (5.0, 2.2))], ids=["overfitted", "hardly"]
)
def test_above_the_limit_the_verdicts_are_nearly_all_those_of_the_exact_machine(
    retain: tuple[float, float],
    test: tuple[float, float],
    fitted: list[SVC],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members, non_members = confidences(2500, *retain, 0), confidences(2500, *test, 1)
    target = confidences(1000, *retain, 2)
    assert len(members) + len(non_members) > mia.EXACT_LIMIT
    binned = non_member_share(members, non_members, target)
    monkeypatch.setattr(mia, "EXACT_LIMIT", 10_000)
    exact = non_member_share(members, non_members, target)
    assert len(fitted[0].support_) <= 2 * mia.BINS < len(fitted[1].support_)
    asked = torch.cat([target, members, non_members]).numpy()
    assert np.mean(fitted[0].predict(asked) == fitted[1].predict(asked)) >= 0.995
    assert abs(binned - exact) <= 0.5
    assert 0 < exact < 100


def test_below_the_limit_and_for_more_than_one_score_every_point_is_used(fitted: list[SVC]) -> None:
    half = mia.EXACT_LIMIT // 2
    rows = torch.arange(half, dtype=torch.float64).unsqueeze(1)
    # Far from each other, all points become support vectors on either side.
    non_member_share(rows / half, rows / half, rows[:3])
    assert fitted[0].shape_fit_ == (mia.EXACT_LIMIT, 1)
    few = min(half, 50)
    non_member_share(rows[:few].expand(-1, 2), rows[:few].expand(-1, 2), rows[:3].expand(-1, 2))
    assert fitted[1].shape_fit_ == (2 * few, 2)


def test_bins_hold_every_point_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, np.ndarray] = {}

    class Watched(SVC):
        def fit(self, x: np.ndarray, y: np.ndarray, sample_weight: np.ndarray) -> SVC:
            seen.update(x=x, y=y, weight=sample_weight)
            return super().fit(x, y, sample_weight=sample_weight)

    monkeypatch.setattr(mia, "SVC", Watched)
    members, non_members = confidences(3000, 6, 2, 0), confidences(1300, 3, 2, 1)
    non_member_share(members, non_members, members[:5])
    for label, points in ((1, members), (0, non_members)):
        weight, x = seen["weight"][seen["y"] == label], seen["x"][seen["y"] == label, 0]
        assert weight.sum() == len(points)
        assert weight.max() - weight.min() <= 1
        assert (weight * x).sum() / weight.sum() == pytest.approx(points.mean().item())


# ---- all attacks at once


def test_all_five_attacks_are_asked_about_the_forget_set() -> None:
    retain, test, forget = ((random_logits(rows, scale=s)) for rows, s in ((60, 6), (60, 1), (30, 3)))
    found = attack_all(retain, test, forget)
    assert set(found) == {"correctness", "confidence", "entropy", "modified_entropy", "probability"}
    for name, share in found.items():
        assert share == shares(*(ATTACKS[name](*part) for part in (retain, test, forget))), name


def test_the_correctness_attack_calls_non_member_what_is_misclassified() -> None:
    def answers(right: int, wrong: int) -> tuple[Tensor, Tensor]:
        logits = torch.tensor([[5.0, 0.0]]).repeat(right + wrong, 1)
        return logits, torch.tensor([0] * right + [1] * wrong)

    found = attack_all(answers(30, 0), answers(0, 30), answers(3, 7))
    assert found["correctness"] == pytest.approx(70)
