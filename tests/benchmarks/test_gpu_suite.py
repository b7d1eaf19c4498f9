"""The GPU suite at toy size on the CPU, so that it works on the day a GPU is at hand."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from scripts import BENCHMARKS, run

# Every job of the suite, in its order.
JOBS = [
    "tests", "ops-barlow", "ops-images", "ops-sensitivity", "masks", "loop", "scale-streaming", "scale",
    "quality-original", "quality-random-0.1", "quality-class-0",
]  # fmt: skip


@pytest.mark.slow
def test_smoke_runs_every_stage_leaves_a_record_and_does_not_repeat_finished_jobs(tmp_path: Path) -> None:
    # Two halves at the same time, each on one core, into one record.
    halves = [["tests", "ops", "masks"], ["loop", "scale", "quality"]]
    with ThreadPoolExecutor() as pool:
        stages = [[argument for name in half for argument in ("--stage", name)] for half in halves]
        for done in pool.map(
            lambda chosen: run("gpu_suite.py", "--smoke", "--record", tmp_path, *chosen), stages
        ):
            assert done.returncode == 0, done.stdout + done.stderr
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert {"commit", "hardware", "versions"} <= environment.keys()
    assert " passed" in json.loads((tmp_path / "tests.json").read_text())["outcome"]
    barlow = json.loads((tmp_path / "ops-barlow" / "summary.json").read_text())
    assert {"dau_fast", "definition", "facebook compiled"} <= barlow["cases"]["8x6"].keys()
    ops = json.loads((tmp_path / "ops-sensitivity" / "summary.json").read_text())["cases"]
    assert {"dau_fast", "definition", "definition compiled"} <= ops["sensitivity 4x6x5"].keys()
    for entries in ops.values():
        assert entries["dau_fast"].get("error", 0) < 1e-4
    images = json.loads((tmp_path / "ops-images" / "summary.json").read_text())["cases"]
    assert images.keys() == {
        f"{name}, {kind}" for name in ("cifar", "digits") for kind in ("augmented", "plain")
    }
    for entries in images.values():
        assert entries.keys() == {"dau_fast", "PyTorch", "PyTorch compiled", "torchvision"}
    masks = json.loads((tmp_path / "masks" / "summary.json").read_text())["cases"]
    rivals = {"dau_fast", "foreach and foreach mask", "fused and foreach mask", "ASP", "compiled"}
    rivals |= {"torch.nn.utils.prune"}
    assert masks["SGD step, small at 95 %"].keys() == rivals
    assert {"apply, small at 95 %", "forward, small at 95 %"} <= masks.keys()
    loop = json.loads((tmp_path / "loop" / "summary.json").read_text())
    assert loop["cases"]["whole job, random:0.1"].keys() == {"dau_fast", "DataLoader"}
    assert {"dau_fast", "compiled", "DataLoader"} <= loop["cases"]["training step, batch 32"].keys()
    assert loop["job"]["methods"]["dau"]["avg_gap"] is not None
    scale = json.loads((tmp_path / "scale" / "summary.json").read_text())["steps"]
    assert {row["what"] for row in scale} == {"training", "game"}
    assert all(row["images_per_second"] > 0 and row["peak_bytes"] > 0 for row in scale)
    streaming = json.loads((tmp_path / "scale-streaming" / "summary.json").read_text())["cases"]
    assert streaming.keys() == {"files", "arrow", "arrays"}
    quality = json.loads((tmp_path / "quality.json").read_text())
    for job in ("quality-random-0.1", "quality-class-0"):
        assert set(quality[job]["methods"]) == {"original", "retrain", "retrain_fast", "dau", "ft", "ga"}
        assert quality[job]["methods"]["dau"]["avg_gap"] is not None
    again = run("gpu_suite.py", "--smoke", "--record", tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "exit code" not in again.stdout


@pytest.mark.usefixtures("importable")
def test_every_job_is_run_once_and_its_command_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suite's own work, with jobs that leave a result and compute nothing."""
    import gpu_suite

    started: list[str] = []

    def pretend(suite: gpu_suite.Suite, job: str, command: list[str]) -> None:
        started.append(job)
        if "-m" not in command:
            assert (BENCHMARKS.parent / command[1]).is_file(), command
        (suite.record / f"{job}.log").write_text("3 passed")
        for option, file in (("--record", "summary.json"), ("--out", "report.json")):
            if option in command:
                out = Path(command[command.index(option) + 1])
                out.mkdir()
                (out / file).write_text(json.dumps({"run": {"epochs": 2}, "methods": {"dau": {"ua": 3.0}}}))

    monkeypatch.setattr(gpu_suite.Suite, "run", pretend)
    for _ in range(2):
        done = CliRunner().invoke(gpu_suite.main, ["--smoke", "--record", str(tmp_path)])
        assert done.exit_code == 0, done.output
        assert started == JOBS
    assert json.loads((tmp_path / "tests.json").read_text())["outcome"] == "3 passed"
    quality = json.loads((tmp_path / "quality.json").read_text())
    assert quality["quality-class-0"]["methods"]["dau"]["ua"] == 3.0


@pytest.mark.usefixtures("importable")
def test_a_suite_that_is_out_of_time_or_whose_job_fails_ends_and_says_so(tmp_path: Path) -> None:
    from gpu_suite import Suite

    suite = Suite(tmp_path, torch.device("cpu"), True, None, None, float("inf"), "digits")
    with pytest.raises(SystemExit, match="no such file"):
        suite.run("failing", ["sh", "-c", "echo no such file; exit 3"])
    late = Suite(tmp_path, torch.device("cpu"), True, None, 1.0, 0.0, "digits")
    with pytest.raises(SystemExit, match="out of time before late"):
        late.run("late", ["sh", "-c", "exit 3"])
    assert not (tmp_path / "late.log").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so(tmp_path: Path) -> None:
    done = run("gpu_suite.py", "--record", tmp_path)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr
