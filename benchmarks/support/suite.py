"""Jobs one after the other, each under a limit of its own, with whatever they left kept at any moment.

No job ends the suite: one that fails, is killed or is out of time costs its own rest alone. After every job
the record holds `jobs.jsonl` (what became of each), `summary.json` (that, and all rows and targets so far)
and `suite.tar.gz` (the record without weights), so that a suite that is itself killed leaves them too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.recording import ROOT, read_lines, write_json
from support.speed import Target

# Seconds between asking a job to end and ending it.
GRACE = 5.0
# What comes back from a lent machine is a few files of at most so many bytes.
MOST_BYTES = 16 * 2**20
WEIGHTS = (".safetensors", ".pt", ".pth", ".npy", ".arrow")
# Where a job's folder holds its rows.
ROWS = ("rows.jsonl", "judgements.jsonl")
PROMISED = ("jobs.jsonl", "summary.json", "suite.tar.gz")
_TAIL = 15
# Of a job without a limit, in seconds: processes take no infinite one, nor does JSON.
_DAYS = 30 * 86400.0


@dataclass(frozen=True)
class Job:
    """A command whose working directory is the checkout and whose output goes to <record>/<name>.log.

    share: of its stage's minutes that it may take at most. environment: beside that of the suite.
    """

    name: str
    command: tuple[str, ...]
    share: float = 1.0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """minutes: that its jobs may take together. plan: its jobs, from the seconds that it has."""

    name: str
    minutes: float
    plan: Callable[[float], Sequence[Job]]


# Targets by the rows of a job's folder.
Judge = Callable[[Sequence[dict[str, Any]]], Sequence[Target]]
# Runs a job with its output in a file, for so many seconds at most: its exit code, None if it was ended.
Start = Callable[[Job, Path, float], int | None]


def run_process(job: Job, log: Path, limit: float) -> int | None:
    """`job` in a process group of its own, which is ended as a whole: by Ctrl-C's signal first."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | dict(job.environment)
    with log.open("w") as output:
        process = subprocess.Popen(
            job.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(max(0.1, min(limit, _DAYS) - GRACE))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(GRACE, limit))
            return None
        finally:
            # Also what the job itself started and left behind.
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


@dataclass(frozen=True)
class Suite:
    """record: where everything goes. seconds: for all stages together, None for as long as they may take.

    deliver: a folder that gets a copy of the promised files after every job. judges: of the rows of jobs that
    did not come to judge them themselves. clock, start: as they are, or those of a test.
    """

    record: Path
    seconds: float | None = None
    deliver: Path | None = None
    judges: Mapping[str, Judge] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter
    start: Start = run_process

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run all jobs that are not done; whether all are."""
        began = self.clock()
        self._finish([])
        for stage in stages:
            limit = 60 * stage.minutes * self.scale(stages)
            if self.seconds is not None:
                limit = min(limit, began + self.seconds - self.clock())
            self._run_stage(stage, limit)
        return all(row["fate"] == "done" for row in latest(self.record))

    def scale(self, stages: Sequence[Stage]) -> float:
        """What each stage has of its minutes: less than all where they are more than there are."""
        if self.seconds is None:
            return 1.0
        return min(1.0, self.seconds / (60 * sum(stage.minutes for stage in stages)))

    def _run_stage(self, stage: Stage, limit: float) -> None:
        began = self.clock()
        print(f"stage {stage.name}: {limit / 60:.1f} minutes", flush=True)
        for job in stage.plan(limit):
            if any(row["job"] == job.name and row["fate"] == "done" for row in latest(self.record)):
                continue
            left = min(limit - (self.clock() - began), limit * job.share)
            row = {"stage": stage.name, "job": job.name, **self._run_job(job, left)}
            print(f"  {job.name}: {row['fate']} after {row['seconds']:.0f} s", flush=True)
            self._finish([row])

    def _run_job(self, job: Job, limit: float) -> dict[str, Any]:
        """What became of it: done, failed, killed (by the system), ended (by its limit) or not started."""
        row: dict[str, Any] = {
            "fate": "not started",
            "code": None,
            "seconds": 0.0,
            "limit": min(limit, _DAYS),
        }
        if limit <= 2 * GRACE:
            return row | {"reason": "no time is left in its stage"}
        log, began = self.record / f"{job.name}.log", self.clock()
        try:
            code = self.start(job, log, limit)
        except OSError as error:
            return row | {"fate": "failed", "reason": str(error)}
        row |= {"code": code, "seconds": self.clock() - began}
        if code == 0:
            return row | {"fate": "done"}
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        fate = "ended" if code is None else "killed" if code < 0 else "failed"
        return row | {"fate": fate, "reason": "\n".join(lines[-_TAIL:])}

    def _finish(self, rows: list[dict[str, Any]]) -> None:
        """Note `rows`, and bring the promised files up to date."""
        with (self.record / "jobs.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        summary = summarise(self.record, self.judges)
        summary["left_out"] = _pack(self.record)
        write_json(self.record / "summary.json", summary)
        if self.deliver is not None:
            self.deliver.mkdir(parents=True, exist_ok=True)
            for name in PROMISED:
                shutil.copy(self.record / name, self.deliver / name)


# ---- what the record holds


def latest(record: Path) -> list[dict[str, Any]]:
    """What last became of each job, in the order of their first start."""
    return list({row["job"]: row for row in read_lines(record / "jobs.jsonl")}.values())


def summarise(record: Path, judges: Mapping[str, Judge]) -> dict[str, Any]:
    """Jobs, and of each folder of the record its rows and targets."""
    rows, targets = {}, {}
    for folder in sorted(path for path in record.iterdir() if path.is_dir()):
        found = [row for name in ROWS for row in read_lines(folder / name)]
        if found:
            rows[folder.name] = found
        judged = folder / "summary.json"
        if judged.exists():
            content = json.loads(judged.read_text())
            # That of judgements is a list of means, without targets.
            targets[folder.name] = content.get("targets", []) if isinstance(content, dict) else []
        elif found and folder.name in judges:
            targets[folder.name] = [target.to_json() for target in judges[folder.name](found)]
    environment = record / "environment.json"
    known = json.loads(environment.read_text()) if environment.exists() else None
    return {"environment": known, "jobs": latest(record), "rows": rows, "targets": targets}


def _pack(record: Path) -> list[str]:
    """Write suite.tar.gz, small files first; what it leaves out: weights are not even named."""
    unfinished, taken, left_out = record / "suite.tar.gz.unfinished", 0, []
    with tarfile.open(unfinished, "w:gz") as archive:
        for path in sorted(_results(record), key=lambda path: path.stat().st_size):
            name = str(path.relative_to(record))
            # Not what it takes compressed: that is at most as much.
            taken += path.stat().st_size
            if taken > MOST_BYTES - 2**20:
                left_out.append(name)
            else:
                archive.add(path, name)
    unfinished.replace(record / "suite.tar.gz")
    return left_out


def _results(record: Path) -> Iterator[Path]:
    for path in record.rglob("*"):
        unfinished = path.name.endswith(".unfinished") or path.name == "suite.tar.gz"
        if path.is_file() and path.suffix not in WEIGHTS and not unfinished:
            yield path
