"""The plain model: features against their definition, and that it learns from the retain set alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.data.split import Split
from dau_fast.engine.batches import Load
from dau_fast.methods.dau import difficulty
from dau_fast.methods.dau.difficulty import (
    PatchFeatures,
    PlainModel,
    Rows,
    draw_lesson,
    fit_plain_model,
    rate_difficulty,
)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fit(load: Load, split: Split, labels: Tensor, classes: int) -> PlainModel | None:
    drawn = chance()
    return fit_plain_model(load, draw_lesson(split, drawn), labels, classes, drawn)


def pictures(count: int, side: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, side, side, generator=chance(seed), dtype=torch.float64)


def split_of(count: int) -> Split:
    """A tenth each to forget and to validate with, and the rest in two."""
    parts = torch.arange(count).tensor_split([count // 10, count // 5, 3 * count // 5])
    forget, validation, retain, test = parts
    return Split(torch.cat([forget, retain]), forget, retain, validation, test, classwise=False)


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_responses_of_normalised_patches_averaged_over_quarters(channels: int) -> None:
    images = pictures(6, 9, channels)
    features = PatchFeatures(images, chance())
    side = features.filters.shape[-1]
    assert side == 4
    places = 9 - side + 1
    filters = features.filters.flatten(1)
    assert filters.sum(1).abs().max() < 1e-9
    found = features(images[:2])
    for image, row in zip(images[:2], found, strict=True):
        grid = torch.zeros(2 * len(filters), places, places, dtype=torch.float64)
        for i in range(places):
            for j in range(places):
                patch = image[:, i : i + side, j : j + side].flatten()
                response = (
                    filters @ ((patch - patch.mean()) / (patch.std(correction=0) + 0.1)) - features.offsets
                )
                grid[:, i, j] = torch.cat([response - 0.5, -response - 0.5]).clamp_min(0)
        half = places // 2
        quarters = [grid[:, a : a + half, b : b + half].mean((1, 2)) for a in (0, half) for b in (0, half)]
        torch.testing.assert_close(row, torch.stack(quarters, 1).flatten())


def test_large_images_are_averaged_down_and_half_precision_is_widened() -> None:
    images = pictures(3, 64)
    features = PatchFeatures(images, chance())
    torch.testing.assert_close(features(images), features(F.avg_pool2d(images, 2)))
    single = PatchFeatures(images.bfloat16(), chance())
    assert single(images.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("numbers", [5, 60])
def test_scores_are_those_of_ridge_regression(numbers: int) -> None:
    seen = torch.randn(30, numbers, generator=chance(), dtype=torch.float64)
    labels = torch.arange(30) % 4
    model = PlainModel(Rows(), seen, labels, 4)
    x = (seen - seen.mean(0)) / seen.std(0, correction=0)
    y = F.one_hot(labels, 4).double()
    y = y - y.mean(0)
    # Where the penalised squared error is least, its gradient is zero.
    gradient = x.T @ (x @ model.weights - y) + 0.1 * len(x) * model.weights
    assert gradient.abs().max() < 1e-9
    torch.testing.assert_close(model(seen), x @ model.weights + F.one_hot(labels, 4).double().mean(0))


def test_a_number_that_never_varies_says_nothing() -> None:
    seen = torch.tensor([[1.0, 2.0], [1.0, -2.0], [1.0, 3.0]], dtype=torch.float64)
    model = PlainModel(Rows(), seen, torch.tensor([0, 1, 0]), 2)
    assert torch.equal(model.weights[0], torch.zeros(2, dtype=torch.float64))
    assert model(seen).isfinite().all()


def test_only_the_retain_set_is_learned_from() -> None:
    images, labels = pictures(100), torch.arange(100) % 4
    split = split_of(100)
    first = fit(lambda i: images[i], split, labels, 4)
    changed, others = images.clone(), torch.cat([split.forget, split.validation, split.test])
    changed[others] = torch.nan
    labels = labels.index_fill(0, others, 0)
    second = fit(lambda i: changed[i], split, labels, 4)
    assert first is not None
    assert second is not None
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_a_sample_of_a_large_retain_set_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, split = pictures(100), torch.arange(100) % 4, split_of(100)
    monkeypatch.setattr(difficulty, "LESSON_IMAGES", 30)
    model = fit(lambda i: images[i], split, labels, 4)
    assert model is not None
    few = replace(split, retain=split.retain[torch.isin(split.retain, seen_by(split, 30))])
    again = PlainModel(model.features, model.features(images[few.retain]), labels[few.retain], 4)
    torch.testing.assert_close(model.weights, again.weights)


def seen_by(split: Split, count: int) -> Tensor:
    order = torch.randperm(len(split.retain), generator=chance())
    return split.retain[order[:count]]


def test_a_hard_image_is_one_whose_label_the_others_do_not_support() -> None:
    """Bright and dark pictures: one with the label of the other kind is hard, and with its own easy."""
    labels = torch.arange(60) % 2
    images = pictures(60) * 0.1 + labels[:, None, None, None] * 2 - 1
    model = fit(lambda i: images[i].flatten(1), split_of(60), labels, 2)
    assert model is not None
    assert isinstance(model.features, Rows)
    index = torch.tensor([0, 1, 2])
    right, wrong = rate_difficulty(model, lambda i: images[i].flatten(1), index, [labels, 1 - labels])
    assert (right > 0.5).all()
    torch.testing.assert_close(wrong, -right)


def test_tokens_are_not_rated_and_tiny_pictures_by_their_pixels() -> None:
    labels, split = torch.arange(40) % 2, split_of(40)
    tokens = torch.arange(40 * 7).view(40, 7)
    assert fit(lambda i: tokens[i], split, labels, 2) is None
    tiny = fit(lambda i: pictures(40, 3)[i], split, labels, 2)
    assert tiny is not None
    assert isinstance(tiny.features, Rows)
