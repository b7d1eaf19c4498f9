"""A caller's own model and sets as a task: which images are which, and which layer answers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from dau_fast.config import SplitConfig, TrainingRecipe
from dau_fast.data.images import Images
from dau_fast.data.inputs import Inputs, Layout
from dau_fast.data.overlap import find_copies
from dau_fast.data.progress import Progress
from dau_fast.data.requests import Entry, find_images, read_request
from dau_fast.data.sets import Joined, join_sets
from dau_fast.data.split import FORGOTTEN, TEST, TRAINING, VALIDATION, Forget, draw_validation, make_split
from dau_fast.engine.evaluation import predict_each
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.sharding import placed
from dau_fast.errors import UserError
from dau_fast.job.assembly import match_precision, place_network
from dau_fast.job.fitting import check_answers, find_head, list_arguments
from dau_fast.methods.task import Task
from dau_fast.metrics.accuracy import percent
from dau_fast.models import Classifier
from dau_fast.prune import Masks

# Images of the retain and the validation set on which a model is looked at before and after.
_LOOKED_AT = 2000


@dataclass(frozen=True)
class Given:
    """What a caller gives. Either retain, or train, of which forget is then a part.

    forget: a set, or of `train` the indices, a mask, names, or a file that lists them. earlier: what requests
    before this one forgot: sets, or indices of `train`. held_out: indices of `train` that an earlier request
    took for validation.
    """

    forget: Any
    retain: Any = None
    train: Any = None
    validation: Any = None
    test: Any = None
    earlier: tuple[Any, ...] = ()
    held_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.retain is None and self.train is None:
            raise UserError(
                "neither `retain` nor `train` is given: give what the model keeps as `retain`, or all that "
                "it was trained on as `train` and as `forget` which of it is to be forgotten"
            )
        if self.retain is not None and self.train is not None:
            raise UserError("`retain` and `train` are both given: give one of them")

    @property
    def sets(self) -> dict[str, Any]:
        """The sets that are there, what indices count in first."""
        first = (
            {"train": self.train} if self.retain is None else {"forget": self.forget, "retain": self.retain}
        )
        named = first | {"validation": self.validation, "test": self.test}
        if self.retain is not None:
            named |= {f"earlier forget {i + 1}": data for i, data in enumerate(self.earlier)}
        return {name: data for name, data in named.items() if data is not None}

    def after(self, asked: Sequence[int], held_out: Sequence[int]) -> Given:
        """What the next request starts from, after `asked` of this one's images are forgotten."""
        gone = (self.forget,) if self.train is None else (tuple(asked),)
        kept = () if self.train is None else tuple(held_out)
        return replace(self, earlier=(*self.earlier, *gone), held_out=kept)


