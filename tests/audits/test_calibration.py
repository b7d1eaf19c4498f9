"""Bands of held-out references, and how often a retrained model is outside of them: by hand, simulated."""

from __future__ import annotations

import numpy as np
import pytest

from dau_fast.audits.calibration import Calibrated, Side, judge, leave_out


def calibrated(
    audited: float, held_out: list[float], side: Side = "both", resolution: float = 0.01
) -> Calibrated:
    return Calibrated((audited,) * len(held_out), tuple(held_out), side, resolution)


def test_every_reference_is_held_out_once_and_left_over_ones_never() -> None:
    assert leave_out(3, 1) == [([0], [1, 2]), ([1], [0, 2]), ([2], [0, 1])]
    assert leave_out(5, 2) == [([0, 1], [2, 3, 4]), ([2, 3], [0, 1, 4])]
    assert leave_out(2, 3) == []


@pytest.mark.parametrize(
    ("side", "audited", "outside", "p_value"),
    [
        ("both", 5.0, True, 2 / 5),
        ("both", -5.0, True, 2 / 5),
        ("both", 2.5, False, 1.0),
        ("both", 4.0, False, 4 / 5),  # a tie with the largest
        ("above", 5.0, True, 1 / 5),
        ("above", -5.0, False, 1.0),
        ("above", 3.5, False, 2 / 5),
        ("below", -5.0, True, 1 / 5),
        ("below", 5.0, False, 1.0),
    ],
)
def test_outside_is_beyond_all_on_a_side_that_counts(
    side: Side, audited: float, outside: bool, p_value: float
) -> None:
    found = calibrated(audited, [1.0, 2.0, 3.0, 4.0], side)
    assert found.outside == outside
    assert found.p_value == pytest.approx(p_value)
    assert found.band == (1, 4)
    assert found.false_alarm_rate == pytest.approx((2 if side == "both" else 1) / 5)


def test_an_audited_model_is_compared_with_each_fold_by_itself() -> None:
    """Above the held-out one in every fold, though not above the largest of all."""
    found = Calibrated((2.0, 12.0), (1.0, 11.0), "above", 0.1)
    assert found.outside
    assert found.value == 7


def test_deviations_are_from_the_others_and_in_their_spread() -> None:
    found = calibrated(7.0, [1.0, 2.0, 3.0, 40.0])
    ours, theirs = found.deviations(3)
    assert ours == pytest.approx((7 - 2) / 1)
    assert theirs == pytest.approx((40 - 2) / 1)
    assert calibrated(7.0, [1.0, 2.0, 3.0, 40.0], "below").deviations(3) == (0, 0)
    # Where others do not differ, the resolution is the unit.
    assert calibrated(2.0, [1.0, 1.0, 1.0, 1.0], resolution=0.5).deviations(0) == (2, 0)


def test_what_cannot_differ_tells_nothing_apart() -> None:
    found = judge([calibrated(0.0, [0.0] * 5), calibrated(100.0, [100.0] * 5, "above")])
    assert found.inside
    assert found.p_value == 1
    assert found.outside == 0


def test_one_audit_among_many_tells_a_model_apart() -> None:
    chance = np.random.default_rng(0)
    audits = [calibrated(*_split(chance.normal(size=10))) for _ in range(30)]
    assert judge(audits).inside
    audits[:3] = [calibrated(400.0, chance.normal(size=9).tolist()) for _ in range(3)]
    found = judge(audits)
    assert not found.inside
    assert found.p_value == pytest.approx(1 / 10)
    assert found.expected == pytest.approx(30 * 2 / 10)


def _split(scores: np.ndarray) -> tuple[float, list[float]]:
    return float(scores[0]), scores[1:].tolist()


@pytest.mark.parametrize("references", [4, 9])
def test_a_retrained_model_is_told_apart_as_often_as_stated(references: int) -> None:
    """200 models exchangeable with their references, on 12 audits that hang together in part."""
    chance, calls, single = np.random.default_rng(1), 0, 0
    for _ in range(200):
        scores = chance.normal(size=(12, references + 1)) + chance.normal(size=references + 1)
        audits = [calibrated(*_split(row), side="both") for row in scores]
        calls += not judge(audits).inside
        single += audits[0].outside
    assert calls / 200 == pytest.approx(1 / (references + 1), abs=0.06)
    assert single / 200 == pytest.approx(2 / (references + 1), abs=0.07)
