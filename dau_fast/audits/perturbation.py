"""Residual knowledge: forget images that a model recognises again once they are slightly changed.

Hsu et al. 2025 (arXiv 2601.22359). Retrained and unlearned models may agree on an image and differ in its
neighbourhood. Changes are measured in pixels of the range 0 to 1, before normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.audits.signals import Array
from dau_fast.data.images import Images
from dau_fast.engine.batches import load_each
from dau_fast.engine.modes import evaluating
from dau_fast.models import Classifier

_BATCH = 256


@dataclass(frozen=True)
class Recognition:
    """Of each image, [N]. noisy: share, 0 to 1, of noisy copies that are given the true label. reappears: 1
    where the image itself is not given its label and some image in the ball is, else 0.
    """

    noisy: Array
    reappears: Array


@dataclass(frozen=True)
class Pixels:
    """How pixels of the range 0 to 1 are normalised: radius, low and high of that range, to fit a batch."""

    radius: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, images: Images, radius: float) -> Pixels:
        """A ball of `radius`. Images in floating point are taken as they are, and have no range."""
        if images.pixels.is_floating_point():
            whole = torch.full((1,), torch.inf, device=images.device)
            return cls(torch.full((1,), radius, device=images.device), -whole, whole)
        mean, std = (part.view(1, -1, 1, 1) for part in (images.mean, images.std))
        return cls(radius / std, (0 - mean) / std, (1 - mean) / std)


def recognise(
    model: Classifier,
    images: Images,
    index: Tensor,
    *,
    radius: float,
    draws: int,
    steps: int,
    generator: torch.Generator,
) -> Recognition:
    """Look at images `index` [N] and around them.

    draws: copies with normal noise of standard deviation `radius`, as published, cut off at the range of
    pixels. steps: of the search in the ball of `radius` in the largest change of a pixel, by projected
    gradients towards the true label. generator: on the images' device; seed it alike for all models.
    """
    pixels, noisy, reappears = Pixels.of(images, radius), [], []
    parts = index.split(_BATCH)
    with evaluating(model):
        for part, batch in zip(parts, load_each(images.widened(), parts), strict=True):
            labels = images.labels[part]
            noisy.append(_noisy_share(model, batch, labels, pixels, draws, generator))
            wrong = ~_right(model, batch, labels)
            found = _found_in_ball(model, batch, labels, pixels, steps)
            reappears.append((wrong & found).double())
    return Recognition(*(torch.cat(column).cpu().numpy() for column in (noisy, reappears)))


@torch.no_grad()
def _right(model: Classifier, batch: Tensor, labels: Tensor) -> Tensor:
    return model(batch).logits.argmax(1) == labels


def _noisy_share(
    model: Classifier, batch: Tensor, labels: Tensor, pixels: Pixels, draws: int, generator: torch.Generator
) -> Tensor:
    right = torch.zeros(len(batch), dtype=torch.float64, device=batch.device)
    for _ in range(draws):
        noise = torch.randn(batch.shape, dtype=batch.dtype, device=batch.device, generator=generator)
        right += _right(model, (batch + pixels.radius * noise).clamp(pixels.low, pixels.high), labels)
    return right / draws


def _found_in_ball(model: Classifier, batch: Tensor, labels: Tensor, pixels: Pixels, steps: int) -> Tensor:
    """Whether the search meets an image that is given its true label, bool [B]."""
    low = (batch - pixels.radius).clamp(min=pixels.low)
    high = (batch + pixels.radius).clamp(max=pixels.high)
    stride = 2.5 * pixels.radius / steps
    here = batch
    found = torch.zeros(len(batch), dtype=torch.bool, device=batch.device)
    for _ in range(steps):
        here = here.detach().requires_grad_(True)
        loss = F.cross_entropy(model(here).logits, labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, here)
        here = torch.clamp(here.detach() - stride * slope.sign(), low, high)
        found |= _right(model, here, labels)
    return found
