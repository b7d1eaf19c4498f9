"""How well one score tells two sets apart: over all thresholds, and at few false alarms."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import rankdata

from dau_fast.audits.signals import Array


def auc(positives: Array, negatives: Array) -> float:
    """Percent of pairs in which one of `positives` [P] is above one of `negatives` [N]; ties count half.

    50 is chance. The area below the ROC curve, by the Mann-Whitney statistic.
    """
    count, others = len(positives), len(negatives)
    ranks = rankdata(np.concatenate([positives, negatives]))[:count]
    return 100 * float(ranks.sum() - count * (count + 1) / 2) / (count * others)


def tpr_at(positives: Array, negatives: Array, fpr: float) -> float:
    """Percent of `positives` [P] above the lowest threshold that at most `fpr` percent of `negatives` pass.

    Of fewer than 100 / fpr negatives none may pass.
    """
    allowed = math.floor(fpr * len(negatives) / 100 + 1e-9)
    if allowed >= len(negatives):
        return 100.0
    threshold = np.sort(negatives)[::-1][allowed]
    return 100 * float(np.mean(positives > threshold))
