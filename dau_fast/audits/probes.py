"""What a model's features still know of the forget set, whatever its classifier layer says.

A new head on frozen features, and mutual information between features and "forgotten or not". Both are of
Jeon et al. 2024 (arXiv 2405.17878), who show that changing the head alone passes every test of outputs.
"""

from __future__ import annotations

import math

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from dau_fast.audits.signals import Array


def _linear_probe() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def head_accuracy(shown: Array, shown_labels: np.ndarray, asked: Array, asked_labels: np.ndarray) -> float:
    """Percent of `asked` that a new head, fitted to the features `shown`, recognises.

    shown [S, D], asked [A, D]: features; labels int [S], [A]. The head is a logistic regression on
    standardised features, the same whatever order they come in, with the usual penalty of scikit-learn.
    """
    if len(np.unique(shown_labels)) < 2:
        return 100 * float(np.mean(asked_labels == shown_labels[0]))
    probe = _linear_probe().fit(shown, shown_labels)
    return 100 * float(np.mean(probe.predict(asked) == asked_labels))


def information(forgotten: Array, retained: Array) -> float:
    """Nats that features tell of whether an image is forgotten, 0 to log 2; a lower bound.

    forgotten [N, D], retained [N, D]: features in an order that says nothing, N at least 2. The published
    estimate trains a network on every layer with InfoNCE; this is one layer, the last, and a linear probe:
    log 2 minus its cross-entropy on the half that it was not fitted to, both halves in turn (the bound of
    Barber and Agakov 2003). What only a curved boundary would tell it does not see.
    """
    features = np.concatenate([forgotten, retained])
    kinds = np.repeat([1, 0], [len(forgotten), len(retained)])
    first = np.arange(len(features)) % 2 == 0
    if len(forgotten) % 2:  # each half then holds as many of both kinds
        first[len(forgotten) :] = ~first[len(forgotten) :]
    losses = []
    for fitted in (first, ~first):
        probe = _linear_probe().fit(features[fitted], kinds[fitted])
        asked = kinds[~fitted]
        log_p = probe.predict_log_proba(features[~fitted])[np.arange(len(asked)), asked]
        losses.append(-np.maximum(log_p, math.log(1e-12)))
    return max(0.0, math.log(2) - float(np.concatenate(losses).mean()))


def information_difference_index(audited: float, original: float, retrained: float) -> float | None:
    """(I_audited - I_retrained) / (I_original - I_retrained): 0 as retrained, 1 as the original.

    Of `information` each. None where original and retrained differ by less than 0.01 nats, as for images
    spread over classes: the ratio is then noise.
    """
    whole = original - retrained
    return None if abs(whole) < 0.01 else (audited - retrained) / whole
