"""The report of a call from Python: the same JSON and page as the command line's, of a caller's own model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dau_fast import checkpoints
from dau_fast.methods.registry import get_method
from dau_fast.report.facts import (
    count_sets,
    describe_forget_set,
    describe_methods,
    describe_runtime,
    list_versions,
)
from dau_fast.report.manifest import describe_files
from dau_fast.report.output import OutputFolder
from dau_fast.report.page import render
from dau_fast.report.record import SCHEMA, method_entry
from dau_fast.report.risk import list_at_risk


@dataclass(frozen=True)
class _Clock:
    seconds: float | None
    compile_seconds: float = 0.0


def describe_own(result: Any) -> dict[str, Any]:
    """The report of a dau_fast.api.Result, as JSON holds it."""
    facts, method = result._facts, result._facts["method"]
    assert result.before is not None
    assert result.after is not None
    known = result.reference
    reference = (known.measures, _Clock(known.seconds)) if known and known.measures else None
    entries = {"original": method_entry(result.before, None, reference)}
    if reference:
        entries["retrain"] = method_entry(*reference, reference)
    clock = _Clock(result.seconds, result.compile_seconds)
    entries[method.name] = method_entry(result.after, clock, reference)
    rows = [method, *[get_method("retrain")] * bool(reference)]
    return {
        "schema": SCHEMA,
        "run": {
            "dataset": "own data",
            "arch": type(result.model).__name__,
            "forget": describe_forget_set("a caller's set", facts["split"]),
            "seed": facts["seed"],
            "repeats": 1,
            **describe_runtime(facts["runtime"], facts["loops"]),
            "prune": None,
            "sets": count_sets(facts["split"]),
            "class_sizes": facts["class_sizes"],
            "methods": describe_methods(rows),
            "settings": {method.name: asdict(result.settings)},
            "versions": list_versions(),
            "started": facts["started"].isoformat(timespec="seconds"),
            "wall_seconds": facts["wall_seconds"],
        },
        "methods": entries,
        "at_risk": _describe_at_risk(result),
        "game": result.history if method.name == "dau" else None,
        "noise_floor": None,
        "runs": None,
    }


def _describe_at_risk(result: Any) -> dict[str, Any]:
    """Places in `train`, or in the set to forget. No pictures: a call does not hold on to images."""
    facts, reference = result._facts, result.reference.measures if result.reference else None
    listed = list_at_risk(result.after, reference, facts["split"], facts["forgotten_classes"])
    return {"method": facts["method"].name, "images": listed}


def write_report(folder: Path, result: Any) -> Path:
    """report.json, report.html and the weights into `folder`; the page's path."""
    report = describe_own(result)
    with OutputFolder(folder) as staging:
        checkpoints.save(staging / f"{result.method}.safetensors", result.model, _describe_weights(report))
        (staging / "report.html").write_text(render(report), encoding="utf-8")
        report["files"] = describe_files(staging)
        (staging / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return folder / "report.html"


def _describe_weights(report: Mapping[str, Any]) -> dict[str, str]:
    run = report["run"]
    return {
        "arch": run["arch"],
        "method": next(reversed(report["methods"])),
        "forget": run["forget"]["sha256"],
    }


def save_pretrained(folder: Path, result: Any) -> None:
    """model.safetensors and a card, README.md, into `folder`, as Hugging Face's libraries write them.

    A model that saves itself so does it, with its configuration.
    """
    with OutputFolder(folder, "README.md") as staging:
        save = getattr(result.model, "save_pretrained", None)
        if callable(save):
            save(staging)
        else:
            checkpoints.save(staging / "model.safetensors", result.model, {"method": result.method})
        (staging / "README.md").write_text(_write_card(result), encoding="utf-8")


def _write_card(result: Any) -> str:
    split, arch = result._facts["split"], type(result.model).__name__
    settings = "\n".join(f"- {name}: {value}" for name, value in asdict(result.settings).items())
    rates = [
        ("retain accuracy", *result.retain_accuracy),
        ("validation accuracy", *result.validation_accuracy),
    ]
    if result.before and result.after:
        rates += [
            ("error on the forget set", result.before.ua, result.after.ua),
            ("test accuracy", result.before.ta, result.after.ta),
            ("MIA-efficacy", result.before.mia_efficacy, result.after.mia_efficacy),
        ]
    rows = "\n".join(f"| {name} | {before:.1f} | {after:.1f} |" for name, before, after in rates)
    gap = "" if result.avg_gap is None else f"\nAvg gap to a retrained model: {result.avg_gap:.2f} points.\n"
    return f"""---
tags:
- machine-unlearning
---

# {arch}, {len(split.forget):,} training images forgotten

Unlearned by `{result.method}` of dau_fast (arXiv 2402.06864) in {result.seconds:.1f} seconds;
{len(split.retain):,} training images were kept.

| percent | before | after |
|---|---|---|
{rows}
{gap}
Settings:

{settings}

These are statistical measurements on one model and one split. They are no proof of deletion.
"""
