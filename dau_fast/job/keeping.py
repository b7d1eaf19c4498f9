"""Finished parts of a run in files: a run that was killed goes on from them and ends with the same weights.

Every part is kept under a digest of all that decides it: code, data, split, seed, settings, the original's
weights and how they compute. So a part of another run is never taken for it.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dau_fast.engine.loop import LoopCost
from dau_fast.job.loading import list_loaded
from dau_fast.job.saving import hash_file, write_synced
from dau_fast.job.tuning import Trial, Tuned, Tuning
from dau_fast.methods.running import Finished
from dau_fast.methods.task import Task
from dau_fast.models import Classifier
from dau_fast.prune import Masks


@dataclass(frozen=True)
class Keeper:
    """Keeps finished parts in `folder`. recalled: the names of those that were taken from it, in order."""

    folder: Path
    recalled: list[str] = field(default_factory=list)
    _images: dict[int, str] = field(default_factory=dict)  # their digest, by the object

    def finish(
        self, name: str, task: Task, settings: Any, work: Callable[[], Finished], *, in_place: bool = False
    ) -> Finished:
        """What `work` gives, or gave to a run that was killed; None of a run in several processes is kept.

        in_place: whether the model that comes of it is the task's original itself, and no copy.
        """
        return self._finish(name, task, settings, lambda: (work(), None), in_place=in_place)[0]

    def finish_tuned(self, name: str, task: Task, plan: Sequence[Any], work: Callable[[], Tuned]) -> Tuned:
        """What `work` gives, or gave to a run that was killed, of the trials of `plan`; as `finish`."""

        def run() -> tuple[Finished, dict[str, Any]]:
            tuned = work()
            return tuned.finished, asdict(tuned.tuning)

        finished, told = self._finish(name, task, plan, run)
        trials = tuple(Trial(**trial) for trial in told["trials"])
        return Tuned(finished, plan[told["chosen"]], Tuning(trials, told["chosen"], told["seconds"]))

    def _finish(
        self,
        name: str,
        task: Task,
        settings: Any,
        work: Callable[[], tuple[Finished, Any]],
        *,
        in_place: bool = False,
    ) -> tuple[Finished, Any]:
        """A finished part and what else is to be kept of it."""
        if not task.ranks.alone or task.runtime.traces is not None:
            return work()
        # Taken once: many images take a while.
        images = self._images.get(id(task.images)) or digest_images(task)
        self._images[id(task.images)] = images
        key = _digest_part(name, task, settings, images)
        found = self._recall(key, task.original if in_place else None, task)
        if found is not None:
            self.recalled.append(name)
            return found
        finished, more = work()
        self._keep(key, finished, more)
        return finished, more

    def _keep(self, key: str, finished: Finished, more: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        state = finished.model.network.state_dict()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        write_synced(self._file(key, "weights"), save(tensors))
        if finished.masks is not None:
            finished.masks.save(self._file(key, "masks"))
        facts = {
            "seconds": finished.seconds,
            "compile_seconds": finished.compile_seconds,
            "loops": [asdict(loop) for loop in finished.loops],
            "history": finished.history,
            "more": more,
            "files": {file.name: hash_file(file) for file in self._files(key)},
        }
        # Last: a part is there once its facts are.
        text = json.dumps(facts)
        write_synced(self.folder / f"{key}.json", f"{_digest_text(text)}\n{text}".encode())

    def _recall(self, key: str, original: Classifier | None, task: Task) -> tuple[Finished, Any] | None:
        try:
            digest, text = (self.folder / f"{key}.json").read_text().split("\n", 1)
        except (OSError, ValueError):
            return None
        if digest != _digest_text(text):
            return None
        facts = json.loads(text)
        if facts["files"] != {file.name: hash_file(file) for file in self._files(key)}:
            return None
        model = original or copy.deepcopy(task.original)
        model.network.load_state_dict(load_file(self._file(key, "weights")))
        masks = self._file(key, "masks")
        finished = Finished(
            model.eval(),
            facts["seconds"],
            facts["compile_seconds"],
            tuple(LoopCost(**loop) for loop in facts["loops"]),
            facts["history"],
            Masks.load(masks).to(task.images.device) if masks.exists() else None,
        )
        return finished, facts["more"]

    def _file(self, key: str, what: str) -> Path:
        return self.folder / f"{key}.{what}.safetensors"

    def _files(self, key: str) -> Iterator[Path]:
        return (file for what in ("weights", "masks") if (file := self._file(key, what)).exists())


def _digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# What of a runtime may decide a result.
_COMPUTING = ("device", "precision", "engine", "accumulate", "loop_parts", "activation_checkpointing")


def _digest_part(name: str, task: Task, settings: Any, images: str) -> str:
    """The key of the part `name` of `task`. images: their digest."""
    runtime, split = task.runtime, task.split
    sets = {name: getattr(split, name) for name in ("train", "validation", "test", "forget", "retain")}
    facts = {
        "name": name,
        "settings": list(map(asdict, settings))
        if isinstance(settings, Sequence)
        else settings and asdict(settings),
        "seed": task.seed,
        "recipe": asdict(task.recipe),
        "pruning": task.pruning and asdict(task.pruning),
        "masks": task.masks and _digest_tensors({"masks": task.masks.arena}),
        "runtime": {name: str(getattr(runtime, name)) for name in _COMPUTING},
        "threads": torch.get_num_threads(),
        "machine": [platform.machine(), platform.python_version(), torch.__version__, np.__version__],
        "code": [digest_code(), *map(hash_file, list_loaded())],
        "network": f"{type(task.original.network).__qualname__} {task.original.head_name}",
        "original": digest_weights(task.original.network),
        "sets": _digest_tensors(sets),
        "images": images,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def digest_weights(network: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and numbers of all parameters and buffers."""
    return _digest_tensors(network.state_dict())


def digest_images(task: Task) -> str:
    """SHA-256 over labels, normalisation and the pixels, where these are in memory."""
    images = task.images
    return _digest_tensors(
        {"labels": images.labels, "mean": images.mean, "std": images.std, "pixels": images.pixels}
    )


def _digest_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        content = tensor.detach().cpu().contiguous().flatten()
        if content.numel():
            digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@functools.cache
def digest_code() -> str:
    """SHA-256 over the package's own files, the compiled ones included."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for file in sorted(file for kind in ("*.py", "*.so", "*.pyd") for file in root.rglob(kind)):
        digest.update(f"{file.relative_to(root)} {hash_file(file)}\n".encode())
    return digest.hexdigest()
