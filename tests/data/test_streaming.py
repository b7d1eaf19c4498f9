"""Streamed images: the same batches as from memory, read ahead, and only what is asked for."""

from __future__ import annotations

import gc
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calling import call, environment, succeed
from checking import check_report, same_tensors
from PIL import Image
from torch import Tensor, nn

from dau_fast.config import TrainingRecipe
from dau_fast.data import decoding, stored
from dau_fast.data.images import Augmentation, Images
from dau_fast.data.named import load
from dau_fast.data.sources import Arrays, Files
from dau_fast.data.streaming import DEPTH, StreamedImages, ahead
from dau_fast.engine.batches import Batch
from dau_fast.engine.evaluation import predict
from dau_fast.engine.ranks import ALONE, Ranks
from dau_fast.engine.steps import Engine
from dau_fast.engine.training import recompute_batchnorm, train
from dau_fast.errors import UserError
from dau_fast.methods.task import Task
from dau_fast.models import Classifier, SmallResNet

CPU = torch.device("cpu")


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
    return Task(images, nothing, 3, nothing, nothing, TrainingRecipe(), engine=Engine(ranks=ranks))


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dau_fast")]


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


# ---- reading ahead


def test_items_come_in_order_and_are_made_no_further_ahead_than_asked() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    found = ahead(items(), 3)
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


# ---- sources


@pytest.fixture(scope="module")
def arrays(place: Path, pictures: Path) -> Path:
    """The images of `pictures` as arrays."""
    images, root = load("folder", pictures), place / "arrays"
    assert images.test is not None
    train = torch.ones(len(images.labels), dtype=torch.bool)
    train[images.test] = False
    for part, rows in (("train", train), ("test", ~train)):
        save(root / part, images.pixels[rows].permute(0, 2, 3, 1).numpy(), images.labels[rows].numpy())
    return root


def save(folder: Path, images: np.ndarray | None, labels: np.ndarray | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images", images), ("labels", labels)):
        if array is not None:
            np.save(folder / f"{name}.npy", array)


def test_arrays_hold_the_training_part_and_then_the_test_part(arrays: Path, pictures: Path) -> None:
    images, same = load("arrays", arrays), load("folder", pictures)
    assert torch.equal(images.pixels, same.pixels)
    assert torch.equal(images.labels, same.labels)
    assert images.labels.dtype == torch.int64
    assert images.class_names == ("0", "1", "2")
    assert images.test is not None
    assert images.test.tolist() == list(range(36, 54))
    assert images.augmentation == Augmentation(2, True)
    assert torch.equal(images.mean, same.mean)
    assert torch.equal(images.std, same.std)


@pytest.mark.parametrize("name", ["folder", "arrays"])
def test_a_streamed_data_set_is_the_one_in_memory(name: str, arrays: Path, pictures: Path) -> None:
    folder = {"folder": pictures, "arrays": arrays}[name]
    held, streamed = (load(name, folder, stream=stream) for stream in ("off", "on"))
    assert (type(held), type(streamed)) == (Images, StreamedImages)
    assert len(streamed.pixels) == 0
    for field in ("labels", "test", "mean", "std"):
        assert torch.equal(getattr(held, field), getattr(streamed, field))
    for field in ("class_names", "augmentation", "dtype", "shape", "device"):
        assert getattr(held, field) == getattr(streamed, field)
    index = torch.tensor([50, 3, 0, 35, 36, 3])
    assert torch.equal(held.batch(index, seeded(1)), streamed.batch(index, seeded(1)))


def test_the_sample_that_normalises_is_the_same_in_a_large_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(10_500) % 2
    save(tmp_path / "train", rng.integers(0, 256, (10_500, 2, 2, 1), dtype=np.uint8), labels)
    save(tmp_path / "test", np.full((10, 2, 2, 1), 255, dtype=np.uint8), labels[:10])
    asked: list[int] = []
    read = Arrays.read
    monkeypatch.setattr(
        Arrays, "read", lambda self, index, out: (asked.extend(index.tolist()), read(self, index, out))[1]
    )
    streamed = load("arrays", tmp_path, stream="on")
    assert asked == list(range(0, 10_500, 2))
    held = load("arrays", tmp_path, stream="off")
    assert torch.equal(streamed.mean, held.mean)
    assert torch.equal(streamed.std, held.std)
    pixels = held.pixels[asked[: len(range(0, 10_500, 2))]].double() / 255
    torch.testing.assert_close(held.mean.double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(held.std.double(), pixels.std((0, 2, 3)), rtol=1e-6, atol=0)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to tell resident memory")
def test_of_a_large_array_only_the_images_asked_for_are_read(tmp_path: Path) -> None:
    count, path = 100_000, tmp_path / "images.npy"
    # 4.9 GB of zeros that take no room on the disk, but for a few images.
    written = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, 128, 128, 3))
    index = torch.arange(5, count, 999)
    written[index.numpy()] = np.arange(len(index), dtype=np.uint8)[:, None, None, None]
    del written
    before = resident_bytes()
    source = Arrays([path])
    out = torch.empty((len(index), 128, 128, 3), dtype=torch.uint8)
    source.read(index, out)
    assert torch.equal(out[:, 0, 0, 0], torch.arange(len(index)).to(torch.uint8))
    assert torch.equal(out.float().amax((1, 2, 3)), out.float().amin((1, 2, 3)))
    assert resident_bytes() - before < 200e6


