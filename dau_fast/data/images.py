"""Images that live on the device as uint8, and their batches.

A subset is an index tensor; a batch is one gather, which crops, mirrors and normalises on its way. No
loader or worker stands between the pixels and the step. Images that do not fit: `dau_fast.data.streaming`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dau_fast.ops import image_batch


@dataclass(frozen=True)
class Augmentation:
    """Random crop after zero padding by `pad` pixels, and mirroring with probability 1/2."""

    pad: int = 0
    flip: bool = False


class Draws(NamedTuple):
    """What chance decided for a batch, as `dau_fast.ops.image_batch` takes it; int64 [B] each."""

    rows: Tensor
    columns: Tensor
    flip: Tensor | None

    def take(self, positions: Tensor) -> Draws:
        """Those at `positions`, int64 [b]."""
        flip = None if self.flip is None else self.flip[positions]
        return Draws(self.rows[positions], self.columns[positions], flip)


@dataclass(frozen=True)
class Choice:
    """Which images make a batch, int64 [B], and what chance decided for them; None for no augmentation."""

    index: Tensor
    draws: Draws | None = None


@dataclass(frozen=True)
class Images:
    """All images of a data set on one device.

    pixels: uint8 [N, channels, H, W], or another type and any shape [N, ...] that is taken as it is.
    labels: int64 [N].
    test, validation: int64 indices of the official parts, None where the data set has none.
    mean, std: float32 [channels], in units of pixel / 255. dtype: of batches that are made from uint8 pixels.
    names: of the images, files as a rule; empty where they have none.
    """

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    test: Tensor | None = None
    mean: Tensor = field(default_factory=lambda: torch.zeros(1))
    std: Tensor = field(default_factory=lambda: torch.ones(1))
    augmentation: Augmentation = Augmentation()
    dtype: torch.dtype = torch.float32
    validation: Tensor | None = None
    names: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image, (channels, H, W)."""
        return tuple(self.pixels.shape[1:])

    @property
    def ready(self) -> bool:
        """Whether a network takes `pixels` as they are: no uint8, which is normalised."""
        return self.pixels.dtype != torch.uint8

    @property
    def continuous(self) -> bool:
        """Whether images can be changed a little, as tokens cannot."""
        return not self.ready or self.pixels.is_floating_point()

    def to(self, device: torch.device) -> Self:
        """The same images on `device`."""
        return replace(
            self,
            pixels=self.pixels.to(device),
            labels=self.labels.to(device),
            test=None if self.test is None else self.test.to(device),
            validation=None if self.validation is None else self.validation.to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
        )

    def widened(self) -> Self:
        """The same images, with batches in float32 at least: for what changes them a little."""
        return replace(self, dtype=torch.promote_types(self.dtype, torch.float32))

    def batch(
        self, index: Tensor, generator: torch.Generator | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Normalised images [B, ...] at `index` [B]; augmented when a `generator` is given.

        positions: [b] in `index`, of the images to return, [b, ...], with what chance decided for each when
        it drew for all B.
        """
        choice = self.choose(index, generator, positions)
        return self.gather(choice.index, choice.draws)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """Normalised images [B, ...] at each of `indices`, one after the other."""
        return (images for _, images in self.make_batches(Choice(index) for index in indices))

    def make_batches(self, choices: Iterable[Choice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Index [B] and normalised images [B, ...] of each of `choices`, one after the other."""
        return ((choice.index, self.gather(choice.index, choice.draws)) for choice in choices)

    def choose(
        self, index: Tensor, generator: torch.Generator | None = None, positions: Tensor | None = None
    ) -> Choice:
        """What `batch` makes a batch of."""
        draws = None if generator is None else self.draw(len(index), generator)
        if positions is None:
            return Choice(index, draws)
        return Choice(index[positions], draws and draws.take(positions))

    def augmented(self, generator: torch.Generator) -> Augmented:
        """These images as a fixed augmented copy: `generator` draws once for each of them, here."""
        return Augmented(self, self.draw(len(self.labels), generator))

    def draw(self, count: int, generator: torch.Generator) -> Draws | None:
        """The crops and mirrorings of `count` images; None where nothing is to be augmented."""
        if self.ready or self.augmentation == Augmentation():
            return None

        def below(high: int) -> Tensor:
            return torch.randint(high, (count,), device=self.device, generator=generator)

        # The order of the draws decides what a seed gives.
        starts = 2 * self.augmentation.pad + 1
        rows = below(starts)
        flip = below(2) if self.augmentation.flip else None
        return Draws(rows, below(starts), flip)

    def gather(self, index: Tensor, draws: Draws | None = None) -> Tensor:
        """Normalised images [B, ...] at `index` [B], augmented by `draws`: no chance."""
        if self.ready:
            return self.pixels[index]
        return self._normalise(self.pixels, index, draws)

    def _normalise(self, pixels: Tensor, index: Tensor, draws: Draws | None) -> Tensor:
        chosen = {} if draws is None else draws._asdict()
        pad = self.augmentation.pad
        return image_batch(pixels, index, self.mean, self.std, pad=pad, dtype=self.dtype, **chosen)


@dataclass(frozen=True)
class Augmented:
    """Images, each with a crop and a mirroring of its own, as a source of batches.

    What an image looks like does not depend on the batch it is in, nor on the process that asks for it.
    draws: of all images, [N] each; None for no augmentation.
    """

    images: Images
    draws: Draws | None

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """Normalised augmented images [B, ...] at each of `indices`, one after the other."""
        choices = (Choice(index, self.draws and self.draws.take(index)) for index in indices)
        return (images for _, images in self.images.make_batches(choices))
