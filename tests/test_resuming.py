"""Runs that are killed and resumed end with the bytes of undisturbed ones."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import Called, call, contents, succeed
from safetensors.torch import save_file
from toys import TENTH, trained

from dau_fast.config import FINE_TUNE, TrainingRecipe
from dau_fast.job import keeping
from dau_fast.job.experiment import Experiment, SeedResult, run_seed
from dau_fast.job.keeping import Keeper
from dau_fast.job.tuning import Trial, Tuned, Tuning
from dau_fast.methods.finetune import unlearn
from dau_fast.methods.running import Finished, run_timed
from dau_fast.methods.task import Task

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are killed")
RUN = ("--epochs", 1, "--methods", "ga,retrain", "--seed", 3)
WEIGHTS = ("original", "retrain", "ga")


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Called:
    return succeed(place / "undisturbed", *RUN)


def kill_after(seconds: float, work: Callable[[], object]) -> bool:
    """Do `work` in a process of its own that is killed after `seconds`; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def assert_same(run: Called, undisturbed: Called) -> None:
    assert sorted(contents(run.folder)) == sorted(contents(undisturbed.folder))
    for name in WEIGHTS:
        file = f"{name}.safetensors"
        assert (run.folder / file).read_bytes() == (undisturbed.folder / file).read_bytes()
    rates = ("ua", "ra", "ta", "mia_efficacy", "attacks", "avg_gap", "confidence")
    for name, entry in undisturbed.report["methods"].items():
        assert {key: run.report["methods"][name][key] for key in rates} == {key: entry[key] for key in rates}


def test_killed_at_random_and_resumed_the_bytes_are_the_same(
    request: pytest.FixtureRequest, tmp_path: Path, undisturbed: Called
) -> None:
    kills = request.config.getoption("--kills")
    chance = random.Random(0)
    usual = undisturbed.report["run"]["wall_seconds"]
    for number in range(kills):
        out = tmp_path / str(number)
        # Now and then a resumed run is killed too.
        while kill_after(chance.uniform(0, usual), lambda out=out: call(out, *RUN, "--resume")):
            if chance.random() < 0.5:
                break
        assert_same(succeed(out, *RUN, "--resume"), undisturbed)


def die_at_the_end(folder: Path, *arguments: object) -> None:
    """Run the command line into `folder` in a process that dies where it would write its results."""

    def dying(*_: object) -> None:
        os._exit(9)

    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dau_fast.unlearn._write", dying)
            call(folder, *arguments)

    assert not kill_after(60, run)


def test_a_resumed_run_says_what_it_took_over(tmp_path: Path, undisturbed: Called) -> None:
    die_at_the_end(tmp_path, *RUN)
    (unfinished,) = tmp_path.iterdir()
    assert unfinished.name.startswith(".unfinished-")
    resumed = succeed(tmp_path, *RUN, "--resume")
    assert_same(resumed, undisturbed)
    assert resumed.report["run"]["resumed"] == ["original", "retrain", "ga"]
    assert "resumed" not in undisturbed.report["run"]


