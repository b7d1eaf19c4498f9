"""Imbalanced classes: the command line says so, and what accuracies are where every class counts alike."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from calling import succeed
from test_commands import run

# Images of each class in training and test part; no test image is of the last.
COUNTS = {"train": (90, 24, 12), "test": (40, 8, 0)}


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of arrays whose classes differ by their brightness."""
    root, rng = tmp_path_factory.mktemp("imbalanced"), np.random.default_rng(0)
    for part, counts in COUNTS.items():
        labels = np.repeat(np.arange(3), counts)
        images = 60 + 60 * labels[:, None, None, None] + rng.integers(60, size=(len(labels), 8, 8, 1))
        (root / part).mkdir()
        np.save(root / part / "images.npy", images.astype(np.uint8))
        np.save(root / part / "labels.npy", labels)
    return root


def test_balanced_accuracies_stand_beside_the_others_and_are_told_of(
    imbalanced: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = ("--dataset", "arrays", "--data", imbalanced, "--forget", "random:0.1")
    called = succeed(out, *given, "--methods", "ga,retrain", "--repeats", 2, "--epochs", 1)
    report = called.report
    sizes = report["run"]["class_sizes"]
    assert sizes["test"] == [8, 40]
    assert sizes["retain"][1] >= 3 * sizes["retain"][0]
    for entry in report["methods"].values():
        assert set(entry["balanced"]) == set(entry["spread"]["balanced"]) == {"ra", "ta"}
    before = report["methods"]["original"]["balanced"]
    told = "RA and TA as means over classes: original {ra:.1f} and {ta:.1f} %".format(**before)
    assert "Classes are imbalanced, images a class" in called.stdout
    assert told in called.stdout
    assert told in re.sub(r"\s+", " ", (out / "report.html").read_text())

    models = (out / "ga.safetensors", "--original", out / "original.safetensors")
    code, shown, _ = run("evaluate", *models, *given, "--device", "cpu", "--out", tmp_path / "evaluated")
    assert code == 0
    evaluated = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())
    assert evaluated["methods"]["ga"]["balanced"] == report["runs"][0]["methods"]["ga"]["balanced"]
    assert "Classes are imbalanced" in re.sub(r"\s+", " ", shown)
    code, _, _ = run("report", tmp_path / "evaluated" / "evaluation.json")
    page = (tmp_path / "evaluated" / "evaluation.html").read_text()
    assert (code, "Classes are imbalanced" in page) == (0, True)


def test_digits_are_balanced(tmp_path: Path) -> None:
    called = succeed(tmp_path / "out", "--methods", "ga", "--epochs", 1)
    assert called.report["methods"]["ga"]["balanced"]["ta"] > 0
    assert "imbalanced" not in called.stdout
