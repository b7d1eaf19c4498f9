"""Signed gaps and the mean of several retrainings, against sums by hand."""

from __future__ import annotations

import pytest

from dau_fast.metrics.gaps import gap_to_mean, list_rates, mean_gap, mean_measures, signed_gaps
from dau_fast.metrics.mia import ATTACKS
from dau_fast.metrics.unlearning import Measures, avg_gap


def measures(ua: float, ra: float, ta: float, mia: float, entropy: float = 0.0) -> Measures:
    attacks = dict.fromkeys(ATTACKS, mia) | {"entropy": entropy}
    return Measures(ua, ra, ta, attacks, {"edges": [0.0, 1.0], "forget": [ua]})


ONE = measures(10, 90, 80, 30, entropy=5)
TWO = measures(4, 98, 79, 36, entropy=30)


def test_gaps_keep_their_sign_and_hold_every_attack() -> None:
    assert signed_gaps(ONE, TWO) == {
        "ua": 6, "ra": -8, "ta": 1, "attack_correctness": -6, "attack_confidence": -6,
        "attack_entropy": -25, "attack_modified_entropy": -6, "attack_probability": -6,
    }  # fmt: skip
    assert signed_gaps(TWO, ONE) == {name: -gap for name, gap in signed_gaps(ONE, TWO).items()}


def test_the_avg_gap_is_the_mean_of_four_of_them() -> None:
    gaps = signed_gaps(ONE, TWO)
    four = ("ua", "ra", "ta", "attack_confidence")
    assert avg_gap(ONE, TWO) == sum(abs(gaps[name]) for name in four) / 4


def test_the_mean_is_that_of_every_rate_and_bin() -> None:
    mean = mean_measures([ONE, TWO])
    assert (mean.ua, mean.ra, mean.ta, mean.mia_efficacy) == (7, 94, 79.5, 33)
    assert mean.attacks["entropy"] == 17.5
    assert mean.confidence == {"edges": [0.0, 1.0], "forget": [7]}
    assert list_rates(mean_measures([ONE])) == list_rates(ONE)


def test_between_two_retrainings_the_gap_to_the_mean_is_0_where_that_to_each_is_not() -> None:
    references = [measures(2, 100, 50, 10), measures(6, 96, 54, 14)]
    middle = measures(4, 98, 52, 12)
    assert gap_to_mean(middle, references) == 0
    assert mean_gap(middle, references) == 2
    outside = measures(8, 100, 52, 12)
    assert gap_to_mean(outside, references) == pytest.approx((4 + 2 + 0 + 0) / 4)
    assert mean_gap(outside, references) == pytest.approx(((6 + 0 + 2 + 2) + (2 + 4 + 2 + 2)) / 8)
