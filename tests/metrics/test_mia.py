"""Membership inference: scores against loops by the definitions, shares against scikit-learn's."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from torch import Tensor

from dau_fast.metrics import mia, svm
from dau_fast.metrics.mia import ATTACKS, Answers, Attacks

Score = Callable[[list[float], int], float]


def random_logits(rows: int = 40, classes: int = 5, scale: float = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(rows, classes, generator=generator)
    return logits, torch.randint(classes, (rows,), generator=generator)


def scored(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    return ATTACKS[name](Answers(logits, labels))


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
    score = scored(name, logits, labels)
    rows = logits.double().tolist()
    expected = [[BY_HAND[name](row, y)] for row, y in zip(rows, labels.tolist(), strict=True)]
    assert score.dtype == torch.float64
    torch.testing.assert_close(score, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_the_probability_score_is_the_whole_distribution() -> None:
    logits, labels = random_logits()
    score = scored("probability", logits, labels)
    expected = torch.tensor([softmax(row) for row in logits.double().tolist()], dtype=torch.float64)
    torch.testing.assert_close(score, expected)


def test_modified_entropy_of_known_distributions() -> None:
    logits = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.9, 0.1]], dtype=torch.float64).log()
    labels = torch.tensor([0, 0, 1])
    expected = [math.log(2), 0.2 * -math.log(0.9), 1.8 * -math.log(0.1)]
    found = scored("modified_entropy", logits, labels).squeeze(1).tolist()
    assert found == pytest.approx(expected, rel=1e-12)


def test_modified_entropy_tells_a_confident_right_answer_from_a_confident_wrong_one() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    right, wrong = scored("modified_entropy", logits, torch.tensor([0, 1])).squeeze(1).tolist()
    assert right < 0.01
    assert wrong > 10
    entropies = scored("entropy", logits, torch.tensor([0, 1]))
    assert entropies[0] == entropies[1]


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    "row",
    [[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [800.0, 0.0, 0.0], [1e30, -1e30, 1e30], [0.0, 0.0, 0.0]],
    ids=str,
)
def test_scores_of_extreme_logits_are_finite(name: str, row: list[float]) -> None:
    for label in range(3):
        score = scored(name, torch.tensor([row]), torch.tensor([label]))
        assert score.isfinite().all()
        assert (score >= 0).all()


@pytest.mark.parametrize("margin", [20.0, 40.0, 200.0, 700.0])
def test_modified_entropy_keeps_its_precision_where_a_wrong_probability_rounds_to_1(margin: float) -> None:
    """Both terms are (1 - q) times log q with q = exp(-margin) / (1 + exp(-margin))."""
    score = scored("modified_entropy", torch.tensor([[margin, 0.0]]), torch.tensor([1])).item()
    assert score == pytest.approx(2 * margin, rel=1e-8)


# ---- all attacks at once


def shares(members: Tensor, non_members: Tensor, target: Tensor) -> float:
    """What scikit-learn says when asked directly."""
    x = np.concatenate([members.numpy(), non_members.numpy()])
    y = np.array([1] * len(members) + [0] * len(non_members))
    verdicts = SVC(C=3, gamma="auto", kernel="rbf").fit(x, y).predict(target.numpy())
    return 100 * float(np.sum(verdicts == 0)) / len(target)


def attack_all(retain: Answers, test: Answers, forget: Answers) -> dict[str, float]:
    """Percent of `forget` called non-member, by attack."""
    verdicts = Attacks(retain, test).non_members(forget)
    assert verdicts.shape == (len(forget), len(ATTACKS))
    return dict(zip(ATTACKS, (100 * verdicts.double().mean(0)).tolist(), strict=True))


@pytest.mark.parametrize("exact_limit", [0, 4000])
def test_nobody_is_judged_where_nobody_is_asked_about(
    exact_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mia.svm, "fit", partial(svm.fit, exact_limit=exact_limit))
    attacks = Attacks(Answers(*random_logits(30)), Answers(*random_logits(30, scale=1)))
    assert attacks.non_members(Answers(*random_logits(0))).shape == (0, 5)


def test_all_five_attacks_are_asked_about_the_forget_set() -> None:
    retain, test, forget = (
        Answers(*random_logits(rows, scale=scale)) for rows, scale in ((60, 6), (60, 1), (30, 3))
    )
    found = attack_all(retain, test, forget)
    assert set(found) == {"correctness", "confidence", "entropy", "modified_entropy", "probability"}
    for name, share in found.items():
        assert share == shares(*(ATTACKS[name](part) for part in (retain, test, forget))), name


def test_the_correctness_attack_calls_non_member_what_is_misclassified() -> None:
    def answers(right: int, wrong: int) -> Answers:
        logits = torch.tensor([[5.0, 0.0]]).repeat(right + wrong, 1)
        return Answers(logits, torch.tensor([0] * right + [1] * wrong))

    found = attack_all(answers(30, 0), answers(0, 30), answers(3, 7))
    assert found["correctness"] == pytest.approx(70)


def test_scores_of_some_rows_at_a_time_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [Answers(*random_logits(rows, scale=scale)) for rows, scale in ((60, 6), (60, 1), (31, 3))]
    expected = attack_all(*sets)
    monkeypatch.setattr(mia, "_ENTRIES", 7 * 5)
    assert [len(part) for part in sets[2].parts()] == [7, 7, 7, 7, 3]
    assert attack_all(*sets) == expected


# ---- the reference implementation's modified entropy, which older tables show


def column_entropy(logits: Tensor, labels: Tensor) -> np.ndarray:
    """The formula as it stood: rows' own entries were meant, and whole columns written; [N] in float32."""
    z = logits.numpy().astype(np.float32)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    log_p = np.log(np.where(p > 0, p, np.float32(1e-30)))
    weights, log_weights = p.copy(), log_p.copy()  # log p was taken for log(1 - p), too
    columns = labels.numpy()
    weights[:, columns] = (1 - p)[:, columns]
    log_weights[:, columns] = log_p[:, columns]
    return -(weights * log_weights).sum(1)


