"""A caller's sets as images: all of them in memory, or read from the sets while training."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from dau_fast.data.images import Images
from dau_fast.data.overlap import check_disjoint, check_subsets
from dau_fast.data.streaming import StreamedImages
from dau_fast.errors import UserError

# More would be names and logits without end.
_MOST_CLASSES = 10**6

Labelled = tuple[Tensor, Tensor] | Dataset[tuple[Tensor, int]]


def join_sets(
    sets: Mapping[str, Labelled], stream: bool, device: torch.device
) -> tuple[Images, dict[str, int]]:
    """The images of `sets` on `device`, one set after the other, and how many each has.

    stream: whether to read them when a batch needs them. Raises UserError for sets that do not fit together.
    """
    parts = {
        name: _Items(name, data) if isinstance(data, Dataset) else _Rows(name, *data)
        for name, data in sets.items()
    }
    if "forget" in sets:
        check_subsets(sets)
    counts = {name: len(part) for name, part in parts.items()}
    if not stream:
        columns = {name: part.read_all() for name, part in parts.items()}
        _check_alike({name: images[:1] for name, (images, _) in columns.items()})
        _check_disjoint({name: images for name, (images, _) in columns.items()})
        names = _name_classes({name: labels for name, (_, labels) in columns.items()})
        pixels, labels = (torch.cat(column) for column in zip(*columns.values(), strict=True))
        return Images(pixels, labels, names).to(device), counts
    source = Sets(parts)
    _check_disjoint({name: part.images for name, part in parts.items() if isinstance(part, _Rows)})
    names = _name_classes(dict(zip(parts, source.label_parts, strict=True)))
    # Laid out as all of them together would be.
    pixels = torch.cat(source.examples)[:0]
    return StreamedImages(pixels, source.labels, names, source=source).to(device), counts


def _check_disjoint(images: Mapping[str, Tensor]) -> None:
    if "forget" in images:
        check_disjoint(images)


def _name_classes(labels: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The classes by number. UserError, before any memory is taken, for a label that cannot be one."""
    for name, given in labels.items():
        place = int(given.argmax())
        if given[place] >= _MOST_CLASSES:
            raise UserError(
                f"image {place} of the {name} set has the label {given[place]}: expected a class, from 0 to "
                f"{_MOST_CLASSES - 1:,} at most"
            )
    return tuple(str(label) for label in range(1 + max(int(given.max()) for given in labels.values())))


def _check_finite(name: str, images: Tensor, start: int = 0) -> None:
    """UserError where one of `images`, from number `start` of the set `name` on, holds NaN or infinity."""
    # Not isfinite of all of them, which would take memory for as many answers.
    if not images.numel() or bool(torch.stack(images.detach().aminmax()).isfinite().all()):
        return
    wrong = images.detach().flatten(1).isfinite().all(1).logical_not().nonzero().flatten()
    raise UserError(
        f"image {start + int(wrong[0])} of the {name} set holds NaN or infinity ({len(wrong)} such): "
        "expected finite numbers, as the model takes them; leave it out or repair it"
    )


class Sets:
    """A caller's sets, one after the other, as a source of floating-point images.

    One thread, always the same, calls the data sets: they need not be safe for several, and may hold what
    belongs to a thread. labels: int64 [N], label_parts: those of each set. examples: the first image of each
    set, [1, ...].
    """

    def __init__(self, parts: Mapping[str, _Items | _Rows]) -> None:
        self._parts = list(parts.values())
        self._thread = ThreadPoolExecutor(1, "dau_fast data sets")
        self.examples = [self._thread.submit(part.read_first).result() for part in self._parts]
        _check_alike(dict(zip(parts, self.examples, strict=True)))
        self.label_parts = [self._thread.submit(part.read_labels).result() for part in self._parts]
        self.labels = torch.cat(self.label_parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.examples[0].shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: Tensor, out: Tensor) -> None:
        """Write images `index`, int64 [B], to `out`, [B, ...]; both on the CPU."""
        self._thread.submit(self._read, index, out).result()

    @torch.no_grad()
    def _read(self, index: Tensor, out: Tensor) -> None:
        start = 0
        for part in self._parts:
            rows = ((start <= index) & (index < start + len(part))).nonzero().flatten()
            part.read(index[rows] - start, rows, out)
            start += len(part)


