"""What every report.json must be like, and comparing weights."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import Report

ATTACKS = {"correctness", "confidence", "entropy", "modified_entropy", "probability"}
RATES = ("ua", "ra", "ta", "mia_efficacy")
TIMES = ("seconds", "compile_seconds", "speedup")


def check_report(report: Report, methods: list[str], *, repeats: int = 1, given: bool = False) -> None:
    """Assert that `report` has the promised shape. given: the original came from a checkpoint."""
    assert list(report) == ["schema", "run", "methods", "game", "noise_floor", "runs", "at_risk", "files"]
    assert report["schema"] == 1
    check_files(report, methods)
    assert ("checkpoint" in report["run"]) == given
    if given:
        assert list(report["run"]["checkpoint"]) == ["file", "sha256"]
        assert len(report["run"]["checkpoint"]["sha256"]) == 64
    check_run(report["run"], repeats)
    check_prune(report["run"]["prune"], report)
    assert set(report["methods"]) == {"original", *methods}
    has_reference = "retrain" in methods
    prune = report["run"]["prune"]
    # Given weights are trained on once they are pruned.
    trained = not given or (prune is not None and prune["method"] != "checkpoint")
    for name, entry in report["methods"].items():
        entry = dict(entry)
        if repeats > 1:
            check_spread(entry.pop("spread"), entry)
        check_entry(entry, has_reference, timed=name != "original" or trained)
    if has_reference:
        assert report["methods"]["retrain"]["avg_gap"] == 0
        assert report["methods"]["retrain"]["speedup"] == 1
    check_game(report["game"] if "dau" in methods else {"none": report["game"]})
    if repeats == 1:
        assert report["runs"] is None
        assert report["noise_floor"] is None
        return
    assert (type(report["noise_floor"]) is float) == has_reference
    assert len(report["runs"]) == repeats
    for run in report["runs"]:
        assert list(run) == ["seed", "forget", "methods", "game", "retraining_gap"]
        assert type(run["seed"]) is int
        check_forget(run["forget"])
        assert set(run["methods"]) == set(report["methods"])
        for name, entry in run["methods"].items():
            check_entry(entry, has_reference, timed=name != "original" or trained)
        check_game(run["game"] if "dau" in methods else {"none": run["game"]})
        assert (type(run["retraining_gap"]) is float) == has_reference


def check_files(report: Report, methods: list[str]) -> None:
    """Assert that the report names what stands beside it; of what is in it, see `check_folder`."""
    files = report["files"]
    assert {"report.html", *(f"{name}.safetensors" for name in ("original", *methods))} <= set(files)
    for found in files.values():
        assert list(found) == ["sha256", "bytes"]
        assert len(found["sha256"]) == 64
        assert found["bytes"] > 0


def check_folder(folder: Path) -> None:
    """Assert that a report names every file beside it, and none else, as it is."""
    report = json.loads((folder / "report.json").read_text())
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    assert {name: told["sha256"] for name, told in report["files"].items()} == digests


def check_prune(prune: dict[str, Any] | None, report: Report) -> None:
    """Assert that a pruned run says how it was pruned, and that a dense one does not."""
    for entry in report["methods"].values():
        assert ("sparsity" in entry) == (prune is not None)
        assert ("avg_gap_clean" in entry) == ("retrain_clean" in report["methods"])
    if prune is None:
        return
    assert list(prune) == ["method", "sparsity", "scope", "mask_from", "layers"]
    assert set(prune["mask_from"]) == set(report["methods"])
    assert set(prune["layers"]) == {"original", "retrain_clean"} & set(report["methods"])
    for layers in prune["layers"].values():
        assert all(0 <= share <= 1 for share in layers.values())


def check_run(run: dict[str, Any], repeats: int) -> None:
    for key in ("dataset", "arch", "device", "hardware", "precision", "sensitivity", "started"):
        assert type(run[key]) is str, key
    for key in ("seed", "repeats", "epochs"):
        assert type(run[key]) is int, key
    assert run["repeats"] == repeats
    assert run["epochs"] > 0
    assert type(run["wall_seconds"]) is float
    assert run["wall_seconds"] > 0
    assert datetime.fromisoformat(run["started"]).tzinfo is not None
    assert {"python", "dau-fast", "torch", "pillow", "pyarrow", "scipy"} <= set(run["versions"])
    assert all(type(version) is str for version in run["versions"].values())
    assert type(run["streamed"]) is bool
    assert set(run["waiting"]) == set(run["engine"]["loops"])
    assert all(type(share) is float and 0 <= share <= 1 for share in run["waiting"].values())
    check_forget(run["forget"])
    sets = run["sets"]
    assert list(sets) == ["train", "validation", "test", "forget", "retain"]
    assert all(type(size) is int and size > 0 for size in sets.values())
    assert sets["forget"] == run["forget"]["count"]
    assert sets["forget"] + sets["retain"] == sets["train"]
    assert list(run["class_sizes"]) == ["retain", "test"]
    for name, (least, most) in run["class_sizes"].items():
        assert 0 < least <= most <= sets[name]


def check_forget(forget: dict[str, Any]) -> None:
    assert list(forget) == ["spec", "count", "sha256", "indices"]
    indices = forget["indices"]
    assert all(type(index) is int and index >= 0 for index in indices)
    assert indices == sorted(set(indices))
    assert forget["count"] == len(indices) > 0
    words = b"".join(index.to_bytes(8, "little") for index in indices)
    assert forget["sha256"] == hashlib.sha256(words).hexdigest()


def check_entry(entry: dict[str, Any], has_reference: bool, timed: bool) -> None:
    further = {"sparsity", "avg_gap_clean", "speedup_fast", "roc", "margins"}
    assert set(entry) - further == {*RATES, "attacks", *TIMES, "avg_gap", "gaps", "confidence", "balanced"}
    assert set(entry["balanced"]) == {"ra", "ta"}
    assert set(entry["attacks"]) == ATTACKS
    rates = [*(entry[key] for key in RATES), *entry["attacks"].values(), *entry["balanced"].values()]
    for rate in rates:
        assert type(rate) is float
        assert 0 <= rate <= 100
    assert entry["mia_efficacy"] == entry["attacks"]["confidence"]
    if timed:
        assert entry["seconds"] > 0
        assert entry["compile_seconds"] >= 0
    else:
        assert entry["seconds"] is entry["compile_seconds"] is None
    if has_reference:
        assert entry["avg_gap"] >= 0
        assert set(entry["gaps"]) == {"ua", "ra", "ta", *(f"attack_{name}" for name in ATTACKS)}
        assert entry["speedup"] > 0 if timed else entry["speedup"] is None
    else:
        assert entry["avg_gap"] is entry["gaps"] is entry["speedup"] is None
    bins = entry["confidence"]
    assert set(bins) == {"edges", "forget", "validation", "test"}
    assert bins["edges"] == pytest.approx([i / 20 for i in range(21)])
    for name in ("forget", "validation", "test"):
        assert len(bins[name]) == 20
        assert min(bins[name]) >= 0
        assert sum(bins[name]) == pytest.approx(100, abs=1e-3)


def check_spread(spread: dict[str, Any], entry: dict[str, Any]) -> None:
    assert set(spread) == set(entry) - {"confidence", "roc", "margins"}
    assert set(spread["attacks"]) == ATTACKS
    nested = [spread["attacks"], spread["balanced"], spread["gaps"] or {}]
    for key, value in [*spread.items(), *(pair for inner in nested for pair in inner.items())]:
        if key not in ("attacks", "balanced", "gaps"):
            assert value is None if key in entry and entry[key] is None else value >= 0


def check_game(game: dict[str, Any]) -> None:
    if set(game) == {"none"}:
        assert game["none"] is None
        return
    accuracies = ("forget_accuracy", "validation_accuracy", "retain_accuracy")
    assert set(game) == {"step", "auc", *accuracies, "exposure", "wrong_labels", "lr", "turns"}
    assert game["lr"] > 0
    assert game["turns"][-1] == game["step"][-1]
    assert game["step"][0] == 0
    assert game["step"] == sorted(set(game["step"]))
    for key, top in (("auc", 1), *((name, 100) for name in accuracies)):
        assert len(game[key]) == len(game["step"])
        assert all(0 <= value <= top for value in game[key])


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