def test_the_reference_mode_weighs_the_columns_of_all_labels_that_a_set_holds() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    found = mia.reference_modified_entropy(Answers(logits, torch.tensor([0, 0])), torch.tensor([1, 0, 0]) > 0)
    by_hand = [-0.5 * math.log(0.5) - 0.5 * math.log(0.25), -1.0 * math.log(0.1) - 0.8 * math.log(0.8)]
    assert found.flatten().tolist() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("forgotten", [None, 2], ids=["spread", "one class"])
def test_the_reference_mode_gives_the_old_shares_and_changes_no_other_attack(forgotten: int | None) -> None:
    sets = [random_logits(rows, scale=scale) for rows, scale in ((60, 40), (60, 1), (30, 9))]
    if forgotten is not None:
        sets[2] = (sets[2][0], torch.full((30,), forgotten))
    members, non_members, targets = (Answers(*some) for some in sets)
    plain, old = (
        Attacks(members, non_members, reference=reference).non_members(targets)
        for reference in (None, targets.labels)
    )
    share = 100 * old.double().mean(0)[list(ATTACKS).index("modified_entropy")].item()
    assert share == pytest.approx(shares(*(torch.tensor(column_entropy(*some))[:, None] for some in sets)))
    same = [i for i, name in enumerate(ATTACKS) if name != "modified_entropy"]
    assert torch.equal(plain[:, same], old[:, same])
    assert not torch.equal(plain, old)


def test_the_reference_mode_asks_about_a_few_rows_as_about_all() -> None:
    """The columns follow the whole set, of which a batch may hold a single class."""
    sets = [Answers(*random_logits(rows, scale=scale)) for rows, scale in ((60, 6), (60, 1), (30, 3))]
    attacks = Attacks(sets[0], sets[1], reference=sets[2].labels)
    whole = attacks.non_members(sets[2])
    rows = [Answers(sets[2].logits[i : i + 1], sets[2].labels[i : i + 1]) for i in range(30)]
    assert torch.equal(torch.cat([attacks.non_members(row) for row in rows]), whole)
