"""Which other classes a model takes a forgotten class for, compared with retrained ones.

A retrained model spreads a class that it never saw over the classes that look like it, one that was made to
forget often over others, which gives it away (arXiv 2512.06993 reads it off single images; here mean
distributions are compared).
"""

from __future__ import annotations

import numpy as np

from dau_fast.audits.signals import Array


def mean_distributions(probabilities: Array, labels: np.ndarray) -> Array:
    """Mean predicted distribution of each class's images, [C, C]; NaN in rows of classes without any.

    probabilities [N, C], labels [N].
    """
    classes = probabilities.shape[1]
    found = np.full((classes, classes), np.nan)
    for label in np.unique(labels):
        found[label] = probabilities[labels == label].mean(0)
    return found


def neighbour_distance(one: Array, other: Array, counts: np.ndarray) -> float:
    """Total variation in percent between mean distributions [C, C], averaged over images.

    counts [C]: images of each class. 0 for equal ones, 100 for ones that share no class.
    """
    seen = counts > 0
    apart = 50 * np.abs(one[seen] - other[seen]).sum(1)
    return float(np.average(apart, weights=counts[seen]))
