"""RMIA: is an image more likely under a model than the population makes one expect?

Zarifzadeh, Liu and Shokri 2024 (arXiv 2312.03262). With Pr(x) the mean probability of x's label under
reference models, x beats a population image z where

    (Pr(x | model) / Pr(x)) / (Pr(z | model) / Pr(z)) >= gamma,

and the score of x is the share of population images that it beats.
"""

from __future__ import annotations

import numpy as np

from dau_fast.audits.signals import Array


def rmia_scores(
    log_p_x: Array, log_prior_x: Array, log_p_z: Array, log_prior_z: Array, *, gamma: float
) -> Array:
    """Share, 0 to 1, of population images that each image beats; [N].

    log_p_x [N], log_p_z [Z]: log probability of the true label under the audited model, in nats, of images
    and of population images. log_prior_x, log_prior_z: log Pr of the same.
    """
    beaten = np.sort(log_p_z - log_prior_z)
    ratios = log_p_x - log_prior_x - np.log(gamma)
    return np.searchsorted(beaten, ratios, side="right") / len(beaten)


def offline_prior(log_p_out: Array, *, a: float) -> Array:
    """log Pr [N], from models that never saw the images alone: log_p_out [K, N].

    The mean over models that were trained on an image is not known and taken as a mean_out + 1 - a, with a
    from 0 to 1, so that Pr = ((1 + a) mean_out + 1 - a) / 2.
    """
    return np.log(((1 + a) * np.exp(log_p_out).mean(0) + 1 - a) / 2)


def online_prior(log_p_in: Array, log_p_out: Array) -> Array:
    """log Pr [N], half from models that were trained on the images and half from others: [J, N], [K, N]."""
    return np.log((np.exp(log_p_in).mean(0) + np.exp(log_p_out).mean(0)) / 2)
