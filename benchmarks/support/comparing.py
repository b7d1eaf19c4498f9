"""Figures over seeds: paired differences with their intervals, and equivalence to the noise floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student

from dau_fast.errors import UserError

CONFIDENCE = 0.95
# Share of the mean noise floor that counts as no difference: 1.25 floors is the target of image tasks.
MARGIN = 0.25


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided 95 % interval by Student's t."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """Avg gaps of a method over seeds beside the noise floors of the same seeds, in percentage points.

    gap, floor: means. difference: gap less floor, paired by seed. p_above: of the one-sided paired t-test of
    gap <= floor: below 0.05 the gap is significantly above. margin: points that count as no difference.
    p_equivalent: of two one-sided tests (Schuirmann 1987) of |gap - floor| >= margin: below 0.05 they are
    equivalent.
    """

    seeds: int
    gap: float
    floor: float
    difference: Interval
    p_above: float
    margin: float
    p_equivalent: float


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of `values`, two at least."""
    middle, error, freedom = _describe(values)
    half = float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Interval(middle, middle - half, middle + half)


def paired_interval(one: Sequence[float], other: Sequence[float]) -> Interval:
    """Of one - other, paired by position."""
    return interval(_differences(one, other))


def p_above(values: Sequence[float], limit: float = 0.0) -> float:
    """p of the one-sided t-test of mean <= `limit`: small where the mean is above it."""
    middle, error, freedom = _describe(values)
    if error == 0:
        return 0.0 if middle > limit else 1.0
    return float(student.sf((middle - limit) / error, freedom))


def p_equivalent(values: Sequence[float], margin: float) -> float:
    """p of two one-sided t-tests of |mean| >= `margin`: small where the mean is within it."""
    return max(p_above(values, -margin), p_above([-value for value in values], -margin))


def summarise(gaps: Sequence[float], floors: Sequence[float], margin: float | None = None) -> Summary:
    """Avg gaps of one method and noise floors, one a seed; margin: points, None for MARGIN mean floors."""
    differences, floor = _differences(gaps, floors), fmean(floors)
    margin = MARGIN * floor if margin is None else margin
    return Summary(
        seeds=len(gaps),
        gap=fmean(gaps),
        floor=floor,
        difference=interval(differences),
        p_above=p_above(differences),
        margin=margin,
        p_equivalent=p_equivalent(differences, margin),
    )


def _differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    if len(one) != len(other):
        raise UserError(f"{len(one)} and {len(other)} figures are not paired: give one of each a seed")
    return [a - b for a, b in zip(one, other, strict=True)]


def _describe(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean, standard error and degrees of freedom."""
    if len(values) < 2:
        raise UserError(f"{len(values)} figures have no interval: give those of 2 seeds or more")
    return fmean(values), stdev(values) / len(values) ** 0.5, len(values) - 1
