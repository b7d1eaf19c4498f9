"""Networks are built where a training begins from scratch, and for a checkpoint's weights: nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calling import Called, succeed

from dau_fast import models

# What runs, and what networks are built for.
RUNS = [
    ("--methods ga", ["original"]),
    ("--methods dau --profile", ["original"]),
    ("--methods retrain", ["original", "retrain"]),
    ("--methods ga --prune synflow", ["original"]),
    ("--methods dau --checkpoint {given}", ["checkpoint"]),
    ("--methods retrain --checkpoint {given}", ["checkpoint", "retrain"]),
]
LONG_RUNS = [
    ("--methods retrain --retrain-recipe both", ["original", "retrain", "retrain fast"]),
    ("--methods retrain --repeats 2", 2 * ["original", "retrain", "retrain again"]),
    ("--methods retrain_clean --prune random", ["original", "retrain clean"]),
    ("--methods ga --checkpoint {given} --repeats 2", ["checkpoint"]),
    ("--methods ga --checkpoint {given} --prune omp --repeats 2", ["checkpoint"]),
]


@pytest.mark.parametrize(
    ("arguments", "made_for"),
    [*RUNS, *(pytest.param(*run, marks=pytest.mark.slow) for run in LONG_RUNS)],
    ids=lambda value: value if isinstance(value, str) else str(len(value)),
)
def test_a_run_builds_no_network_more_than_it_needs(
    tmp_path: Path, once: Called, monkeypatch: pytest.MonkeyPatch, arguments: str, made_for: list[str]
) -> None:
    built, build = [], models.build

    def count(*given: Any) -> Any:
        built.append(given)
        return build(*given)

    monkeypatch.setattr(models, "build", count)
    given = arguments.format(given=once.folder / "original.safetensors").split()
    succeed(tmp_path, "--epochs", 1, *given, turns=16)
    assert len(built) == len(made_for), built
