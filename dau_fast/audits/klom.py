"""KLoM: KL divergence, image by image, between the margins of unlearned and of retrained models.

Georgiev et al. 2024 (arXiv 2410.23232); the estimate is that of EasyDUB (arXiv 2602.16400): over N models of
each kind, the margins of an image are counted in 20 bins over the range that they span together, and
KL(unlearned || retrained) is taken of the shares, an empty bin of the retrained ones counting as 1e-5. It was
made for about 100 models of each kind: with few of them most bins are empty. For few models there is the
divergence of the two normal distributions, which is ours.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import rel_entr

from dau_fast.audits.signals import Array

BINS = 20
# Margins beyond are cut off, in nats.
_LIMIT = 100.0
# Share of an empty bin. So no divergence is above -log of it, 11.5 nats; normal ones are cut off there.
_EMPTY = 1e-5
CEILING = -math.log(_EMPTY)
# Nats. Margins of copies of one model do not vary.
_LEAST_SPREAD = 1e-2


def klom_histogram(unlearned: Array, retrained: Array, *, bins: int = BINS) -> Array:
    """Divergence in nats of each column, [N]; unlearned [M, N], retrained [K, N]: margins under models.

    As EasyDUB computes it, but that the largest margin falls into the last bin and not out of it.
    """
    sides = [np.clip(side, -_LIMIT, _LIMIT) for side in (unlearned, retrained)]
    low = np.minimum(sides[0].min(0), sides[1].min(0))
    high = np.maximum(sides[0].max(0), sides[1].max(0))
    width = np.where(high > low, high - low, 1.0)
    p, q = (_shares(np.floor(bins * (side - low) / width), bins) for side in sides)
    q = np.where(p > 0, np.maximum(q, _EMPTY), q)
    return rel_entr(p, q / q.sum(0)).sum(0)


def _shares(cells: Array, bins: int) -> Array:
    """Share of the models in each bin, [bins, N]; cells [M, N]."""
    cells = np.minimum(cells, bins - 1)
    return np.stack([(cells == cell).mean(0) for cell in range(bins)])


def klom_normal(unlearned: Array, retrained: Array) -> Array:
    """Divergence in nats of the normal distributions of each column, [N], at most CEILING; at least 2 models.

    log(s_r / s_u) + (s_u^2 + (m_u - m_r)^2) / (2 s_r^2) - 1/2.
    """
    sides = [np.clip(side, -_LIMIT, _LIMIT) for side in (unlearned, retrained)]
    (mean, spread), (other, wide) = ((side.mean(0), _spread(side)) for side in sides)
    found = np.log(wide / spread) + (spread**2 + (mean - other) ** 2) / (2 * wide**2) - 0.5
    return np.minimum(found, CEILING)


def _spread(side: Array) -> Array:
    return np.maximum(side.std(0, ddof=1), _LEAST_SPREAD)
