"""What a report says of how a run came about: what was asked for, what was chosen, on what it ran."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from importlib import metadata
from typing import Any

import torch

from dau_fast.config import PruneConfig
from dau_fast.cost import Equivalents, count_equivalents, has_batchnorm
from dau_fast.data.split import Split, range_class_sizes
from dau_fast.data.streaming import StreamedImages
from dau_fast.engine.loop import LoopCost
from dau_fast.engine.runtime import Runtime
from dau_fast.job.experiment import Experiment, SeedResult
from dau_fast.job.keeping import digest_code, digest_images
from dau_fast.job.request import Request
from dau_fast.methods.dau.difficulty import are_pictures
from dau_fast.methods.method import Method
from dau_fast.prune.registry import get_pruner


def describe_run(
    request: Request, experiment: Experiment, results: Sequence[SeedResult], started: datetime, seconds: float
) -> dict[str, Any]:
    """The report's "run". started, seconds: when it began and how long it took."""
    first, runtime, options = results[0], experiment.runtime, request.to_options()
    loops = [loop for result in results for made in result.outcome.finished.values() for loop in made.loops]
    chosen = first.outcome.settings
    game = chosen.get("dau")
    equivalents = describe_costs(first)
    return {
        "dataset": request.dataset,
        "arch": request.arch_name,
        "forget": describe_forget_set(options["forget"], first.split),
        "seed": request.seed,
        "repeats": request.repeats,
        **describe_runtime(runtime, loops),
        **_origin(request, experiment),
        "image_equivalents": equivalents.list_totals() if equivalents else None,
        "normalisation": {
            "mean": experiment.images.mean.tolist(),
            "std": experiment.images.std.tolist(),
            "from": experiment.normalised_by,
        },
        "streamed": isinstance(experiment.images, StreamedImages),
        "epochs": experiment.recipe.epochs,
        "retrain_epochs": {name: chosen[name].epochs for name in _RETRAINED if name in chosen},
        "prune": describe_pruning(experiment.pruning, first, checkpoint=experiment.checkpoint is not None),
        "sensitivity": game.sensitivity if game else "none",
        "retain_sample": game.retain_sample if game else None,
        "sets": count_sets(first.split),
        "class_sizes": range_class_sizes(first.split, first.outcome.task.labels),
        "methods": describe_methods(method for method in experiment.methods if method.name in chosen),
        "options": options,
        "settings": list_settings(experiment, first),
        "versions": list_versions(),
        "digests": {"images": digest_images(first.outcome.task), "code": digest_code()},
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": seconds,
    }


# Methods whose training has a length in epochs that the page shows.
_RETRAINED = ("retrain", "retrain_fast")


def _origin(request: Request, experiment: Experiment) -> dict[str, Any]:
    """The file that the original was read from, and what an earlier run had finished, if there is either."""
    found: dict[str, Any] = {}
    if experiment.checkpoint is not None:
        name = request.to_options()["checkpoint"]
        found["checkpoint"] = {"file": name, "sha256": experiment.checkpoint.sha256}
    if experiment.keeper is not None and experiment.keeper.recalled:
        found["resumed"] = list(experiment.keeper.recalled)
    return found


def describe_methods(methods: Iterable[Method[Any]]) -> dict[str, dict[str, Any]]:
    """What people read of each method, by name."""
    return {
        method.name: {
            "label": method.label,
            "about": method.about,
            "reference": method.reference,
            "control": method.control,
        }
        for method in methods
    }


def describe_costs(result: SeedResult) -> Equivalents | None:
    """The game beside retraining and the other methods in image equivalents; None where none was played."""
    outcome, split = result.outcome, result.split
    settings, model = outcome.settings, outcome.task.original
    if "dau" not in settings:
        return None
    played = sum(result.history["turns"]) if result.history else settings["dau"].turns
    return count_equivalents(
        replace(settings["dau"], turns=played),
        {name: settings[name] for name in _RETRAINED if name in settings},
        forget=len(split.forget),
        retain=len(split.retain),
        validation=len(split.validation),
        classes=model.head.out_features,
        features=model.head.in_features,
        batchnorm=has_batchnorm(model.network),
        earlier=len(split.earlier),
        classwise=split.classwise,
        pictures=are_pictures(outcome.task.images.shape),
        others=settings,
    )


