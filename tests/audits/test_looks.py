"""Looks into one model: a new head, information, relearning, perturbations; models one can see through."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from checking import same_tensors
from scipy import stats
from torch import Tensor, nn
from toys import blobs, perceptron

from dau_fast.audits.perturbation import Recognition, recognise
from dau_fast.audits.probes import head_accuracy, information, information_difference_index
from dau_fast.audits.relearning import count_relearning
from dau_fast.config import AuditConfig
from dau_fast.data.images import Images
from dau_fast.errors import UserError
from dau_fast.models import Classifier


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ---- features


def test_a_new_head_finds_what_features_hold_and_guesses_what_they_do_not() -> None:
    labels = np.arange(300) % 3
    telling = np.eye(3)[labels] + 0.05 * normal(0, 300, 3)
    assert head_accuracy(telling[:30], labels[:30], telling[30:], labels[30:]) == 100
    silent = normal(1, 300, 3)
    assert head_accuracy(silent[:30], labels[:30], silent[30:], labels[30:]) < 50
    # Of class 2 the features were made equal to those of class 1.
    hidden = np.eye(3)[np.minimum(labels, 1)] + 0.05 * normal(2, 300, 3)
    twos = labels == 2
    assert head_accuracy(hidden[:30], labels[:30], hidden[twos], labels[twos]) < 80


def test_a_head_that_was_shown_one_class_knows_no_other() -> None:
    features = normal(0, 4, 2)
    assert head_accuracy(features, np.full(4, 7), features, np.array([7, 7, 1, 7])) == 75


def test_information_is_log_2_where_features_tell_and_0_where_they_do_not() -> None:
    kinds = normal(0, 200, 3), normal(1, 200, 3)
    assert information(*kinds) < 0.03
    assert information(kinds[0] + 50, kinds[1]) == pytest.approx(math.log(2), abs=0.01)


@pytest.mark.parametrize("count", [1000, 1001])
def test_information_of_two_normals_is_near_their_mutual_information(count: int) -> None:
    """Unit variance and means 2 apart: log 2 minus the mean entropy of the posterior, by integration."""
    grid = np.linspace(-9, 11, 20001)
    p, q = stats.norm(2).pdf(grid), stats.norm(0).pdf(grid)
    mixture = (p + q) / 2
    exact = np.trapezoid(0.5 * p * np.log(p / mixture) + 0.5 * q * np.log(q / mixture), grid)
    found = information(normal(0, count, 1) + 2, normal(1, count, 1))
    assert found == pytest.approx(exact, abs=0.03)


def test_the_index_is_0_as_retrained_and_1_as_the_original() -> None:
    assert information_difference_index(0.1, 0.5, 0.1) == 0
    assert information_difference_index(0.5, 0.5, 0.1) == 1
    assert information_difference_index(0.2, 0.5, 0.1) == pytest.approx(0.25)
    assert information_difference_index(0.2, 0.105, 0.1) is None


# ---- relearning


def relearn(model: Classifier, images: Images, target: float, most: int = 50, seed: int = 0) -> int:
    index = torch.arange(len(images.labels))
    forget, retain = index[images.labels == 2], index[images.labels != 2]
    return count_relearning(
        model, images.batch, images.labels, forget, retain, target=target, most=most, lr=0.05,
        generator=seeded(seed),
    )  # fmt: skip


def test_relearning_counts_from_0_gives_up_and_leaves_the_model_alone() -> None:
    images, model = blobs(120), perceptron(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    assert relearn(model, images, target=0) == 0
    assert relearn(model, images, target=101, most=3) == 3
    steps = relearn(model, images, target=90)
    assert 0 < steps < 50
    assert relearn(model, images, target=90) == steps
    assert same_tensors(before, model.state_dict())
    assert model.training


def test_what_is_hidden_by_a_bias_comes_back_sooner_than_what_was_never_there() -> None:
    class Seeing(nn.Module):
        """Says the class that the first three inputs are largest for, but the last one never."""

        def __init__(self, weight: float, bias: float) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)
            nn.init.zeros_(self.head.weight)
            self.head.weight.data[:, :3] = weight * torch.eye(3)
            self.head.bias.data = torch.tensor([0.0, 0.0, bias])

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    images = blobs(120)
    hidden = relearn(Classifier(Seeing(1.0, -4.0)), images, target=80)
    deeper = relearn(Classifier(Seeing(1.0, -12.0)), images, target=80)
    assert 0 < hidden < deeper <= 50


# ---- perturbations


class Threshold(nn.Module):
    """Class 1 where the mean of the normalised pixels is above 0."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.head = nn.Linear(pixels, 2)
        self.head.weight.data = torch.tensor([[-1.0], [1.0]]).repeat(1, pixels)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def greys(*values: int, std: float = 0.25, height: int = 2) -> Images:
    """Images of one grey value each, all of class 1; the threshold lies at 0.5."""
    pixels = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, height, height)
    labels = torch.ones(len(values), dtype=torch.int64)
    return Images(pixels, labels, ("dark", "light"), None, torch.tensor([0.5]), torch.tensor([std]))


