"""A caller's sets, read while training: what sets in memory give, one thread, and errors that say where."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from dau_fast.api import Result, unlearn
from dau_fast.config import DauConfig
from dau_fast.data.images import Images
from dau_fast.data.sets import join_sets
from dau_fast.data.streaming import DEPTH, StreamedImages
from dau_fast.errors import UserError

CPU = torch.device("cpu")
CONFIG = DauConfig(label_conditioned=False, alpha=1.0, turns=8, batch_size=32, lr=0.05)
Pair = tuple[Tensor, Tensor]


class Items(Dataset[tuple[Tensor, int]]):
    """A data set that notes which items it was asked for, and by which threads.

    further: attributes, such as `targets`. changed: item -> what it gives in place of (image, label).
    """

    def __init__(self, pair: Pair, changed: Callable[[int, Any], Any] | None = None, **further: Any) -> None:
        self.images, self.numbers = pair
        self.changed = changed or (lambda i, item: item)
        self.asked: list[int] = []
        self.threads: set[int] = set()
        self.busy = self.overlapped = False
        vars(self).update(further)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.overlapped |= self.busy
        self.busy = True
        self.asked.append(i)
        self.threads.add(threading.get_ident())
        found = self.changed(i, (self.images[i], int(self.numbers[i])))
        self.busy = False
        return found


def blobs(count: int, labels: tuple[int, ...], seed: int) -> Pair:
    y = torch.tensor(labels)[torch.arange(count) % len(labels)]
    return 3 * torch.eye(3, 6)[y] + torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)), y


def some_sets() -> dict[str, Any]:
    return {
        "forget": blobs(40, (2,), 1),
        "retain": blobs(80, (0, 1), 2),
        "validation": blobs(60, (0, 1, 2), 3),
        "test": blobs(45, (0, 1, 2), 4),
    }


def perceptron() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


def played(sets: dict[str, Any], stream: bool = True, **options: Any) -> Result:
    config = CONFIG if options.get("method", "dau") == "dau" else None
    return unlearn(perceptron(), **sets, config=config, stream=stream, device="cpu", **options)


def assert_same(one: Result, other: Result) -> None:
    states = one.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (one.before, one.after, one.history) == (other.before, other.after, other.history)


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dau_fast")]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    began = time.monotonic()
    while readers() and time.monotonic() - began < 10:
        time.sleep(0.01)
        if time.monotonic() - began > 0.1:  # collecting takes longer than most threads take to end
            gc.collect()
    assert not readers()


# ---- what sets in memory give

WRAPS: dict[str, Callable[[str, Pair], Any]] = {
    "data sets": lambda name, pair: Items(pair),
    "with targets": lambda name, pair: Items(pair, targets=pair[1].tolist()),
    "TensorDataset": lambda name, pair: TensorDataset(*pair),
    "tensors": lambda name, pair: pair,
    "mixed": lambda name, pair: Items(pair) if name in ("forget", "test") else pair,
}


@pytest.mark.parametrize("method", ["dau", "ft", "ga"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_sets_that_are_streamed_give_what_sets_in_memory_give(wrap: str, method: str) -> None:
    sets = {name: WRAPS[wrap](name, pair) for name, pair in some_sets().items()}
    assert_same(played(sets, method=method), played(some_sets(), stream=False, method=method))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batches_of_pictures_are_laid_out_as_in_memory(layout: torch.memory_format) -> None:
    """Otherwise a convolution would round in another way."""
    pictures = torch.randn(9, 3, 5, 4).to(memory_format=layout)
    labels = torch.arange(9)
    for sets in (
        {"forget": (pictures[:4], labels[:4]), "retain": (pictures[4:], labels[4:])},
        {"forget": (pictures[:4], labels[:4]), "retain": Items((pictures[4:], labels[4:]))},
        {"forget": Items((pictures[:4], labels[:4])), "retain": Items((pictures[4:], labels[4:]))},
    ):
        (held, counts, _), (streamed, same_counts, _) = (
            join_sets(sets, stream, CPU) for stream in (False, True)
        )
        assert counts == same_counts == {"forget": 4, "retain": 5}
        assert (type(held), type(streamed)) == (Images, StreamedImages)
        assert len(streamed.pixels) == 0
        assert (held.shape, held.class_names) == (streamed.shape, streamed.class_names)
        index = torch.tensor([8, 3, 0, 4, 3])
        assert torch.equal(held.batch(index), streamed.batch(index))
        assert held.batch(index).stride() == streamed.batch(index).stride()


def test_the_widest_dtype_of_the_sets_is_that_of_their_batches() -> None:
    (narrow, labels), (wide, others) = blobs(4, (0,), 0), blobs(4, (1,), 1)
    sets = {"forget": Items((narrow, labels)), "retain": (wide.double(), others)}
    held, streamed = (join_sets(sets, stream, CPU).images.batch(torch.arange(8)) for stream in (False, True))
    assert held.dtype == streamed.dtype == torch.float64
    assert torch.equal(held, streamed)


# ---- what is read, and by whom


def test_batches_are_read_ahead_and_nothing_else_is() -> None:
    items = Items(blobs(100, (0, 1), 0), targets=blobs(100, (0, 1), 0)[1])
    images = join_sets({"retain": items}, True, CPU).images
    assert items.asked == [0]
    batches = images.batches(torch.arange(100).flip(0).split(5))
    next(batches)
    expected = [0, *range(99, 99 - 5 * (1 + DEPTH), -1)]
    deadline = time.monotonic() + 10
    while len(items.asked) < len(expected) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert items.asked == expected


def test_one_thread_that_is_not_the_callers_calls_all_data_sets() -> None:
    sets = {name: Items(pair) for name, pair in some_sets().items()}
    played(sets)
    threads = set.union(*(items.threads for items in sets.values()))
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


def test_batches_that_are_asked_for_at_once_are_read_one_after_the_other() -> None:
    items = Items(blobs(100, (0, 1), 0), lambda i, item: (time.sleep(0.001), item)[1])
    images = join_sets({"retain": items}, True, CPU).images
    feeds = [images.batches(torch.arange(100).split(5)) for _ in range(3)]
    for batches in itertools.islice(zip(*feeds, strict=True), 8):
        assert torch.equal(batches[0], batches[2])
    assert not items.overlapped


# ---- labels

PAIR = blobs(12, (0, 1, 2), 5)
TOLD: dict[str, tuple[Dataset[Any], int]] = {
    "targets": (Items(PAIR, targets=PAIR[1].tolist()), 1),
    "tensor": (Items(PAIR, targets=PAIR[1].to(torch.uint8)), 1),
    "array": (Items(PAIR, labels=PAIR[1].numpy()), 1),
    "subset": (Subset(Items(PAIR, targets=PAIR[1].tolist()), range(1, 12)), 1),
    "subset of a subset": (Subset(Subset(Items(PAIR, labels=PAIR[1]), range(1, 12)), [3, 4, 0]), 1),
    "neither": (Items(PAIR), 13),
    "too many": (Items(PAIR, targets=[0, 1, 2] * 5, labels=PAIR[1]), 1),
    "names": (Items(PAIR, targets=list("abc") * 4), 13),
    "numbers": (Items(PAIR, targets=PAIR[1] / 1), 13),
    "transformed": (Items(PAIR, targets=PAIR[1].tolist(), target_transform=lambda y: y), 13),
    "others": (Items(PAIR, targets=(PAIR[1] + 1).tolist()), 13),
    "plain subset": (Subset(Items(PAIR), [3, 4, 0]), 4),
}


@pytest.mark.parametrize("name", TOLD)
def test_labels_that_a_data_set_tells_are_taken_and_others_are_read(name: str) -> None:
    data, reads = TOLD[name]
    images = join_sets({"retain": data}, True, CPU).images
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == [label for _, label in (data[i] for i in range(len(data)))]
    inner = data
    while isinstance(inner, Subset):
        inner = inner.dataset
    assert len(inner.asked) - len(data) == reads


def test_a_label_that_turns_out_to_be_another_is_an_error() -> None:
    sets = some_sets()
    told = sets["retain"][1].clone()
    told[57] += 1
    sets["retain"] = Items(sets["retain"], targets=told)
    with pytest.raises(UserError, match=r"item 57 of the retain set has the label 1, and had 2 before or in"):
        played(sets)


# ---- mistakes


def failing(index: int, error: BaseException, calls: int = 0) -> Callable[[int, Any], Any]:
    """Raises `error` for the item `index`, after it was read `calls` times."""
    seen: list[int] = []

    def changed(i: int, item: Any) -> Any:
        if i == index:
            seen.append(i)
            if len(seen) > calls:
                raise error
        return item

    return changed


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "error", [OSError("disk\nfull"), StopIteration(), IndexError("x"), KeyError(3), UserError("no")], ids=repr
)
def test_an_item_that_raises_is_an_error_with_its_set_and_index(error: Exception, stream: bool) -> None:
    sets = some_sets()
    sets["validation"] = Items(sets["validation"], failing(7, error))
    with pytest.raises(UserError, match=f"item 7 of the validation set .*: {type(error).__name__}") as raised:
        played(sets, stream)
    assert raised.value.__cause__ is error
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_an_item_that_raises_while_training_ends_it(calls: int) -> None:
    sets = some_sets()
    sets["retain"] = Items(sets["retain"], failing(33, OSError("gone"), calls))
    with pytest.raises(UserError, match=r"item 33 of the retain set cannot be read .*: OSError: gone"):
        played(sets)


@pytest.mark.parametrize("what", [KeyboardInterrupt, SystemExit])
def test_what_is_no_error_comes_out_as_it_is(what: type[BaseException]) -> None:
    sets = some_sets()
    sets["retain"] = Items(sets["retain"], failing(33, what(), 1))
    with pytest.raises(what):
        played(sets)


ODD: dict[str, tuple[Callable[[Tensor, int], Any], str]] = {
    "bytes": (lambda image, label: (image.to(torch.uint8), label), "of torch.uint8: expected a floating"),
    "words": (lambda image, label: ("six", label), "an image of str: expected a floating"),
    "no pair": (lambda image, label: image[:3], "cannot be read as an image and a label: ValueError"),
    "no label": (lambda image, label: (image, "a"), "cannot be read as an image and a label: ValueError"),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("index", [0, 5])
@pytest.mark.parametrize("name", ODD)
def test_items_must_be_images_with_labels(name: str, index: int, stream: bool) -> None:
    change, message = ODD[name]
    sets = some_sets()
    sets["forget"] = Items(sets["forget"], lambda i, item: change(*item) if i == index else item)
    with pytest.raises(UserError, match=f"item {index} of the forget set .*{message}"):
        played(sets, stream)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image[:5], r"is an image of torch\.float32 and shape \(5,\), and item 0 of .* \(6,\)"),
        (Tensor.double, r"is an image of torch\.float64 and shape \(6,\), and item 0 of torch\.float32"),
    ],
    ids=["shape", "dtype"],
)
def test_streamed_items_must_be_like_the_first(change: Callable[[Tensor], Tensor], message: str) -> None:
    sets = some_sets()
    sets["forget"] = Items(sets["forget"], lambda i, item: (change(item[0]), item[1]) if i == 9 else item)
    with pytest.raises(UserError, match=f"item 9 of the forget set {message}"):
        played(sets)


@pytest.mark.parametrize("stream", [True, False])
def test_sets_that_do_not_fit_are_errors_before_anything_runs(stream: bool) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return itertools.repeat(0)

    for wrong, message in (
        (Items(blobs(0, (0,), 0)), "the retain set is empty"),
        (Items((torch.zeros(4, 5), torch.zeros(4).long())), "the sets hold images of different shapes"),
        ((torch.zeros(4, 6), torch.zeros(3).long()), "the retain set has 4 images and 3 labels"),
        (Endless(), "the retain set has no length: give a map-style Dataset"),
    ):
        with pytest.raises(UserError, match=message):
            played(some_sets() | {"retain": wrong}, stream)


# ---- sets that contradict one another, and numbers that are none


def repeated(sets: dict[str, Any], name: str, place: int) -> dict[str, Any]:
    """The sets with forget image 5 a second time, at `place` of the set `name`."""
    image, label = (column[5:6] for column in sets["forget"])
    images, labels = sets[name]
    columns = [torch.cat([old[:place], new, old[place:]]) for old, new in ((images, image), (labels, label))]
    return {**sets, name: tuple(columns)}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("wrap", ["tensors", "data sets"])
@pytest.mark.parametrize("name", ["forget", "retain", "validation", "test"])
def test_an_image_to_be_forgotten_stands_in_no_other_set(name: str, wrap: str, stream: bool) -> None:
    sets = {key: WRAPS[wrap](key, pair) for key, pair in repeated(some_sets(), name, 30).items()}
    if stream and wrap == "data sets":
        played(sets, stream)  # nothing is read to find out
        return
    with pytest.raises(UserError, match=rf"image 5 of the forget set is also image 30 of the {name} set"):
        played(sets, stream)


@pytest.mark.parametrize("stream", [True, False])
def test_images_that_only_look_alike_are_taken(stream: bool) -> None:
    """A few numbers of each are compared first."""
    sets = some_sets()
    wide = {name: (torch.zeros(len(y), 6, 50), y) for name, (_, y) in sets.items()}
    for name, (images, _) in wide.items():
        images[:, :, 0] = sets[name][0]
    images = wide["retain"][0]
    images[0] = wide["forget"][0][0]
    images[0, 3, 1] += 1
    model = nn.Sequential(nn.Flatten(), nn.Linear(300, 8), nn.Linear(8, 3))
    unlearn(model, **wide, config=CONFIG, stream=stream, device="cpu")


@pytest.mark.parametrize("stream", [True, False])
def test_parts_of_one_data_set_share_no_item(stream: bool) -> None:
    data = Items(blobs(200, (0, 1, 2), 0), lambda i, item: (item[0] + torch.rand(6), item[1]))
    parts = {"forget": range(40), "retain": range(40, 120), "validation": range(120, 200)}
    sets = {name: Subset(data, list(items)) for name, items in parts.items()}
    played(sets, stream)
    with pytest.raises(UserError, match="image 39 of the forget set is also image 0 of the retain set"):
        played({**sets, "retain": Subset(data, range(39, 120))}, stream)
    with pytest.raises(UserError, match="image 3 of the forget set is also image 40 of the forget set"):
        played({**sets, "forget": Subset(data, [*range(40), 3])}, stream)
    with pytest.raises(UserError, match="image 0 of the forget set is also image 0 of the validation set"):
        played({**sets, "validation": sets["forget"]}, stream)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("wrap", ["tensors", "data sets"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["forget", "retain", "validation", "test"])
def test_an_image_with_numbers_that_are_none_is_named(
    name: str, value: float, wrap: str, stream: bool
) -> None:
    sets = some_sets()
    sets[name][0][17, 2] = value
    wrapped = {key: WRAPS[wrap](key, pair) for key, pair in sets.items()}
    with pytest.raises(UserError, match=rf"image 17 of the {name} set holds NaN or infinity \(1 such\)"):
        played(wrapped, stream)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("label", [10**6, 10**8, 2**40, 2**63 - 1])
def test_a_huge_label_is_refused_before_memory_is_taken(label: int, stream: bool) -> None:
    sets = some_sets()
    sets["retain"][1][9] = label
    with pytest.raises(UserError, match=rf"image 9 of the retain set has the label {label}: expected"):
        played(sets, stream)
