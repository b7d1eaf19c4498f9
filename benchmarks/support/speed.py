"""What the records of speed benchmarks share: their rows, ratios of medians, and targets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from dau_fast.engine.runtime import choose_device
from support.recording import ROOT, environment, read_lines, record_folder, write_json

OURS, ROWS = "dau_fast", "rows.jsonl"
# Case -> implementation -> what was measured.
Cases = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Target:
    """value: None where a rival did not run. at_least: whether larger is better."""

    what: str
    value: float | None
    limit: float
    at_least: bool = True

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"reached": self.reached}

    def __str__(self) -> str:
        shown = "not measured" if self.value is None else f"{self.value:.3g}"
        verdict = {True: "reached", False: "MISSED", None: ""}[self.reached]
        return f"{self.what:64} {shown} (limit {self.limit:.3g}) {verdict}"


def command(
    what: str,
    targets: Callable[[Cases, torch.device], list[Target]],
    more: Callable[[Path, torch.device, bool], None] | None = None,
) -> click.Command:
    """The command that runs benchmarks/test_<what>_speed.py, judges it by `targets` and writes the record.

    more(folder, device, smoke): what a record holds beyond the rows.
    """

    @click.command()
    @click.option("--device", "device_name", default="cpu", type=click.Choice(["cpu", "cuda"]))
    @click.option("--record", type=Path, help=f"Folder; default benchmarks/records/<date>-{what}-<device>.")
    @click.option("--smoke", is_flag=True, help="Toy sizes.")
    def main(device_name: str, record: Path | None, smoke: bool) -> None:
        """Run it and write the record."""
        folder, device = start(what, device_name, record)
        cases = run_rows(f"test_{what}_speed.py", folder, device, smoke)
        if more:
            more(folder, device, smoke)
        finish(folder, cases, targets(cases, device))

    return main


def start(what: str, device_name: str, record: Path | None) -> tuple[Path, torch.device]:
    """The record folder, with hardware, versions and commit in it, and the device."""
    device = choose_device(device_name)
    folder = (record or record_folder(f"{what}-{device_name}")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "environment.json", environment(device))
    return folder, device


def run_rows(file: str, folder: Path, device: torch.device, smoke: bool) -> Cases:
    """Run one pytest-benchmark file; its raw numbers stay in the folder as benchmark.json.

    Rows also go to rows.jsonl there as they come; one that fails is noted there, and costs no other.
    """
    raw, lines = folder / "benchmark.json", folder / ROWS
    known = len(read_lines(lines))
    command = [sys.executable, "-m", "pytest", f"benchmarks/{file}", "--device", device.type]
    command += ["--rows", str(lines), "--benchmark-json", str(raw), "--benchmark-disable-gc"]
    subprocess.run([*command, "-p", "no:cacheprovider", "-q", *(["--smoke"] if smoke else [])], cwd=ROOT)
    if raw.exists() and raw.stat().st_size:
        # Hardware and versions stand in environment.json; a host's name is nobody's business.
        write_json(raw, {"benchmarks": json.loads(raw.read_text())["benchmarks"]})
    rows = read_lines(lines)[known:]
    if not rows:
        raise SystemExit(f"benchmarks/{file} has measured nothing: what it printed says why")
    return compare(rows)


def compare(rows: Sequence[dict[str, Any]]) -> Cases:
    """Rows by case and implementation, beside ours where it has run; failed ones are left out."""
    cases: Cases = {}
    for row in rows:
        if "failed" not in row:
            info = {key: value for key, value in row.items() if key not in ("row", "case", "implementation")}
            cases.setdefault(row["case"], {})[row["implementation"]] = info
    for entries in cases.values():
        for name, entry in entries.items():
            ours = entries.get(f"{OURS} captured" if name.endswith("captured") else OURS)
            if ours:
                entry["dau_fast_is_faster"] = entry["median_seconds"] / ours["median_seconds"]
    return cases


def finish(folder: Path, cases: Cases, targets: list[Target], **further: Any) -> None:
    """Write summary.json, with what is `further` to be kept, and print the targets.

    Ends with exit code 1 where a row has failed.
    """
    judged = [target.to_json() for target in targets]
    failed = {row["row"]: row["failed"] for row in read_lines(folder / ROWS) if "failed" in row}
    write_json(folder / "summary.json", {"cases": cases, "targets": judged, "failed": failed, **further})
    for target in targets:
        print(target)
    if failed:
        raise SystemExit("\n".join(f"{row}: {reason}" for row, reason in failed.items()))


# ---- targets


def faster(cases: Cases, case: str, rival: str, limit: float) -> Target:
    """How many times as fast as `rival` at least."""
    entry = cases.get(case, {}).get(rival)
    value = entry.get("dau_fast_is_faster") if entry else None
    return Target(f"times as fast as {rival}, {case}", value, limit)


def share(cases: Cases, case: str, key: str, rival: str, limit: float) -> Target:
    """Our figure `key` over the rival's, at most."""
    entries = cases.get(case, {})
    known = OURS in entries and rival in entries
    value = entries[OURS][key] / entries[rival][key] if known else None
    return Target(f"{key} over {rival}'s, {case}", value, limit, at_least=False)


def figure(cases: Cases, case: str, key: str, limit: float, row: str = OURS) -> Target:
    """Our own figure `key`, at least. row: of ours, where there are several."""
    entry = cases.get(case, {}).get(row)
    return Target(f"{key}, {case}{row.removeprefix(OURS)}", entry[key] if entry else None, limit)


def largest(cases: Cases, key: str, limit: float) -> Target:
    """The largest of our own figures `key`, at most."""
    values = [entries[OURS][key] for entries in cases.values() if OURS in entries]
    return Target(f"largest {key}", max(values, default=None), limit, at_least=False)