def look(images: Images, radius: float, draws: int = 1) -> Recognition:
    model = Classifier(Threshold(images.pixels[0].numel()))
    index = torch.arange(len(images.labels))
    return recognise(model, images, index, radius=radius, draws=draws, steps=5, generator=seeded())


@pytest.mark.parametrize("std", [0.25, 2.0])
def test_the_ball_is_measured_in_pixels_whatever_the_normalisation(std: float) -> None:
    """127 / 255 is 0.002 below the threshold, 120 / 255 is 0.029 and 119 / 255 is 0.033 below it."""
    found = look(greys(127, 120, 119, 140, std=std), radius=0.03)
    assert found.reappears.tolist() == [1, 1, 0, 0]  # the last one is recognised as it is


def test_noise_is_normal_with_the_radius_for_its_deviation() -> None:
    """The mean of four pixels, each with noise of 0.1, is above 0.5 with the probability of that normal."""
    images = greys(115, 127, 140, 0)
    found = look(images, radius=0.1, draws=2000).noisy
    expected = stats.norm.cdf((np.array([115, 127, 140, 0]) / 255 - 0.5) / (0.1 / 2))
    np.testing.assert_allclose(found, expected, atol=0.04)


def test_no_pixel_leaves_its_range() -> None:
    """From 0 upwards by 0.3 there is no way to a mean of 0.5, from 102 / 255 there is."""
    assert look(greys(0, 102), radius=0.3).reappears.tolist() == [0, 1]
    noisy = look(greys(0, height=1), radius=0.4, draws=4000).noisy[0]
    assert noisy == pytest.approx(1 - stats.norm.cdf(0.5 / 0.4), abs=0.03)
    pixels = look(greys(255, height=1), radius=100.0, draws=400).noisy[0]
    assert pixels == pytest.approx(0.5, abs=0.1)


def test_images_in_floating_point_are_taken_as_they_are() -> None:
    pixels = torch.tensor([[-0.02, -0.02], [-0.05, -0.05]])
    images = Images(pixels, torch.ones(2, dtype=torch.int64), ("dark", "light"))
    assert look(images, radius=0.03).reappears.tolist() == [1, 0]


# ---- settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"radius": 0}, "`radius=0`: expected a number above 0"),
        ({"most_images": 1}, "`most_images=1`: expected a whole number from 2 up"),
        ({"head_share": 1.0}, "`head_share=1.0`"),
        ({"rmia_offline": 1.5}, "`rmia_offline=1.5`"),
        ({"noisy_copies": 0}, "`noisy_copies=0`"),
    ],
)
def test_settings_are_checked_when_they_are_made(fields: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AuditConfig(**fields)  # type: ignore[arg-type]
