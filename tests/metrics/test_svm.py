"""The machine of low rank against scikit-learn's exact one, on scores as networks have them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from sklearn.svm import SVC
from torch import Tensor

from dau_fast.errors import UserError
from dau_fast.metrics import svm
from dau_fast.metrics.mia import ATTACKS, Answers

Sides = tuple[Tensor, Tensor, Tensor]
ROWS = 1500


def normal(mean: float, spread: float, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + spread * torch.randn(*(shape or (ROWS, 1)), dtype=torch.float64, generator=generator)


def sides(of: Callable[[Tensor], Tensor], *settings: tuple[float, float]) -> Sides:
    """Members, non-members and targets: `of` normal numbers with a mean and a spread each."""
    members, non_members, target = (of(normal(*s, seed=i)) for i, s in enumerate(settings))
    return members, non_members, target


def entropies(largest: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.exp().clamp_max(largest)


ONE_COLUMN: dict[str, Sides] = {
    "overfitted": sides(torch.sigmoid, (8, 2), (4, 4), (8, 2)),
    "very confident": sides(torch.sigmoid, (16, 3), (10, 6), (13, 5)),
    "calibrated, no difference": sides(torch.sigmoid, (3, 2), (3, 2), (3, 2)),
    "mostly forgotten": sides(torch.sigmoid, (8, 2), (5, 4), (0, 3)),
    "ties": sides(lambda x: torch.sigmoid(x).mul(20).round() / 20, (6, 3), (4, 4), (6, 3)),
    "two values": sides(lambda x: (x > 0).double(), (3, 1), (1.5, 1), (1.6, 1)),
    "entropy": sides(entropies(2.3), (-5, 2), (-4, 2.5), (-5, 2)),
    "entropy, no difference": sides(entropies(4.6), (-2, 1.5), (-2, 1.5), (-2, 1.5)),
    "modified entropy": sides(entropies(60), (-6, 3), (-3, 4), (-6, 3)),
    "modified entropy, no difference": sides(entropies(60), (-1, 2.5), (-1, 2.5), (-1, 2.5)),
}


def distributions(classes: int, *settings: tuple[float, float], rows: int = ROWS) -> Sides:
    """Softmax of noise and a margin, its mean and spread given, of one class."""

    def some(mean: float, spread: float, seed: int) -> Tensor:
        logits = normal(0, 2, 10 + seed, rows, classes)
        logits[torch.arange(rows), torch.arange(rows) % classes] += normal(mean, spread, seed, rows)
        return logits.softmax(1)

    members, non_members, target = (some(*s, seed=i) for i, s in enumerate(settings))
    return members, non_members, target


MANY_COLUMNS: dict[str, Sides] = {
    "2 classes": distributions(2, (8, 2), (4, 4), (7, 3)),
    "10 classes, overfitted": distributions(10, (14, 2), (8, 4), (13, 3)),
    "10 classes, calibrated": distributions(10, (8, 3), (7.8, 3), (8, 3)),
    "40 classes, overfitted": distributions(40, (14, 3), (9, 4), (12, 3), rows=1000),
}


def exact(sides: Sides) -> Tensor:
    return svm.fit(*sides[:2], exact_limit=10**9)(sides[2])


def low_rank(sides: Sides) -> Tensor:
    return svm.fit(*sides[:2], exact_limit=0)(sides[2])


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize(("members", "non_members"), [(60, 60), (80, 30), (90, 60)])
def test_for_few_points_the_verdicts_are_scikit_learns(members: int, non_members: int, columns: int) -> None:
    sizes = ((members, 4.0), (non_members, 1.0), (50, 2.0))
    x = [normal(mean, 2, i, count, columns).sigmoid() for i, (count, mean) in enumerate(sizes)]
    machine = SVC(C=3, gamma="auto", kernel="rbf").fit(torch.cat(x[:2]), [1] * members + [0] * non_members)
    found = svm.fit(*x[:2])(x[2])
    assert found.tolist() == [verdict == 0 for verdict in machine.predict(x[2])]
    assert found.any()
    assert not found.all()


@pytest.mark.parametrize("exact_limit", [0, 100])
def test_a_verdict_is_true_of_non_members(exact_limit: int) -> None:
    members, non_members = torch.ones(20, 1), torch.zeros(20, 1)
    target = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    assert svm.fit(members, non_members, exact_limit=exact_limit)(target).tolist() == [False] * 3 + [True]
    assert svm.fit(non_members, members, exact_limit=exact_limit)(target).tolist() == [True] * 3 + [False]


@pytest.mark.parametrize("exact_limit", [0, 100])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_refused(bad: float, exact_limit: int) -> None:
    rows, broken = torch.rand(20, 3), torch.rand(20, 3)
    broken[4, 1] = bad
    for sides in ((rows, broken), (broken, rows)):
        with pytest.raises(UserError, match="NaN or infinity"):
            svm.fit(*sides, exact_limit=exact_limit)
    with pytest.raises(UserError, match="NaN or infinity"):
        svm.fit(rows, rows.flip(0), exact_limit=exact_limit)(broken)


def test_a_machine_that_does_not_converge_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scores = ONE_COLUMN["overfitted"]
    svm.fit(*scores[:2], exact_limit=0)
    assert not caplog.records
    monkeypatch.setattr(svm, "_STEPS", 2)
    svm.fit(*scores[:2], exact_limit=0)
    assert "not converged" in caplog.text


@pytest.mark.parametrize("name", [*ONE_COLUMN, *MANY_COLUMNS])
def test_verdicts_of_low_rank_are_nearly_all_the_exact_ones(name: str) -> None:
    scores = (ONE_COLUMN | MANY_COLUMNS)[name]
    expected, found = exact(scores), low_rank(scores)
    assert (found == expected).double().mean() >= 0.995
    assert 0 < expected.double().mean() < 1


def test_the_attacks_on_one_model_agree() -> None:
    def answers(margin: float, seed: int) -> Answers:
        labels = torch.arange(ROWS) % 10
        logits = normal(0, 2, seed, ROWS, 10)
        logits[torch.arange(ROWS), labels] += normal(margin, 3, 10 + seed, ROWS)
        return Answers(logits.float(), labels)

    sets = answers(10, 0), answers(6, 1), answers(9, 2)
    for name, score in ATTACKS.items():
        members, non_members, target = (score(part) for part in sets)
        scores = members, non_members, target
        assert (low_rank(scores) == exact(scores)).double().mean() >= 0.995, name


def test_decisions_are_scikit_learns_where_it_stops_late() -> None:
    members, non_members, target = distributions(6, (6, 3), (4, 4), (5, 3), rows=300)
    x, y = torch.cat([members, non_members]), [1] * 300 + [0] * 300
    expected = SVC(C=3, gamma="auto", kernel="rbf", tol=1e-9).fit(x, y).decision_function(target)
    found = svm._LowRank(members, non_members).decision(target)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=2e-3)


def test_unequal_sides_are_weighed_as_scikit_learn_weighs_them() -> None:
    members, non_members, target = ONE_COLUMN["overfitted"]
    scores = members[:900], non_members[:250], target
    assert (low_rank(scores) == exact(scores)).double().mean() >= 0.995


@pytest.mark.parametrize("columns", [1, 3])
def test_equal_scores_are_called_member_as_by_scikit_learn(columns: int) -> None:
    rows = torch.ones(200, columns)
    assert not svm.fit(rows, rows)(rows).any()
    assert not svm.fit(rows, rows, exact_limit=0)(rows).any()


def test_where_all_points_lie_inside_the_margin_the_offset_is_the_middle_of_the_optimal_ones() -> None:
    members, non_members, _ = distributions(40, (14, 3), (9, 4), (12, 3), rows=200)
    x, y = torch.cat([members, non_members]), [1] * 200 + [0] * 200
    machine = SVC(C=3, gamma="auto", kernel="rbf", tol=1e-9).fit(x, y)
    assert abs(machine.dual_coef_).min() == 3
    found = svm._LowRank(members, non_members).offset.item()
    assert found == pytest.approx(machine.intercept_.item(), abs=1e-4)


def test_the_limit_counts_all_points() -> None:
    rows = torch.rand(30, 2)
    assert isinstance(svm.fit(rows[:20], rows[20:], exact_limit=30), svm._Exact)
    assert isinstance(svm.fit(rows[:20], rows[20:], exact_limit=29), svm._LowRank)


@pytest.mark.parametrize("columns", [1, 3])
def test_merged_points_keep_sums_and_no_cell_holds_distant_points(columns: int) -> None:
    x = torch.cat([torch.rand(3000, columns, dtype=torch.float64) / 100, torch.ones(70, columns)])
    means, weight = svm._merged(x)
    assert weight.sum() == len(x)
    assert weight[means.sum(1) > columns - 0.01].sum() == 70
    assert len(means) < len(x) - 68
    torch.testing.assert_close(weight @ means, x.sum(0))
    assert (torch.cdist(x, means, p=torch.inf).min(1).values <= svm._CELL).all()
    cells = {tuple(row) for row in (x / svm._CELL).round().long().tolist()}
    assert len(means) == len(cells)


def test_the_factor_reproduces_the_kernel() -> None:
    x = distributions(5, (6, 3), (4, 4), (5, 3), rows=200)[0]
    factor, pivots = svm._pivoted_cholesky(x, 1 / 5, 128)
    kernel = svm._kernel(x, x, 1 / 5)
    torch.testing.assert_close(kernel, (-torch.cdist(x, x).square() / 5).exp())
    assert (factor @ factor.T - kernel).abs().max() <= 2 * svm._RESIDUAL
    assert len(pivots) == factor.shape[1] < 128
    triangle = factor[pivots]
    torch.testing.assert_close(triangle, triangle.tril(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 100, 2000])
def test_the_rank_leaves_room_for_every_column(columns: int) -> None:
    assert columns < svm._rank(columns)


def test_columns_beyond_those_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    rows = torch.rand(30, 2001, generator=torch.Generator().manual_seed(0)).softmax(1)
    svm.fit(rows[:15, 1:], rows[15:, 1:], exact_limit=0)
    assert not caplog.records
    svm.fit(rows[:15], rows[15:], exact_limit=0)
    assert "rough" in caplog.text


@pytest.mark.parametrize("name", ONE_COLUMN)
def test_the_solution_meets_the_conditions_of_an_optimum(name: str) -> None:
    """Beyond the margin: alpha 0; inside: the bound; in between: on the margin. And sign . alpha = 0."""
    x = torch.cat(ONE_COLUMN[name][:2])
    sign = torch.ones(len(x)).double()
    sign[ROWS:] = -1
    factor, _ = svm._pivoted_cholesky(x, 1.0, 128)
    bound = torch.full_like(sign, 3)
    dual = svm._Dual(factor * sign[:, None], sign, bound)
    for step in itertools.count():
        if dual.solved():
            break
        dual.step()
        assert step < 50
    margin = sign * (factor @ dual.normal + dual.offset) - 1
    assert (sign @ dual.alpha).abs() < 1e-6 * bound.sum()
    assert ((dual.alpha > 0) & (dual.alpha < bound)).all()
    assert (dual.alpha[margin > 0.05] < 0.01).all()
    assert (dual.alpha[margin < -0.05] > 2.99).all()
