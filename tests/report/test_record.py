"""One run's entries by hand, and the mean and spread of several."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dau_fast.config import PruneConfig
from dau_fast.data.split import Split
from dau_fast.job.tuning import Trial, Tuning
from dau_fast.methods.running import Finished
from dau_fast.metrics.unlearning import Measures
from dau_fast.models import Classifier
from dau_fast.prune import Masks
from dau_fast.report import record
from dau_fast.report.facts import describe_pruning
from dau_fast.report.record import build_report, combine, method_entry

ROOT_7 = 7**0.5  # the sample standard deviation of 1, 2 and 6


def measures(ua: float, ra: float, ta: float, confidence: float) -> Measures:
    attacks = {"correctness": 1.0, "confidence": confidence, "probability": 3.0}
    return Measures(ua, ra, ta, attacks, {"edges": [0.0, 1.0], "forget": [100.0]})


def finished(seconds: float, compile_seconds: float = 0.0) -> Finished:
    return Finished(Classifier(torch.nn.Linear(1, 2)), seconds, compile_seconds, (), None)


MEASURED = measures(10.0, 90.0, 80.0, 30.0)
REFERENCE = measures(4.0, 98.0, 81.0, 25.0), finished(12.0)


def entry(ua: float | None, attack: float | None = 0.0, bins: tuple[float, float] = (0.0, 0.0)) -> Any:
    return {"ua": ua, "attacks": {"entropy": attack, "confidence": 5.0}, "confidence": {"test": list(bins)}}


# ---- an entry


def test_an_entry_holds_measures_times_and_the_distance_to_the_retrained() -> None:
    assert method_entry(MEASURED, finished(3.0, 0.5), REFERENCE) == {
        "ua": 10.0,
        "ra": 90.0,
        "ta": 80.0,
        "mia_efficacy": 30.0,
        "attacks": {"correctness": 1.0, "confidence": 30.0, "probability": 3.0},
        "seconds": 3.0,
        "compile_seconds": 0.5,
        "avg_gap": 5.0,  # the mean of 6, 8, 1 and 5
        "gaps": {
            "ua": 6.0,
            "ra": -8.0,
            "ta": -1.0,
            "attack_correctness": 0.0,
            "attack_confidence": 5.0,
            "attack_probability": 0.0,
        },
        "speedup": 4.0,
        "confidence": {"edges": [0.0, 1.0], "forget": [100.0]},
    }


def test_the_retrained_is_its_own_reference() -> None:
    found = method_entry(*REFERENCE, REFERENCE)
    assert found["avg_gap"] == 0
    assert found["speedup"] == 1


def test_without_a_reference_there_is_no_gap_and_no_speedup() -> None:
    found = method_entry(MEASURED, finished(3.0), None)
    assert found["avg_gap"] is found["gaps"] is found["speedup"] is None
    assert found["seconds"] == 3.0


def test_what_was_not_timed_has_a_gap_but_no_speedup() -> None:
    found = method_entry(MEASURED, None, REFERENCE)
    assert found["seconds"] is found["compile_seconds"] is found["speedup"] is None
    assert found["avg_gap"] == 5.0


def test_a_pruned_models_entry_holds_its_sparsity_and_the_gap_to_the_clean_one() -> None:
    clean = measures(4.0, 90.0, 80.0, 32.0)
    dense = method_entry(MEASURED, finished(3.0), REFERENCE)
    found = method_entry(MEASURED, finished(3.0), REFERENCE, clean=clean, sparsity=0.95)
    assert found == dense | {"sparsity": 0.95, "avg_gap_clean": 2.0}  # the mean of 6, 0, 0 and 2


def test_a_second_retraining_gives_a_second_speedup() -> None:
    usual = method_entry(MEASURED, finished(3.0), REFERENCE)
    found = method_entry(MEASURED, finished(3.0), REFERENCE, fast=finished(6.0))
    assert found == usual | {"speedup_fast": 2.0}


PRUNED = ("original", "dau", "retrain", "retrain_clean")


@pytest.mark.parametrize(
    ("method", "checkpoint", "original", "clean"),
    [
        ("omp", False, "dense model, trained on the training set, forget", "trained on the retain set alone"),
        (
            "omp",
            True,
            "checkpoint, trained on the training set, forget",
            "dense model, trained on the retain",
        ),
        (
            "imp",
            False,
            "each round of training on the training set, forget",
            "training on the retain set alone",
        ),
        ("synflow", False, "initial weights, no data", "initial weights, no data"),
        ("random", False, "chance, no data", "chance, no data"),
    ],
)
def test_where_masks_come_from(method: str, checkpoint: bool, original: str, clean: str) -> None:
    masks = Masks({"a": torch.tensor([True, False, False, False]), "b": torch.ones(4) > 0})
    outcome = SimpleNamespace(masks=dict.fromkeys(PRUNED, masks))
    result: Any = SimpleNamespace(networks=dict.fromkeys(PRUNED), outcome=outcome)
    facts = describe_pruning(PruneConfig(method, 0.4), result, checkpoint=checkpoint)
    assert facts is not None
    assert (facts["method"], facts["sparsity"]) == (method, 0.4)
    assert original in facts["mask_from"]["original"]
    assert clean in facts["mask_from"]["retrain_clean"]
    leaks = "found with the forget set" in facts["mask_from"]["retrain"]
    assert leaks == (method in ("omp", "imp"))
    assert facts["mask_from"]["dau"] == facts["mask_from"]["retrain"]
    assert facts["layers"] == {name: {"a": 0.75, "b": 0} for name in ("original", "retrain_clean")}


def test_masks_that_came_with_a_checkpoint() -> None:
    masks = Masks({"a": torch.tensor([True, False, False, False])})
    outcome = SimpleNamespace(masks={"original": masks})
    result: Any = SimpleNamespace(networks={"original": None}, outcome=outcome)
    facts = describe_pruning(None, result, checkpoint=True)
    assert facts is not None
    assert (facts["method"], facts["sparsity"]) == ("checkpoint", 0.75)
    dense: Any = SimpleNamespace(outcome=SimpleNamespace(masks={}))
    assert describe_pruning(None, dense, checkpoint=True) is None


# ---- several runs


def test_a_single_run_stays_as_it_is() -> None:
    run = {"dau": entry(1.0)}
    assert combine([run]) == {"dau": entry(1.0)}


def test_numbers_become_mean_and_sample_standard_deviation() -> None:
    runs = [{"dau": entry(value), "ft": entry(10 * value)} for value in (1.0, 2.0, 6.0)]
    combined = combine(runs)
    assert list(combined) == ["dau", "ft"]
    assert combined["dau"]["ua"] == pytest.approx(3)
    assert combined["dau"]["spread"]["ua"] == pytest.approx(ROOT_7)
    assert combined["ft"]["ua"] == pytest.approx(30)
    assert combined["ft"]["spread"]["ua"] == pytest.approx(10 * ROOT_7)


def test_nested_numbers_are_combined_where_they_stand() -> None:
    runs = [{"dau": entry(0.0, v, (v, 10 * v))} for v in (1.0, 2.0, 6.0)]
    combined = combine(runs)["dau"]
    assert combined["attacks"] == pytest.approx({"entropy": 3.0, "confidence": 5.0})
    assert combined["spread"]["attacks"] == pytest.approx({"entropy": ROOT_7, "confidence": 0.0})
    assert combined["confidence"]["test"] == pytest.approx([3.0, 30.0])


def test_histograms_have_a_mean_and_no_spread() -> None:
    combined = combine([{"dau": entry(1.0)}, {"dau": entry(2.0)}])["dau"]
    assert set(combined) == {"ua", "attacks", "confidence", "spread"}
    assert set(combined["spread"]) == {"ua", "attacks"}


@pytest.mark.parametrize("values", [(None, None), (None, 2.0), (1.0, None)])
def test_a_number_that_one_run_lacks_is_missing_from_all(values: tuple[float | None, float | None]) -> None:
    combined = combine([{"dau": entry(value, value)} for value in values])["dau"]
    assert combined["ua"] is combined["spread"]["ua"] is None
    assert combined["attacks"] == {"entropy": None, "confidence": 5.0}
    assert combined["spread"]["attacks"] == {"entropy": None, "confidence": 0.0}


def test_the_runs_are_not_changed() -> None:
    runs = [{"dau": entry(1.0)}, {"dau": entry(2.0)}]
    before = copy.deepcopy(runs)
    combine(runs)["dau"]["attacks"]["entropy"] = 99.0
    assert runs == before


# ---- the whole report


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results bring their entries along."""
    monkeypatch.setattr(record, "describe_seed", lambda result: result.entries)


