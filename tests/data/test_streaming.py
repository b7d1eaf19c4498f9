"""Streamed images: the same batches as from memory, read ahead, and only what is asked for."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checking import same_tensors
from storing import save_image
from torch import Tensor, nn

from dau_fast.config import TrainingRecipe
from dau_fast.data.images import Augmentation, Images
from dau_fast.data.named import load
from dau_fast.data.streaming import DEPTH, StreamedImages, read_ahead
from dau_fast.engine.batches import Batch, load_each
from dau_fast.engine.evaluation import predict
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.training import recompute_batchnorm, train
from dau_fast.errors import UserError
from dau_fast.methods.task import Task
from dau_fast.models import Classifier, SmallResNet


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Rows:
    """A source in memory that notes which images it was asked for. broken: the image it cannot read."""

    def __init__(self, pixels: Tensor, broken: int | None = None, seconds: float = 0) -> None:
        self.pixels, self.broken, self.seconds = pixels, broken, seconds
        self.shape: Any = tuple(pixels.shape[1:])
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: Tensor, out: Tensor) -> None:
        self.asked.append(index.tolist())
        time.sleep(self.seconds)
        if self.broken in self.asked[-1]:
            raise UserError(f"image {self.broken} is broken")
        out.copy_(self.pixels[index].permute(0, 2, 3, 1))


def both(
    count: int = 40, augmentation: Augmentation | None = None, **options: Any
) -> tuple[Images, StreamedImages, Rows]:
    """The same images in memory and streamed, and the source of the latter."""
    pixels = torch.randint(0, 256, (count, 3, 6, 5), generator=seeded(0)).to(torch.uint8)
    labels = torch.arange(count) % 4
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    further = labels, tuple("abcd"), None, mean, std, augmentation or Augmentation(2, True)
    source = Rows(pixels, **options)
    return Images(pixels, *further), StreamedImages(pixels[:0], *further, source=source), source


def task_on(images: Images, ranks: Ranks = ALONE) -> Task:
    """What `Task.feed` needs, and nothing else."""
    nothing: Any = None
    return Task(images, nothing, 3, nothing, nothing, TrainingRecipe(), runtime=Runtime(ranks=ranks))


# Of other files' tests, whose images something still holds.
OTHERS: set[threading.Thread] = set()


def readers() -> list[str]:
    """This file's own."""
    return [t.name for t in threading.enumerate() if t.name.startswith("dau_fast") and t not in OTHERS]


@pytest.fixture(autouse=True, scope="module")
def _others() -> None:
    OTHERS.update(threading.enumerate())


def none_left() -> bool:
    """Whether all reading threads have ended, at once or soon."""
    deadline = time.monotonic() + 10
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not readers()


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    began = time.monotonic()
    while readers() and time.monotonic() - began < 10:
        time.sleep(0.01)
        if time.monotonic() - began > 0.1:  # collecting takes longer than most threads take to end
            gc.collect()
    assert not readers()


# ---- the same batches as from memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(2, True), Augmentation(1), None])
def test_a_batch_is_that_of_images_in_memory_bit_for_bit(
    augmentation: Augmentation | None, dtype: torch.dtype
) -> None:
    held, streamed, _ = both(augmentation=augmentation)
    held, streamed = replace(held, dtype=dtype), replace(streamed, dtype=dtype)
    index, mine = torch.tensor([7, 7, 0, 39, 12]), torch.tensor([4, 1])
    assert (streamed.shape, streamed.device) == (held.shape, held.device)
    for some, seed, rows in itertools.product((index, index[:0]), (None, 5), (None, mine)):
        if len(some) == 0 and rows is not None:
            continue
        one, other = (
            images.batch(some, None if seed is None else seeded(seed), rows) for images in (held, streamed)
        )
        assert one.dtype == dtype
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def test_an_image_that_does_not_exist_is_an_error() -> None:
    _, streamed, _ = both(4)
    for index in ([4], [-1]):
        with pytest.raises(IndexError, match="outside 0 to 3"):
            streamed.batch(torch.tensor(index))


def test_a_feed_is_that_of_images_in_memory() -> None:
    held, streamed, _ = both()
    sets = torch.arange(30), torch.arange(30, 40)
    feeds = [task_on(images).feed("some purpose", 8, *sets) for images in (held, streamed)]
    for one, other in itertools.islice(zip(*feeds, strict=True), 12):
        for expected, found in zip(one, other, strict=True):
            assert torch.equal(expected, found)


def test_a_process_reads_its_own_rows_of_a_feed_and_no_others() -> None:
    held, streamed, source = both()
    sets, ranks = (torch.arange(30), torch.arange(30, 40)), Ranks(1, 3)
    feeds = [task_on(images, ranks).feed("some purpose", 8, *sets) for images in (held, streamed)]
    seen = []
    for one, other in itertools.islice(zip(*feeds, strict=True), 6):
        assert len(other.images) == 2 * 3
        assert all(torch.equal(expected, found) for expected, found in zip(one, other, strict=True))
        seen.append(other.indices.tolist())
    assert source.asked[:6] == seen


