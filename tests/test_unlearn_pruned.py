"""Pruned runs of the command line: sparsity, where masks come from, and the files of pruned models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calling import Called, succeed
from checking import RATES, check_report, same_tensors
from safetensors.torch import save_file

from dau_fast import checkpoints, models
from dau_fast.prune import omp
from dau_fast.report.page import render


@pytest.fixture(scope="module")
def pruned(place: Path) -> Called:
    """The game and both references on a model that was pruned by magnitude, to the usual sparsity."""
    methods = "dau,retrain,retrain_clean"
    return succeed(place / "pruned", "--prune", "omp", "--methods", methods, "--epochs", 1, turns=16)


def zeros(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where the convolutions' weights are zero."""
    return {name: tensor == 0 for name, tensor in weights.items() if tensor.ndim == 4}


def test_every_method_of_a_pruned_run_is_as_sparse_as_asked(pruned: Called) -> None:
    report = pruned.report
    check_report(report, ["dau", "retrain", "retrain_clean"])
    original = zeros(pruned.weights("original"))
    for method, entry in report["methods"].items():
        found = zeros(pruned.weights(method))
        count = sum(mask.numel() for mask in found.values())
        assert abs(sum(int(mask.sum()) for mask in found.values()) - 0.95 * count) < 1, method
        assert entry["sparsity"] == pytest.approx(0.95, abs=1 / count)
        assert same_tensors(found, original) == (method != "retrain_clean"), method


def test_a_pruned_report_says_where_each_mask_comes_from(pruned: Called) -> None:
    prune = pruned.report["run"]["prune"]
    assert (prune["method"], prune["sparsity"]) == ("omp", 0.95)
    assert "training set, forget set included" in prune["mask_from"]["original"]
    for method in ("retrain", "dau"):
        assert prune["mask_from"][method] == "the original's, found with the forget set"
    assert "retain set alone" in prune["mask_from"]["retrain_clean"]
    for method, layers in prune["layers"].items():
        found = zeros(pruned.weights(method))
        assert layers == {name: pytest.approx(mask.float().mean().item()) for name, mask in found.items()}
    page = (pruned.folder / "report.html").read_text(encoding="utf-8")
    assert page == render(pruned.report)
    assert "omp, 95.0 % of the convolutions" in page
    assert "found with the forget set" in page


def test_the_gap_to_the_cleanly_retrained_is_the_gap_to_it(pruned: Called) -> None:
    methods = pruned.report["methods"]
    for entry in methods.values():
        gaps = [abs(entry[key] - methods["retrain_clean"][key]) for key in RATES]
        assert entry["avg_gap_clean"] == pytest.approx(sum(gaps) / 4)


def test_sparse_files_hold_the_weights_of_the_dense_ones(pruned: Called) -> None:
    for method in pruned.report["methods"]:
        dense = pruned.folder / f"{method}.safetensors"
        sparse = pruned.folder / f"{method}.sparse.safetensors"
        network = models.build("small", 10, (1, 8, 8))
        assert checkpoints.load(sparse, network) == checkpoints.load(
            dense, models.build("small", 10, (1, 8, 8))
        )
        assert same_tensors(network.state_dict(), pruned.weights(method))
        assert sparse.stat().st_size <= 0.15 * dense.stat().st_size


@pytest.mark.parametrize(
    ("method", "source"), [("imp", "each round"), ("synflow", "no data"), ("random", "no data")]
)
def test_other_ways_to_prune_forget_a_class(tmp_path: Path, method: str, source: str) -> None:
    arguments = (
        "--prune",
        method,
        "--sparsity",
        0.5,
        "--forget",
        "class:3",
        "--epochs",
        1,
        "--methods",
        "ga",
    )
    called = succeed(tmp_path, *arguments)
    check_report(called.report, ["ga"])
    assert source in called.report["run"]["prune"]["mask_from"]["original"]
    original = zeros(called.weights("original"))
    assert same_tensors(zeros(called.weights("ga")), original)
    assert called.report["methods"]["ga"]["sparsity"] == pytest.approx(0.5, abs=1e-4)


def test_given_weights_are_pruned_and_trained_on(place: Path, once: Called) -> None:
    original = once.folder / "original.safetensors"
    arguments = (
        "--checkpoint",
        original,
        "--prune",
        "omp",
        "--sparsity",
        0.8,
        "--methods",
        "ga",
        "--repeats",
        2,
    )
    called = succeed(place / "given", *arguments)
    check_report(called.report, ["ga"], repeats=2, given=True)
    assert "the checkpoint" in called.report["run"]["prune"]["mask_from"]["original"]
    given = once.weights("original")
    expected = omp(_loaded(given), 0.8)
    found = zeros(called.weights("original"))
    assert all(torch.equal(~found[name], expected[name]) for name in expected)
    for run in called.report["runs"]:  # every seed begins at the weights that were given
        assert run["methods"]["original"]["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert not torch.equal(called.weights("original")["head.weight"], given["head.weight"])


def _loaded(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    network = models.build("small", 10, (1, 8, 8))
    network.load_state_dict(weights)
    return network


def test_a_sparse_or_dense_file_of_a_pruned_model_stays_sparse(place: Path, pruned: Called) -> None:
    weights = []
    for form in ("sparse.safetensors", "safetensors"):
        original = pruned.folder / f"original.{form}"
        called = succeed(place / form, "--checkpoint", original, "--methods", "dau", turns=16)
        check_report(called.report, ["dau"], given=True)
        assert called.report["run"]["prune"]["method"] == "checkpoint"
        assert same_tensors(called.weights("original"), pruned.weights("original"))
        assert (called.roles() == pruned.roles()).all()
        weights.append(called.weights("dau"))
    assert same_tensors(weights[0], pruned.weights("dau"))
    assert same_tensors(*weights)


def test_zeros_that_no_file_speaks_of_are_no_masks(place: Path, pruned: Called) -> None:
    file = place / "plain.safetensors"
    save_file(pruned.weights("original"), file)
    called = succeed(place / "plain", "--checkpoint", file, "--methods", "ga")
    assert called.report["run"]["prune"] is None
