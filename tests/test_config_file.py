"""`--config`: a report does its run again, and files of options stand where the command line says nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calling import Called, call, contents, succeed
from safetensors.torch import load_file

RUNS = {
    "defaults": ("--methods", "dau,retrain"),
    "pruned": ("--methods", "dau", "--prune", "omp", "--sparsity", 0.8),
    "full": ("--methods", "dau", "--sensitivity", "full", "--accumulate", 2),
    "sampled": ("--methods", "dau", "--retain-sample", 3, "--forget", "class:1", "--seed", 5),
}


def weights(called: Called) -> dict[str, bytes]:
    """The files of weights, without what their metadata says."""
    return {
        file.name: b"".join(t.numpy().tobytes() for _, t in sorted(load_file(file).items()))
        for file in sorted(called.folder.glob("*.safetensors"))
    }


@pytest.fixture(scope="session")
def first(place: Path) -> Called:
    return succeed(place / "first", *RUNS["defaults"])


def again(first: Called, out: Path, *more: object) -> Called:
    """The run of a report: the file alone says what runs, but for what `call` says itself."""
    return succeed(out, "--config", first.folder / "report.json", *more)


def test_a_report_does_its_run_again(first: Called, tmp_path: Path) -> None:
    second = again(first, tmp_path)
    assert len(weights(first)) == 3
    assert weights(second) == weights(first)
    for name in ("options", "settings", "precision", "loop_parts"):
        assert second.report["run"][name] == first.report["run"][name]


@pytest.mark.slow
def test_a_tuned_run_is_done_again_with_what_was_chosen_and_not_tuned_again(tmp_path: Path) -> None:
    tuned = succeed(tmp_path / "first", "--methods", "head_only,ga", "--tune", 4)
    report = tuned.report
    assert report["run"]["options"]["tune"] == 4
    found = report["tuning"]["head_only"]
    chosen = found["trials"][found["chosen"]]
    assert len(found["trials"]) == 4
    assert chosen["score"] == min(trial["score"] for trial in found["trials"])
    assert (
        report["run"]["settings"]["head_only"] | chosen["settings"] == report["run"]["settings"]["head_only"]
    )
    entry = report["methods"]["head_only"]
    assert entry["tuning_seconds"] == found["seconds"] > entry["seconds"] == chosen["seconds"]
    assert "Tuned on validation images" in tuned.stdout
    second = again(tuned, tmp_path / "second")
    assert weights(second) == weights(tuned)
    assert "tuning" not in second.report
    assert second.report["run"]["settings"] == report["run"]["settings"]


@pytest.mark.slow
def test_a_run_of_all_methods_is_done_again_with_those_that_ran(tmp_path: Path) -> None:
    first = succeed(tmp_path / "first", "--methods", "all", "--prune", "omp", turns=16)
    assert first.report["run"]["options"]["methods"] == ["all"]
    second = again(first, tmp_path / "second")
    assert weights(second) == weights(first)
    assert second.report["run"]["options"]["methods"] == list(first.report["run"]["methods"])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS)[1:])
def test_other_runs_are_done_again_too(name: str, tmp_path: Path) -> None:
    first = succeed(tmp_path / "first", *RUNS[name], turns=16)
    assert weights(again(first, tmp_path / "second")) == weights(first)


@pytest.mark.slow
def test_settings_that_were_not_the_usual_ones_are_played_again(first: Called, tmp_path: Path) -> None:
    report = first.report
    report["run"]["settings"]["dau"]["alpha"] = 2.0
    file = tmp_path / "changed.json"
    file.write_text(json.dumps(report))
    changed = succeed(tmp_path / "out", "--config", file)
    assert changed.report["run"]["settings"]["dau"]["alpha"] == 2.0
    assert weights(changed)["original.safetensors"] == weights(first)["original.safetensors"]
    assert weights(changed)["dau.safetensors"] != weights(first)["dau.safetensors"]


def test_what_the_command_line_says_goes_first(first: Called, tmp_path: Path) -> None:
    other = again(first, tmp_path, "--seed", 1, "--methods", "ft")
    assert other.report["run"]["seed"] == 1
    assert set(other.report["methods"]) == {"original", "ft"}


def test_a_toml_file_holds_options_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('methods = "ft"\nseed = 3\nretrain-recipe = "fast"\n[settings.ft]\nepochs = 2\n')
    run = succeed(tmp_path / "out", "--config", file).report["run"]
    assert (run["seed"], run["settings"]["ft"]["epochs"], list(run["methods"])) == (3, 2, ["ft"])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("missing.toml", None, "--config {file} is not a file"),
        ("broken.toml", "seed = ", "--config {file} cannot be read as TOML or JSON"),
        ("broken.json", "{", "--config {file} cannot be read as TOML or JSON"),
        ("list.json", "[1]", "--config {file} holds no options"),
        ("unknown.toml", "sede = 1", "--config {file} names the unknown option 'sede'"),
        ("flat.toml", "settings = 1", "'settings' in '{file}' is no table of tables"),
        ("field.toml", "[settings.dau]\nrate = 1", "dau has no setting 'rate'"),
        ("value.toml", "[settings.dau]\nalpha = -1", "`alpha=-1`: expected a number from 0 up"),
        ("old.json", '{"run": {"precision": "fp32"}}', "does not say how it came about (no 'engine')"),
        ("type.toml", 'seed = "x"', "Invalid value for '--seed'"),
    ],
)
def test_a_file_that_will_not_do_costs_one_line(
    name: str, text: str | None, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    before = contents(tmp_path)
    called = call(tmp_path / "out", "--config", file)
    assert called.code == 2
    assert called.stderr.count("\n") == 1
    assert expected.format(file=file) in called.stderr
    assert contents(tmp_path) == before