def test_outputs_and_batchnorm_are_those_of_images_in_memory() -> None:
    held, streamed, source = both()
    with torch.random.fork_rng():
        models = [Classifier(SmallResNet(3, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    index = torch.tensor([5, 1, 30, 2, 39, 0, 17])
    for model, images in zip(models, (held, streamed), strict=True):
        recompute_batchnorm(model, images, index, batch_size=3)
    assert same_tensors(models[0].state_dict(), models[1].state_dict())
    assert source.asked == [part.tolist() for part in index.tensor_split(3)]
    outputs = [predict(m, i, index, batch_size=2) for m, i in zip(models, (held, streamed), strict=True)]
    for expected, found in zip(*outputs, strict=True):
        assert torch.equal(expected, found)


def test_augmented_images_are_those_in_memory_whatever_the_batches() -> None:
    held, streamed, _ = both()
    index = torch.randperm(40, generator=seeded(1))
    whole = next(task_on(held).load_augmented("some purpose").batches([index]))
    for images, size in ((held, 7), (streamed, 7), (streamed, 40)):
        load = task_on(images).load_augmented("some purpose")
        assert torch.equal(torch.cat(list(load_each(load, index.split(size)))), whole)


@pytest.mark.parametrize("batch_size", [40, 9])
def test_batchnorm_statistics_can_be_those_of_images_as_training_sees_them(batch_size: int) -> None:
    """Zero padding darkens images, so that statistics of plain ones are others."""
    for images in both()[:2]:
        task, norm, index = task_on(images), nn.BatchNorm2d(3), torch.arange(40)
        recompute_batchnorm(norm, task.load_augmented("statistics"), index, batch_size=batch_size)
        found = norm.running_mean
        seen = next(task.load_augmented("statistics").batches([index]))
        torch.testing.assert_close(found, seen.mean((0, 2, 3)))
        assert not torch.allclose(found, images.batch(index).mean((0, 2, 3)), atol=0.1)


# ---- reading ahead


def test_items_come_in_order_and_are_made_no_further_ahead_than_asked() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    found = read_ahead(items(), 3)
    assert next(found) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    assert list(found) == list(range(1, 20))


def test_batches_are_read_while_another_is_in_use() -> None:
    _, streamed, source = both()
    feed = task_on(streamed).feed("some purpose", 4, torch.arange(40))
    next(feed)
    deadline = time.monotonic() + 10
    while len(source.asked) < 1 + DEPTH and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(source.asked) == 1 + DEPTH


def test_what_cannot_be_read_is_an_error_in_place_of_its_batch() -> None:
    _, streamed, _ = both(broken=9)
    batches = streamed.batches(torch.arange(40).split(4))
    for _ in range(2):
        next(batches)
    with pytest.raises(UserError, match="image 9 is broken"):
        next(batches)


def test_a_feed_that_is_dropped_ends_its_thread_while_reading_too() -> None:
    _, streamed, source = both(seconds=0.2)
    feed = task_on(streamed).feed("some purpose", 4, torch.arange(40))
    next(feed)
    assert readers()
    began = time.perf_counter()
    del feed
    assert none_left()
    # Neither the batches that were still to be read are waited for, nor are they read.
    assert time.perf_counter() - began < 1.5 * 0.2
    assert len(source.asked) <= 3


def test_a_file_that_is_damaged_ends_a_streamed_feed_with_its_name(tmp_path: Path) -> None:
    for part, name in itertools.product(("train", "test"), range(8)):
        path = tmp_path / part / "a" / f"{name}.png"
        save_image(path, np.zeros((8, 8, 3), dtype=np.uint8))
    streamed = load("folder", tmp_path, stream="on")
    (tmp_path / "train/a/5.png").write_text("this is no image")
    feed = task_on(streamed).feed("some purpose", 2, torch.arange(8))
    with pytest.raises(UserError, match=r"5\.png' is not a readable image"):
        list(itertools.islice(feed, 4))
    save_image(tmp_path / "train/a/5.png", np.zeros((8, 9, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=r"5\.png' is not like .*: add `image_size=PIXELS`"):
        streamed.batch(torch.arange(8))


# ---- how long steps wait


def waited(feed: Iterator[Batch], loss: Callable[[Tensor, Tensor], Tensor], steps: int) -> float:
    """The share that a loop of `steps` steps reports."""
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(90, 4)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    (cost,) = train(model, feed, steps=steps, optimizer=optimizer, scheduler=scheduler, loss=loss)
    return cost.data_seconds / cost.seconds if cost.seconds else 0.0


def slow_loss(logits: Tensor, targets: Tensor) -> Tensor:
    time.sleep(0.03)
    return nn.functional.cross_entropy(logits, targets)


def test_steps_that_are_faster_than_reading_wait() -> None:
    _, streamed, _ = both(seconds=0.03)
    feed = task_on(streamed).feed("some purpose", 4, torch.arange(40))
    assert 0.6 < waited(feed, nn.functional.cross_entropy, 8) <= 1


def test_steps_that_are_slower_than_reading_do_not_wait() -> None:
    _, streamed, _ = both(seconds=0.015)
    feed = task_on(streamed).feed("some purpose", 4, torch.arange(40))
    # Reading one batch after the other, and not ahead, would take a third of the time.
    assert waited(feed, slow_loss, 8) < 0.2


def test_the_first_step_of_a_loop_does_not_count() -> None:
    _, streamed, _ = both(seconds=0.1)
    feed = task_on(streamed).feed("some purpose", 4, torch.arange(40))
    assert waited(feed, nn.functional.cross_entropy, 1) == 0
