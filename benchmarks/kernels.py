"""The record of Triton's kernels as they are built: registers and spills for three chips, without a GPU.

    python benchmarks/kernels.py        some minutes on one core

Runs the tests that build every kernel ahead of time for compute capabilities 8.0, 9.0 and 10.0, and writes
benchmarks/records/<date>-kernels/: every build, and of each kernel and chip the most registers and bytes of
local memory a thread. Another version of Triton on PYTHONPATH is the one that builds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from support.recording import ROOT, environment, read_lines, record_folder, write_json

FILES = ("barlow_twins", "batch_norm", "image_batch", "masked_step", "per_sample_grad_norms", "sensitivity")


@click.command()
@click.option("--record", type=Path, help="Folder; default benchmarks/records/<date>-kernels.")
def main(record: Path | None) -> None:
    """Build, and write what the builds took."""
    folder = (record or record_folder("kernels")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "--slow", "-k", "builds", "-p", "no:cacheprovider"]
    command += [f"tests/ops/test_{name}_kernels.py" for name in FILES]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"DAU_FAST_RESOURCES": str(rows)})
    write_json(folder / "environment.json", environment(torch.device("cpu")) | {"triton": version("triton")})
    write_json(
        folder / "summary.json", {"kernels": summarise(read_lines(rows)), "passed": not done.returncode}
    )
    sys.exit(done.returncode)


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Kernel -> chip -> builds, and the most registers and spilled bytes of any."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for row in rows:
        chip = found.setdefault(row["kernel"], {}).setdefault(f"sm_{row['capability']}", {"builds": 0})
        chip["builds"] += 1
        for key in ("registers", "spilled"):
            chip[key] = max(chip.get(key, 0), row[key])
    return found


if __name__ == "__main__":
    main()
