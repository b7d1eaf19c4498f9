"""A bank of trained models: each is trained once, however often it is asked for, and kept in a folder.

A model's file is named by a hash of what made it, so that nothing stale is ever found. A file is there whole
or not at all, and is checked when it is read. While a model is trained its claim, a locked file, is held:
other processes train something else or wait, and the system drops the claim of a process that died.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dau_fast import checkpoints
from dau_fast.config import PruneConfig, TrainingRecipe
from dau_fast.data.images import Images
from dau_fast.data.split import Split
from dau_fast.engine.chance import derive_seed
from dau_fast.engine.device import run_flushed
from dau_fast.engine.runtime import Runtime
from dau_fast.errors import UserError
from dau_fast.job.assembly import network_builder
from dau_fast.methods import original
from dau_fast.methods.task import Task
from dau_fast.models import Classifier
from dau_fast.prune import Masks

# Of what a training gives: to be raised when the same settings come to give another model.
FORMAT = 1


@dataclass(frozen=True)
class Training:
    """What makes a model: `arch`, trained by `recipe` on `images` at `index`, int64 [N] in this order.

    seed: of initial weights, order and augmentation. pruning: how masks are found meanwhile. masks: those
    of another model, which this one keeps to; neither for a dense one. runtime: how the training computes.
    """

    images: Images
    index: Tensor
    seed: int
    recipe: TrainingRecipe
    arch: str
    pruning: PruneConfig | None = None
    masks: Masks | None = None
    runtime: Runtime = field(default_factory=Runtime)

    @cached_property
    def key(self) -> str:
        """SHA-256, 64 hexadecimal digits, over the pixels and labels trained on and over every setting."""
        images = self.images
        pixels, labels = images.pixels[self.index].cpu(), images.labels[self.index].cpu()
        settings = {
            "format": FORMAT,
            "arch": self.arch,
            "seed": self.seed,
            "recipe": asdict(self.recipe),
            "augmentation": asdict(images.augmentation),
            "mean": images.mean.tolist(),
            "std": images.std.tolist(),
            "classes": len(images.class_names),
            "pixels": [str(pixels.dtype), *pixels.shape],
            "batches": str(images.dtype),
        }
        if self.runtime.device.type != "cpu":
            settings["computed"] = [self.runtime.device.type, self.runtime.precision_name]
        if self.pruning is not None:
            settings["pruning"] = asdict(self.pruning)
        if self.masks is not None:
            settings["masks"] = {name: self.masks.shape(name) for name in self.masks}
        found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        found.update(pixels.numpy().tobytes())
        found.update(labels.numpy().astype("<i8").tobytes())
        if self.masks is not None:
            found.update(self.masks.arena.cpu().numpy().tobytes())
        return found.hexdigest()

    @property
    def work(self) -> int:
        """Images that the training passes."""
        return len(self.index) * self.recipe.epochs

    @property
    def shape(self) -> str:
        """What the cost of an image depends on, but for the machine."""
        image = "x".join(map(str, self.images.shape))
        pruned = f", pruned by {self.pruning.method}" if self.pruning else ", masked" if self.masks else ""
        return f"{self.arch} {image} in batches of {self.recipe.batch_size}{pruned}"

    def build(self) -> Classifier:
        """The network before its training."""
        return self._fresh(derive_seed(self.seed, "original"))

    def train(self) -> tuple[Classifier, Masks | None]:
        """The trained model, in evaluation mode, and the masks it has in the end."""
        index = self.index
        split = Split(index, index, index, index, index, classwise=False)
        task = Task(
            self.images, split, self.seed, self.build(), self._fresh, self.recipe,
            masks=self.masks, pruning=self.pruning, runtime=self.runtime,
        )  # fmt: skip
        made = original.train(task)
        return made.model.eval(), made.masks or self.masks

    def _fresh(self, seed: int) -> Classifier:
        return network_builder(self.arch, self.images, self.runtime)(seed)


class Bank:
    """The models in `folder`, which is made where it is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._models, self._claims = folder / "models", folder / "claims"
        for place in (self._models, self._claims):
            place.mkdir(parents=True, exist_ok=True)

    def path(self, training: Training) -> Path:
        """Where the model of `training` lies or will lie."""
        return self._models / f"{training.key}.safetensors"

    def claim_path(self, training: Training) -> Path:
        """The file that who trains the model of `training` has locked, whole, with flock(2)."""
        return self._claims / training.key

    def holds(self, training: Training) -> bool:
        """Whether there is a file of this model; only reading it tells whether it is sound."""
        return self.path(training).is_file()

    def get(self, training: Training) -> Classifier:
        """The model, in evaluation mode: read, or trained and kept where its file is missing or damaged.

        Where another process is training it, this waits.
        """
        model = self._read(training)
        if model is None:
            with self._claim(training, wait=True):
                model = self._read(training)  # again: another process may have been faster
                if model is None:
                    model = self._train(training)
        return model

    def get_masks(self, training: Training) -> Masks | None:
        """The masks of the model, which is trained where it is missing; None for a dense one."""
        self.make(training)
        masks = checkpoints.load_masks(self.path(training))
        return masks and masks.to(training.runtime.device)

    def make(self, training: Training, *, wait: bool = True) -> bool:
        """Train the model unless it is there; False where another process is at it and `wait` is False."""
        if self._read(training) is None:
            with self._claim(training, wait) as mine:
                if not mine:
                    return False
                if self._read(training) is None:
                    self._train(training)
        return True

    def measure_costs(self) -> dict[str, float]:
        """Median seconds of training for an image that it passed, by `Training.shape`, of all models here."""
        found: dict[str, list[float]] = {}
        for path in self._models.glob("*.safetensors"):
            notes = _read_notes(path)
            if "shape" in notes:
                found.setdefault(notes["shape"], []).append(float(notes["seconds"]) / int(notes["work"]))
        return {shape: median(seconds) for shape, seconds in found.items()}

    def _read(self, training: Training) -> Classifier | None:
        """The model; None where it is not there, or, after a warning, where its file is damaged."""
        path = self.path(training)
        if not path.is_file():
            return None
        model = training.build()
        try:
            notes = checkpoints.load(path, model.network)
            if notes.get("key") != training.key or notes.get("sha256") != _digest(model.network):
                raise UserError(f"bank file '{path}' does not hold what was written to it")
        except UserError as error:
            logging.getLogger("dau_fast").warning("%s: the model is trained again", error)
            return None
        return model.eval()

    def _train(self, training: Training) -> Classifier:
        """Train and write the model, whose claim is held."""
        path = self.path(training)
        for left in path.parent.glob(f"{path.name}.*"):  # by a process that died
            left.unlink()
        began = time.perf_counter()
        model, masks = run_flushed(training.train, training.runtime.device)
        notes = {
            "key": training.key,
            "sha256": _digest(model.network),
            "shape": training.shape,
            "seconds": f"{time.perf_counter() - began:.3f}",
            "work": str(training.work),
            "torch": torch.__version__,
        }
        write_whole(path, lambda place: checkpoints.save(place, model.network, notes, masks))
        return model

    @contextmanager
    def _claim(self, training: Training, wait: bool) -> Iterator[bool]:
        """Hold the claim inside; yields whether this is so, which it is not where another holds it."""
        with self.claim_path(training).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True  # closing the file drops the claim


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path` and put it in its place: readers see all of it or nothing.

    It is on the disk when this returns. A process that is killed leaves `<path>.<number>` at most.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        _flush(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Have a file's content, or a folder's names, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(network: nn.Module) -> str:
    """SHA-256 over all weights and buffers: safetensors alone does not see a changed byte."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _read_notes(path: Path) -> dict[str, str]:
    """What stands in a model's file beside its weights; nothing for one that is damaged or gone."""
    with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
        notes: dict[str, str] = json.loads((file.metadata() or {}).get("dau_fast", "{}"))
        return notes
    return {}
