"""The sections of docs/scaling.md that a command writes: predictions, and figures of a record."""

from __future__ import annotations

import json
from pathlib import Path

from support.one_gpu import one_gpu_tables
from support.predicting import markdown, tables
from support.recording import ROOT
from support.scaling_plots import CORES, Rows, efficiency, series_named

DOCS = ROOT / "docs" / "scaling.md"


def write_docs(record: Path | None) -> None:
    """Replace what stands between the markers of docs/scaling.md: predictions, and a record's figures."""
    text = between(DOCS.read_text(), "predictions", tables())
    text = between(text, "one GPU", one_gpu_tables())
    if record is not None:
        measured = "cases" in json.loads((record / "summary.json").read_text())
        text = between(
            text, *(("measurements", measurements(record)) if measured else ("quality", quality(record)))
        )
    DOCS.write_text(text)


def between(text: str, name: str, new: str) -> str:
    """`text` with `new` between the markers called `name`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{new.strip()}\n{end}{rest.partition(end)[2]}"


def measurements(record: Path) -> str:
    """The section on what was measured, from summary.json."""
    name = record.resolve().name
    summary = json.loads((record / "summary.json").read_text())
    link = f"../benchmarks/records/{name}"
    return "\n\n".join((
        f"Everything here is from [{name}]({link}).",
        _targets(summary["targets"]),
        f"![Seconds over sizes]({link}/growth.svg)",
        "Held-out cases, seconds:",
        _held_out(summary["cases"]),
        f"![Predicted over measured seconds]({link}/predictions.svg)",
        "Constants, in seconds a unit:",
        markdown(("constant", "seconds"), [(k, f"{v:.2e}") for k, v in summary["constants"].items()]),
        f"Processes, seconds and efficiency; there are {CORES} cores, so three processes cannot reach more "
        "than 67 %:",
        _processes(summary["cases"]),
        f"![Efficiency]({link}/processes.svg)",
        "Memory, MB at the worst moment; nothing was fitted:",
        _memory(summary["memory"]),
    ))  # fmt: skip


def _targets(found: Rows) -> str:
    rows = [
        (t["what"], f"{t['value']:.3g}", f"{t['limit']:.3g}", "reached" if t["reached"] else "**missed**")
        for t in found
    ]
    return markdown(("target", "value", "limit", ""), rows)


def _held_out(cases: Rows) -> str:
    rows = [
        (f"{r['series']}, {r['x']:g}", f"{r['seconds']:.2f}", f"{r['predicted']:.2f}",
         f"{r['error_percent']:+.0f} %")
        for r in cases if r["held_out"]
    ]  # fmt: skip
    return markdown(("case", "measured", "predicted", "error"), rows)


def _processes(cases: Rows) -> str:
    rows, counts = [], []
    for kind in dict.fromkeys(r["series"] for r in cases if "scaling" in r["series"]):
        series = series_named(cases, kind)
        counts = [f"{r['processes']} processes" for r in series]
        shown = zip(series, efficiency(series), strict=True)
        rows.append((kind, *(f"{r['seconds']:.2f} s, {percent:.0f} %" for r, percent in shown)))
    return markdown(("series", *counts), rows)


def _memory(found: Rows) -> str:
    rows = [
        (f"{r['forget']:,}", f"{r['validation']:,}", f"{r['classes']:,}", str(r["batch"]), r["phase"],
         f"{r['bytes'] / 1e6:.0f}", f"{r['predicted'] / 1e6:.0f}", f"{r['error_percent']:+.0f} %")
        for r in found
    ]  # fmt: skip
    head = ("forget", "validation", "classes", "batch", "phase", "measured", "predicted", "error")
    return markdown(head, rows)


def quality(record: Path) -> str:
    """The section on what a sampled retain set costs in quality, from summary.json."""
    name = record.resolve().name
    summary = json.loads((record / "summary.json").read_text())
    (target,) = summary["targets"]
    rows = [
        (f"{row['retain_images']:,}", *(f"{row[key]:.2f}" for key in
         ("avg_gap", "noise_floor", "original", "seconds", "retraining_seconds")))
        for row in summary["quality"]
    ]  # fmt: skip
    head = ("retain images", "avg gap", "noise floor", "original", "seconds", "retraining, seconds")
    verdict = "reached" if target["reached"] else "**missed**"
    return "\n\n".join([
        f"From [{name}](../benchmarks/records/{name}), mean avg gap to models retrained on the same sets:",
        markdown(head, rows),
        f"{target['what'].capitalize()}: {target['value']:.2f} (limit, the noise floor: "
        f"{target['limit']:.2f}), {verdict}.",
    ])  # fmt: skip
