"""The GPU suite at toy size on the CPU, so that it works on the day a GPU is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUITE = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SUITE), *arguments], env=one_thread, capture_output=True, text=True
    )


def test_smoke_runs_every_stage_leaves_a_record_and_does_not_repeat_finished_jobs(tmp_path: Path) -> None:
    # Two halves at the same time, each on one core, into one record.
    halves = [["tests", "ops", "masks"], ["loop", "scale", "quality"]]
    with ThreadPoolExecutor() as pool:
        stages = [[argument for name in half for argument in ("--stage", name)] for half in halves]
        for done in pool.map(lambda chosen: run("--smoke", "--record", str(tmp_path), *chosen), stages):
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
    again = run("--smoke", "--record", str(tmp_path))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "exit code" not in again.stdout


def test_without_cuda_it_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        return
    done = run("--record", str(tmp_path))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr
