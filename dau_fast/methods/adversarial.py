"""Adversarial examples of the original: where the nearest other class begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dau_fast.data.images import Images
from dau_fast.engine.evaluation import map_batches
from dau_fast.engine.sharding import placed
from dau_fast.methods.task import Task
from dau_fast.models import Classifier

# Attempts with twice the radius, after which an image counts as one that cannot be turned.
_DOUBLINGS = 16


@dataclass(frozen=True)
class Units:
    """How normalised images follow from pixels in 0 to 1; floating-point images are their own pixels.

    scale: of a normalised image for one unit of pixels. low, high: its limits. They broadcast over images.
    """

    scale: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, images: Images) -> Units:
        """Those of `images`, which are unlimited where they are not made from uint8 pixels."""
        if images.ready:
            one = images.pixels.new_ones(())
            return cls(one, -torch.inf * one, torch.inf * one)
        mean, std = (values.to(images.widened().dtype).view(-1, 1, 1) for values in (images.mean, images.std))
        return cls(1 / std, -mean / std, (1 - mean) / std)

    def limit(self, images: Tensor) -> Tensor:
        """`images` [B, ...] with all pixels in their limits."""
        return images.clamp(self.low, self.high)


def attack(task: Task, index: Tensor, find: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
    """What `find` makes of images [B, ...] and labels [B], for images `index` [N] as they are.

    Results have a row an image. The original is on the images' device meanwhile, in evaluation mode.
    """

    def enabled(images: Tensor, batch: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return find(images, task.labels[batch])

    with placed(task.images.device, task.original):
        return map_batches(task.original, task.images.widened(), index, enabled, ranks=task.ranks)


def fgsm(model: Classifier, images: Tensor, labels: Tensor, bound: float, units: Units) -> Tensor:
    """`images` [B, ...], every pixel moved by `bound` to where the loss grows (Goodfellow et al. 2015).

    arXiv 1412.6572. bound: in units of pixels.
    """
    _, slope = _ask(model, images, labels)
    return units.limit(images + bound * units.scale * slope.sign())


def pgd(
    model: Classifier, images: Tensor, labels: Tensor, radius: float, steps: int, units: Units
) -> tuple[Tensor, Tensor]:
    """`images` [B, ...] moved as little as it takes to be classified wrongly, and those classes [B].

    Projected gradient steps of a tenth of the radius, in L2 (Madry et al. 2018, arXiv 1706.06083); after
    each `steps` of them the radius doubles. radius: in units of pixels. What is wrong already stays. Images
    that nothing turns have the second class.
    """
    moved, left = images.clone(), torch.arange(len(images), device=images.device)
    for number in range(_DOUBLINGS * steps):
        guess, slope = _ask(model, moved[left], labels[left])
        right = guess == labels[left]
        left, slope = left[right], slope[right]
        if not len(left):
            break
        reach = radius * 2 ** (number // steps)
        moved[left] = _step(moved[left], images[left], slope, reach, units)
    with torch.no_grad():
        logits = model(moved).logits
    return moved, logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def _step(moved: Tensor, images: Tensor, slope: Tensor, reach: float, units: Units) -> Tensor:
    """`moved` a tenth of `reach` along `slope`, and back to within `reach` of `images`; all [B, ...]."""
    slope = slope * units.scale  # for a unit of pixels
    step = reach / 10 * slope / _lengths(slope).clamp_min(torch.finfo(slope.dtype).tiny)
    offset = (moved - images) / units.scale + step
    offset = offset * (reach / _lengths(offset).clamp_min(reach))
    return units.limit(images + offset * units.scale)


def _ask(model: Classifier, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted class [B], and the gradient of the images' cross-entropy, each by its own."""
    images = images.detach().requires_grad_()
    logits = model(images).logits
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), images)
    return logits.detach().argmax(1), slope


def _lengths(images: Tensor) -> Tensor:
    """The L2 norm of each image, as images of one pixel."""
    return images.flatten(1).norm(dim=1).view(-1, *[1] * (images.ndim - 1))