def test_streaming_a_folder_decodes_the_files_of_its_batches_alone(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = load("folder", pictures, stream="on")
    assert isinstance(streamed, StreamedImages)
    assert isinstance(streamed.source, Files)
    opened: list[int] = []
    content = Files.content
    monkeypatch.setattr(
        Files, "content", lambda self, number: (opened.append(number), content(self, number))[1]
    )
    streamed.batch(torch.tensor([7, 7, 40]))
    assert sorted(opened) == [7, 7, 40]


def test_a_file_that_is_damaged_ends_a_streamed_feed_with_its_name(tmp_path: Path) -> None:
    for part, name in itertools.product(("train", "test"), range(8)):
        path = tmp_path / part / "a" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(path)
    streamed = load("folder", tmp_path, stream="on")
    (tmp_path / "train/a/5.png").write_text("this is no image")
    feed = task_on(streamed).feed("some purpose", 2, torch.arange(8))
    with pytest.raises(UserError, match=r"5\.png' is not a readable image"):
        list(itertools.islice(feed, 4))
    Image.fromarray(np.zeros((8, 9, 3), dtype=np.uint8)).save(tmp_path / "train/a/5.png")
    with pytest.raises(UserError, match=r"5\.png' is not like .*: add --image-size"):
        streamed.batch(torch.arange(8))


IMAGES, LABELS = np.zeros((4, 5, 6, 3), dtype=np.uint8), np.array([0, 1, 2, 1])

# What train/ and test/ hold in place of IMAGES and LABELS, or files; and what the message must name.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"train/images": None}, r"train/images.npy' is missing"),
    "no labels": ({"test/labels": None}, r"test/labels.npy' is missing"),
    "text": ({"train/images": b"no array"}, r"train/images.npy' is not a readable NumPy array"),
    "empty file": ({"test/images": b""}, r"test/images.npy' is not a readable NumPy array"),
    "objects": ({"train/labels": np.array([{}] * 4)}, r"train/labels.npy' is not a readable NumPy array"),
    "cut": ({"train/images": "cut"}, r"train/images.npy' is not a readable NumPy array"),
    "floats": ({"train/images": IMAGES / 1}, r"is float64 of shape \[4, 5, 6, 3\]: expected uint8 images"),
    "no channels": ({"train/images": IMAGES[..., 0]}, r"of shape \[4, 5, 6\]: expected uint8 images"),
    "channels first": (
        {"train/images": IMAGES.transpose(0, 3, 1, 2).copy()}, r"shape \[4, 3, 5, 6\]: expected uint8 images"
    ),
    "Fortran": ({"train/images": np.asfortranarray(IMAGES)}, "is in Fortran order"),
    "none": ({"train/images": IMAGES[:0]}, r"train/images.npy'"),
    "differing": ({"test/images": IMAGES[:, 1:]}, r"of shape \[4, 6, 3\] and .* of \[5, 6, 3\]"),
    "too few labels": ({"test/labels": LABELS[1:]}, r"of shape \[3\]: expected integers of shape \[4\]"),
    "float labels": ({"train/labels": LABELS / 1}, r"train/labels.npy' is float64 of shape \[4\]"),
    "missing label": ({"train/labels": np.array([0, 1, 3, 0])}, "labels from 0 to 3 but no 2"),
    "huge label": ({"train/labels": np.array([0, 1, 2**60, 0])}, "but no 2"),
    "negative": ({"train/labels": np.array([0, 1, -1, 0])}, "labels from -1 to 1 but no 0"),
    "unknown label": ({"test/labels": np.array([0, 1, 7, 0])}, "has the label 7, which no training image"),
}  # fmt: skip