@dataclass(frozen=True)
class Own:
    """A caller's request, ready to be carried out. drawn: images of `train` or retain held out by a draw.

    layout: of inputs by name, else None. classifier: as it was asked for.
    """

    given: Given
    task: Task
    drawn: tuple[int, ...]
    layout: Layout | None
    classifier: str | None

    def fit(self, network: nn.Module) -> Classifier:
        """A copy of `network`, of the same kind of answers, to be called as the original is."""
        return _wrap(network, self.task.images, self.layout, self.task.runtime, self.classifier)

    def look(self, model: Classifier) -> tuple[float, float]:
        """Percent of retain and of validation images, some thousands of each, that `model` is right on."""
        split = self.task.split
        return self._count_right(model, split.retain), self._count_right(model, split.validation)

    def _count_right(self, model: Classifier, index: Tensor) -> float:
        task = self.task
        some = index[:: max(1, -(-len(index) // _LOOKED_AT))]
        with placed(task.images.device, model):
            right = predict_each(
                model, task.images, some, lambda logits, at: (logits.argmax(1) == task.labels[at]).float(),
                ranks=task.ranks,
            )  # fmt: skip
        return percent(right)


def prepare(
    model: nn.Module,
    given: Given,
    runtime: Runtime,
    classifier: str | None = None,
    masks: Masks | None = None,
    *,
    seed: int,
    stream: bool,
    progress: Progress,
) -> Own:
    """`given` as a task of making a copy of `model` forget. Raises UserError for what does not fit."""
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UserError(f"`seed={str(seed)[:80]}`: expected a whole number from 0 to {2**32 - 1}")
    joined = join_sets(given.sets, stream, runtime.device, list_arguments(model))
    joined = replace_images(joined, match_precision(joined.images, runtime), runtime)
    labels = joined.images.labels
    if labels.min() < 0:
        raise UserError("a label is negative: labels count from 0")
    asked = _list_asked(given, joined)
    roles, drawn = _give_roles(given, joined, asked, seed)
    if given.train is not None:
        _tell_of_copies(joined, asked, roles)
    original = _wrap(model, joined.images, joined.layout, runtime, classifier)
    if masks is not None:
        masks = masks.to(runtime.device)
        masks.apply_(original.network)
    split = make_split(roles, labels, Forget("the given set", indices=asked), seed).to(runtime.device)
    task = Task(
        joined.images,
        split,
        seed,
        original,
        _no_fresh_network,
        TrainingRecipe(),
        progress,
        masks,
        runtime=runtime,
    )
    return Own(given, task, drawn, joined.layout, classifier)


def replace_images(joined: Joined, images: Images, runtime: Runtime) -> Joined:
    """`joined` with `images`, and a layout of the precision that they have."""
    exact = joined.layout is not None and runtime.precision == torch.float64
    layout = joined.layout.to_double() if joined.layout is not None and exact else joined.layout
    return joined._replace(images=images, layout=layout)


def _wrap(
    model: nn.Module, images: Images, layout: Layout | None, runtime: Runtime, classifier: str | None
) -> Classifier:
    """A copy of `model` as a Classifier that gives (features, logits) of `images`."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("no parameter of the model requires grad: unfreeze what may change")
    network = place_network(copy.deepcopy(model), runtime)
    two = images.batch(torch.arange(2, device=images.device))
    head = find_head(network, two, layout, classifier)
    exact = runtime.precision == torch.float64
    made = Classifier(
        network, head.name, None if exact else runtime.precision, layout, answers_at_head=head.answers_at_head
    )
    with torch.no_grad():
        features, logits = made.eval()(two)
    check_answers(features, logits, len(images.class_names))
    return made


# ---- which images are which


def _list_asked(given: Given, joined: Joined) -> tuple[int, ...]:
    """The images to forget, by their places in all images."""
    if given.train is None:
        return tuple(range(joined.counts["forget"]))
    count = joined.counts["train"]
    asked = _find_asked(given.forget, given.train, count)
    wrong = next((index for index in asked if not 0 <= index < count), None)
    if wrong is not None:
        raise UserError(
            f"`forget` has the index {wrong}: the training set has {count} images, numbered from 0"
        )
    if not asked:
        raise UserError("`forget` is empty: name at least one image of `train`")
    return asked


def _find_asked(forget: Any, train: Any, count: int) -> tuple[int, ...]:
    if isinstance(forget, Path):
        return find_images(read_request(forget), list_names(train), f"request file '{forget}'")
    if isinstance(forget, Tensor | np.ndarray):
        array = np.asarray(forget.cpu() if isinstance(forget, Tensor) else forget)
        if array.dtype == bool and array.shape == (count,):
            return tuple(np.flatnonzero(array).tolist())
        if array.dtype.kind not in "iuU" or array.ndim != 1:
            raise UserError(
                f"`forget` is {array.dtype} of shape {list(array.shape)}: expected indices of `train`, a "
                f"mask [{count}], or names"
            )
        forget = array.tolist()
    if isinstance(forget, str) or not isinstance(forget, Iterable):
        raise UserError(
            f"`forget` is a {type(forget).__name__}: with `train`, expected a list of indices or names, or a "
            "Path of a file that lists them"
        )
    entries: list[Entry] = [
        int(entry) if isinstance(entry, int | np.integer) and not isinstance(entry, bool) else entry
        for entry in forget
    ]
    odd = next((entry for entry in entries if not isinstance(entry, int | str)), None)
    if odd is not None:
        raise UserError(f"`forget` holds a {type(odd).__name__}: expected indices or names of `train`")
    named = any(isinstance(entry, str) for entry in entries)
    return find_images(entries, list_names(train) if named else (), "`forget`")


# Where data sets keep the names of their items.
_NAME_COLUMNS = ("id", "ids", "file_name", "filename", "path", "image_path", "name")


def list_names(data: Any) -> tuple[str, ...]:
    """What the items of a data set are called: files of torchvision's folders, or ids; empty if unknown."""
    if type(data) is Subset:
        names = list_names(data.dataset)
        return tuple(names[i] for i in data.indices) if names else ()
    data = getattr(data, "dataset", data) if hasattr(data, "batch_sampler") else data
    samples = getattr(data, "samples", None) or getattr(data, "imgs", None)
    if isinstance(samples, list) and samples and isinstance(samples[0], tuple):
        return tuple(str(sample[0]) for sample in samples)
    columns = getattr(data, "column_names", None)
    for name in _NAME_COLUMNS:
        found = data[name] if isinstance(columns, list) and name in columns else getattr(data, name, None)
        if found is not None and not isinstance(found, str) and hasattr(found, "__len__"):
            return tuple(str(entry) for entry in found)
    return ()


def _give_roles(
    given: Given, joined: Joined, asked: tuple[int, ...], seed: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The role of every image, int8 [N], and what was drawn for validation where there is no such set."""
    counts, labels = joined.counts, joined.images.labels
    roles = np.concatenate([np.full(count, _role_of(name), dtype=np.int8) for name, count in counts.items()])
    if given.train is not None and given.earlier:
        roles[np.concatenate([np.array(part, dtype=np.int64) for part in given.earlier])] = FORGOTTEN
    if "validation" in counts:
        return roles, ()
    if given.held_out:
        drawn = np.setdiff1d(np.array(given.held_out), np.array(asked))
    else:
        drawn = draw_validation(
            roles, labels.cpu().numpy(), seed, share=SplitConfig().validation_share, keep=asked
        )
    roles[drawn] = VALIDATION
    logging.getLogger("dau_fast").warning(
        "there is no validation set: %d images of the retain set are held out for it; the model was trained "
        "on them as on those to forget, so it will forget little: give images that it has never seen",
        len(drawn),
    )
    return roles, tuple(drawn.tolist())


def _tell_of_copies(joined: Joined, asked: tuple[int, ...], roles: np.ndarray) -> None:
    """Warn where an image to forget stands in the sets again, and stays; of images in memory alone."""
    pixels = joined.images.pixels
    if len(pixels) != len(roles):
        return
    copies = [pair for pair in find_copies(pixels, asked) if roles[pair[1]] != FORGOTTEN]
    if not copies:
        return
    place, other = copies[0]
    starts = np.cumsum([0, *joined.counts.values()])
    at = int(np.searchsorted(starts, other, side="right")) - 1
    logging.getLogger("dau_fast").warning(
        "%d images that stay equal some that are to be forgotten (image %d of `train` is image %d of the %s "
        "set): what they show is kept; name them in `forget` too, or leave them out",
        len(copies), place, other - starts[at], list(joined.counts)[at],
    )  # fmt: skip


def _role_of(name: str) -> int:
    known = {"validation": VALIDATION, "test": TEST}
    return FORGOTTEN if name.startswith("earlier") else known.get(name, TRAINING)


def _no_fresh_network(seed: int) -> Classifier:
    raise UserError(f"a fresh network (seed {seed}) cannot be made from a caller's model")


# ---- a reference


@dataclass(frozen=True)
class RetainSet(Dataset[tuple[Inputs, int]]):
    """The retain set as a caller may train on it: (inputs, label) of each image, as the model takes them."""

    images: Images
    index: Tensor
    layout: Layout | None = field(default=None)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[Inputs, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        row = self.index[i][None]
        inputs, label = self.images.gather(row).cpu(), int(self.images.labels[row])
        if self.layout is None:
            return inputs[0], label
        return {name: tensor[0] for name, tensor in self.layout(inputs).items()}, label
