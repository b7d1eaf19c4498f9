"""How far a model's measures are from retraining: signed, each by itself, and to the mean of retrainings.

A mean of absolute differences hides on which side of retraining a model is, and divides harm to one measure
by the number of all. And single retrainings are apart from one another themselves: their mean is the steadier
reference (AMUN, arXiv 2503.00917, compares with the mean of its retrainings).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from dau_fast.metrics.unlearning import Measures, avg_gap


def list_rates(measures: Measures) -> dict[str, float]:
    """Every rate by name, in percent: UA, RA, TA, and the share of each attack as "attack_<name>"."""
    attacks = {f"attack_{name}": share for name, share in measures.attacks.items()}
    return {"ua": measures.ua, "ra": measures.ra, "ta": measures.ta, **attacks}


def signed_gaps(one: Measures, other: Measures) -> dict[str, float]:
    """Every rate of `one` minus that of `other`, in percentage points; above 0 where `one` has more."""
    theirs = list_rates(other)
    return {name: rate - theirs[name] for name, rate in list_rates(one).items()}


def mean_measures(several: Sequence[Measures]) -> Measures:
    """The mean of every rate and bin of `several`, at least one."""
    first = several[0]

    def over_bins(key: str) -> list[float]:
        return [fmean(column) for column in zip(*(one.confidence[key] for one in several), strict=True)]

    return Measures(
        ua=fmean(one.ua for one in several),
        ra=fmean(one.ra for one in several),
        ta=fmean(one.ta for one in several),
        attacks={name: fmean(one.attacks[name] for one in several) for name in first.attacks},
        confidence={key: over_bins(key) for key in first.confidence},
    )


def gap_to_mean(one: Measures, references: Sequence[Measures]) -> float:
    """avg gap between `one` and the mean of `references`, in percentage points."""
    return avg_gap(one, mean_measures(references))


def mean_gap(one: Measures, references: Sequence[Measures]) -> float:
    """Mean of the avg gaps between `one` and each of `references`, in percentage points.

    Never below `gap_to_mean`: what single references are apart from their mean stays in it.
    """
    return fmean(avg_gap(one, reference) for reference in references)
