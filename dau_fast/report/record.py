"""The report as a dictionary: one run's numbers, and the mean and spread of several."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch

from dau_fast.config import PruneConfig
from dau_fast.data.split import Split
from dau_fast.methods.running import Finished
from dau_fast.metrics.unlearning import Measures, avg_gap

if TYPE_CHECKING:
    from dau_fast.job.experiment import SeedResult

SCHEMA = 1


def report(run: dict[str, Any], results: Sequence[SeedResult]) -> dict[str, Any]:
    """The whole report: `run` says what ran, `results` holds one entry a seed, at least one.

    The game is the first seed's. noise_floor needs two retrainings a seed, else it is None.
    """
    gaps = [result.retraining_gap for result in results]
    known = [gap for gap in gaps if gap is not None]
    return {
        "schema": SCHEMA,
        "run": run,
        "methods": combine([result.entries for result in results]),
        "game": results[0].history,
        "noise_floor": fmean(known) if known and len(known) == len(gaps) else None,
        "runs": [_seed_facts(run, result) for result in results] if len(results) > 1 else None,
    }


def _seed_facts(run: dict[str, Any], result: SeedResult) -> dict[str, Any]:
    return {
        "seed": result.seed,
        "forget": forget_facts(run["forget"]["spec"], result.split),
        "methods": result.entries,
        "game": result.history,
        "retraining_gap": result.retraining_gap,
    }


def method_entry(
    measures: Measures,
    finished: Finished | None,
    reference: tuple[Measures, Finished] | None,
    *,
    fast: Finished | None = None,
    clean: Measures | None = None,
    sparsity: float | None = None,
) -> dict[str, Any]:
    """What the report says of one method. finished: None where its making was not timed.

    reference: the retrained model's; avg_gap and speedup are None without it. fast: the retraining by the
    fast recipe, for "speedup_fast". clean: those of the model retrained with masks of its own, for
    "avg_gap_clean". sparsity: of the model, 0 to 1. An entry has these three where they are known.
    """
    seconds = finished.seconds if finished else None
    further = {
        "speedup_fast": fast.seconds / seconds if fast and seconds else None,
        "sparsity": sparsity,
        "avg_gap_clean": avg_gap(measures, clean) if clean else None,
    }
    return {
        "ua": measures.ua,
        "ra": measures.ra,
        "ta": measures.ta,
        "mia_efficacy": measures.mia_efficacy,
        "attacks": measures.attacks,
        "seconds": seconds,
        "compile_seconds": finished.compile_seconds if finished else None,
        "avg_gap": avg_gap(measures, reference[0]) if reference else None,
        "speedup": reference[1].seconds / seconds if reference and seconds else None,
        "confidence": measures.confidence,
        **{key: value for key, value in further.items() if value is not None},
    }


def combine(runs: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Method entries of several runs as one: every number the mean, and "spread" beside them."""
    if len(runs) == 1:
        return runs[0]
    combined = {}
    for name in runs[0]:
        entries = [run[name] for run in runs]
        combined[name] = _over(entries, fmean)
        spread = {key: _over(values, stdev) for key, values in _columns(entries).items()}
        combined[name]["spread"] = {k: v for k, v in spread.items() if k != "confidence"}
    return combined


def _columns(entries: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [entry[key] for entry in entries] for key in entries[0]}


def _over(values: Sequence[Any], statistic: Any) -> Any:
    """Apply `statistic` to numbers that stand at the same place of nested dicts and lists."""
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, dict):
        return {key: _over(column, statistic) for key, column in _columns(values).items()}
    if isinstance(first, list):
        return [_over(column, statistic) for column in zip(*values, strict=True)]
    return statistic(values)


def versions() -> dict[str, str]:
    """What the numbers depend on, by name."""
    packages = ("dau-fast", "torch", "torchvision", "numpy", "scikit-learn")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def forget_facts(spec: str, split: Split) -> dict[str, Any]:
    """The forget set, so that anybody can check it."""
    indices = split.forget
    sha256 = split.forget_sha256
    return {"spec": spec, "count": len(indices), "sha256": sha256, "indices": indices.tolist()}


def prune_facts(
    pruning: PruneConfig | None, result: SeedResult, *, checkpoint: bool
) -> dict[str, Any] | None:
    """How the models of a run were pruned and where their masks come from; None where none is.

    sparsity: as asked for, 0 to 1. mask_from: by method. layers: of the first seed, 0 to 1, by method
    and layer. checkpoint: whether the original was given.
    """
    if "original" not in result.masks:
        return None
    found_with_it = pruning is None or pruning.method in ("omp", "imp")
    whole = "the training set, forget set included"
    sources = dict.fromkeys(result.networks, "the original's" + ", found with the forget set" * found_with_it)
    sources["original"] = _mask_source(pruning, whole, checkpoint)
    if "retrain_clean" in result.networks:
        sources["retrain_clean"] = _mask_source(pruning, "the retain set alone", False)
    return {
        "method": pruning.method if pruning else "checkpoint",
        "sparsity": pruning.sparsity if pruning else result.masks["original"].sparsity,
        "scope": "global",
        "mask_from": sources,
        "layers": {
            name: result.masks[name].layer_sparsity
            for name in ("original", "retrain_clean")
            if name in result.masks
        },
    }


def _mask_source(pruning: PruneConfig | None, trained_on: str, checkpoint: bool) -> str:
    if pruning is None:
        return f"the checkpoint, trained on {trained_on}"
    dense = "the checkpoint" if checkpoint else "a dense model"
    return {
        "omp": f"the weights of {dense}, trained on {trained_on}",
        "imp": f"the weights after each round of training on {trained_on}",
        "synflow": "its initial weights, no data",
        "random": "chance, no data",
    }[pruning.method]


def set_sizes(split: Split) -> dict[str, int]:
    """How many images each set holds."""
    names = ("train", "validation", "test", "forget", "retain")
    return {name: len(getattr(split, name)) for name in names}
