"""The score of the NeurIPS 2023 unlearning challenge: an epsilon for each image, points for small ones.

Triantafillou et al. 2024 (arXiv 2406.09073), Algorithm 1 and its released scoring. For each forget image,
attacks with one threshold and with two try to tell its confidences under unlearned models from those under
retrained ones. An attack with false-positive rate FPR and false-negative rate FNR shows that unlearning is
not better than (epsilon, delta)-unlearning with

    epsilon = max(log(1 - delta - FPR) - log FNR, log(1 - delta - FNR) - log FPR).

Every distinct threshold and pair of thresholds is tried, where the release tries a fine grid and, of pairs,
those about as far apart as the narrower set is wide: our attacks are the same or stronger.
"""

from __future__ import annotations

import math

import numpy as np

from dau_fast.audits.signals import Array

_DELTA = 1e-5
# A set that is less wide than this share of the other's width is told apart, whatever attacks say.
_POINTLIKE = 0.01
# Width of the steps in epsilon after each of which an image earns half as much.
_BUCKET = 0.5


def epsilons(unlearned: Array, retrained: Array) -> Array:
    """Of each image, [N], from 0; infinite where some attack makes no mistake.

    unlearned [M, N], retrained [K, N]: margins of images under models.
    """
    return np.array([_epsilon(*columns) for columns in zip(unlearned.T, retrained.T, strict=True)])


def _epsilon(unlearned: Array, retrained: Array) -> float:
    widths = sorted((float(np.ptp(unlearned)), float(np.ptp(retrained))))
    if widths[1] > 0 and widths[0] / widths[1] < _POINTLIKE:
        return math.inf
    upper, lower = retrained, unlearned
    if np.median(retrained) <= np.median(unlearned):
        upper, lower = lower, upper
    inner, outer = sorted((unlearned, retrained), key=np.ptp)
    rates = [_one_threshold(upper, lower), _two_thresholds(inner, outer)]
    fpr, fnr = (np.concatenate(column) for column in zip(*rates, strict=True))
    if np.any((fpr == 0) & (fnr == 0)):
        return math.inf
    # What makes mistakes of one kind alone says nothing with this few models.
    usable = (fpr > 0) & (fnr > 0) & (fpr < 1 - _DELTA) & (fnr < 1 - _DELTA)
    fpr, fnr = fpr[usable], fnr[usable]
    found = np.maximum(np.log(1 - _DELTA - fpr) - np.log(fnr), np.log(1 - _DELTA - fnr) - np.log(fpr))
    return max(0.0, float(found.max(initial=0.0)))


def _one_threshold(upper: Array, lower: Array) -> tuple[Array, Array]:
    """FPR and FNR of calling `upper` what is at least a threshold, of all thresholds."""
    values = np.unique(np.concatenate([upper, lower]))
    below_upper, below_lower = (np.searchsorted(np.sort(side), values) for side in (upper, lower))
    return 1 - below_lower / len(lower), below_upper / len(upper)


def _two_thresholds(inner: Array, outer: Array) -> tuple[Array, Array]:
    """FPR and FNR of calling `inner` what lies between two thresholds, of all pairs of them."""
    values = np.unique(np.concatenate([inner, outer]))

    def inside(side: Array) -> Array:
        ordered = np.sort(side)
        first = np.searchsorted(ordered, values, side="left")
        last = np.searchsorted(ordered, values, side="right")
        return (last[None, :] - first[:, None])[np.triu_indices(len(values))] / len(side)

    return inside(outer), 1 - inside(inner)


def forgetting_quality(epsilons: Array, models: int) -> float:
    """Mean points of the images, 0 to 1: 1 below an epsilon of 0.5, half as much in every further 0.5.

    models: of each kind, at least 3. No point from log(models - 1) up, rounded up: the largest finite epsilon
    that so few models can show. 1 is best.
    """
    last = math.ceil(math.log(models - 1)) / _BUCKET
    bucket = np.floor(epsilons / _BUCKET)
    return float(np.where(bucket < last, 0.5 ** np.minimum(bucket, 100), 0.0).mean())


def challenge_score(quality: float, retain: tuple[float, float], test: tuple[float, float]) -> float:
    """Forgetting quality times the shares of accuracy that are kept.

    retain, test: accuracy of unlearned and of retrained models, any unit but the same.
    """
    return quality * (retain[0] / retain[1]) * (test[0] / test[1])
