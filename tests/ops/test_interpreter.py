"""Starts the process in which Triton's kernels are interpreted on CPU tensors, see the marker's tests."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from calling import environment
from packaging.version import Version


def test_kernels_in_tritons_interpreter(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    if Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        pytest.skip("the interpreter of Triton 3.6 needs numpy below 2.4 (triton-lang/triton issue 9171)")
    command = [sys.executable, "-m", "pytest", "-m", "interpreter", "-p", "no:cacheprovider", "-ra"]
    command += ["--slow"] if request.config.getoption("--slow") else []
    done = subprocess.run(
        [*command, str(Path(__file__).parent)],
        env=environment() | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
