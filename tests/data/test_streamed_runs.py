"""Whole runs on images that are read while training: the numbers of one in memory, and how they end."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from calling import call, environment, succeed
from checking import check_report, same_tensors
from storing import save_image


@pytest.mark.parametrize("name", ["folder", pytest.param("arrays", marks=pytest.mark.slow)])
def test_a_streamed_run_gives_the_numbers_of_one_in_memory(
    name: str, tmp_path: Path, arrays: Path, pictures: Path
) -> None:
    folder = {"folder": pictures, "arrays": arrays}[name]
    arguments = ("--dataset", name, "--data", folder, "--epochs", 5, "--methods", "dau,retrain,ft")
    held, streamed = (succeed(tmp_path / s, *arguments, "--stream", s, turns=16) for s in ("off", "on"))
    for called, expected in ((held, False), (streamed, True)):
        check_report(called.report, ["dau", "retrain", "ft"])
        assert called.report["run"]["streamed"] == expected
        assert set(called.report["run"]["waiting"]) == {"original", "game", "retrain", "ft"}
    for method in ("original", "dau", "retrain", "ft"):
        assert same_tensors(held.weights(method), streamed.weights(method))
        one, other = (
            {key: value for key, value in called.report["methods"][method].items()
             if key not in ("seconds", "compile_seconds", "speedup")}
            for called in (held, streamed)
        )  # fmt: skip
        assert one == other
    assert held.report["game"] == streamed.report["game"]


def test_a_file_that_is_damaged_ends_a_streamed_run_in_one_line(tmp_path: Path, arrays: Path) -> None:
    """Not one of those that were looked at before the run began."""
    folder = tmp_path / "folder"
    for part, name in itertools.product(("train", "test"), range(16)):
        path = folder / part / "ab"[name % 2] / f"{name}.png"
        save_image(path, np.full((8, 8, 3), 10 * name, dtype=np.uint8))
    (folder / "test/b/9.png").write_text("this is no image")
    called = call(
        tmp_path / "out", "--dataset", "folder", "--data", folder, "--stream", "on", "--forget", "random:0.3"
    )
    assert called.code == 2
    assert re.fullmatch(r"error: '[^\n]*9\.png' is not a readable image[^\n]*\n", called.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--stream maybe", "--stream maybe: expected one of auto, on, off"),
        ("--stream on", "--stream on is for folder, arrays, arrow"),
        ("--dataset arrays", "--dataset arrays needs --data DIR"),
        ("--dataset arrays --data {pictures}", "images.npy' is missing"),
    ],
)
def test_mistakes_are_one_line(arguments: str, message: str, tmp_path: Path, pictures: Path) -> None:
    called = call(tmp_path / "out", *arguments.format(pictures=pictures).split())
    assert called.code == 2
    assert called.stderr.startswith("error: ")
    assert message in called.stderr
    assert called.stderr.count("\n") == 1


# Says on stdout whenever an optimiser has taken a step.
TELLING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from torch.optim.optimizer import register_optimizer_step_post_hook as hook
from dau_fast.unlearn import main
hook(lambda *_: print("step", flush=True))
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_ends_a_streamed_run(tmp_path: Path, pictures: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--dataset", "folder", "--data", str(pictures), "--stream", "on", "--epochs", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-c", TELLING, *arguments, "--device", "cpu", "--out", str(out)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    giving_up = threading.Timer(60, process.kill)
    giving_up.start()
    try:
        assert process.stdout
        assert [process.stdout.readline() for _ in range(10)] == ["step\n"] * 10
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    finally:
        giving_up.cancel()
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert stderr.strip() == "interrupted: nothing was written"
    assert list(tmp_path.iterdir()) == []
