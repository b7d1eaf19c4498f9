"""U-LiRA: tell, image by image, an unlearned model from a retrained one by a likelihood ratio.

Hayes et al. 2024 (arXiv 2403.01218): for each forget image one normal distribution is fitted to its
logit-scaled confidences under unlearned models and one to those under models that never saw it; a further
model is called unlearned where the first makes its confidence more likely. Here all models share one forget
set and one retain set and differ in their seeds, and one model of each kind at a time is left out and judged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dau_fast.audits.roc import auc, tpr_at
from dau_fast.audits.signals import Array

# Below this many models the variance is one for all images, as Carlini et al. 2022 advise for few models.
OWN_VARIANCE = 64
# Nats. Confidences of copies of one model do not vary.
_LEAST_SPREAD = 1e-6


@dataclass(frozen=True)
class ULira:
    """All in percent, 50 being chance but for `tpr`.

    accuracy: of the verdicts, over models and images. auc: of the likelihood ratio. tpr: by false-positive
    rate, the share of unlearned models' images recognised. by_image: accuracy on each image, [N].
    """

    accuracy: float
    auc: float
    tpr: dict[float, float]
    by_image: Array


def ulira(unlearned: Array, retrained: Array, *, fprs: tuple[float, ...] = (0.1, 1.0)) -> ULira:
    """Leave one pair of models out at a time, fit to the others and judge the pair.

    unlearned [M, N], retrained [K, N]: margins of N images under models, M and K at least 3; where they
    differ, models of the fewer are left out several times, each time beside another. fprs: in percent.
    """
    pairs = [(i % len(unlearned), i % len(retrained)) for i in range(max(len(unlearned), len(retrained)))]
    ratios = np.stack([_judge(unlearned, retrained, *pair) for pair in pairs])  # [pairs, 2, N]
    positives, negatives = ratios[:, 0], ratios[:, 1]
    right = (np.sign(positives) - np.sign(negatives) + 2) / 4  # a ratio of 0 is half right
    return ULira(
        accuracy=100 * float(right.mean()),
        auc=auc(positives.ravel(), negatives.ravel()),
        tpr={fpr: tpr_at(positives.ravel(), negatives.ravel(), fpr) for fpr in fprs},
        by_image=100 * right.mean(0),
    )


def _judge(unlearned: Array, retrained: Array, one: int, other: int) -> Array:
    """Log likelihood ratios of unlearned[one] and retrained[other], fitted to all others; [2, N]."""
    judged = np.stack([unlearned[one], retrained[other]])
    for_unlearned = _log_density(judged, np.delete(unlearned, one, 0))
    return for_unlearned - _log_density(judged, np.delete(retrained, other, 0))


def _log_density(values: Array, models: Array) -> Array:
    """Of values [..., N] under the normal distribution of each column of `models` [M, N], but a constant."""
    variance = models.var(0, ddof=1)
    if len(models) < OWN_VARIANCE:
        variance = np.full_like(variance, variance.mean())
    spread = np.maximum(np.sqrt(variance), _LEAST_SPREAD)
    return -0.5 * ((values - models.mean(0)) / spread) ** 2 - np.log(spread)