def test_ctrl_c_in_the_third_repeat_does_not_lose_the_first_two(tmp_path: Path) -> None:
    """With --resume they stay; the run that goes on trains what is left."""
    repeated = ("--epochs", 1, "--methods", "ga", "--seed", 3, "--repeats", 3, "--resume")
    seeds: list[int] = []

    def interrupted(experiment: Experiment, seed: int, **more: Any) -> SeedResult:
        seeds.append(seed)
        if seed == 5:
            raise KeyboardInterrupt
        return run_seed(experiment, seed, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dau_fast.job.experiment.run_seed", interrupted)
        stopped = call(tmp_path / "out", *repeated)
    assert (stopped.code, seeds) == (130, [3, 4, 5])
    resumed = succeed(tmp_path / "out", *repeated)
    assert resumed.report["run"]["resumed"] == ["original", "ga"] * 2
    assert [run["seed"] for run in resumed.report["runs"]] == [3, 4, 5]
    assert {path.name[0] for path in resumed.folder.iterdir()} & {"."} == set()


def test_a_tuned_run_goes_on_from_the_methods_that_were_tuned(tmp_path: Path) -> None:
    tuned = ("--epochs", 1, "--methods", "ga,head_only", "--tune", 3, "--seed", 3)
    undisturbed = succeed(tmp_path / "undisturbed", *tuned)
    out = tmp_path / "out"
    die_at_the_end(out, *tuned)
    resumed = succeed(out, *tuned, "--resume")
    assert resumed.report["run"]["resumed"] == ["original", "ga", "head_only"]
    for name in ("original", "ga", "head_only"):
        file = f"{name}.safetensors"
        assert (out / file).read_bytes() == (undisturbed.folder / file).read_bytes()
    for name, found in undisturbed.report["tuning"].items():
        again = resumed.report["tuning"][name]
        assert again["chosen"] == found["chosen"]
        for key in ("settings", "score", "terms", "failure"):
            assert [trial.get(key) for trial in again["trials"]] == [
                trial.get(key) for trial in found["trials"]
            ]
    assert resumed.report["run"]["settings"] == undisturbed.report["run"]["settings"]


def test_without_asking_nothing_is_taken_over(tmp_path: Path, undisturbed: Called) -> None:
    kept = tmp_path / ".unfinished-old" / "kept"
    kept.mkdir(parents=True)
    (kept / "something.json").touch()
    run = succeed(tmp_path, *RUN)
    assert_same(run, undisturbed)
    assert "resumed" not in run.report["run"]


# ---- what is kept, and for whom


@pytest.fixture(scope="module")
def task() -> Task:
    return trained(TENTH)


def work(task: Task, calls: list[str] | None = None) -> Callable[[], Finished]:
    def run() -> Finished:
        if calls is not None:
            calls.append("run")
        return run_timed("ft", lambda given: unlearn(given, TrainingRecipe(epochs=1, lr=0.01)), task)

    return run


def test_a_part_comes_back_as_it_was(task: Task, tmp_path: Path) -> None:
    keeper, calls = Keeper(tmp_path / "kept"), []
    first = keeper.finish("ft", task, None, work(task, calls))
    again = Keeper(tmp_path / "kept").finish("ft", task, None, work(task, calls))
    assert calls == ["run"]
    assert (again.seconds, again.loops, again.history) == (first.seconds, first.loops, first.history)
    states = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert again.model is not task.original


def test_trials_come_back_and_those_of_another_plan_do_not(task: Task, tmp_path: Path) -> None:
    plan, calls = [TrainingRecipe(epochs=1, lr=0.01), TrainingRecipe(epochs=1, lr=0.02)], []
    trials = (Trial({"lr": 0.01}, failure="ft diverged"), Trial({"lr": 0.02}, 1.5, {"a": 1.5}, 2.0))

    def tune() -> Tuned:
        return Tuned(work(task, calls)(), plan[1], Tuning(trials, 1, 3.0))

    first = Keeper(tmp_path).finish_tuned("ft", task, plan, tune)
    again = Keeper(tmp_path).finish_tuned("ft", task, plan, tune)
    assert calls == ["run"]
    assert (
        (first.settings, first.tuning) == (again.settings, again.tuning) == (plan[1], Tuning(trials, 1, 3.0))
    )
    Keeper(tmp_path).finish_tuned("ft", task, plan[::-1], tune)
    assert calls == ["run", "run"]


@pytest.mark.parametrize("change", ["name", "settings", "seed", "weights", "labels", "code"])
def test_a_part_of_another_run_is_not_taken(
    change: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    Keeper(tmp_path).finish("ft", task, None, work(task))
    if change == "weights":
        task = trained(TENTH, seed=1)
    if change == "labels":
        task = replace(task, images=replace(task.images, labels=task.images.labels.flip(0)))
    if change == "code":
        monkeypatch.setattr(keeping, "digest_code", lambda: "other")
    other = replace(task, seed=task.seed + (change == "seed"))
    name, settings = ("ga" if change == "name" else "ft"), (FINE_TUNE if change == "settings" else None)
    Keeper(tmp_path).finish(name, other, settings, work(task, calls))
    assert calls == ["run"]


@pytest.mark.parametrize(
    "damage", ["cut", "changed", "no facts", "half facts", "other facts", "other tensors"]
)
def test_a_damaged_part_is_done_again(damage: str, task: Task, tmp_path: Path) -> None:
    calls: list[str] = []
    Keeper(tmp_path).finish("ft", task, None, work(task))
    (facts,), (weights,) = tmp_path.glob("*.json"), tmp_path.glob("*.weights.safetensors")
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "changed":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no facts":
        facts.unlink()
    elif damage == "half facts":
        facts.write_text(facts.read_text()[:40])
    elif damage == "other facts":
        facts.write_text(facts.read_text().replace('"loops": [{', '"loops": [{"more": 1, '))
    else:
        save_file({"w": torch.zeros(1)}, weights)
    Keeper(tmp_path).finish("ft", task, None, work(task, calls))
    assert calls == ["run"]
    assert json.loads(facts.read_text().split("\n", 1)[1])["seconds"] > 0
