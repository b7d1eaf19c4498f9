"""The command line as a user runs it: files, report, reproducibility, mistakes and Ctrl-C.

Runs are three epochs on digits, in this process and shared by the tests; two tests start their own.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from dau_fast import models
from dau_fast.engine.evaluation import predict
from dau_fast.report.page import render
from dau_fast.split import TEST, TRAINING, VALIDATION, decode_roles
from dau_fast.unlearn import main

Report = dict[str, Any]

LABELS = load_digits().target
ATTACKS = {"correctness", "confidence", "entropy", "modified_entropy", "probability"}
RATES = ("ua", "ra", "ta", "mia_efficacy")
TIMES = ("seconds", "compile_seconds", "speedup")


@dataclass(frozen=True)
class Called:
    """What one call of the command line left behind."""

    code: int
    stdout: str
    stderr: str
    folder: Path

    @property
    def report(self) -> Report:
        return json.loads((self.folder / "report.json").read_text(), parse_constant=_no_constant)

    def weights(self, method: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{method}.safetensors")

    def metadata(self, method: str) -> dict[str, str]:
        with safe_open(self.folder / f"{method}.safetensors", "pt") as file:
            return json.loads(file.metadata()["dau_fast"])

    def roles(self, method: str = "original", count: int = len(LABELS)) -> np.ndarray:
        return decode_roles(self.metadata(method)["split"], count)


def _no_constant(name: str) -> None:
    pytest.fail(f"{name} in report.json is not JSON")


# What Python does not show unless it is asked to.
_SILENT = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


def call(folder: Path, *arguments: object) -> Called:
    """Run the command line in this process with --out `folder`; an exception that escapes fails the test.

    stderr holds the warnings that Python would have printed there, too.
    """
    given = ["dau-fast", "--epochs", "3", "--device", "cpu", "--out", folder, *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        patch.setattr(sys, "argv", [str(argument) for argument in given])
        patch.setenv("COLUMNS", "400")
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
            patch.delenv(name, raising=False)
        try:
            main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            torch.set_flush_denormal(False)
    shown = [w for w in warned if not issubclass(w.category, _SILENT)]
    stderr = err.getvalue() + "".join(f"{w.category.__name__}: {w.message}\n" for w in shown)
    return Called(code, out.getvalue(), stderr, folder)


def succeed(folder: Path, *arguments: object) -> Called:
    called = call(folder, *arguments)
    assert called.code == 0, called.stderr
    return called


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below `folder`: files with their bytes, folders with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def numbers(methods: dict[str, Any]) -> dict[str, Any]:
    """The entries without what a clock decides."""
    return {
        name: {key: value for key, value in entry.items() if key not in TIMES}
        for name, entry in methods.items()
    }


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- shared runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unlearn")


@pytest.fixture(scope="module")
def once(place: Path) -> Called:
    """Defaults, in a folder whose parent is missing as well."""
    return succeed(place / "new" / "once")


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


def check_report(report: Report, methods: list[str], *, repeats: int = 1, given: bool = False) -> None:
    """Assert that `report` has the promised shape. given: the original came from a checkpoint."""
    assert list(report) == ["schema", "run", "methods", "game", "noise_floor", "runs"]
    assert report["schema"] == 1
    check_run(report["run"], repeats)
    assert set(report["methods"]) == {"original", *methods}
    has_reference = "retrain" in methods
    for name, entry in report["methods"].items():
        entry = dict(entry)
        if repeats > 1:
            check_spread(entry.pop("spread"), entry)
        check_entry(entry, has_reference, timed=name != "original" or not given)
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
            check_entry(entry, has_reference, timed=name != "original" or not given)
        check_game(run["game"] if "dau" in methods else {"none": run["game"]})
        assert (type(run["retraining_gap"]) is float) == has_reference


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
    assert {"python", "dau-fast", "torch"} <= set(run["versions"])
    assert all(type(version) is str for version in run["versions"].values())
    check_forget(run["forget"])
    sets = run["sets"]
    assert list(sets) == ["train", "validation", "test", "forget", "retain"]
    assert all(type(size) is int and size > 0 for size in sets.values())
    assert sets["forget"] == run["forget"]["count"]
    assert sets["forget"] + sets["retain"] == sets["train"]


def check_forget(forget: dict[str, Any]) -> None:
    assert list(forget) == ["spec", "count", "sha256", "indices"]
    indices = forget["indices"]
    assert all(type(index) is int and index >= 0 for index in indices)
    assert indices == sorted(set(indices))
    assert forget["count"] == len(indices) > 0
    words = b"".join(index.to_bytes(8, "little") for index in indices)
    assert forget["sha256"] == hashlib.sha256(words).hexdigest()


def check_entry(entry: dict[str, Any], has_reference: bool, timed: bool) -> None:
    assert set(entry) == {*RATES, "attacks", *TIMES, "avg_gap", "confidence"}
    assert set(entry["attacks"]) == ATTACKS
    for rate in [*(entry[key] for key in RATES), *entry["attacks"].values()]:
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
        assert entry["speedup"] > 0 if timed else entry["speedup"] is None
    else:
        assert entry["avg_gap"] is entry["speedup"] is None
    bins = entry["confidence"]
    assert set(bins) == {"edges", "forget", "validation", "test"}
    assert bins["edges"] == pytest.approx([i / 20 for i in range(21)])
    for name in ("forget", "validation", "test"):
        assert len(bins[name]) == 20
        assert min(bins[name]) >= 0
        assert sum(bins[name]) == pytest.approx(100, abs=1e-3)


def check_spread(spread: dict[str, Any], entry: dict[str, Any]) -> None:
    assert set(spread) == set(entry) - {"confidence"}
    assert set(spread["attacks"]) == ATTACKS
    for key, value in [*spread.items(), *spread["attacks"].items()]:
        if key != "attacks":
            assert value is None if key in entry and entry[key] is None else value >= 0


def check_game(game: dict[str, Any]) -> None:
    if set(game) == {"none"}:
        assert game["none"] is None
        return
    assert set(game) == {"step", "auc", "forget_accuracy", "validation_accuracy", "stopped"}
    assert type(game["stopped"]) is str
    assert game["step"][0] == 0
    assert game["step"] == sorted(set(game["step"]))
    for key, top in (("auc", 1), ("forget_accuracy", 100), ("validation_accuracy", 100)):
        assert len(game[key]) == len(game["step"])
        assert all(0 <= value <= top for value in game[key])


def test_report_of_a_default_run(once: Called) -> None:
    report = once.report
    check_report(report, ["dau", "retrain"])
    run = report["run"]
    assert [run[key] for key in ("dataset", "arch", "seed", "device", "epochs", "precision")] == [
        "digits", "small", 0, "cpu", 3, "fp32",
    ]  # fmt: skip
    assert run["forget"]["spec"] == "random:0.1"


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
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "dau_fast"]
    assert str(file) in warning
    assert "does not say which images it was trained on" in warning
    # The seed is the one it was trained with, and so is the split.
    assert called.report["methods"]["original"]["ta"] == once.report["methods"]["original"]["ta"]


# ---- a folder of images


@pytest.fixture(scope="module")
def pictures(place: Path) -> Path:
    """train/ and test/ with three classes of coloured noise, 12 and 6 images of 16x16 pixels each."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = place / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                mean = np.full(3, 60)
                mean[channel] = 180
                pixels = rng.normal(mean, 30, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return place / "pictures"


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
    called = succeed(place / "share", "--dataset", "folder", "--data", pictures)
    check_report(called.report, ["dau", "retrain"])
    assert called.report["run"]["sets"] == {
        "train": 33, "validation": 3, "test": 18, "forget": 3, "retain": 30,
    }  # fmt: skip


# ---- mistakes


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def files(place: Path, once: Called, pictures: Path) -> Path:
    """A folder of things that cannot be used, and some that can."""
    folder = place / "files"
    folder.mkdir()
    validation = np.flatnonzero(once.roles() == VALIDATION)
    for name, text in {
        "twice": "3 5 3", "range": "0 1797", "huge": "9" * 30, "digits": "9" * 5000, "negative": "4\n-1",
        "empty": " \n", "word": "1 two", "validation": str(validation[0]),
        "everything": " ".join(map(str, range(len(LABELS)))),
    }.items():  # fmt: skip
        (folder / f"{name}.txt").write_text(text)
    (folder / "binary.txt").write_bytes(b"\xff\xfe1")
    good = (once.folder / "original.safetensors").read_bytes()
    (folder / "good.safetensors").write_bytes(good)
    (folder / "short.safetensors").write_bytes(good[:100_000])
    (folder / "nothing.safetensors").write_bytes(b"")
    for name, metadata in (("odd", "3"), ("odd_split", '{"split": 3}')):
        save_file(once.weights("original"), folder / f"{name}.safetensors", {"dau_fast": metadata})
    torch.save(once.weights("original"), folder / "whole.pt")
    (folder / "short.pt").write_bytes((folder / "whole.pt").read_bytes()[:100_000])
    torch.save({0: torch.zeros(1)}, folder / "numbered.pt")
    torch.save([torch.zeros(1)], folder / "list.pt")
    png = (pictures / "test" / "red" / "00.png").read_bytes()
    # The header's length is wrong: Pillow gives up with a ValueError.
    damaged = png[:8] + b"\0\0\0\5" + png[12:]
    for file, content in {
        "damaged/train/a/0.png": damaged, "damaged/test/a/0.png": damaged, "train_only/train/a/0.png": png,
    }.items():  # fmt: skip
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_bytes(content)
    return folder


LONG = "x" * 300

# Arguments, and what the message must name.
MISTAKES = [
    ("--dataset mnist", "dataset 'mnist'"),
    ("--arch alexnet_9", "architecture 'alexnet_9'"),
    ("--methods dau,magic", "method 'magic'"),
    ("--methods dau,", "method ''"),
    ("--device cuda", "--device cuda"),
    ("--device tpu", "device 'tpu'"),
    ("--precision fp8", "precision 'fp8'"),
    ("--forget random:0", "'random:0'"),
    ("--forget random:1.5", "'random:1.5'"),
    ("--forget random:nan", "'random:nan'"),
    ("--forget random:", "'random:'"),
    ("--forget random:0.0001", "no forget images"),
    ("--forget random:0.9999", "no retain images"),
    ("--forget indices:{files}/everything.txt", "no retain images"),
    ("--forget class:99", "'class:99'"),
    ("--forget class:", "'class:'"),
    ("--forget nonsense", "'nonsense'"),
    ("--forget indices:{files}/twice.txt", "3 twice"),
    ("--forget indices:{files}/range.txt", "1797 is out of range"),
    ("--forget indices:{files}/huge.txt", "huge.txt"),
    ("--forget indices:{files}/digits.txt", "digits.txt"),
    ("--forget indices:{files}/negative.txt", "'-1'"),
    ("--forget indices:{files}/empty.txt", "empty.txt' is empty"),
    ("--forget indices:{files}/word.txt", "'two'"),
    ("--forget indices:{files}/binary.txt", "binary.txt"),
    ("--forget indices:{files}/missing.txt", "missing.txt"),
    ("--forget indices:{files}", "cannot be read"),
    (
        "--checkpoint {files}/good.safetensors --forget indices:{files}/validation.txt",
        "is a validation image",
    ),
    ("--dataset folder", "--data DIR"),
    ("--dataset folder --data {files}/missing", "missing' is not a folder"),
    ("--dataset folder --data {files}/twice.txt", "twice.txt' is not a folder"),
    ("--dataset folder --data {files}/train_only", "'test' folder"),
    ("--dataset folder --data {files}/damaged", "0.png"),
    ("--dataset cifar10 --data {files}/missing", "--download"),
    ("--dataset cifar10 --data {files}/twice.txt", "twice.txt"),
    ("--checkpoint {files}/missing.pt", "missing.pt' does not exist"),
    ("--checkpoint {files}", "files"),
    ("--checkpoint {files}/short.safetensors", "short.safetensors"),
    ("--checkpoint {files}/nothing.safetensors", "nothing.safetensors"),
    ("--checkpoint {files}/odd.safetensors", "checkpoint"),
    ("--checkpoint {files}/odd_split.safetensors", "checkpoint"),
    ("--checkpoint {files}/short.pt", "short.pt"),
    ("--checkpoint {files}/twice.txt", "twice.txt"),
    ("--checkpoint {files}/numbered.pt", "numbered.pt"),
    ("--checkpoint {files}/list.pt", "list.pt"),
    ("--checkpoint {files}/whole.pt --arch resnet18", "another architecture"),
    ("--checkpoint {files}/good.safetensors --arch resnet18", "another architecture"),
    ("--checkpoint {long}", "xxx"),
    ("--dataset folder --data {long}", "xxx"),
    ("--wrong", "--wrong"),
    ("extra", "extra"),
    ("--seed one", "'one'"),
    ("--seed -1", "-1"),
    ("--repeats 0", "--repeats"),
    ("--epochs 0", "--epochs"),
]


def assert_one_line(called: Called, code: int, beginning: str) -> None:
    assert called.code == code
    assert called.stdout == ""
    assert re.fullmatch(rf"{beginning}[^\n]+\n", called.stderr), called.stderr


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_costs_one_line_and_leaves_nothing(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    used = tmp_path / "used"
    used.mkdir()
    (used / "report.json").write_text("older")
    before, given = contents(tmp_path), [part.format(files=files, long=LONG) for part in arguments.split()]
    for folder in (used, tmp_path / "new" / "out"):
        called = call(folder, *given)
        assert contents(tmp_path) == before
        assert named in called.stderr
        assert_one_line(called, 2, "error: ")


@pytest.mark.parametrize("out", ["file", "file/below/it", LONG])
def test_an_output_folder_that_cannot_be_costs_one_line(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    called = call(tmp_path / out)
    assert contents(tmp_path) == before
    assert str(tmp_path / out) in called.stderr
    assert_one_line(called, 2, "error: ")


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32, 2**70])
def test_a_large_seed_works_or_is_refused(tmp_path: Path, seed: int) -> None:
    called = call(tmp_path / "out", "--seed", seed, "--methods", "ga", "--repeats", 2, "--epochs", 1)
    assert called.code in (0, 2)
    if called.code:
        assert_one_line(called, 2, "error: ")


@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.safetensors", "evil"])
@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_a_malicious_checkpoint_is_refused_and_not_run(tmp_path: Path, name: str, container: str) -> None:
    made, file, out = tmp_path / "made", tmp_path / name, tmp_path / "out"
    content = io.BytesIO()
    if container == "torch":
        torch.save({"stem.0.weight": Malicious(made)}, content)
        torch.load(io.BytesIO(content.getvalue()), weights_only=False)
    else:
        pickle.dump({"stem.0.weight": Malicious(made)}, content)
        pickle.loads(content.getvalue())
    file.write_bytes(content.getvalue())
    made.rmdir()  # Reading it carelessly made the folder.
    called = call(out, "--checkpoint", file)
    assert not made.exists()
    assert not out.exists()
    assert name in called.stderr
    assert_one_line(called, 2, "error: ")


# ---- processes of their own


def test_help_of_the_module_names_every_option(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "dau_fast.unlearn", "--help"],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0
    assert found.stderr == ""
    for option in (
        "dataset", "data", "arch", "checkpoint", "forget", "methods", "seed", "repeats", "device", "out",
    ):  # fmt: skip
        assert re.search(rf"^ *(-\w, )?--{option} ", found.stdout, re.MULTILINE), option
    assert list(tmp_path.iterdir()) == []


# Says on stdout whenever an optimiser has taken a step.
TELLING = """
from torch.optim.optimizer import register_optimizer_step_post_hook as hook
from dau_fast.unlearn import main
hook(lambda *_: print("step", flush=True))
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_in_the_middle_of_training_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", TELLING, "--epochs", "100000", "--device", "cpu", "--out", str(out)],
        cwd=tmp_path,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    giving_up = threading.Timer(60, process.kill)
    giving_up.start()
    try:
        assert process.stdout
        # The first steps are of warming up.
        assert [process.stdout.readline() for _ in range(10)] == ["step\n"] * 10
        (staging,) = out.iterdir()
        assert staging.name.startswith(".unfinished-")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    finally:
        giving_up.cancel()
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []
    # click ends the line of the terminal's ^C first.
    assert re.fullmatch(r"interrupted[^\n]+", stderr.strip()), stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
