"""What is to be forgotten, the sets of a run as index tensors, and the checks that keep them honest.

Every image of a data set has one role: training, validation, test, or forgotten by an earlier request, for
good. The forget set is a part of the training images and the retain set is the rest of them. All methods of
a run share one split.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dau_fast.data.paths import check_regular
from dau_fast.data.requests import find_images, read_request
from dau_fast.errors import UserError, suggest

TRAINING, VALIDATION, TEST, FORGOTTEN = 0, 1, 2, 3


@dataclass(frozen=True)
class Forget:
    """What to forget, as asked for: exactly one of the three fields is set.

    fraction: share of the training images, drawn at random. label: a whole class.
    indices: positions in the data set, training part first.
    """

    spec: str
    fraction: float | None = None
    label: int | None = None
    indices: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, spec: str, class_names: Sequence[str], names: Sequence[str] = ()) -> Forget:
        """Read `random:FRACTION`, `class:NUMBER_OR_NAME`, `indices:FILE` or `file:FILE`.

        names: of all images, by which the last may name some. Raises UserError for anything else, with what
        was expected.
        """
        kind, _, value = spec.partition(":")
        if kind == "random":
            return cls(spec, fraction=_fraction(spec, value))
        if kind == "class":
            return cls(spec, label=_label(spec, value, class_names))
        if kind == "indices":
            return cls(spec, indices=_read_indices(Path(value)))
        if kind == "file":
            entries = read_request(Path(value))
            return cls(spec, indices=find_images(entries, names, f"request file '{value}'"))
        raise UserError(
            f"`forget` {spec!r} is not understood: expected random:0.1, class:3, indices:FILE or file:FILE"
        )


def _fraction(spec: str, value: str) -> float:
    try:
        fraction = float(value)
    except ValueError:
        fraction = float("nan")
    if not 0 < fraction < 1:
        raise UserError(
            f"`forget` {spec!r}: expected a share of the training images between 0 and 1, such as random:0.1"
        )
    return fraction


def _label(spec: str, value: str, class_names: Sequence[str]) -> int:
    if value in class_names:
        return class_names.index(value)
    if value.isdecimal() and len(value) < 10 and int(value) < len(class_names):
        return int(value)
    raise UserError(
        f"`forget` {spec!r}: no such class: expected a number from 0 to {len(class_names) - 1} "
        f"or a class name{suggest(value, class_names)}"
    )


def _read_indices(path: Path) -> tuple[int, ...]:
    """Whole numbers from 0, separated by white space, none of them twice."""
    check_regular(path, f"index file '{path}'")
    try:
        words = path.read_text().split()
    except (OSError, ValueError) as error:  # the latter for what is no text, and no path
        raise UserError(f"index file '{path}' cannot be read: {error}") from error
    if not words:
        raise UserError(f"index file '{path}' is empty: expected one index a line")
    wrong = next(
        (word for word in words if not (word.isascii() and word.isdecimal() and len(word) < 19)), None
    )
    if wrong is not None:
        raise UserError(f"index file '{path}': {wrong[:40]!r} is not an index from 0 up")
    indices = tuple(int(word) for word in words)
    seen: set[int] = set()
    for index in indices:
        if index in seen:
            raise UserError(f"index file '{path}' names {index} twice: name every image once")
        seen.add(index)
    return indices


@dataclass(frozen=True)
class Split:
    """int64 index tensors, each sorted; forget and retain partition train.

    classwise: whether whole classes are forgotten, so that no retain image shares a label with the
    forget set; validation and test set are then without those classes. earlier: forgotten by requests before
    this one, and in none of the other sets; classes of which nothing else is left are gone as well.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    forget: Tensor
    retain: Tensor
    classwise: bool
    earlier: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def to(self, device: torch.device) -> Split:
        """The same sets on `device`."""
        names = ("train", "validation", "test", "forget", "retain", "earlier")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @property
    def forget_sha256(self) -> str:
        """SHA-256 over the forget indices as little-endian int64."""
        return hashlib.sha256(self.forget.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def range_class_sizes(split: Split, labels: Tensor) -> dict[str, tuple[int, int]]:
    """Images of the smallest and the largest class in retain and test set, of the classes that are there."""
    found = {}
    for name in ("retain", "test"):
        counts = torch.bincount(labels[getattr(split, name)].cpu())
        present = counts[counts > 0].tolist()
        if present:
            found[name] = (min(present), max(present))
    return found


def hold_out(
    labels: Tensor,
    test: Tensor | None,
    seed: int,
    *,
    validation_share: float,
    test_share: float,
    keep: Sequence[int] = (),
    validation: Tensor | None = None,
) -> np.ndarray:
    """Give every image a role, int8 [N]; validation (and test, if there is no official one) per class.

    test, validation: indices of the official parts. keep: indices that must stay in training where possible,
    so that a person's own images are not held out by the draw; those that no image has are ignored.
    """
    targets = labels.cpu().numpy()
    roles = np.full(len(targets), TRAINING, dtype=np.int8)
    if test is not None:
        roles[test.cpu().numpy()] = TEST
    if validation is not None:
        roles[validation.cpu().numpy()] = VALIDATION
    kept = np.zeros(len(targets), dtype=bool)
    kept[[index for index in keep if index < len(targets)]] = True
    rng = np.random.default_rng([seed, 0])
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero((targets == label) & (roles == TRAINING)))
        held = members[~kept[members]]
        tests = 0 if test is not None else round(test_share * len(members))
        validations = 0 if validation is not None else max(1, round(validation_share * len(members)))
        roles[held[:tests]] = TEST
        roles[held[tests : tests + validations]] = VALIDATION
    return roles


