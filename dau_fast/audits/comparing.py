"""Scores of audited models against references, from what was seen of each: one function an audit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from dau_fast.audits import challenge, klom, rmia
from dau_fast.audits.evidence import Evidence
from dau_fast.audits.neighbours import neighbour_distance
from dau_fast.audits.roc import auc
from dau_fast.audits.signals import Array, log_probabilities
from dau_fast.audits.ulira import ULira, ulira
from dau_fast.config import AuditConfig
from dau_fast.metrics.gaps import gap_to_mean, list_rates

Group = Sequence[Evidence]


@dataclass(frozen=True)
class Context:
    """What scores need beside models. originals: from before unlearning. forget_counts: by class, [C]."""

    originals: Group
    forget_counts: np.ndarray
    config: AuditConfig


# Audited models and references -> a number in the audit's unit.
Score = Callable[[Group, Group, Context], float]


def mean_of(read: Callable[[Evidence], float]) -> Score:
    """The mean of what `read` gives of each audited model, whatever the references are."""
    return lambda group, _references, _context: fmean(map(read, group))


def rate(name: str) -> Score:
    """One of the rates that reports have, by its name in `list_rates`."""
    return mean_of(lambda one: list_rates(one.measures)[name])


# ---- measures


def distance_to_mean(group: Group, references: Group, _: Context) -> float:
    """avg gap between each audited model and the mean of the references, in points."""
    theirs = [reference.measures for reference in references]
    return fmean(gap_to_mean(one.measures, theirs) for one in group)


# ---- margins, image by image


def _stack(group: Group, name: str) -> Array:
    """Margins of a set under each model, [M, N]."""
    return np.stack([one.margins[name] for one in group])


def margin_shift(name: str) -> Score:
    """How much more certain of the true labels of a set than the references' mean, in nats; signed."""

    def score(group: Group, references: Group, _: Context) -> float:
        return float((_stack(group, name) - _stack(references, name).mean(0)).mean())

    return score


def margin_distance(name: str) -> Score:
    """The mean distance to the references' mean, image by image, in nats."""

    def score(group: Group, references: Group, _: Context) -> float:
        return float(np.abs(_stack(group, name) - _stack(references, name).mean(0)).mean())

    return score


def klom_of(name: str, summarise: Callable[[Array], float]) -> Score:
    """KLoM on a set, of normal distributions where there are few models; `summarise` takes it by image."""

    def score(group: Group, references: Group, context: Context) -> float:
        sides = _stack(group, name), _stack(references, name)
        many = min(map(len, sides)) >= context.config.histogram_from
        return float(summarise((klom.klom_histogram if many else klom.klom_normal)(*sides)))

    return score


def ulira_of(read: Callable[[ULira], float]) -> Score:
    """What `read` takes of U-LiRA on the forget set."""
    return lambda group, references, _: read(ulira(_stack(group, "forget"), _stack(references, "forget")))


def forgetting_quality(group: Group, references: Group, _: Context) -> float:
    """The challenge's, on as many models as the fewer kind has."""
    sides = _stack(group, "forget"), _stack(references, "forget")
    return challenge.forgetting_quality(challenge.epsilons(*sides), min(map(len, sides)))


def challenge_score(group: Group, references: Group, context: Context) -> float:
    """Forgetting quality times what is kept of retain and test accuracy."""

    def kept(read: Callable[[Evidence], float]) -> tuple[float, float]:
        return fmean(map(read, group)), fmean(map(read, references))

    quality = forgetting_quality(group, references, context)
    retain, test = kept(lambda one: one.measures.ra), kept(lambda one: one.measures.ta)
    return challenge.challenge_score(quality, retain, test)


# ---- RMIA


def _rmia_scores(one: Evidence, name: str, references: Group, context: Context, *, online: bool) -> Array:
    """Scores of the images of a set under one model; the population is the validation set."""
    out = {key: log_probabilities(_stack(references, key)) for key in (name, "validation")}
    a, gamma = context.config.rmia_offline, context.config.rmia_gamma
    if online:
        inside = log_probabilities(_stack(context.originals, name))
        everyone = log_probabilities(_stack([*references, *context.originals], "validation"))
        priors = rmia.online_prior(inside, out[name]), rmia.offline_prior(everyone, a=1)
    else:
        priors = rmia.offline_prior(out[name], a=a), rmia.offline_prior(out["validation"], a=a)
    mine = [log_probabilities(one.margins[key]) for key in (name, "validation")]
    return rmia.rmia_scores(mine[0], priors[0], mine[1], priors[1], gamma=gamma)


def rmia_against_test(summarise: Callable[[Array, Array], float]) -> Score:
    """Forget images against test images, under the audited model: how the literature reports it."""

    def score(group: Group, references: Group, context: Context) -> float:
        pairs = [
            [_rmia_scores(one, name, references, context, online=False) for name in ("forget", "test")]
            for one in group
        ]
        return fmean(summarise(forget, test) for forget, test in pairs)

    return score


def rmia_against_retrained(*, online: bool) -> Score:
    """Forget images under the audited model against the same images under a retrained one.

    Each reference in turn is the retrained one, and the others are what both are scored with.
    """

    def score(group: Group, references: Group, context: Context) -> float:
        found = []
        for i, other in enumerate(references):
            rest = [*references[:i], *references[i + 1 :]]
            theirs = _rmia_scores(other, "forget", rest, context, online=online)
            found += [auc(_rmia_scores(one, "forget", rest, context, online=online), theirs) for one in group]
        return fmean(found)

    return score


# ---- features and neighbourhoods


def neighbours(group: Group, references: Group, context: Context) -> float:
    """Distance of mean predicted distributions on forget images to the references' mean, in percent."""
    theirs = np.mean([reference.distributions for reference in references], 0)
    return fmean(neighbour_distance(one.distributions, theirs, context.forget_counts) for one in group)


def residual_knowledge(group: Group, references: Group, _: Context) -> float:
    """Mean ratio of how often noisy copies are recognised, over images that references recognise at all.

    1 where they recognise none: the share of recognised copies then tells alone.
    """
    theirs = np.mean([reference.noisy for reference in references], 0)
    known = theirs > 0
    if not known.any():
        return 1.0
    return fmean(float((one.noisy[known] / theirs[known]).mean()) for one in group)