def result(seed: int, gap: float | None) -> Any:
    index = torch.arange(4)
    return SimpleNamespace(
        seed=seed,
        split=Split(index, index, index, index[seed:], index[:seed], False),
        entries={"dau": entry(float(seed))},
        history={"lr": float(seed), "turns": [9]},
        tunings={},
        retraining_gap=gap,
    )


@pytest.mark.parametrize(
    ("gaps", "floor"), [([0.5, 1.5, 4.0], 2.0), ([0.5, None], None), ([None, None], None), ([None], None)]
)
def test_the_noise_floor_is_the_mean_over_runs_that_all_have_one(
    gaps: list[float | None], floor: float | None
) -> None:
    results = [result(seed, gap) for seed, gap in enumerate(gaps)]
    assert build_report({"forget": {"spec": "random:0.5"}}, results)["noise_floor"] == floor


def test_the_first_seeds_tuning_stands_beside_the_time_of_what_it_chose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(record, "describe_seed", lambda one: copy.deepcopy(one.entries))
    first, second = result(1, None), result(2, None)
    trials = (Trial({"lr": 0.1}, failure="dau diverged"), Trial({"lr": 0.01}, 2.0, {"a": 2.0}, 1.5))
    first.tunings = {"dau": Tuning(trials, chosen=1, seconds=4.0)}
    report = build_report({"forget": {"spec": "random:0.5"}}, [first, second])
    assert report["methods"]["dau"]["tuning_seconds"] == 4
    assert report["tuning"]["dau"]["chosen"] == 1
    assert report["tuning"]["dau"]["trials"][0] == {
        "settings": {"lr": 0.1}, "score": None, "terms": None, "seconds": None, "failure": "dau diverged",
    }  # fmt: skip
    assert all("tuning_seconds" not in run["methods"]["dau"] for run in report["runs"])
    assert "tuning" not in build_report({"forget": {"spec": "random:0.5"}}, [second, second])


def test_several_runs_stand_in_the_report_one_by_one() -> None:
    found = build_report({"forget": {"spec": "random:0.5"}}, [result(1, 0.5), result(2, 1.5)])
    assert found["schema"] == 1
    assert found["methods"]["dau"]["ua"] == 1.5
    assert found["game"] == {"lr": 1.0, "turns": [9]}
    assert [run["seed"] for run in found["runs"]] == [1, 2]
    assert [run["methods"]["dau"]["ua"] for run in found["runs"]] == [1.0, 2.0]
    assert [run["retraining_gap"] for run in found["runs"]] == [0.5, 1.5]
    assert [run["forget"]["indices"] for run in found["runs"]] == [[1, 2, 3], [2, 3]]
    assert build_report({"forget": {"spec": "random:0.5"}}, [result(1, None)])["runs"] is None
