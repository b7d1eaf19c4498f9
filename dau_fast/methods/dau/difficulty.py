"""How hard each image is for a model that never saw it, told by a plain model of the retain set.

Sets of images differ by chance, and a forget set may be harder than validation by its nature, as mislabelled
images are. An attacker that compares images of one difficulty does not take the one for the other. The plain
model is linear, by ridge regression on features of patches (Coates, Ng and Lee 2011, AISTATS, "An analysis of
single-layer networks"): it learns from the retain set alone, so that it has memorised nothing of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dau_fast.data.split import Split, draw_sample
from dau_fast.engine.batches import Load, load_each
from dau_fast.engine.evaluation import map_batches
from dau_fast.engine.ranks import ALONE, Ranks

# Pixels a side: larger images are averaged down to it, and smaller ones have no patches.
_SIDE, _LEAST_SIDE = 32, 4
# Pixels a side of a patch, or half an image's; filters; images that patches are drawn from, and patches.
_PATCH, _FILTERS, _PATCH_IMAGES, _PATCHES = 5, 64, 200, 20_000
# Of a patch's standard deviation and of the eigenvalues of whitened ones, in units of normalised pixels.
_LEAST_SPREAD = 0.1
_THRESHOLD = 0.5
# Images of the retain set that are learned from, at most.
LESSON_IMAGES = 10_000
# FLOPs of the features of an image, at most.
IMAGE_FLOPS = 2 * _FILTERS * 3 * _PATCH**2 * (_SIDE - _PATCH + 1) ** 2
_RIDGE = 0.1  # penalty of a squared weight, by image
FEATURES = 8 * _FILTERS  # of an image
_LEAST_REST = 1e-3  # of an answer that a row does not give itself: it is divided by


def count_patch_numbers(side: float) -> int:
    """What all filters answer to the patches of an image of `side` pixels a side."""
    side = min(_SIDE, int(side))
    patch = max(1, min(_PATCH, side // 2))
    return _FILTERS * max(0, side - patch + 1) ** 2


class PatchFeatures(nn.Module):
    """Images [B, channels, H, W] -> features [B, 8 filters], in float32 or wider.

    Each patch is normalised and compared with whitened patches drawn from `images` [M, channels, H, W]; what
    exceeds a threshold, on either side, is averaged over each quarter of the image.
    """

    filters: Tensor
    offsets: Tensor
    box: Tensor

    def __init__(self, images: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        images = _shrink(images)
        channels, size = images.shape[1], max(1, min(_PATCH, min(images.shape[2:]) // 2))
        numbers = channels * size * size
        patches = F.unfold(images, size).transpose(1, 2).reshape(-1, numbers)
        patches = patches[torch.randperm(len(patches), generator=generator, device=images.device)[:_PATCHES]]
        patches = patches - patches.mean(1, keepdim=True)
        patches /= patches.square().mean(1, keepdim=True).sqrt() + _LEAST_SPREAD
        center = patches.mean(0)
        patches -= center
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        whiten = vectors * (values.clamp_min(0) + _LEAST_SPREAD).rsqrt() @ vectors.T
        filters = F.normalize(patches[:_FILTERS] @ whiten) @ whiten
        self.register_buffer("offsets", filters @ center)
        # A patch's mean falls out of its product with what sums to zero.
        filters -= filters.mean(1, keepdim=True)
        self.register_buffer("filters", filters.view(-1, channels, size, size))
        self.register_buffer("box", torch.full_like(self.filters[:1], 1 / numbers))

    def forward(self, images: Tensor) -> Tensor:
        images = _shrink(images)
        mean = F.conv2d(images, self.box)
        spread = (F.conv2d(images.square(), self.box) - mean.square()).clamp_min(0).sqrt()
        found = F.conv2d(images, self.filters) / (spread + _LEAST_SPREAD) - self.offsets[:, None, None]
        sides = torch.cat([F.relu(found - _THRESHOLD), F.relu(-found - _THRESHOLD)], 1)
        return F.adaptive_avg_pool2d(sides, 2).flatten(1)


class Rows(nn.Module):
    """Inputs [B, ...] of another shape than images' -> their numbers [B, D], in float32 or wider."""

    def forward(self, images: Tensor) -> Tensor:
        return widen(images).flatten(1)


