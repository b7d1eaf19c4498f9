"""The command line as a user runs it: files, report, reproducibility, checkpoints, folders of images.

Runs are three epochs on digits, in this process and shared by the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from calling import LABELS, Called, call, environment, succeed
from checking import ATTACKS, RATES, TIMES, check_folder, check_report, same_tensors
from sklearn.datasets import load_digits

from dau_fast import models
from dau_fast.data.split import TEST, TRAINING, VALIDATION
from dau_fast.engine.evaluation import predict
from dau_fast.report.page import render


def numbers(methods: dict[str, Any]) -> dict[str, Any]:
    """The entries without what a clock decides."""
    return {
        name: {key: value for key, value in entry.items() if key not in TIMES}
        for name, entry in methods.items()
    }


# ---- shared runs


@pytest.fixture(scope="module")
def again(place: Path) -> Called:
    """The same once more, where an older report and somebody's notes are."""
    folder = place / "again"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "report.json").write_text("old")
    return succeed(folder)


@pytest.fixture(scope="module")
def other_seed(place: Path) -> Called:
    return succeed(place / "other", "--seed", 1)


@pytest.fixture(scope="module")
def twice(place: Path) -> Called:
    return succeed(place / "twice", "--repeats", 2)


@pytest.fixture(scope="module")
def resumed(place: Path, once: Called) -> Called:
    """From the original's weights of `once`, in another folder."""
    original = once.folder / "original.safetensors"
    return succeed(place / "resumed", "--checkpoint", original, "--methods", "dau")


# ---- the files


def test_out_holds_the_report_and_the_weights_and_nothing_else(once: Called) -> None:
    assert {file.name for file in once.folder.iterdir()} == {
        "report.json", "report.html", "original.safetensors", "dau.safetensors", "retrain.safetensors",
    }  # fmt: skip


def test_other_files_in_out_stay_and_an_older_report_is_replaced(once: Called, again: Called) -> None:
    assert {file.name for file in again.folder.iterdir()} == {
        "notes.txt", *(file.name for file in once.folder.iterdir())
    }  # fmt: skip
    assert (again.folder / "notes.txt").read_text() == "mine"
    assert again.report["schema"] == 1


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
def test_the_report_names_all_that_stands_beside_it(resumed: Called) -> None:
    check_folder(resumed.folder)


def test_the_report_names_the_checkpoint(once: Called, resumed: Called) -> None:
    file = once.folder / "original.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert resumed.report["run"]["checkpoint"] == {"file": str(file), "sha256": digest}


def test_weights_are_as_readable_as_the_report(once: Called) -> None:
    assert len({file.stat().st_mode for file in once.folder.iterdir()}) == 1


def test_the_page_shows_the_report(once: Called) -> None:
    assert (once.folder / "report.html").read_text(encoding="utf-8") == render(once.report)


def test_the_terminal_shows_a_row_for_each_method_and_where_the_files_are(once: Called) -> None:
    for method, name in [("original", "original"), ("retrain", "retrained"), ("dau", "DAU")]:
        (row,) = [line for line in once.stdout.splitlines() if re.match(rf" +{name} ", line)]
        assert f"{once.report['methods'][method]['ua']:.1f}" in row
    assert str(once.folder / "report.html") in once.stdout
    assert str(once.folder / "report.json") in once.stdout


def test_a_run_that_succeeds_leaves_stderr_empty(once: Called) -> None:
    assert once.stderr == ""


@pytest.mark.parametrize("name", ["run[b]", "run[/b]"])
def test_the_terminal_names_a_folder_with_brackets_as_it_is(tmp_path: Path, name: str) -> None:
    called = succeed(tmp_path / name, "--methods", "ga", "--epochs", 1)
    assert str(tmp_path / name / "report.html") in called.stdout


@pytest.mark.parametrize("name", ["a[/b]", os.fsdecode(b"\xff")])
def test_an_index_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    try:
        file.write_text("1 2 3")
    except OSError:
        pytest.skip("the file system refuses the name")
    called = succeed(tmp_path / "out", "--methods", "ga", "--epochs", 1, "--forget", f"indices:{file}")
    assert called.report["run"]["forget"]["indices"] == [1, 2, 3]


# ---- report.json


def test_report_of_a_default_run(once: Called) -> None:
    report = once.report
    check_report(report, ["dau", "retrain"])
    run = report["run"]
    assert [run[key] for key in ("dataset", "arch", "seed", "device", "epochs", "precision")] == [
        "digits", "small", 0, "cpu", 3, "fp32",
    ]  # fmt: skip
    assert run["forget"]["spec"] == "random:0.1"
    assert run["engine"]["asked"] == "auto"
    assert set(run["engine"]["loops"]) == {"original", "retrain", "game"}
    assert run["retrain_epochs"] == {"retrain": 3}


