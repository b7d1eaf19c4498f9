"""Whether gaps are as large as the noise floor: a paired test, and one of equivalence within a stated margin.

That no difference was found is no equality: few seeds find nothing. Two one-sided tests (Schuirmann 1987)
turn it around: equivalent is what is shown to be within the margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dau_fast.audits.signals import Array
from dau_fast.errors import UserError

_RESAMPLES = 9999


@dataclass(frozen=True)
class Equivalence:
    """Of paired differences, gap - noise floor, in their own unit.

    mean: of `count` differences. interval: of the mean, by Student's t, at confidence 1 - level; bootstrap:
    the same by resampling (BCa). margin: what counts as equivalent. p_above: against "the mean is not above
    0". p_equivalent: against "the mean is a margin away from 0 or further", the larger p of two one-sided
    tests.
    """

    count: int
    mean: float
    interval: tuple[float, float]
    bootstrap: tuple[float, float]
    margin: float
    level: float
    p_above: float
    p_equivalent: float

    @property
    def verdict(self) -> str:
        """What is shown at `level`: "equivalent", else "above", else "undecided"."""
        if self.p_equivalent < self.level:
            return "equivalent"
        return "above" if self.p_above < self.level else "undecided"


def compare_with_floor(
    gaps: Sequence[float], floors: Sequence[float], *, margin: float, level: float = 0.05, seed: int = 0
) -> Equivalence:
    """Compare `gaps` with `floors`, seed by seed: one of each a seed, at least two, on the same split.

    margin: above 0, in the gaps' unit. seed: of the resampling. Raises UserError for too few seeds.
    """
    if len(gaps) != len(floors) or len(gaps) < 2:
        raise UserError(
            f"{len(gaps)} gaps and {len(floors)} noise floors: expected one of each a seed, from two seeds up"
        )
    if not margin > 0:
        raise UserError(f"`margin={margin}`: expected a number above 0, in the unit of the gaps")
    differences = np.asarray(gaps, dtype=np.float64) - np.asarray(floors, dtype=np.float64)
    return Equivalence(
        count=len(differences),
        mean=float(differences.mean()),
        interval=_student_interval(differences, level),
        bootstrap=bootstrap_interval(differences, level=level, seed=seed),
        margin=margin,
        level=level,
        p_above=_p_above(differences, 0.0),
        p_equivalent=max(_p_above(differences, -margin), _p_above(-differences, -margin)),
    )


def _p_above(values: Array, border: float) -> float:
    """p of Student's t against "the mean is not above `border`"."""
    if np.ptp(values) == 0:
        return 0.0 if values[0] > border else 1.0
    return float(stats.ttest_1samp(values, border, alternative="greater").pvalue)


def _student_interval(values: Array, level: float) -> tuple[float, float]:
    half = stats.t.ppf(1 - level / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def bootstrap_interval(values: Array, *, level: float = 0.05, seed: int = 0) -> tuple[float, float]:
    """Of the mean of values [N] at confidence 1 - level, bias-corrected and accelerated; N at least 2."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    chance = np.random.default_rng(seed)
    found = stats.bootstrap(
        (values,), np.mean, confidence_level=1 - level, n_resamples=_RESAMPLES, random_state=chance
    ).confidence_interval
    return float(found.low), float(found.high)
