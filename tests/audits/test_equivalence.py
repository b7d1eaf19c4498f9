"""Paired gaps against the noise floor: scipy's own tests, and cases that can be said beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dau_fast.audits.equivalence import bootstrap_interval, compare_with_floor
from dau_fast.errors import UserError

FLOORS = [0.7, 0.9, 0.8, 1.0, 0.6, 0.8]


def test_it_is_the_paired_t_test_and_two_of_them() -> None:
    gaps = [0.9, 1.0, 0.7, 1.3, 0.8, 0.9]
    found = compare_with_floor(gaps, FLOORS, margin=0.5)
    assert found.p_above == pytest.approx(stats.ttest_rel(gaps, FLOORS, alternative="greater").pvalue)
    upper = stats.ttest_rel(gaps, np.array(FLOORS) + 0.5, alternative="less").pvalue
    lower = stats.ttest_rel(gaps, np.array(FLOORS) - 0.5, alternative="greater").pvalue
    assert found.p_equivalent == pytest.approx(max(upper, lower))
    assert found.mean == pytest.approx(np.subtract(gaps, FLOORS).mean())
    interval = stats.ttest_rel(gaps, FLOORS).confidence_interval(0.95)
    assert found.interval == pytest.approx((interval.low, interval.high))
    assert found.bootstrap[0] < found.mean < found.bootstrap[1]


@pytest.mark.parametrize(
    ("added", "margin", "verdict"),
    [
        ([0.0, 0.1, -0.1, 0.05, -0.05, 0.0], 0.3, "equivalent"),
        ([2.0, 2.2, 1.8, 2.1, 1.9, 2.0], 0.3, "above"),
        ([0.0, 1.5, -1.2, 0.9, -1.0, 0.4], 0.3, "undecided"),  # no difference was found, nor was equality
        ([0.1, 0.12, 0.08, 0.1, 0.11, 0.09], 0.3, "equivalent"),  # above, by too little to matter
        ([-2.0, -2.2, -1.8, -2.1, -1.9, -2.0], 0.3, "undecided"),
    ],
)
def test_no_difference_found_is_not_yet_equivalence(added: list[float], margin: float, verdict: str) -> None:
    assert compare_with_floor(np.add(FLOORS, added).tolist(), FLOORS, margin=margin).verdict == verdict


def test_differences_that_do_not_vary_are_decided_by_the_margin() -> None:
    gaps = [1.0, 2.0, 3.0]
    same = compare_with_floor(gaps, gaps, margin=0.1)
    assert (same.p_equivalent, same.p_above, same.bootstrap, same.interval) == (0, 1, (0, 0), (0, 0))
    shifted = compare_with_floor([gap + 0.5 for gap in gaps], gaps, margin=0.25)
    assert (shifted.p_equivalent, shifted.p_above) == (1, 0)


def test_two_equal_methods_are_rarely_called_above() -> None:
    chance = np.random.default_rng(0)
    calls = [
        compare_with_floor(*chance.normal(1, 0.3, (2, 6)).tolist(), margin=0.01).p_above < 0.05
        for _ in range(60)
    ]
    assert sum(calls) <= 8


def test_a_bootstrap_interval_of_many_values_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    half = 1.96 * values.std(ddof=1) / 20
    found = bootstrap_interval(values)
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.04)
    assert found == bootstrap_interval(values)


@pytest.mark.parametrize(("gaps", "floors"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_too_few_seeds_are_refused(gaps: list[float], floors: list[float]) -> None:
    with pytest.raises(UserError, match="one of each a seed"):
        compare_with_floor(gaps, floors, margin=1)


def test_a_margin_is_a_number_above_0() -> None:
    with pytest.raises(UserError, match="`margin=0`"):
        compare_with_floor([1.0, 2.0], [1.0, 2.0], margin=0)