def draw_validation(
    roles: np.ndarray, targets: np.ndarray, seed: int, *, share: float, keep: Sequence[int] = ()
) -> np.ndarray:
    """Of the training images a `share` of every class, at least one where two are left; sorted indices.

    roles, targets: of every image, [N]. keep: indices that are not drawn.
    """
    free = roles == TRAINING
    free[list(keep)] = False
    rng = np.random.default_rng([seed, 2])
    drawn = [np.empty(0, dtype=np.int64)]
    for label in np.unique(targets[free]):
        members = rng.permutation(np.flatnonzero(free & (targets == label)))
        drawn.append(members[: min(max(1, round(share * len(members))), len(members) // 2)])
    return np.sort(np.concatenate(drawn))


_ROLES = (TRAINING, VALIDATION, TEST, FORGOTTEN)


def make_split(roles: np.ndarray, labels: Tensor, forget: Forget, seed: int) -> Split:
    """Choose the forget set among the training images and check that every set can do its work.

    Raises UserError for an index outside the training images and for an empty set; only a test set
    may be missing, where no image has that role.
    """
    targets = labels.cpu().numpy()
    train, validation, test, earlier = (np.flatnonzero(roles == role) for role in _ROLES)
    chosen = _choose_forgotten(forget, train, roles, targets, seed)
    retain = np.setdiff1d(train, chosen)
    classwise = not np.isin(targets[chosen], targets[retain]).any()
    gone = np.setdiff1d(targets[earlier], targets[train])
    if classwise:
        gone = np.union1d(gone, targets[chosen])
    validation, test = (index[~np.isin(targets[index], gone)] for index in (validation, test))
    sets = {"forget": chosen, "retain": retain, "validation": validation, "test": test}
    for name, index in sets.items():
        if len(index) == 0 and not (name == "test" and TEST not in roles):
            raise UserError(
                f"`forget` {forget.spec!r} leaves no {name} images out of {len(train)} training "
                "images: forget another share, or add data"
            )
    as_tensor = {name: torch.from_numpy(index) for name, index in (sets | {"earlier": earlier}).items()}
    return Split(train=torch.from_numpy(train), classwise=bool(classwise), **as_tensor)


def draw_sample(index: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of `index` [N] in their order, all of it where it has no more."""
    if count >= len(index):
        return index
    order = torch.randperm(len(index), generator=generator, device=index.device)
    return index[order[:count]].sort().values


def _choose_forgotten(
    forget: Forget, train: np.ndarray, roles: np.ndarray, targets: np.ndarray, seed: int
) -> np.ndarray:
    """The indices of `train` that `forget` asks for, sorted; a share of them is drawn from `seed`."""
    if forget.indices is not None:
        chosen = np.sort(np.array(forget.indices, dtype=np.int64))
        _check_trained_on(chosen, roles)
        return chosen
    if forget.label is not None:
        return train[targets[train] == forget.label]
    assert forget.fraction is not None
    count = round(forget.fraction * len(train))
    return np.sort(np.random.default_rng([seed, 1]).permutation(train)[:count])


def _check_trained_on(chosen: np.ndarray, roles: np.ndarray) -> None:
    """Every index must exist and belong to the images the original was trained on."""
    if chosen[-1] >= len(roles):
        raise UserError(
            f"forget index {chosen[-1]} is out of range: the data set has {len(roles)} images, "
            "numbered from 0"
        )
    again = chosen[roles[chosen] == FORGOTTEN]
    if len(again):
        raise UserError(
            f"forget index {again[0]} was forgotten by an earlier request ({len(again)} such): leave out "
            "what is forgotten already"
        )
    strangers = chosen[roles[chosen] != TRAINING]
    if len(strangers):
        part = "test" if roles[strangers[0]] == TEST else "validation"
        raise UserError(
            f"forget index {strangers[0]} is a {part} image, which the original was never trained "
            f"on ({len(strangers)} such): name training images only"
        )


def mark_forgotten(roles: np.ndarray, split: Split) -> np.ndarray:
    """`roles` int8 [N] after the forget set of `split` is forgotten, as a copy."""
    marked = roles.copy()
    marked[split.forget.cpu().numpy()] = FORGOTTEN
    return marked


def encode_roles(roles: np.ndarray) -> str:
    """Roles as text, for a checkpoint's metadata."""
    return base64.b64encode(zlib.compress(roles.astype(np.int8).tobytes(), 9)).decode()


def decode_roles(text: str, count: int) -> np.ndarray:
    """The inverse of `encode_roles`; UserError where it does not fit a data set of `count` images."""
    unpacker = zlib.decompressobj()
    try:
        # No more than was expected is unpacked, and a byte that shows that there was more.
        roles = np.frombuffer(unpacker.decompress(base64.b64decode(text), count + 1), dtype=np.int8)
    except (ValueError, zlib.error) as error:
        raise UserError(f"the checkpoint's record of its split is damaged: {error}") from error
    if len(roles) <= count and not unpacker.eof:
        raise UserError("the checkpoint's record of its split is damaged: it was cut short")
    if not np.isin(roles, _ROLES).all():
        raise UserError("the checkpoint's record of its split is damaged: it holds an unknown role")
    if len(roles) != count:
        found = "more" if len(roles) > count else len(roles)
        raise UserError(
            f"the checkpoint was trained on a data set of {found} images, this one has "
            f"{count}: use the data it was trained on"
        )
    return roles
