"""The GPU suite without a GPU: its plan, its limits, and what it leaves whatever becomes of its jobs."""

from __future__ import annotations

import json
import math
import os
import random
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from scripts import BENCHMARKS, run

# Every job of the suite, in its order; of these, what needs pictures.
JOBS = [
    "selfcheck", "correctness", "probe", "quality", "augmented", "budget", "ops-sensitivity", "ops-barlow",
    "ops-masks", "ops-images", "ops-batch_norm", "loop", "scale", "scale-streaming",
]  # fmt: skip
WITHOUT_DATA = [job for job in JOBS if job not in ("quality", "augmented")]
pytestmark = pytest.mark.usefixtures("importable")


def summary_of(record: Path) -> dict:
    return json.loads((record / "summary.json").read_text())


def names_in(archive: Path) -> set[str]:
    with tarfile.open(archive) as opened:
        return set(opened.getnames())


def quality_jobs(record: Path, data: Path | None, seconds: float) -> dict[str, list[str]]:
    """Commands of the stage quality, by job."""
    from gpu_suite import plan_stages

    stages = plan_stages(record, torch.device("cuda"), data, smoke=False)
    (stage,) = [stage for stage in stages if stage.name == "quality"]
    return {job.name: list(job.command) for job in stage.plan(seconds)}


def test_the_papers_tables_are_filled_where_nothing_limits_them(tmp_path: Path) -> None:
    assert list(quality_jobs(tmp_path, tmp_path, math.inf)) == ["quality", "augmented", "budget", "paper"]
    assert list(quality_jobs(tmp_path, tmp_path, 500.0)) == ["quality", "augmented", "budget"]
    assert list(quality_jobs(tmp_path, None, math.inf)) == ["budget"]


def test_the_jobs_of_quality_share_its_minutes_and_keep_their_models_out_of_the_record(
    tmp_path: Path,
) -> None:
    def told(data: Path | None, job: str, option: str) -> str:
        command = quality_jobs(tmp_path / "record", data, 600.0)[job]
        return command[command.index(option) + 1]

    minutes = [float(told(tmp_path, job, "--minutes")) for job in ("quality", "augmented", "budget")]
    # Of ten minutes, each job leaves a tenth of its own for its start.
    assert minutes == pytest.approx([4.05, 3.15, 1.8])
    assert float(told(None, "budget", "--minutes")) == 9.0
    bank = Path(told(tmp_path, "quality", "--bank"))
    assert not bank.is_relative_to(tmp_path / "record")


def test_means_of_judgements_are_no_targets(tmp_path: Path) -> None:
    from support.recording import append_row, write_json
    from support.suite import Suite

    (tmp_path / "quality").mkdir()
    append_row(tmp_path / "quality" / "judgements.jsonl", {"entry": "dau", "avg_gap": 1.0})
    write_json(tmp_path / "quality" / "summary.json", [{"entry": "dau", "gap": 1.0}])
    Suite(tmp_path).run([])
    found = summary_of(tmp_path)
    assert found["rows"]["quality"] == [{"entry": "dau", "avg_gap": 1.0}]
    assert found["targets"]["quality"] == []


class Chance:
    """A clock, and jobs that end at random: well, wrongly, by a kill, by their limit, or without a start."""

    def __init__(self, seed: int) -> None:
        self.now, self.random = 0.0, random.Random(seed)
        self.limits: dict[str, float] = {}

    def clock(self) -> float:
        return self.now

    def start(self, job, log: Path, limit: float) -> int | None:
        self.limits[job.name] = limit
        folder = log.parent / job.name
        folder.mkdir(exist_ok=True)
        (folder / "weights.safetensors").write_bytes(b"0" * 1000)
        fate = self.random.choice(["done", "wrong", "killed", "ended", "cut off", "missing"])
        if fate == "missing":
            raise FileNotFoundError(f"no such program: {job.command[0]}")
        self.now += limit if fate == "ended" else self.random.random() * limit
        log.write_text("some lines\nTraceback\n")
        row = json.dumps({"row": "copy", "bytes_per_second": 4e12}) + "\n"
        (folder / "rows.jsonl").write_text(row + (row[:9] if fate in ("killed", "cut off") else ""))
        if fate == "done":
            (folder / "summary.json").write_text(json.dumps({"targets": [{"what": "fast"}]}))
        return {"done": 0, "wrong": 1, "killed": -9, "ended": None, "cut off": -15}[fate]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("minutes", [None, 14.0])
