"""What the digits benchmark calls reached: in noise floors, and against doing nothing."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("importable")


def targets_of(found: dict[str, Any], *, classwise: bool) -> dict[str, Any]:
    import digits

    targets: dict[str, Any] = digits.judge(found, classwise)["targets"]
    return targets


def report(dau: float, original: float, *, speedup: float = 6.0, ua: float = 100.0) -> dict[str, Any]:
    gaps = {"dau": dau, "original": original, "ft": 3.0, "ga": 3.0}
    return {
        "noise_floor": 0.1,
        "methods": {name: {"avg_gap": gap} for name, gap in gaps.items()},
        "runs": [{"methods": {"dau": {"speedup": speedup, "ua": ua}}}] * 3,
    }


@pytest.mark.parametrize(("gap", "reached"), [(0.11, True), (0.12, False), (0.9, False)])
def test_a_gap_is_judged_in_noise_floors_however_small_it_is(gap: float, reached: bool) -> None:
    value, limit, found = targets_of(report(gap, 2.0), classwise=False)["avg gap"]
    assert (value, found) == (gap, reached)
    assert limit == pytest.approx(0.11)


@pytest.mark.parametrize("classwise", [False, True])
def test_a_result_has_to_be_nearer_than_doing_nothing(classwise: bool) -> None:
    for original, reached in ((0.2, True), (0.05, False)):
        targets = targets_of(report(0.1, original), classwise=classwise)
        assert targets["below original, ft and ga"][2] == reached


def test_of_a_class_the_worst_seed_counts() -> None:
    assert "lowest UA" not in targets_of(report(0.1, 2.0), classwise=False)
    assert not targets_of(report(0.1, 2.0, ua=98.9), classwise=True)["lowest UA"][2]
    assert targets_of(report(0.1, 2.0), classwise=True)["lowest UA"][2]