class _Rows:
    """A set of tensors: images [N, ...] and labels int64 [N]."""

    def __init__(self, name: str, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        if len(images) == 0 or len(images) != len(labels):
            raise UserError(
                f"the {name} set has {len(images)} images and {len(labels)} labels: expected as many of "
                "both, at least one"
            )
        if not images.is_floating_point() or labels.dtype != torch.int64 or labels.ndim != 1:
            raise UserError(
                f"the {name} set has {images.dtype} images and {labels.dtype} labels: expected "
                "floating-point images as the model takes them, and int64 labels"
            )
        _check_finite(name, images)

    def __len__(self) -> int:
        return len(self.labels)

    def read_all(self) -> tuple[Tensor, Tensor]:
        return self.images, self.labels

    def read_first(self) -> Tensor:
        return self.images[:1].detach().cpu()

    def read_labels(self) -> Tensor:
        return self.labels.cpu()

    def read(self, index: Tensor, rows: Tensor, out: Tensor) -> None:
        """Write images `index` [b] to out[rows]."""
        out[rows] = self.images[index.to(self.images.device)].to(out)


class _Items:
    """A map-style data set of pairs of an image and a label."""

    def __init__(self, name: str, data: Dataset[tuple[Tensor, int]]) -> None:
        self.name, self.data = name, data
        if not hasattr(data, "__len__"):
            raise UserError(f"the {name} set has no length: give a map-style Dataset, or tensors")
        self._count = len(data)
        if self._count == 0:
            raise UserError(f"the {name} set is empty: give at least one image")
        self._labels: Tensor | None = None

    def __len__(self) -> int:
        return self._count

    def read_item(self, i: int) -> tuple[Tensor, int]:
        """Image [...] and label of item `i`. UserError where there is none, whatever the reason."""
        try:
            image, label = self.data[i]
            label = int(label)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"item {i} of the {self.name} set cannot be read as an image and a label: {reason}"
            ) from error
        if not isinstance(image, Tensor) or not image.is_floating_point():
            kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise UserError(
                f"item {i} of the {self.name} set has an image of {kind}: expected a floating-point tensor "
                "as the model takes it"
            )
        _check_finite(self.name, image[None], i)
        return image, label

    def read_all(self) -> tuple[Tensor, Tensor]:
        pairs = [self.read_item(i) for i in range(len(self))]
        try:
            images = torch.stack([image for image, _ in pairs])
            return images, torch.tensor([label for _, label in pairs])
        except RuntimeError as error:
            raise UserError(
                f"the {self.name} set's pairs do not fit together, all images need one shape: {error}"
            ) from error

    def read_first(self) -> Tensor:
        """The first image, [1, ...]."""
        image, self._first_label = self.read_item(0)
        self._kind = image.dtype, image.shape
        return image.detach().cpu().contiguous()[None]

    def read_labels(self) -> Tensor:
        """int64 [N]; those that the data set tells, or else every item is read once."""
        told = _find_labels(self.data)
        # What changes labels on their way out changes the first one, too, as a rule.
        if told is None or told[0] != self._first_label:
            told = torch.tensor([self.read_item(i)[1] for i in range(len(self))])
        self._labels = told
        return told

    def read(self, index: Tensor, rows: Tensor, out: Tensor) -> None:
        """Write images `index` [b] to out[rows]."""
        assert self._labels is not None
        for i, row in zip(index.tolist(), rows.tolist(), strict=True):
            image, label = self.read_item(i)
            if (image.dtype, image.shape) != self._kind:
                raise UserError(
                    f"item {i} of the {self.name} set is an image of {image.dtype} and shape "
                    f"{tuple(image.shape)}, and item 0 of {self._kind[0]} and {tuple(self._kind[1])}: give "
                    "all the same"
                )
            if label != self._labels[i]:
                raise UserError(
                    f"item {i} of the {self.name} set has the label {label}, and had {self._labels[i]} "
                    "before or in its targets: give a Dataset whose labels stay the same"
                )
            out[row] = image


def _find_labels(data: Dataset[tuple[Tensor, int]]) -> Tensor | None:
    """What `targets` or `labels` of a data set tell, as torchvision's do, int64 [N]; None for neither."""
    if type(data) is Subset:
        told = _find_labels(data.dataset)
        return None if told is None else told[torch.as_tensor(data.indices)]
    if getattr(data, "target_transform", None) is not None:
        return None
    for name in ("targets", "labels"):
        try:
            told = torch.as_tensor(getattr(data, name))
        except (AttributeError, TypeError, ValueError, RuntimeError):
            continue
        integers = not (told.is_floating_point() or told.is_complex() or told.dtype == torch.bool)
        if integers and told.shape == (len(data),):  # type: ignore[arg-type]
            return told.detach().cpu().long()
    return None


def _check_alike(examples: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(image.shape[1:]) for name, image in examples.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"the sets hold images of different shapes {shapes}: give all the same shape")
