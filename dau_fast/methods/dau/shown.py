"""What the attacker is shown of an image beside the model's answer: a label, and how hard the image is.

Labels of a forget set may be wrong: a mislabelled batch, or images that wear a trigger. A model that never
saw them does not predict those labels, so that validation with its true ones is no example of how they look
unseen. As large a share of validation as is wrong in the forget set is then shown with wrong labels too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import chi2, gaussian_kde
from torch import Tensor

from dau_fast.config import DauConfig
from dau_fast.data.split import draw_sample
from dau_fast.methods.dau.departure import Departures, prepare_departures
from dau_fast.methods.dau.difficulty import PlainModel, draw_lesson, fit_plain_model, rate_difficulty
from dau_fast.methods.dau.unseen import prepare_unseen
from dau_fast.methods.task import Task

# Wrong labels are believed in where chance gives as clear signs once in a thousand forget sets.
_CLEAR = float(chi2.isf(1e-3, df=1))
# Images of each set whose difficulties are compared, at most, and steps of expectation and maximisation.
_COMPARED, _STEPS = 2000, 200
_BACKGROUND = 0.02


@dataclass(frozen=True)
class Shown:
    """labels: int64 [N], of all images, those that the attacker is shown. difficulty: float [N], or None.

    wrong_labels: share of the validation set that is shown with wrong labels. departures: where forget images
    depart to.
    """

    labels: Tensor
    difficulty: Tensor | None = None
    wrong_labels: float = 0.0
    departures: Departures | None = None

    def rate(self, index: Tensor) -> Tensor | None:
        """Difficulty [B] of the images `index` [B]."""
        return None if self.difficulty is None else self.difficulty[index]


def prepare_shown(task: Task, config: DauConfig) -> Shown:
    """For the game of `task`, whose retain set is all that the plain model learns from."""
    labels, validation, chance = task.labels, task.split.validation, task.generator("difficulty")
    wrong = draw_wrong_labels(labels[validation], labels[task.split.forget], chance)
    lesson, classes = draw_lesson(task.split, chance), task.original.head.out_features
    plain = fit_plain_model(task.images, lesson, labels, classes, chance) if config.asks_plain else None
    rated = (
        _rate(task, plain, labels.index_put((validation,), wrong)) if plain and config.difficulty else None
    )
    share = config.wrong_labels
    if share is None:
        share = _compare(rated, wrong != labels[validation], chance) if rated else 0.0
    chosen = torch.rand(len(wrong), generator=chance, device=labels.device) < share
    shown = labels.index_put((validation[chosen],), wrong[chosen])
    departures = _depart(task, plain, lesson, shown, share, config, chance) if config.departure else None
    if rated is None:
        return Shown(shown, None, share, departures)
    difficulty = rated.forget.new_zeros(len(labels))
    difficulty[task.split.forget] = rated.forget
    difficulty[validation] = torch.where(chosen, rated.wrong, rated.right)
    return Shown(shown, difficulty, share, departures)


def draw_wrong_labels(labels: Tensor, among: Tensor, generator: torch.Generator) -> Tensor:
    """For each of `labels` [V] another one, drawn from `among` [F]; the same where that has no other, [V]."""
    ordered = among.sort().values
    first = torch.searchsorted(ordered, labels)
    equal = torch.searchsorted(ordered, labels, right=True) - first
    others = len(among) - equal
    place = (torch.rand(len(labels), generator=generator, device=labels.device) * others).long()
    place = place.minimum(others - 1).clamp_min(0)
    place = torch.where(place < first, place, place + equal)  # over those that are equal
    return torch.where(others > 0, ordered[place.clamp_max(len(among) - 1)], labels)


def estimate_wrong_share(known: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> float:
    """The share of images of difficulties `known` [F] whose labels are wrong; 0 where that is not clear.

    right, wrong: difficulties of images that are shown with right and with wrong labels. Of the mixture of
    their densities (Gaussian kernels, Scott's rule) the share that makes `known` most likely, kept where the
    likelihood-ratio test (Wilks 1938) speaks for it.
    """
    if min(len(right), len(wrong)) < 2 or min(np.ptp(right), np.ptp(wrong)) == 0:
        return 0.0
    # Tails of kernels are thin: without a background one image outside them would decide.
    background = _BACKGROUND / np.ptp(np.concatenate([known, right, wrong]))
    of_right, of_wrong = (
        (1 - _BACKGROUND) * gaussian_kde(sample)(known) + background for sample in (right, wrong)
    )
    share = 0.5
    for _ in range(_STEPS):
        share = float(np.mean(share * of_wrong / (share * of_wrong + (1 - share) * of_right)))
    gain = 2 * float(np.log(share * of_wrong + (1 - share) * of_right).sum() - np.log(of_right).sum())
    return share if gain > _CLEAR else 0.0


@dataclass(frozen=True)
class _Rated:
    """Difficulties of forget [F], and of validation with its true labels and with wrong ones, [V] each."""

    forget: Tensor
    right: Tensor
    wrong: Tensor


def _depart(
    task: Task,
    plain: PlainModel | None,
    lesson: Tensor,
    shown: Tensor,
    wrong: float,
    config: DauConfig,
    generator: torch.Generator,
) -> Departures:
    """plain: of the retain images `lesson`; shown: labels of all images; wrong: share of the forget set's."""
    if task.split.classwise:
        return prepare_departures(task, plain, config.plain_share, generator)
    return prepare_unseen(
        task, plain, lesson, shown, share=config.plain_share, wrong=wrong, most=config.look_images,
        chance=generator,
    )  # fmt: skip


def _rate(task: Task, model: PlainModel, changed: Tensor) -> _Rated:
    """changed: labels [N] with wrong ones for validation."""
    split = task.split
    index, versions = torch.cat([split.forget, split.validation]), [task.labels, changed]
    true, other = rate_difficulty(model, task.images, index, versions, task.ranks)
    return _Rated(true[: len(split.forget)], true[len(split.forget) :], other[len(split.forget) :])


def _compare(rated: _Rated, changed: Tensor, generator: torch.Generator) -> float:
    """The estimate from as many images as are worth it; changed: bool [V], whose wrong label is one."""
    samples = (rated.forget, rated.right, rated.wrong[changed])
    drawn = (_draw(sample, generator).double().cpu().numpy() for sample in samples)
    return estimate_wrong_share(*drawn)


def _draw(values: Tensor, generator: torch.Generator) -> Tensor:
    """At most _COMPARED of `values` [N]."""
    return values[draw_sample(torch.arange(len(values), device=values.device), _COMPARED, generator)]