def list_settings(experiment: Experiment, result: SeedResult) -> dict[str, dict[str, Any]]:
    """Every setting that decides the result, as `Request.settings` takes them."""
    chosen = {name: asdict(settings) for name, settings in result.outcome.settings.items()}
    pruning = {"prune": asdict(experiment.pruning)} if experiment.pruning else {}
    return {"split": asdict(experiment.shares), "original": asdict(experiment.recipe), **pruning, **chosen}


def describe_runtime(runtime: Runtime, loops: Sequence[LoopCost]) -> dict[str, Any]:
    """How `loops` ran: where, on how many processes, by which engine, and how long they waited for data."""
    return {
        "device": runtime.device.type,
        "processes": runtime.ranks.count,
        "sharded": runtime.shard,
        "hardware": describe_hardware(runtime.device),
        "precision": runtime.precision_name,
        "accumulate": runtime.accumulate,
        "activation_checkpointing": runtime.activation_checkpointing,
        "engine": {
            "asked": runtime.engine,
            "loops": {loop.loop: ": ".join(filter(None, (loop.engine, loop.reason))) for loop in loops},
        },
        "loop_parts": {loop.loop: loop.parts for loop in loops},
        "waiting": {name: _waiting_share(loops, name) for name in dict.fromkeys(loop.loop for loop in loops)},
    } | _profiles(loops)


def _waiting_share(loops: Iterable[LoopCost], name: str) -> float:
    """Of the steps' time of all loops of this name, the part spent waiting for data, 0 to 1."""
    same = [loop for loop in loops if loop.loop == name]
    seconds = sum(loop.seconds for loop in same)
    return sum(loop.data_seconds for loop in same) / seconds if seconds else 0.0


def _profiles(loops: Sequence[LoopCost]) -> dict[str, Any]:
    # Of several loops of one name the first.
    found = {loop.loop: asdict(loop.profile) for loop in reversed(loops) if loop.profile}
    return {"profile": found} if found else {}


def list_versions() -> dict[str, str]:
    """What the numbers depend on, by name."""
    models, numbers = ("dau-fast", "torch", "torchvision", "safetensors"), ("numpy", "scipy", "scikit-learn")
    packages = (*models, *numbers, "pillow", "pyarrow")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe_hardware(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def describe_forget_set(spec: str, split: Split) -> dict[str, Any]:
    """The forget set, so that anybody can check it."""
    indices = split.forget
    sha256 = split.forget_sha256
    return {"spec": spec, "count": len(indices), "sha256": sha256, "indices": indices.tolist()}


def describe_pruning(
    pruning: PruneConfig | None, result: SeedResult, *, checkpoint: bool
) -> dict[str, Any] | None:
    """How the models of a run were pruned and where their masks come from; None where none is.

    sparsity: as asked for, 0 to 1. mask_from: by method. layers: of the first seed, 0 to 1, by method
    and layer. checkpoint: whether the original was given.
    """
    masks = result.outcome.masks
    if "original" not in masks:
        return None
    found_with_it = pruning is None or get_pruner(pruning.method).trains
    whole = "the training set, forget set included"
    sources = dict.fromkeys(result.networks, "the original's" + ", found with the forget set" * found_with_it)
    sources["original"] = _mask_source(pruning, whole, checkpoint)
    if "retrain_clean" in result.networks:
        sources["retrain_clean"] = _mask_source(pruning, "the retain set alone", False)
    return {
        "method": pruning.method if pruning else "checkpoint",
        "sparsity": pruning.sparsity if pruning else masks["original"].sparsity,
        "scope": "global",
        "mask_from": sources,
        "layers": {
            name: masks[name].layer_sparsity for name in ("original", "retrain_clean") if name in masks
        },
    }


def _mask_source(pruning: PruneConfig | None, images: str, checkpoint: bool) -> str:
    if pruning is None:
        return f"the checkpoint, trained on {images}"
    model = "the checkpoint" if checkpoint else "a dense model"
    return get_pruner(pruning.method).source.format(model=model, images=images)


def count_sets(split: Split) -> dict[str, int]:
    """How many images each set holds; "earlier" where earlier requests forgot some."""
    names = ["train", "validation", "test", "forget", "retain", *["earlier"] * bool(len(split.earlier))]
    return {name: len(getattr(split, name)) for name in names}
