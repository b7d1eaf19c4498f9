"""The GPU suite at toy size on the CPU, so that it works on the day a GPU is at hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SUITE = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SUITE), *arguments], capture_output=True, text=True)


def test_smoke_runs_every_stage_leaves_a_record_and_does_not_repeat_finished_jobs(tmp_path: Path) -> None:
    done = run("--smoke", "--record", str(tmp_path))
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
    masks = json.loads((tmp_path / "masks" / "summary.json").read_text())["cases"]
    rivals = {"dau_fast", "foreach and foreach mask", "fused and foreach mask", "compiled"}
    assert masks["SGD step, small at 95 %"].keys() == rivals
    assert {"apply, small at 95 %", "forward, small at 95 %"} <= masks.keys()
    quality = json.loads((tmp_path / "quality.json").read_text())
    for job in ("quality-random-0.1", "quality-class-0"):
        assert set(quality[job]["methods"]) == {"original", "retrain", "dau", "ft", "ga"}
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
