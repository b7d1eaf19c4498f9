"""Running the commands in benchmarks/ from a checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from calling import environment

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`python benchmarks/<script>` with `arguments`."""
    command = [sys.executable, f"benchmarks/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def succeed(script: str, *arguments: object) -> str:
    """What `run` prints; anything but exit code 0 fails the test."""
    done = run(script, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