@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_do_not_fit_are_an_error_before_anything_runs(
    name: str, stream: str, tmp_path: Path
) -> None:
    changes, message = WRONG[name]
    for part in ("train", "test"):
        save(tmp_path / part, IMAGES, LABELS)
    for place, change in changes.items():
        path = tmp_path / f"{place}.npy"
        whole = path.read_bytes()
        path.unlink()
        if isinstance(change, np.ndarray):
            np.save(path, change)
        elif change is not None:
            path.write_bytes(whole[:-1] if change == "cut" else change)
    with pytest.raises(UserError, match=message) as raised:
        load("arrays", tmp_path, stream=stream)
    assert "\n" not in str(raised.value)


def test_arrays_need_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dataset arrays needs --data"):
        load("arrays")
    with pytest.raises(UserError, match="is not a folder"):
        load("arrays", tmp_path / "absent")


# ---- whether to stream

# `pictures` as uint8.
TAKEN = 54 * 16 * 16 * 3


@pytest.mark.parametrize(("free", "streamed"), [(2 * TAKEN, False), (2 * TAKEN - 2, True), (0, True)])
def test_auto_streams_what_takes_more_than_half_of_the_free_memory_and_says_so_once(
    free: int, streamed: bool, arrays: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stored, "free_memory", lambda device: free)
    assert isinstance(load("arrays", arrays, stream="auto"), StreamedImages) == streamed
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == streamed
    assert all(re.fullmatch(r"images are streamed, as they take 0\.0 GB .* are free", line) for line in said)


def test_images_that_must_be_in_memory_and_do_not_fit_are_an_error(
    arrays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "free_memory", lambda device: TAKEN)
    assert type(load("arrays", arrays, stream="off")) is Images
    monkeypatch.setattr(stored, "free_memory", lambda device: TAKEN - 1)
    with pytest.raises(UserError, match=r"do not fit into memory .*leave --stream off out"):
        load("arrays", arrays, stream="off")
    assert isinstance(load("arrays", arrays, stream="on"), StreamedImages)