def test_killed_at_random_it_ends_in_its_time_and_leaves_what_it_promised(
    seed: int, minutes: float | None, tmp_path: Path
) -> None:
    from gpu_suite import plan_stages
    from support.suite import PROMISED, Suite

    chance, delivered = Chance(seed), tmp_path / "out"
    record = tmp_path / "record"
    record.mkdir()
    stages = plan_stages(record, torch.device("cuda"), tmp_path, smoke=False)
    seconds = 60 * minutes if minutes else None
    suite = Suite(record, seconds, delivered, clock=chance.clock, start=chance.start)
    complete = suite.run(stages)
    assert chance.now <= (seconds or 60 * sum(stage.minutes for stage in stages))
    found = summary_of(record)
    assert [row["job"] for row in found["jobs"]] == JOBS
    fates = {row["job"]: row["fate"] for row in found["jobs"]}
    assert set(fates.values()) <= {"done", "failed", "killed", "ended", "not started"}
    assert complete == (set(fates.values()) == {"done"})
    for job, fate in fates.items():
        if fate in ("done", "killed"):
            assert found["rows"][job] == [{"row": "copy", "bytes_per_second": 4e12}]
        assert (job in found["targets"]) == (fate == "done")
    assert all(row["reason"] for row in found["jobs"] if row["fate"] != "done")
    assert {path.name for path in delivered.iterdir()} == set(PROMISED)
    assert not any(name.endswith(".safetensors") for name in names_in(delivered / "suite.tar.gz"))

    # The same command again runs what is not done, and nothing else.
    again = Chance(seed + 100)
    Suite(record, seconds, clock=again.clock, start=again.start).run(stages)
    assert again.limits.keys() == {job for job in JOBS if fates[job] != "done"} & again.limits.keys()
    assert not {job for job, fate in fates.items() if fate == "done"} & again.limits.keys()


