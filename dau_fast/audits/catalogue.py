"""The audits by name: on which side each blames a model, and what it takes to run it.

docs/audits.md says of each which question it answers, where it is from and what it does not show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from dau_fast.audits import comparing
from dau_fast.audits.calibration import Side
from dau_fast.audits.comparing import Score
from dau_fast.audits.roc import auc, tpr_at
from dau_fast.audits.signals import Array
from dau_fast.audits.ulira import ULira
from dau_fast.metrics.mia import ATTACKS


@dataclass(frozen=True)
class Audit:
    """One row of the table.

    unit: "%", "points", "nats", "steps", or "" for a share or ratio. side: of retrained models on which a
    score is held against a model. resolution: the smallest difference that means something; None for one
    forget image, in percent. audited, references: how many models of each kind it needs.
    """

    name: str
    label: str
    unit: str
    side: Side
    score: Score
    resolution: float | None = None
    audited: int = 1
    references: int = 1


@cache
def find_audits() -> dict[str, Audit]:
    """Every audit, in the order in which they are shown."""
    rows = [*_rates(), *_margins(), *_rmia(), *_features(), *_of_several()]
    return {row.name: row for row in rows}


# Nats, points, ratios and shares.
_FINE = 0.01
_SETS = ("forget", "retain", "validation")
# Percent of false positives.
_TAILS = (1.0, 0.1)


def _rates() -> list[Audit]:
    labels = {"ua": "UA", "ra": "RA", "ta": "TA"}
    labels |= {f"attack_{name}": f"attack: {name.replace('_', ' ')}" for name in ATTACKS}
    rows = [Audit(name, label, "%", "both", comparing.rate(name)) for name, label in labels.items()]
    distance = comparing.distance_to_mean
    gap = Audit("gap_to_mean", "avg gap to the mean", "points", "above", distance, _FINE)
    return [*rows, gap]


def _margins() -> list[Audit]:
    rows = []
    for name in _SETS:
        shift, distance = comparing.margin_shift(name), comparing.margin_distance(name)
        rows += [
            Audit(f"margin_shift_{name}", f"margins {name}: shift", "nats", "both", shift, _FINE),
            Audit(f"margin_distance_{name}", f"margins {name}: distance", "nats", "above", distance, _FINE),
        ]
    return rows


def _tail(fpr: float) -> Callable[[Array, Array], float]:
    return lambda positives, negatives: tpr_at(positives, negatives, fpr)


def _rmia() -> list[Audit]:
    tails = [
        Audit(
            f"rmia_tpr_{fpr:g}", f"RMIA: TPR at {fpr:g} % FPR", "%", "above",
            comparing.rmia_against_test(_tail(fpr)),
        )
        for fpr in _TAILS
    ]  # fmt: skip
    offline, online = (comparing.rmia_against_retrained(online=online) for online in (False, True))
    test = comparing.rmia_against_test(auc)
    return [
        Audit("rmia_auc", "RMIA: AUC", "%", "both", test),
        *tails,
        Audit("rmia_retrained_auc", "RMIA against retrained: AUC", "%", "both", offline, references=2),
        Audit("rmia_online_auc", "RMIA online: AUC", "%", "both", online, references=2),
    ]


def _features() -> list[Audit]:
    head = comparing.mean_of(lambda one: one.head_accuracy)
    information = comparing.mean_of(lambda one: one.information)
    relearning = comparing.mean_of(lambda one: one.relearning)
    noisy = comparing.mean_of(lambda one: 100 * float(one.noisy.mean()))
    reappears = comparing.mean_of(lambda one: one.reappears)
    return [
        Audit("head_accuracy", "new head: forget accuracy", "%", "both", head),
        Audit("information", "information in features", "nats", "both", information, _FINE),
        Audit("relearning", "relearning", "steps", "both", relearning, 1.0),
        Audit("noisy", "noisy forget images known", "%", "both", noisy),
        Audit("reappears", "labels that reappear nearby", "%", "both", reappears),
        Audit("residual_knowledge", "residual knowledge", "", "both", comparing.residual_knowledge, _FINE),
        Audit("neighbours", "neighbouring classes", "%", "above", comparing.neighbours),
    ]


def _p95(values: Array) -> float:
    return float(np.percentile(values, 95))


def _rate_at(fpr: float) -> Callable[[ULira], float]:
    return lambda found: found.tpr[fpr]


def _of_several() -> list[Audit]:
    """What compares distributions over models."""
    rows = []
    for name in _SETS:
        for key, summarise in (("mean", np.mean), ("p95", _p95)):
            score = comparing.klom_of(name, summarise)
            label = f"KLoM {name}: {key.replace('p', 'P')}"
            rows.append(Audit(f"klom_{name}_{key}", label, "nats", "above", score, _FINE, 2, 2))
    accuracy, area = (comparing.ulira_of(read) for read in (lambda u: u.accuracy, lambda u: u.auc))
    rows += [
        Audit("ulira_accuracy", "U-LiRA: accuracy", "%", "above", accuracy, 1.0, 3, 3),
        Audit("ulira_auc", "U-LiRA: AUC", "%", "above", area, 1.0, 3, 3),
    ]
    for fpr in _TAILS:
        tail, label = comparing.ulira_of(_rate_at(fpr)), f"U-LiRA: TPR at {fpr:g} % FPR"
        rows.append(Audit(f"ulira_tpr_{fpr:g}", label, "%", "above", tail, 1.0, 3, 3))
    quality, score = comparing.forgetting_quality, comparing.challenge_score
    return [
        *rows,
        Audit("forgetting_quality", "challenge: forgetting quality", "", "below", quality, _FINE, 4, 4),
        Audit("challenge_score", "challenge: score", "", "below", score, _FINE, 4, 4),
    ]
