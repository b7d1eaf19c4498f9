"""`python -m dau_fast audit` as a user runs it: files, table, the same again from files, and mistakes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import Called, contents, succeed
from checking import check_forget, same_tensors
from safetensors.torch import load_file, save_file

from dau_fast import checkpoints
from dau_fast.__main__ import main
from dau_fast.audits.catalogue import find_audits
from dau_fast.commands.audit import make_audit
from dau_fast.commands.help import SHARED
from dau_fast.config import AuditConfig
from dau_fast.data.split import encode_roles
from dau_fast.unlearn import unlearn

REFERENCES = 4


def audit(folder: Path, *arguments: object) -> Called:
    """Run the command in this process with --out `folder`, trainings of three epochs, on the CPU."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    given = ["audit", "--epochs", "3", "--device", "cpu", "--out", folder, *arguments]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["dau-fast", *map(str, given)])
        patch.setenv("COLUMNS", "80")
        try:
            main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            torch.set_flush_denormal(False)
    return Called(code, out.getvalue(), err.getvalue(), folder)


def report(called: Called) -> dict[str, Any]:
    assert called.code == 0, called.stderr
    return json.loads((called.folder / "audit.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Short looks: what they see is tested where they are."""
    with pytest.MonkeyPatch.context() as patch:
        short = partial(AuditConfig, relearning_steps=4, noisy_copies=2, search_steps=2)
        patch.setattr("dau_fast.job.audit.AuditConfig", short)
        yield


@pytest.fixture(scope="module")
def trained(place: Path, once: Called) -> Called:
    """An audit of `once`'s DAU model against references that it trains."""
    original, model = once.folder / "original.safetensors", once.folder / "dau.safetensors"
    return audit(place / "audit", model, "--original", original, "--train-references", REFERENCES)


# ---- what it writes and prints


def test_it_writes_the_report_and_the_references_and_nothing_else(trained: Called) -> None:
    names = {f"reference_{i + 1}.safetensors" for i in range(REFERENCES)}
    assert trained.code == 0, trained.stderr
    assert {file.name for file in trained.folder.iterdir()} == {"audit.json", "audit.html", *names}
    files = [load_file(trained.folder / name) for name in sorted(names)]
    assert not any(same_tensors(files[0], other) for other in files[1:])


def test_the_report_has_its_shape(trained: Called, once: Called) -> None:
    found = report(trained)
    assert list(found) == [
        "schema", "run", "verdict", "original", "gaps", "information_difference_index", "audits", "skipped",
        "files",
    ]  # fmt: skip
    check_forget(found["run"]["forget"])
    assert found["run"]["forget"] == once.report["run"]["forget"]
    assert found["run"]["checkpoints"] == [str(once.folder / "dau.safetensors")]
    assert found["run"]["trained_references"] == REFERENCES
    assert set(found["audits"]) | set(found["skipped"]) == set(find_audits())
    for name, entry in found["audits"].items():
        assert len(entry["retrained"]) == REFERENCES, name
        assert entry["low"] == min(entry["retrained"])
        assert entry["high"] == max(entry["retrained"])
        assert entry["false_alarm_rate"] == pytest.approx((1 + (entry["side"] == "both")) / (REFERENCES + 1))
        assert entry["outside"] == (entry["p_value"] <= entry["false_alarm_rate"] + 1e-9)
        assert entry["gap"] == pytest.approx(entry["value"] - sum(entry["retrained"]) / REFERENCES)
    for verdict in (found["verdict"], found["original"]):
        assert verdict["false_alarm_rate"] == pytest.approx(1 / (REFERENCES + 1))
        assert verdict["inside"] == (verdict["p_value"] > verdict["false_alarm_rate"] + 1e-9)
        assert verdict["audits"] == len(found["audits"])


def test_rates_and_gaps_are_those_of_the_run_that_made_the_model(trained: Called, once: Called) -> None:
    found, methods = report(trained), once.report["methods"]
    for name, column in (("value", "dau"), ("original", "original")):
        for rate in ("ua", "ra", "ta"):
            assert found["audits"][rate][name] == methods[column][rate]
        for attack, share in methods[column]["attacks"].items():
            assert found["audits"][f"attack_{attack}"][name] == share
    for side in ("audited", "original"):
        gaps = found["gaps"][side]
        four = [gaps["signed"][name] for name in ("ua", "ra", "ta", "attack_confidence")]
        assert gaps["to_mean"] == pytest.approx(sum(map(abs, four)) / 4)
        assert gaps["to_mean"] <= gaps["mean_of_pairs"] + 1e-9
    assert found["gaps"]["audited"]["signed"]["ua"] == pytest.approx(found["audits"]["ua"]["gap"])
    assert len(found["gaps"]["retrained_to_mean_of_others"]) == REFERENCES


def test_the_table_fits_a_terminal_and_says_how_sure_it_is(trained: Called) -> None:
    lines = trained.stdout.splitlines()
    # A path is as long as it is.
    assert max(len(line) for line in lines if os.sep not in line) <= 80
    assert "…" not in trained.stdout
    text = " ".join(trained.stdout.split())
    for entry in report(trained)["audits"].values():
        assert entry["label"] in text
    word = "INSIDE" if report(trained)["verdict"]["inside"] else "OUTSIDE"
    assert f"{word}: " in text
    assert "in about 20 % of cases" in text
    assert "no proof of deletion" in text


def test_the_same_references_from_files_give_the_same_numbers(
    trained: Called, once: Called, place: Path
) -> None:
    original, model = once.folder / "original.safetensors", once.folder / "dau.safetensors"
    again = audit(place / "audit again", model, "--original", original, "--references", trained.folder)
    assert {file.name for file in again.folder.iterdir()} == {"audit.json", "audit.html"}
    found, before = report(again), report(trained)
    assert found["audits"] == before["audits"]
    assert found["verdict"] == before["verdict"]
    assert found["run"]["references"] == before["run"]["references"]
    assert found["run"]["trained_references"] == 0


def test_several_models_are_compared_as_distributions(trained: Called, once: Called, place: Path) -> None:
    models = [once.folder / f"{name}.safetensors" for name in ("dau", "retrain")]
    options = ("--original", once.folder / "original.safetensors", "--references", trained.folder)
    found = report(audit(place / "audit two", *models, *options))
    assert "klom_forget_mean" in found["audits"]
    assert "ulira_auc" in found["skipped"]
    assert found["audits"]["klom_forget_mean"]["original"] is None
    assert found["verdict"]["false_alarm_rate"] == pytest.approx(1 / 3)


def test_the_original_is_told_apart_where_a_class_is_forgotten(place: Path, once: Called) -> None:
    original = once.folder / "original.safetensors"
    options = ("--original", original, "--train-references", 2, "--forget", "class:3", "--epochs", 12)
    found = report(audit(place / "audit class", original, *options))
    assert not found["verdict"]["inside"]
    assert found["verdict"]["outside"] == found["original"]["outside"]
    assert found["audits"]["ua"]["gap"] < -50
    assert found["audits"]["relearning"]["value"] == 0


# ---- how it is called


def test_its_options_are_those_of_unlearning() -> None:
    named = {parameter.name: parameter for parameter in unlearn.params}
    own = {parameter.name: parameter for parameter in make_audit(unlearn.params).params}
    assert all(own[name] is named[name] for name in SHARED["audit"])
    assert set(own) - SHARED["audit"] == {"audited", "original", "references", "train_references"}


def test_help_names_its_options_and_where_it_is_found(tmp_path: Path) -> None:
    called = audit(tmp_path, "--help")
    assert called.code == 0
    assert "dau_fast audit [OPTIONS] CHECKPOINT" in called.stdout
    assert "--train-references" in called.stdout


# ---- mistakes


@pytest.fixture(scope="module")
def files(place: Path, once: Called, trained: Called) -> Path:
    """Folders of references that cannot be used, and `fine`, which can."""
    folder = place / "odd references"
    for name in ("fine", "other_split", "other_images", "silent", "mixed", "foreign", "empty"):
        (folder / name).mkdir(parents=True)
    sources = [trained.folder / f"reference_{i + 1}.safetensors" for i in range(2)]
    for source in sources:
        shutil.copy(source, folder / "fine")
    origin = once.metadata("retrain")
    roles = once.roles().copy()
    roles[0] = (roles[0] + 1) % 3
    changed = {
        "other_split": {**origin, "split": encode_roles(roles)},
        "other_images": {**origin, "forget": "0" * 64},
        "mixed": {**origin, "method": "retrain_fast"},
        "silent": {key: origin[key] for key in ("dataset", "arch", "split")},
    }
    for name, metadata in changed.items():
        shutil.copy(sources[0], folder / name)
        save_file(
            load_file(sources[1]), folder / name / "second.safetensors", {"dau_fast": json.dumps(metadata)}
        )
    for name, made in (("before", "original"), ("unlearned", "dau")):
        (folder / name).mkdir()
        shutil.copy(sources[0], folder / name)
        shutil.copy(once.folder / f"{made}.safetensors", folder / name / "a.safetensors")
    torch.save(load_file(sources[0]), folder / "foreign" / "a.pt")
    torch.save(load_file(sources[1]), folder / "foreign" / "b.pt")
    return folder


MISTAKES = [
    ("{dau} --original {original}", "give --references or --train-references, and not both"),
    ("{dau} --original {original} --references {files}/fine --train-references 3", "and not both"),
    ("{dau} --references {files}/fine", "Missing option '--original'"),
    ("--original {original} --references {files}/fine", "Missing argument 'CHECKPOINT...'"),
    ("{dau} --original {files}/none.pt --references {files}/fine", "none.pt' does not exist"),
    ("{files}/none.pt --original {original} --references {files}/fine", "none.pt' does not exist"),
    ("{dau} --original {original} --references {files}/none", "--references {files}/none is not a folder"),
    ("{dau} --original {original} --references {files}/empty", "0 retrained models for 1 audited ones"),
    ("{dau} --original {original} --train-references 1", "--train-references: 1 retrained models for 1"),
    ("{dau} --original {original} --train-references 0", "--train-references"),
    ("{dau} {retrain} --original {original} --references {files}/fine", "expected at least 4"),
    ("{dau} --original {original} --references {once}", "is the same model as '{dau}'"),
    ("{dau} --original {original} --references {files}/before", "forget set, as 'original' is"),
    ("{retrain} --original {original} --references {files}/unlearned", "forget set, as 'dau' is"),
    ("{dau} --original {original} --references {files}/other_split", "trained on another split"),
    ("{dau} --original {original} --references {files}/other_images", "retrained without other images"),
    ("{dau} --original {original} --references {files}/mixed", "in several ways (retrain, retrain_fast)"),
    ("{dau} --original {original} --references {files}/silent", "does not say how it was trained"),
    ("{dau} --original {original} --references {files}/foreign", "does not say how it was trained"),
    ("{dau} --original {original} --references {files}/fine --seed 9", "give --forget and --seed as in"),
    ("{dau} --original {original} --references {files}/fine --forget class:3", "made to forget other images"),
    ("{dau} --original {original} --references {files}/fine --arch resnet18", "another architecture"),
    ("{dau} --original {original} --references {files}/fine --forget class:x", "'class:x'"),
    (
        "{dau} --original {original} --references {files}/fine --dataset mnist",
        "--dataset mnist: expected one of digits, ",
    ),
    ("{dau} --original {original} --references {files}/fine --methods dau", "--methods"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_costs_one_line_and_leaves_nothing(
    files: Path, once: Called, tmp_path: Path, arguments: str, named: str
) -> None:
    names = {name: once.folder / f"{name}.safetensors" for name in ("original", "dau", "retrain")}
    known = {**names, "files": files, "once": once.folder}
    called = audit(tmp_path / "new" / "out", *(part.format(**known) for part in arguments.split()))
    assert called.code == 2
    assert called.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", called.stderr), called.stderr
    assert named.format(**known) in called.stderr
    assert contents(tmp_path) == {}


def test_a_model_that_does_not_say_what_it_was_trained_on_is_audited_with_a_warning(
    tmp_path: Path, once: Called, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(once.weights("dau"), tmp_path / "mine.pt")
    options = ("--original", once.folder / "original.safetensors", "--references", files / "fine")
    called = audit(tmp_path / "out", tmp_path / "mine.pt", *options)
    assert report(called)["verdict"]["audits"] > 20
    assert "mine.pt does not say which images it was trained on" in caplog.text + called.stderr


def test_several_processes_are_refused(
    tmp_path: Path, once: Called, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    model, original = (once.folder / f"{name}.safetensors" for name in ("dau", "original"))
    called = audit(tmp_path / "out", model, "--original", original, "--references", files / "fine")
    assert called.code == 2
    assert called.stderr == "error: an audit is for one process: start it without torchrun\n"


def test_every_checkpoint_of_a_run_says_what_made_it_and_what_it_is_to_forget(once: Called) -> None:
    forget = once.report["run"]["forget"]["sha256"]
    for method, forgotten in (("original", None), ("dau", forget), ("retrain", forget)):
        metadata = once.metadata(method)
        assert metadata["method"] == method
        assert metadata.get("forget") == forgotten


@pytest.mark.slow
def test_a_pruned_original_is_audited_against_references_with_its_masks(place: Path) -> None:
    run = succeed(place / "pruned for audit", "--prune", "random", "--sparsity", 0.5, "--methods", "dau")
    original, model = (run.folder / f"{name}.safetensors" for name in ("original", "dau"))
    called = audit(place / "audit pruned", model, "--original", original, "--train-references", 2)
    assert report(called)["run"]["trained_references"] == 2
    masks = checkpoints.load_masks(original)
    kept = checkpoints.load_masks(called.folder / "reference_1.safetensors")
    assert masks is not None
    assert kept is not None
    assert kept.sparsity == pytest.approx(masks.sparsity)
