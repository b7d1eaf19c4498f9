"""Batches of images: what is in them, what chance may do to them, and what it may not."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dau_fast.data.images import Augmentation, Draws, Images

PLAIN = Augmentation()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def raw_images(pixels: Tensor, augmentation: Augmentation = PLAIN) -> Images:
    """Images whose batches are pixels / 255."""
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    return Images(pixels, labels, ("only",), augmentation=augmentation)


def numbered_pixels(count: int, channels: int, height: int, width: int) -> Tensor:
    """Pixels of which no two are alike, none of them 0, the value of the padding."""
    values = torch.arange(1, count * channels * height * width + 1)
    assert values[-1] < 256
    return values.to(torch.uint8).view(count, channels, height, width)


def windows(image: Tensor, pad: int, flip: bool) -> set[bytes]:
    """Every crop of the zero-padded `image` [channels, H, W], and its mirror image with `flip`."""
    height, width = image.shape[1:]
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)))
    found = set()
    for top, left in itertools.product(range(2 * pad + 1), repeat=2):
        crop = padded[:, top : top + height, left : left + width]
        # Either may come first: all crops of the mirror image are mirrored crops.
        found |= {crop.tobytes(), crop[:, :, ::-1].tobytes()} if flip else {crop.tobytes()}
    return found


def as_bytes(batch: Tensor) -> list[bytes]:
    pixels = (batch * 255).round().to(torch.uint8).contiguous()
    return [image.numpy().tobytes() for image in pixels]


def test_batch_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel() -> None:
    pixels = torch.tensor([[[[0, 255]], [[51, 102]]], [[[255, 0]], [[204, 153]]]], dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.2]), torch.tensor([0.25, 0.4])
    images = Images(pixels, torch.tensor([0, 1]), ("a", "b"), None, mean, std)
    expected = [[[[2.0, -2.0]], [[1.5, 1.0]]], [[[-2.0, 2.0]], [[0.0, 0.5]]]]
    torch.testing.assert_close(images.batch(torch.tensor([1, 0])), torch.tensor(expected))


def test_batch_repeats_an_image_that_is_asked_for_twice() -> None:
    images = raw_images(numbered_pixels(3, 1, 2, 2))
    batch = images.batch(torch.tensor([2, 2, 0]))
    torch.testing.assert_close(batch * 255, images.pixels[[2, 2, 0]].float())


@pytest.mark.parametrize(
    ("pad", "flip"), [(1, True), (1, False), (0, True), (2, True)], ids=["both", "crop", "flip", "wide"]
)
def test_augmented_images_are_all_windows_of_the_padded_image_and_nothing_else(pad: int, flip: bool) -> None:
    images = raw_images(numbered_pixels(1, 2, 3, 5), Augmentation(pad, flip))
    batch = images.batch(torch.zeros(2000, dtype=torch.int64), seeded(0))
    assert batch.shape == (2000, 2, 3, 5)
    assert set(as_bytes(batch)) == windows(images.pixels[0], pad, flip)


def test_every_augmented_image_is_a_window_of_its_own_image() -> None:
    images = raw_images(numbered_pixels(4, 1, 4, 4), Augmentation(1, True))
    index = torch.arange(4).repeat(20)
    batch = as_bytes(images.batch(index, seeded(1)))
    for image, i in zip(batch, index.tolist(), strict=True):
        assert image in windows(images.pixels[i], 1, True)


def test_each_augmented_image_is_a_window_of_its_own_and_the_seed_decides_which() -> None:
    images = raw_images(numbered_pixels(4, 1, 4, 4), Augmentation(1, True))
    index = torch.arange(4)
    seen = [as_bytes(next(images.augmented(seeded(seed)).batches([index]))) for seed in (0, 0, *range(1, 20))]
    assert seen[0] == seen[1]
    for i in range(4):
        looks = {batch[i] for batch in seen}
        assert 1 < len(looks) <= 18
        assert looks <= windows(images.pixels[i], 1, True)


def test_augmented_images_do_not_depend_on_order_or_batch() -> None:
    images = raw_images(numbered_pixels(4, 1, 4, 4), Augmentation(1, True))
    augmented = images.augmented(seeded(3))
    forward = torch.cat(list(augmented.batches(torch.arange(4).split(1))))
    backward = torch.cat(list(augmented.batches([torch.tensor([3, 2]), torch.tensor([1, 0])])))
    assert torch.equal(forward, backward.flip(0))


def test_augmented_images_are_drawn_on_the_device(device: torch.device) -> None:
    images = raw_images(numbered_pixels(4, 1, 4, 4), Augmentation(1, True)).to(device)
    augmented = images.augmented(torch.Generator(device).manual_seed(0))
    batch = next(augmented.batches([torch.tensor([2], device=device)]))
    assert batch.device.type == device.type
    assert as_bytes(batch.cpu())[0] in windows(images.pixels[2].cpu(), 1, True)


def test_images_that_training_does_not_augment_stay_as_they_are() -> None:
    plain = raw_images(numbered_pixels(4, 1, 4, 4))
    floating = replace(plain, pixels=torch.rand(4, 3), augmentation=Augmentation(1, True))
    for images in (plain, floating):
        index = torch.tensor([2, 0])
        assert torch.equal(next(images.augmented(seeded(0)).batches([index])), images.batch(index))


def test_mirroring_happens_in_about_half_of_the_draws() -> None:
    images = raw_images(numbered_pixels(1, 1, 2, 2), Augmentation(0, True))
    batch = images.batch(torch.zeros(2000, dtype=torch.int64), seeded(0))
    plain = (batch == images.pixels[0] / 255).flatten(1).all(1).double().mean()
    assert 0.45 < plain < 0.55


def test_augmented_batches_are_normalised_after_the_zero_padding() -> None:
    pixels = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    images = Images(
        pixels,
        torch.zeros(1, dtype=torch.int64),
        ("only",),
        None,
        torch.tensor([0.5]),
        torch.tensor([0.25]),
        Augmentation(pad=2),
    )
    batch = images.batch(torch.zeros(500, dtype=torch.int64), seeded(0))
    assert batch.unique().tolist() == [-2.0, 2.0]


def test_the_same_seed_gives_the_same_augmented_batch_and_another_seed_another() -> None:
    images = raw_images(numbered_pixels(4, 1, 4, 4), Augmentation(2, True))
    index = torch.arange(4)
    one, again, other = (images.batch(index, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("flip", [False, True])
def test_what_a_seed_draws_stays_as_it_is(flip: bool) -> None:
    """Rows, then mirroring, then columns: records of runs name no more than their seeds."""
    images = raw_images(numbered_pixels(4, 1, 4, 4), Augmentation(2, flip))
    generator = seeded(3)
    rows = torch.randint(5, (6, 1), generator=generator).flatten()
    mirrored = torch.randint(2, (6, 1), generator=generator).flatten() if flip else None
    expected = Draws(rows, torch.randint(5, (6, 1), generator=generator).flatten(), mirrored)
    drawn = images.draw(6, seeded(3))
    assert drawn is not None
    for one, other in zip(drawn, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    index = torch.tensor([3, 0, 0, 1, 2, 3])
    padded = torch.nn.functional.pad(images.pixels[index], (2,) * 4)
    cut = [p[:, y : y + 4, x : x + 4] for p, y, x in zip(padded, rows, expected.columns, strict=True)]
    cut = [p.flip(-1) if flip and mirrored[i] else p for i, p in enumerate(cut)]
    assert torch.equal(images.batch(index, seeded(3)), torch.stack(cut) / 255)


def test_draws_that_are_given_decide_the_batch_in_any_dtype() -> None:
    images, index = raw_images(numbered_pixels(4, 1, 4, 4), Augmentation(2, True)), torch.arange(4)
    batch = images.batch(index, seeded(0))
    assert torch.equal(images.gather(index, images.draw(4, seeded(0))), batch)
    half = replace(images, dtype=torch.bfloat16).gather(index, images.draw(4, seeded(0)))
    assert torch.equal(half, batch.bfloat16())
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images.gather(index), images.batch(index))


def test_without_a_generator_nothing_is_augmented() -> None:
    images = raw_images(numbered_pixels(4, 1, 4, 4), Augmentation(2, True))
    torch.testing.assert_close(images.batch(torch.arange(4)) * 255, images.pixels.float())


def test_without_an_augmentation_the_generator_is_left_alone() -> None:
    images, generator = raw_images(numbered_pixels(4, 1, 4, 4)), seeded(0)
    before = generator.get_state()
    assert torch.equal(images.batch(torch.arange(4), generator), images.batch(torch.arange(4)))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("shape", [(6, 3), (6, 2, 4, 4), (6, 5, 2)])
def test_floating_point_pixels_pass_through_as_they_are(shape: tuple[int, ...]) -> None:
    pixels = torch.randn(shape, dtype=torch.float64, generator=seeded(0))
    images = Images(
        pixels,
        torch.zeros(6, dtype=torch.int64),
        ("only",),
        mean=torch.full((1,), 9.0),
        augmentation=Augmentation(1, True),
    )
    index = torch.tensor([5, 0, 5])
    assert torch.equal(images.batch(index, seeded(0)), pixels[index])
    assert images.batch(index).dtype == torch.float64


def test_moving_images_keeps_every_field() -> None:
    images = Images(
        numbered_pixels(2, 1, 2, 2),
        torch.tensor([0, 1]),
        ("a", "b"),
        torch.tensor([1]),
        torch.tensor([0.1]),
        torch.tensor([0.2]),
        Augmentation(1, True),
    )
    moved = images.to(torch.device("meta"))
    for name in ("pixels", "labels", "test", "mean", "std"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(images, name).shape
    assert (moved.class_names, moved.augmentation) == (images.class_names, images.augmentation)
    assert images.device.type == "cpu"