def test_both_recipes_give_two_retrained_models_and_two_speedups(place: Path) -> None:
    called = succeed(place / "recipes", "--retrain-recipe", "both", "--epochs", 10)
    check_report(called.report, ["dau", "retrain", "retrain_fast"])
    methods = called.report["methods"]
    assert called.report["run"]["retrain_epochs"] == {"retrain": 10, "retrain_fast": 2}
    for entry in methods.values():
        expected = methods["retrain_fast"]["seconds"] / entry["seconds"]
        assert entry["speedup_fast"] == pytest.approx(expected)
    assert methods["retrain_fast"]["avg_gap"] > 0
    assert (called.folder / "retrain_fast.safetensors").exists()


def test_a_profile_says_where_the_time_goes_and_leaves_traces(place: Path) -> None:
    called = succeed(place / "profile", "--profile", "--methods", "dau", turns=16)
    loops = called.report["run"]["profile"]
    assert set(loops) == {"original", "game"}
    assert {"data", "forward", "attacker", "backward", "optimiser"} <= set(loops["game"]["seconds"])
    assert "where the time goes" in called.stdout
    for loop in loops:
        assert json.loads((called.folder / f"profile-{loop}.json").read_text())["traceEvents"]


def test_the_fast_recipe_alone_is_the_reference(place: Path) -> None:
    called = succeed(place / "fast", "--retrain-recipe", "fast", "--methods", "ga,retrain", "--epochs", 10)
    check_report(called.report, ["ga", "retrain"])
    assert called.report["run"]["retrain_epochs"] == {"retrain": 2}
    assert "speedup_fast" not in called.report["methods"]["ga"]


def test_report_without_retraining_compares_with_nothing(resumed: Called) -> None:
    check_report(resumed.report, ["dau"], given=True)


def test_report_without_retraining_has_no_noise_floor(place: Path) -> None:
    report = succeed(place / "ga", "--methods", "ga", "--repeats", 2).report
    check_report(report, ["ga"], repeats=2)
    assert report["noise_floor"] is None


def test_report_of_repeats(twice: Called) -> None:
    check_report(twice.report, ["dau", "retrain"], repeats=2)


def test_avg_gap_and_speedup_are_what_they_say(once: Called) -> None:
    methods = once.report["methods"]
    reference = methods["retrain"]
    for entry in methods.values():
        gaps = [abs(entry[key] - reference[key]) for key in RATES]
        assert entry["avg_gap"] == pytest.approx(sum(gaps) / 4)
        assert entry["speedup"] == pytest.approx(reference["seconds"] / entry["seconds"])


def test_repeats_are_the_runs_of_the_seeds_one_after_the_other(
    once: Called, other_seed: Called, twice: Called
) -> None:
    first, second = twice.report["runs"]
    assert [first["seed"], second["seed"]] == [0, 1]
    for run, alone in ((first, once.report), (second, other_seed.report)):
        assert run["forget"] == alone["run"]["forget"]
        assert numbers(run["methods"]) == numbers(alone["methods"])
        assert run["game"] == alone["game"]
    assert twice.report["run"]["forget"] == first["forget"]
    assert same_tensors(twice.weights("dau"), once.weights("dau"))


def test_repeats_give_mean_spread_and_noise_floor(twice: Called) -> None:
    report = twice.report
    for name, entry in report["methods"].items():
        for key in (*RATES, *TIMES, "avg_gap"):
            values = [run["methods"][name][key] for run in report["runs"]]
            assert entry[key] == pytest.approx(fmean(values))
            assert entry["spread"][key] == pytest.approx(stdev(values))
        for attack in ATTACKS:
            values = [run["methods"][name]["attacks"][attack] for run in report["runs"]]
            assert entry["attacks"][attack] == pytest.approx(fmean(values))
            assert entry["spread"]["attacks"][attack] == pytest.approx(stdev(values))
    gaps = [run["retraining_gap"] for run in report["runs"]]
    assert report["noise_floor"] == pytest.approx(fmean(gaps))
    assert min(gaps) > 0


# ---- seeds and sets


def test_the_same_seed_gives_the_same_numbers_and_weights(once: Called, again: Called) -> None:
    assert numbers(once.report["methods"]) == numbers(again.report["methods"])
    assert once.report["game"] == again.report["game"]
    assert once.report["run"]["forget"] == again.report["run"]["forget"]
    for method in ("original", "dau", "retrain"):
        assert same_tensors(once.weights(method), again.weights(method))
        assert once.metadata(method) == again.metadata(method)