class PlainModel(nn.Module):
    """Inputs [B, ...] -> scores of the classes [B, C]: ridge regression of one-hot labels on `features`.

    seen: features [N, D] of what it learns from, with labels [N]. leverages [N]: how much each of these
    answers for itself.
    """

    center: Tensor
    spread: Tensor
    weights: Tensor
    shares: Tensor
    leverages: Tensor

    def __init__(self, features: nn.Module, seen: Tensor, labels: Tensor, classes: int) -> None:
        super().__init__()
        self.features, self.seen = features, seen
        center, spread = seen.mean(0), seen.std(0, correction=0)
        self.register_buffer("center", center)
        # What never varies says nothing, whatever it is divided by.
        self.register_buffer("spread", torch.where(spread > 0, spread, 1.0))
        self.register_buffer("shares", labels.bincount(minlength=classes).to(seen) / len(labels))
        inputs = (seen - self.center) / self.spread
        weights, leverages = _fit_ridge(inputs, labels, classes)
        self.register_buffer("weights", weights)
        self.register_buffer("leverages", leverages)

    def forward(self, images: Tensor) -> Tensor:
        return (self.features(images) - self.center) / self.spread @ self.weights + self.shares

    def leave_out(self, scores: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """Scores [B, C] of the `rows` [B] of what it learned from, with `labels` [B], had it not seen them.

        (Allen 1974: a residual over what its row does not answer for itself.)
        """
        wanted = F.one_hot(labels, scores.shape[1]).to(scores)
        rest = (1 - self.leverages[rows]).clamp_min(_LEAST_REST)
        return wanted - (wanted - scores) / rest.unsqueeze(1)


def draw_lesson(split: Split, generator: torch.Generator) -> Tensor:
    """Retain images that a plain model learns from: int64 [N], at most LESSON_IMAGES."""
    return draw_sample(split.retain, LESSON_IMAGES, generator)


def fit_plain_model(
    load: Load, lesson: Tensor, labels: Tensor, classes: int, generator: torch.Generator
) -> PlainModel | None:
    """A plain model of the images `lesson` [N]; None where inputs are not floating-point numbers.

    load, labels: of all images. Several processes come to the same model, each by itself.
    """
    (examples,) = load_each(load, [draw_sample(lesson, _PATCH_IMAGES, generator)])
    if not examples.is_floating_point():
        return None
    features = PatchFeatures(examples, generator) if are_pictures(examples.shape[1:]) else Rows()
    return PlainModel(features, compute_features(features, load, lesson), labels[lesson], classes)


def compute_features(features: nn.Module, load: Load, index: Tensor) -> Tensor:
    """`features` [n, D] of the images `index` [n]."""

    def compute(images: Tensor, _: Tensor) -> tuple[Tensor]:
        return (features(images),)

    return map_batches(features, load, index, compute)[0]


def are_pictures(shape: Sequence[int]) -> bool:
    """Whether images of `shape` have pixels, [channels, H, W], and enough for patches."""
    return len(shape) == 3 and min(shape[1:]) >= _LEAST_SIDE


def rate_difficulty(
    model: PlainModel, load: Load, index: Tensor, labels: Sequence[Tensor], ranks: Ranks = ALONE
) -> list[Tensor]:
    """Score of the label less the best of the others, [n] for each of `labels`; low where an image is hard.

    index: of images [n]. labels: of all images, of which there may be several versions. ranks: the processes
    that share the pass.
    """

    def compute(images: Tensor, batch: Tensor) -> tuple[Tensor, ...]:
        scores = model(images)
        return tuple(margins_of(scores, version[batch]) for version in labels)

    return map_batches(model, load, index, compute, ranks=ranks)


def margins_of(scores: Tensor, labels: Tensor) -> Tensor:
    """Score [B, C] of the label [B] less the best of the others, [B]."""
    own = labels.unsqueeze(1)
    return scores.gather(1, own).squeeze(1) - scores.scatter(1, own, -torch.inf).amax(1)


def _fit_ridge(inputs: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weights [D, C] of one-hot labels on `inputs` [N, D], and each row's leverage [N].

    From the smaller of two systems, in float64. The means of `inputs` are 0, so that those of the labels fall
    out, and a product with one-hot rows is a sum by class: of many classes no [N, C] is made.
    """
    rows, numbers = inputs.shape
    x = inputs.double()
    penalty = _RIDGE * rows
    if rows < numbers:
        kernel = x @ x.T + penalty * torch.eye(rows, dtype=x.dtype, device=x.device)
        solved = torch.linalg.solve(kernel, x)
    else:
        kernel = x.T @ x + penalty * torch.eye(numbers, dtype=x.dtype, device=x.device)
        solved = torch.linalg.solve(kernel, x.T).T
    leverages = (x * solved).sum(1) + 1 / rows  # and its part in the mean
    weights = x.new_zeros(classes, numbers).index_add_(0, labels, solved).T
    return weights.to(inputs), leverages.to(inputs)


def _shrink(images: Tensor) -> Tensor:
    """Images of at most _SIDE pixels a side."""
    images = widen(images)
    height, width = images.shape[2:]
    if max(height, width) <= _SIDE:
        return images
    return F.adaptive_avg_pool2d(images, (min(height, _SIDE), min(width, _SIDE)))


def widen(images: Tensor) -> Tensor:
    """In float32, or as they are where that is wider."""
    return images.to(torch.promote_types(images.dtype, torch.float32))
