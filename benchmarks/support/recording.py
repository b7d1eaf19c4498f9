"""What every benchmark writes beside its numbers, so that a reader can run it again."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dau_fast.report.facts import describe_hardware, list_versions

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "records"


def record_folder(what: str) -> Path:
    """benchmarks/records/<date>-<what>, made if it is not there."""
    folder = RECORDS / f"{datetime.now(UTC):%Y-%m-%d}-{what}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def environment(device: torch.device) -> dict[str, Any]:
    """Commit, hardware and versions; a commit with uncommitted changes says so."""
    return {
        "commit": _commit(),
        "device": str(device),
        "hardware": describe_hardware(device),
        "versions": list_versions(),
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_json(path: Path, content: Any) -> None:
    """Write `content` whole or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    unfinished.replace(path)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line of JSON to the file of rows `path`, below a last one that a kill has cut off."""
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file with one JSON a line; a last one that was cut off by a kill is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _commit() -> str:
    """Of the checkout; where a machine has its files alone, what BENCHMARK_COMMIT says."""
    if "BENCHMARK_COMMIT" in os.environ:
        return os.environ["BENCHMARK_COMMIT"]
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"