def test_rows_are_judged_that_their_job_did_not_come_to_judge(tmp_path: Path) -> None:
    from gpu_suite import list_judges
    from support.recording import append_row
    from support.suite import Suite

    case = {"case": "SGD step, resnet18 at 95 %"}
    for folder, name, seconds in (
        ("ops-masks", "dau_fast", 1.0),
        ("ops-masks", "ASP", 5.0),
        ("probe", "a", 1.0),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        row = {"row": name, "implementation": name, "median_seconds": seconds, **case}
        append_row(tmp_path / folder / "rows.jsonl", row)
    Suite(tmp_path, judges=list_judges(torch.device("cuda"))).run([])
    found = summary_of(tmp_path)["targets"]
    assert found.keys() == {"ops-masks"}
    first, *others = found["ops-masks"]
    assert (first["value"], first["limit"], first["reached"]) == (5.0, 4, True)
    assert {target["reached"] for target in others} == {None}


def test_a_stage_cannot_take_the_time_of_another(tmp_path: Path) -> None:
    from support.suite import Job, Stage, Suite

    chance = Chance(0)
    chance.random.choice = lambda fates: "ended"  # type: ignore[method-assign]
    stages = [
        Stage("first", 4, lambda _: [Job("a", ("a",), share=0.5), Job("b", ("b",)), Job("c", ("c",))]),
        Stage("second", 2, lambda _: [Job("d", ("d",))]),
    ]
    Suite(tmp_path, clock=chance.clock, start=chance.start).run(stages)
    assert chance.limits == {"a": 120, "b": 120, "d": 120}
    assert [row["fate"] for row in summary_of(tmp_path)["jobs"]] == ["ended", "ended", "not started", "ended"]
    chance.limits = {}
    half = tmp_path / "half"
    half.mkdir()
    Suite(half, 180, clock=chance.clock, start=chance.start).run(stages)
    assert chance.limits == {"a": 60, "b": 60, "d": 60}


def test_processes_are_ended_with_their_children_and_cost_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support import suite

    monkeypatch.setattr(suite, "GRACE", 0.2)
    child = tmp_path / "child"
    commands = {
        "slow": ("sh", "-c", f"sh -c 'sleep 2; touch {child}' & sleep 60"),
        "wrong": ("sh", "-c", "echo no such file; exit 3"),
        "shot": ("sh", "-c", "kill -9 $$"),
        "missing": (str(tmp_path / "nothing"),),
        "right": (sys.executable, "-c", "import dau_fast; print(dau_fast.__file__)"),
    }
    jobs = [suite.Job(name, command) for name, command in commands.items()]
    limits = {"slow": 0.7}

    def start(job, log: Path, limit: float) -> int | None:
        return suite.run_process(job, log, limits.get(job.name, limit))

    began = time.perf_counter()
    record = tmp_path / "record"
    record.mkdir()
    assert not suite.Suite(record, start=start).run([suite.Stage("all", 1, lambda _: jobs)])
    assert time.perf_counter() - began < 8
    found = {row["job"]: row for row in summary_of(record)["jobs"]}
    fates = {name: row["fate"] for name, row in found.items()}
    assert fates == {
        "slow": "ended", "wrong": "failed", "shot": "killed", "missing": "failed", "right": "done",
    }  # fmt: skip
    assert found["wrong"]["reason"] == "no such file"
    assert found["wrong"]["code"] == 3
    assert Path((record / "right.log").read_text().strip()).is_relative_to(BENCHMARKS.parent)
    time.sleep(max(0.0, began + 2.3 - time.perf_counter()))
    assert not child.exists(), "a child of the ended job lives on"


def test_the_archive_keeps_small_files_where_not_all_fit(tmp_path: Path) -> None:
    from support.suite import MOST_BYTES, Suite

    (tmp_path / "trace.json").write_bytes(os.urandom(MOST_BYTES))
    (tmp_path / "rows.jsonl").write_text("{}")
    Suite(tmp_path).run([])
    assert names_in(tmp_path / "suite.tar.gz") == {"rows.jsonl", "jobs.jsonl"}
    assert summary_of(tmp_path)["left_out"] == ["trace.json"]


def test_every_command_of_the_plan_is_there_and_takes_its_options(tmp_path: Path) -> None:
    import budget
    import loop
    import probe
    import quality
    import scaling
    from gpu_suite import STAGES, plan_stages
    from support.speed import command

    doors = {f"{module.__name__}.py": module.main for module in (budget, loop, probe, quality, scaling)}
    for smoke in (True, False):
        stages = plan_stages(tmp_path, torch.device("cuda"), tmp_path, smoke)
        assert tuple(stage.name for stage in stages) == STAGES
        jobs = [job for stage in stages for job in stage.plan(60 * stage.minutes)]
        assert [job.name for job in jobs] == JOBS
        for job in jobs:
            if job.command[1] == "-m":
                continue
            assert (BENCHMARKS.parent / job.command[1]).is_file(), job.command
            door = doors.get(Path(job.command[1]).name) or command("some", lambda *_: [])
            door.make_context(job.command[1], list(job.command[2:]))
    # Without a limit nobody is told of one.
    assert not any("--minutes" in job.command for stage in stages for job in stage.plan(math.inf))


def test_a_dry_run_prints_the_plan_and_runs_nothing(tmp_path: Path) -> None:
    import gpu_suite

    done = CliRunner().invoke(gpu_suite.main, ["--dry-run", "--minutes", "14", "--record", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "correctness: 1.6 minutes" in done.output
    assert all(f"  {job}, at most" in done.output for job in WITHOUT_DATA)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_failed_are_told_of_and_cost_no_other(tmp_path: Path) -> None:
    from support.recording import append_row
    from support.speed import ROWS, Target, compare, finish

    rows = [
        {"row": "a", "case": "small", "implementation": "dau_fast", "median_seconds": 1.0},
        {"row": "b", "case": "small", "implementation": "rival", "median_seconds": 3.0},
        {"row": "c", "failed": "out of memory"},
        {"row": "d", "case": "large", "implementation": "rival captured", "median_seconds": 3.0},
    ]
    for row in rows:
        append_row(tmp_path / ROWS, row)
    cases = compare(rows)
    assert cases["small"]["rival"]["dau_fast_is_faster"] == 3.0
    assert "dau_fast_is_faster" not in cases["large"]["rival captured"]
    with pytest.raises(SystemExit, match="c: out of memory"):
        finish(tmp_path, cases, [Target("fast", None, 2.0)])
    assert json.loads((tmp_path / "summary.json").read_text())["failed"] == {"c": "out of memory"}


def test_targets_of_rows_that_did_not_run_are_not_measured() -> None:
    import barlow
    import batch_norm
    import images
    import loop
    import masks
    import sensitivity

    device = torch.device("cuda")
    for module in (barlow, batch_norm, images, masks, sensitivity):
        assert all(target.value is None for target in module.targets({}, device)), module.__name__
    assert all(target.value is None for target in loop.targets({}, None, device))


@pytest.mark.slow
def test_smoke_runs_every_stage_and_does_not_repeat_finished_jobs(pictures: Path, tmp_path: Path) -> None:
    done = run("gpu_suite.py", "--smoke", "--data", pictures, "--record", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary_of(tmp_path)
    assert {row["job"]: row["fate"] for row in found["jobs"]} == dict.fromkeys(JOBS, "done")
    assert {"commit", "hardware", "versions"} <= found["environment"].keys()
    tests = found["rows"]["correctness"]
    assert {row["outcome"] for row in tests} == {"passed", "skipped"}
    probe = {row["row"]: row for row in found["rows"]["probe"]}
    assert probe.keys() == {
        "copy", "matrix product", "eager, batch 8", "eager, turn of the game", "whole game, random:0.1",
        "whole game, class:0",
    }  # fmt: skip
    whole = probe["whole game, random:0.1"]
    assert 0 < whole["parts"]["turns"] < whole["seconds"] + whole["compile_seconds"]
    judged = [(row["task"], row["entry"]) for row in found["rows"]["quality"]]
    assert judged == [(task, entry) for task in ("random", "class") for entry in ("original", "dau")]
    played = [row["entry"] for row in found["rows"]["augmented"]]
    assert played == ["original", "dau", "no anchor of logits", "exposure alone"]
    budget = {row["row"]: row for row in found["rows"]["budget"]}
    assert budget["random:0.1: retrained"]["avg_gap"] == 0
    assert budget["class:0: turns x 0.1"]["image_equivalents"] > 0
    ops = json.loads((tmp_path / "ops-sensitivity" / "summary.json").read_text())["cases"]
    assert {"dau_fast", "definition", "definition compiled"} <= ops["sensitivity 4x6x5"].keys()
    for entries in ops.values():
        assert entries["dau_fast"].get("error", 0) < 1e-4
    barlow = json.loads((tmp_path / "ops-barlow" / "summary.json").read_text())
    assert {"dau_fast", "definition", "facebook compiled"} <= barlow["cases"]["8x6"].keys()
    images = json.loads((tmp_path / "ops-images" / "summary.json").read_text())["cases"]
    for entries in images.values():
        assert entries.keys() == {"dau_fast", "PyTorch", "PyTorch compiled", "torchvision"}
    norms = json.loads((tmp_path / "ops-batch_norm" / "summary.json").read_text())["cases"]
    assert norms.keys() == {f"8x4, {kind}" for kind in ("plain", "ReLU", "addition and ReLU")}
    for entries in norms.values():
        assert entries.keys() == {"dau_fast", "PyTorch", "PyTorch compiled"}
    masks = json.loads((tmp_path / "ops-masks" / "summary.json").read_text())["cases"]
    assert {"dau_fast", "foreach and foreach mask", "compiled"} <= masks["SGD step, small at 95 %"].keys()
    loop = json.loads((tmp_path / "loop" / "summary.json").read_text())
    assert loop["cases"]["whole job, random:0.1"].keys() == {"dau_fast", "DataLoader"}
    assert loop["job"]["methods"]["dau"]["avg_gap"] is not None
    scale = found["rows"]["scale"]
    assert {row["what"] for row in scale} == {"training", "game"}
    assert all(row["images_per_second"] > 0 and row["peak_bytes"] > 0 for row in scale)
    streaming = json.loads((tmp_path / "scale-streaming" / "summary.json").read_text())["cases"]
    assert streaming.keys() == {"files", "arrow", "arrays"}
    again = run("gpu_suite.py", "--smoke", "--data", pictures, "--record", tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "after" not in again.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so(tmp_path: Path) -> None:
    done = run("gpu_suite.py", "--record", tmp_path)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("search", [True, False])
def test_the_probe_searches_for_convolutions_where_it_says_so(
    search: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import probe

    from dau_fast.engine import steps

    asked: list[str] = []

    @contextmanager
    def noted(_: torch.device) -> Iterator[None]:
        asked.append("search")
        yield

    monkeypatch.setattr(steps, "fastest_convolutions", noted)
    monkeypatch.setattr(probe.loops, "fastest_convolutions", noted)
    row = probe.step(torch.device("cpu"), "eager", 8, search, smoke=True)
    assert row["cudnn_benchmark"] is search
    assert bool(asked) is search
    assert steps.fastest_convolutions is noted