def test_the_smaller_of_two_memories_decides(arrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images are read into the CPU's memory before they are on another device."""
    for small in ("cpu", "meta"):
        monkeypatch.setattr(stored, "free_memory", lambda device, small=small: 10**9 * (device.type != small))
        source = Arrays([arrays / "train/images.npy"])
        assert stored.streams(source, "auto", torch.device("meta"), 1)


@pytest.mark.parametrize(("processes", "streamed"), [(1, False), (3, False), (4, True)])
def test_processes_of_one_machine_share_its_memory_but_not_that_of_their_gpus(
    processes: int, streamed: bool, arrays: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    source = Arrays([arrays / "train/images.npy"])
    taken = len(source) * 16 * 16 * 3
    free = {"cpu": 6 * taken, "meta": 2 * taken}
    monkeypatch.setattr(stored, "free_memory", lambda device: free[device.type])
    assert stored.streams(source, "auto", torch.device("meta"), processes) == streamed
    assert ("free for each of 4 processes" in caplog.text) == streamed
    with pytest.raises(UserError, match="free for each of 7 processes"):
        stored.streams(source, "off", torch.device("meta"), 7)


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    monkeypatch.setattr(decoding.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [decoding.decoder_threads(processes) for processes in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]
    for processes in (1, 3):
        images = load("folder", pictures, stream="on", processes=processes)
        assert isinstance(images, StreamedImages)
        assert isinstance(images.source, Files)
        assert images.source.threads == 8 // processes


@pytest.mark.parametrize("threads", [1, 3, 100])
def test_files_are_decoded_by_as_many_threads_as_asked_for(
    threads: int, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Files(sorted(map(str, pictures.glob("train/*/*.png"))), None, threads)
    index, names = torch.arange(36).flip(0), set()
    content = Files.content
    monkeypatch.setattr(
        Files,
        "content",
        lambda self, number: (names.add(threading.get_ident()), time.sleep(0.01), content(self, number))[2],
    )
    out = torch.empty((36, 16, 16, 3), dtype=torch.uint8)
    source.read(index, out)
    assert min(threads, 2) <= len(names) <= threads
    expected = [np.asarray(Image.open(source.paths[number])) for number in index]
    assert torch.equal(out, torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--stream maybe", "unknown streaming 'maybe': expected one of auto, on, off"),
        ("--stream on", "--stream on is for folder, arrays, arrow"),
        ("--dataset arrays", "--dataset arrays needs --data DIR"),
        ("--dataset arrays --data {pictures}", "images.npy' is missing"),
    ],
)
def test_mistakes_are_one_line(arguments: str, message: str, tmp_path: Path, pictures: Path) -> None:
    called = call(tmp_path / "out", *arguments.format(pictures=pictures).split())
    assert called.code == 2
    assert called.stderr.startswith("error: ")
    assert message in called.stderr
    assert called.stderr.count("\n") == 1


# ---- whole runs


@pytest.mark.parametrize("name", ["folder", "arrays"])
def test_a_streamed_run_gives_the_numbers_of_one_in_memory(
    name: str, tmp_path: Path, arrays: Path, pictures: Path
) -> None:
    folder = {"folder": pictures, "arrays": arrays}[name]
    arguments = ("--dataset", name, "--data", folder, "--epochs", 5, "--methods", "dau,retrain,ft")
    held, streamed = (succeed(tmp_path / s, *arguments, "--stream", s) for s in ("off", "on"))
    for called, expected in ((held, False), (streamed, True)):
        check_report(called.report, ["dau", "retrain", "ft"])
        assert called.report["run"]["streamed"] == expected
        assert set(called.report["run"]["waiting"]) == {"original", "game", "recovery", "retrain", "ft"}
    for method in ("original", "dau", "retrain", "ft"):
        assert same_tensors(held.weights(method), streamed.weights(method))
        one, other = (
            {key: value for key, value in called.report["methods"][method].items()
             if key not in ("seconds", "compile_seconds", "speedup")}
            for called in (held, streamed)
        )  # fmt: skip
        assert one == other
    assert held.report["game"] == streamed.report["game"]


def test_a_file_that_is_damaged_ends_a_streamed_run_in_one_line(tmp_path: Path, arrays: Path) -> None:
    """Not one of those that were looked at before the run began."""
    folder = tmp_path / "folder"
    for part, name in itertools.product(("train", "test"), range(16)):
        path = folder / part / "ab"[name % 2] / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 10 * name, dtype=np.uint8)).save(path)
    (folder / "test/b/9.png").write_text("this is no image")
    called = call(
        tmp_path / "out", "--dataset", "folder", "--data", folder, "--stream", "on", "--forget", "random:0.3"
    )
    assert called.code == 2
    assert re.fullmatch(r"error: '[^\n]*9\.png' is not a readable image[^\n]*\n", called.stderr)
    assert not (tmp_path / "out").exists()


# Says on stdout whenever an optimiser has taken a step.
TELLING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from torch.optim.optimizer import register_optimizer_step_post_hook as hook
from dau_fast.unlearn import main
hook(lambda *_: print("step", flush=True))
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_ends_a_streamed_run(tmp_path: Path, pictures: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--dataset", "folder", "--data", str(pictures), "--stream", "on", "--epochs", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-c", TELLING, *arguments, "--device", "cpu", "--out", str(out)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    giving_up = threading.Timer(60, process.kill)
    giving_up.start()
    try:
        assert process.stdout
        assert [process.stdout.readline() for _ in range(10)] == ["step\n"] * 10
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    finally:
        giving_up.cancel()
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert stderr.strip() == "interrupted: nothing was written"
    assert list(tmp_path.iterdir()) == []


# ---- how long steps wait


def waited(feed: Iterator[Batch], loss: Callable[[Tensor, Tensor], Tensor], steps: int) -> float:
    """The share that a loop of `steps` steps reports."""
    model, engine = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(90, 4))), Engine()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    train(
        model, feed, steps=steps, optimizer=optimizer, scheduler=scheduler, loss=loss, engine=engine, name="a"
    )
    assert engine.waiting.keys() == engine.chosen.keys()
    return engine.waiting["a"].share


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