def test_the_same_seed_gives_the_same_bytes_of_weights(once: Called, again: Called) -> None:
    for name in ("original.safetensors", "dau.safetensors", "retrain.safetensors"):
        assert (once.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_another_seed_gives_another_split_and_other_weights(once: Called, other_seed: Called) -> None:
    assert once.report["run"]["forget"]["sha256"] != other_seed.report["run"]["forget"]["sha256"]
    assert (once.roles() != other_seed.roles()).any()
    for method in ("original", "dau", "retrain"):
        assert not same_tensors(once.weights(method), other_seed.weights(method))
        assert once.report["methods"][method] != other_seed.report["methods"][method]


def test_the_forget_set_is_a_tenth_of_the_training_images(once: Called) -> None:
    run, roles = once.report["run"], once.roles()
    assert (roles[run["forget"]["indices"]] == TRAINING).all()
    assert run["forget"]["count"] == round(0.1 * (roles == TRAINING).sum())
    for name, role in (("train", TRAINING), ("validation", VALIDATION), ("test", TEST)):
        assert run["sets"][name] == (roles == role).sum()


@pytest.mark.parametrize("method", ["original", "dau", "retrain"])
def test_the_weights_are_of_the_models_that_were_measured(once: Called, method: str) -> None:
    network = models.build("small", 10, (1, 8, 8))
    network.load_state_dict(once.weights(method))
    pixels = (load_digits().images * 255 / 16).round() / 255
    images = torch.from_numpy((pixels - 0.305) / 0.376).float().unsqueeze(1)
    everything = torch.arange(len(images))
    guessed = predict(models.Classifier(network), lambda index: images[index], everything).logits.argmax(1)
    right = guessed.numpy() == LABELS
    roles, forget = once.roles(method), once.report["run"]["forget"]["indices"]
    forgotten = np.isin(np.arange(len(LABELS)), forget)
    entry = once.report["methods"][method]
    for key, share, members in (
        ("ua", 1 - right[forgotten].mean(), forgotten),
        ("ra", right[(roles == TRAINING) & ~forgotten].mean(), (roles == TRAINING) & ~forgotten),
        ("ta", right[roles == TEST].mean(), roles == TEST),
    ):
        # One image may fall to the other side where the sums are taken in another order.
        assert entry[key] == pytest.approx(100 * share, abs=101 / members.sum())


def test_a_class_is_forgotten_as_a_whole(place: Path) -> None:
    called = succeed(place / "class", "--forget", "class:3")
    report, roles = called.report, called.roles()
    check_report(report, ["dau", "retrain"])
    assert report["run"]["forget"]["indices"] == np.flatnonzero((LABELS == 3) & (roles == TRAINING)).tolist()
    assert report["run"]["sets"]["test"] == ((LABELS != 3) & (roles == TEST)).sum()
    assert report["run"]["sets"]["validation"] == ((LABELS != 3) & (roles == VALIDATION)).sum()
    # What never saw a 3 cannot call anything one.
    assert report["methods"]["retrain"]["ua"] == 100
    assert report["methods"]["dau"]["ua"] == 100


def test_listed_images_are_forgotten_wherever_the_seed_would_have_put_them(place: Path, once: Called) -> None:
    roles = once.roles()
    chosen = [int(np.flatnonzero(roles == role)[4]) for role in (VALIDATION, TRAINING, TEST)]
    file = place / "chosen.txt"
    file.write_text("\n".join(map(str, chosen)) + "\n")
    called = succeed(place / "chosen", "--forget", f"indices:{file}", "--methods", "ga")
    check_report(called.report, ["ga"])
    assert called.report["run"]["forget"]["indices"] == sorted(chosen)
    assert (called.roles()[chosen] == TRAINING).all()


# ---- checkpoints


def test_a_checkpoint_brings_its_split_and_its_numbers(once: Called, resumed: Called) -> None:
    assert resumed.report["run"]["forget"] == once.report["run"]["forget"]
    assert resumed.report["run"]["sets"] == once.report["run"]["sets"]
    assert (resumed.roles() == once.roles()).all()
    assert same_tensors(resumed.weights("original"), once.weights("original"))
    for key in (*RATES, "attacks", "confidence"):
        assert resumed.report["methods"]["original"][key] == once.report["methods"]["original"][key]


def test_unlearning_from_a_checkpoint_is_the_same_as_without(once: Called, resumed: Called) -> None:
    assert same_tensors(resumed.weights("dau"), once.weights("dau"))
    assert resumed.report["game"] == once.report["game"]


def test_another_seed_forgets_within_the_split_of_the_checkpoint(place: Path, once: Called) -> None:
    original = once.folder / "original.safetensors"
    called = succeed(
        place / "seeded", "--checkpoint", original, "--seed", 5, "--repeats", 2, "--methods", "ga"
    )
    check_report(called.report, ["ga"], repeats=2, given=True)
    assert (called.roles() == once.roles()).all()
    forgotten = [run["forget"]["indices"] for run in called.report["runs"]]
    for indices in forgotten:
        assert (once.roles()[indices] == TRAINING).all()
        assert indices != once.report["run"]["forget"]["indices"]
    assert forgotten[0] != forgotten[1]
    assert same_tensors(called.weights("original"), once.weights("original"))


def test_a_state_dict_without_a_split_is_taken_with_a_warning(
    place: Path, once: Called, caplog: pytest.LogCaptureFixture
) -> None:
    file = place / "original.pt"
    torch.save({f"module.{name}": tensor for name, tensor in once.weights("original").items()}, file)
    called = succeed(place / "state_dict", "--checkpoint", file, "--methods", "ga")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(file) in warning
    assert "does not say which images it was trained on" in warning
    # The seed is the one it was trained with, and so is the split.
    assert called.report["methods"]["original"]["ta"] == once.report["methods"]["original"]["ta"]


# ---- a folder of images


def test_a_folder_of_images(place: Path, pictures: Path) -> None:
    # Classes are numbered in alphabetical order: blue, green, red.
    arguments = ("--dataset", "folder", "--data", pictures, "--epochs", 150, "--methods", "retrain")
    called = succeed(place / "folder", *arguments, "--forget", "class:red")
    report, roles = called.report, called.roles(count=54)
    check_report(report, ["retrain"])
    assert roles.tolist().count(TEST) == 18
    assert (roles[36:] == TEST).all()
    assert report["run"]["sets"] == {"train": 33, "validation": 2, "test": 12, "forget": 11, "retain": 22}
    assert report["run"]["forget"]["indices"] == [i for i in range(24, 36) if roles[i] == TRAINING]
    # Colours are easy: a model that misses them has seen the wrong pixels or labels.
    assert report["methods"]["original"]["ta"] > 90
    assert report["methods"]["retrain"]["ua"] == 100


def test_a_folder_of_images_by_share_of_it(place: Path, pictures: Path) -> None:
    called = succeed(place / "share", "--dataset", "folder", "--data", pictures, turns=16)
    check_report(called.report, ["dau", "retrain"])
    assert called.report["run"]["sets"] == {
        "train": 33, "validation": 3, "test": 18, "forget": 3, "retain": 30,
    }  # fmt: skip


# ---- processes of their own, and a module's own way in


def test_the_package_itself_is_the_command_line(tmp_path: Path) -> None:
    arguments = ("--methods", "ga", "--epochs", 1)
    by_name = succeed(tmp_path / "unlearn", *arguments)
    by_package = succeed(tmp_path / "package", *arguments, start=lambda: run_as_program("dau_fast"))
    assert by_package.stderr == ""
    assert numbers(by_package.report["methods"]) == numbers(by_name.report["methods"])
    assert same_tensors(by_package.weights("ga"), by_name.weights("ga"))


def test_the_package_itself_ends_as_the_command_line_does(tmp_path: Path) -> None:
    asked = [
        call(tmp_path, "--forget", "nonsense", start=lambda module=module: run_as_program(module))
        for module in ("dau_fast", "dau_fast.unlearn")
    ]
    assert [(called.code, called.stdout) for called in asked] == [(2, ""), (2, "")]
    assert asked[0].stderr == asked[1].stderr
    assert asked[0].stderr.startswith("error: --forget 'nonsense'")


def run_as_program(module: str) -> None:
    """As `python -m` does."""
    with warnings.catch_warnings(action="ignore"):  # that the module has been imported before
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def test_help_of_the_module_names_every_option(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "dau_fast.unlearn", "--help"],
        cwd=tmp_path,
        env=environment() | {"MPLBACKEND": "no such thing"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0
    assert found.stderr == ""
    for option in (
        "dataset", "data", "arch", "checkpoint", "forget", "methods", "prune", "sparsity", "sensitivity",
        "seed", "repeats", "device", "out",
    ):  # fmt: skip
        assert re.search(rf"^ *(-\w, )?--{option} ", found.stdout, re.MULTILINE), option
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_game_is_played_with_the_sensitivity_that_is_asked_for(tmp_path: Path) -> None:
    seen = {}
    for name in ("classifier", "input"):
        options = ("--methods", "dau", "--epochs", 2, "--profile")
        called = succeed(tmp_path / name, "--sensitivity", name, *options, turns=16)
        seen[name] = called.report["game"]["auc"]
        assert called.report["run"]["sensitivity"] == name
        costs = called.report["run"]["sensitivity_costs"]["seconds"]
        assert costs["none"] < min(costs["input"], costs["full"])
        assert "cost of sensitivities" in (tmp_path / name / "report.html").read_text()
    assert seen["classifier"] != seen["input"]
