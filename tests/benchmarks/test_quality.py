"""The command that judges parts of the game and rivals, on tiny invented pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

pytestmark = pytest.mark.usefixtures("importable")


def judged(pictures: Path, folder: Path, *arguments: str) -> Result:
    import quality

    given = ["--data", pictures, "--bank", folder / "bank", "--record", folder / "record", "--smoke"]
    few = ["--seeds", "1-2", "--retrained", "2", "--tasks", "random"]
    return CliRunner().invoke(quality.main, [*map(str, given), *few, *arguments])


def test_it_judges_once_and_goes_on_where_it_was(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality

    entries = (quality.Entry("dau", asked={"turns": 2}), quality.Entry("ft", "ft", {"epochs": 1}))
    monkeypatch.setattr(quality, "PARTS", entries)
    first = judged(pictures, tmp_path)
    assert first.exit_code == 0, first.output
    assert first.output.count("random:1") == first.output.count("random:2") == 3
    again = judged(pictures, tmp_path)
    assert again.output.count("random:") == 0
    summary = json.loads((tmp_path / "record" / "summary.json").read_text())
    assert [line["entry"] for line in summary] == ["original", "dau", "ft"]
    rows = [json.loads(line) for line in (tmp_path / "record" / "judgements.jsonl").read_text().splitlines()]
    ft = [row["avg_gap"] for row in rows if row["entry"] == "ft"]
    assert summary[2]["gap"] == pytest.approx(sum(ft) / 2)
    assert summary[2]["worse_than_dau"]["mean"] == pytest.approx(
        sum(ft) / 2 - sum(row["avg_gap"] for row in rows if row["entry"] == "dau") / 2
    )


def test_single_entries_are_judged_beside_the_game(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality

    entries = tuple(quality.Entry(name, asked={"turns": 2}) for name in ("dau", "one", "other"))
    monkeypatch.setattr(quality, "PARTS", entries)
    found = judged(pictures, tmp_path, "--only", "other")
    assert found.exit_code == 0, found.output
    summary = json.loads((tmp_path / "record" / "summary.json").read_text())
    assert [line["entry"] for line in summary] == ["original", "dau", "other"]
    refused = judged(pictures, tmp_path / "again", "--only", "neither")
    assert refused.exit_code == 2
    assert "expected one of dau, one, other" in refused.output


def test_methods_run_with_denormal_numbers_as_zero(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality

    products, judge = [], quality.judge_original

    def spy(*given: Any) -> dict[str, Any]:
        products.append((torch.tensor(1e-30) * torch.tensor(1e-10)).item())
        return judge(*given)

    monkeypatch.setattr(quality, "PARTS", ())
    monkeypatch.setattr(quality, "judge_original", spy)
    result = judged(pictures, tmp_path)
    assert result.exit_code == 0, result.output
    assert products == [0.0, 0.0]


def test_what_fails_is_counted_and_ends_nothing(tmp_path: Path) -> None:
    import quality

    def row(entry: str, seed: int, gap: float) -> dict[str, Any]:
        return {
            "task": "random", "seed": seed, "entry": entry, "floor": 1.0, "avg_gap": gap, "seconds": 1.0,
            "gap_to_mean": gap, "signed": {"ua": gap}, "margins": {"forget": 1.0}, "extra_signed": {},
        }  # fmt: skip

    rows = [row("dau", seed, 1.0 + seed) for seed in (1, 2)] + [row("ft", seed, 4.0) for seed in (1, 2)]
    rows += [{"task": "random", "seed": seed, "entry": "ga", "failed": "diverged"} for seed in (1, 2)]
    file = tmp_path / "judgements.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    dau, ft, ga = quality.summarise_all(file)
    assert (dau["gap"], dau["floors"], dau["failed"]) == (2.5, 2.5, 0)
    assert ft["worse_than_dau"]["mean"] == 1.5
    assert (ga["failed"], "gap" in ga) == (2, False)


def test_one_seed_has_means_without_intervals(tmp_path: Path) -> None:
    import quality

    row = {
        "task": "random", "seed": 1, "floor": 2.0, "seconds": 5.0, "retraining_seconds": 20.0,
        "gap_to_mean": 3.0, "signed": {"ua": 3.0}, "margins": {"forget": 1.0}, "extra_signed": {},
    }  # fmt: skip
    rows = [row | {"entry": "dau", "avg_gap": 3.0}, row | {"entry": "ft", "avg_gap": 4.0}]
    file = tmp_path / "judgements.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    dau, ft = quality.summarise_all(file)
    assert (dau["seeds"], dau["gap"], dau["floor"], dau["floors"]) == (1, 3.0, 2.0, 1.5)
    assert (dau["seconds"], dau["retraining_seconds"], dau["signed"]) == (5.0, 20.0, {"ua": 3.0})
    assert not {"difference", "p_above", "p_equivalent", "worse_than_dau"} & (dau.keys() | ft.keys())
    assert quality._summary_line(dau).endswith("3.00,  1.50 floors, 5.0 s of 20.0 for retraining")
    # Of toys, retrained models may be alike.
    file.write_text(json.dumps(rows[0] | {"floor": 0.0}) + "\n")
    assert quality.summarise_all(file)[0]["floors"] is None


def test_on_cuda_all_of_cifar10_can_be_memorised() -> None:
    from support.settings import CIFAR10, Setting, choose_setting

    from dau_fast.data.images import Augmentation

    plain = choose_setting(torch.device("cuda"), None, smoke=False, plain=True)
    assert plain == replace(CIFAR10, augmentation=Augmentation())
    assert plain != CIFAR10
    assert choose_setting(torch.device("cpu"), None, smoke=False, plain=True) == Setting()


def test_a_record_says_what_is_unusual_of_its_setting(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality

    monkeypatch.setattr(quality, "PARTS", ())
    for name, arguments, epochs in (("usual", (), None), ("other", ("--epochs", "2", "--plain"), 2)):
        found = judged(pictures, tmp_path / name, *arguments)
        assert found.exit_code == 0, found.output
        known = json.loads((tmp_path / name / "record" / "environment.json").read_text())
        assert known.get("setting", {}).get("recipe", {}).get("epochs") == epochs


def test_epochs_are_so_few_that_all_trainings_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import quality
    from support.settings import CIFAR10

    monkeypatch.setattr(quality, "measure_training_rate", lambda *_: 45_000.0)

    def fit(minutes: float, trainings: int = 5) -> int:
        setting = quality.fit_setting(CIFAR10, trainings, minutes, torch.device("cpu"), tmp_path)
        return setting.recipe.epochs

    # 135 s for five trainings, of which an epoch takes a second each.
    assert (fit(3), fit(0.01), fit(1000)) == (27, 1, 182)
    (tmp_path / "environment.json").write_text(json.dumps({"setting": {"recipe": {"epochs": 20}}}))
    assert fit(3) == 20


@pytest.mark.parametrize("kinds", ["random", "random,class", "random,mislabelled,backdoor", "class,one"])
def test_as_many_trainings_are_counted_as_are_made(
    kinds: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality
    from support import bank
    from support.settings import SMOKE

    passes, train = [], bank.Training.train

    def noted(training: bank.Training) -> Any:
        passes.append(len(training.index))
        return train(training)

    monkeypatch.setattr(quality, "PARTS", ())
    monkeypatch.setattr(bank.Training, "train", noted)
    assert judged(pictures, tmp_path, "--tasks", kinds).exit_code == 0
    counted = quality.count_trainings(SMOKE, kinds.split(","), (1, 2), 2)
    # Retrained models are trained on less than all images.
    assert 0.7 * counted * SMOKE.training < sum(passes) < counted * SMOKE.training


def test_nothing_is_begun_when_the_minutes_are_over(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quality

    entries = tuple(quality.Entry(name, asked={"turns": 2}) for name in ("dau", "other"))
    monkeypatch.setattr(quality, "PARTS", entries)
    # Asked before a task, and before each of its rows.
    answers = iter([False, False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(quality.Clock, "over", property(lambda _: next(answers, True)))
        found = judged(pictures, tmp_path, "--minutes", "60")
    assert found.exit_code == 0, found.output
    assert "6 trainings of 1 epochs, of 1" in found.output
    rows = (tmp_path / "record" / "judgements.jsonl").read_text().splitlines()
    assert [json.loads(row)["entry"] for row in rows] == ["original", "dau"]
    assert "The minutes are over: 4 more rows" in found.output
    again = judged(pictures, tmp_path, "--minutes", "60")
    assert "over" not in again.output
    assert len((tmp_path / "record" / "judgements.jsonl").read_text().splitlines()) == 6


def test_all_methods_but_those_that_retrain_are_rivals(pictures: Path) -> None:
    import quality

    names = [entry.method for entry in quality.list_entries("rivals")]
    assert names[0] == "dau"
    assert {"ft", "ga", "salun", "scrub"} <= set(names)
    assert not {"retrain", "retrain_fast", "retrain_clean"} & set(names)


def test_the_game_can_be_judged_alone(pictures: Path) -> None:
    import quality

    assert [entry.name for entry in quality.list_entries("dau")] == ["dau"]
    assert len(quality.list_entries("parts")) > 5
