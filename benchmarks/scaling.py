"""The record of how cost grows, and of how well dau_fast.scaling predicts it.

    python benchmarks/scaling.py                     costs on the CPU, below 10 minutes on 2 quiet cores
    python benchmarks/scaling.py --data DIR          and quality with 10 times the retain set, 5 minutes more
    python benchmarks/scaling.py --part quality --data DIR          quality alone
    python benchmarks/scaling.py --device cuda       ResNet-50 at 224x224: speed, utilisation and memory
    python benchmarks/scaling.py --predict           prints the tables of predictions, and measures nothing
    python benchmarks/scaling.py --docs RECORD       writes a record and the predictions into docs/scaling.md

DIR holds train/<class>/ and test/<class>/. Writes benchmarks/records/<date>-scaling-<device>/: summary.json
(targets, constants, every case with its seconds and its prediction), plots, hardware, versions and commit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import costs
import large_images
import retain_quality
import torch
from matplotlib.figure import Figure
from predicting import markdown, tables
from recording import ROOT, write_json
from speed import Target, start

from dau_fast import scaling

DOCS = ROOT / "docs" / "scaling.md"
# Limits of the targets: growth at 10 times the retain set, and percent of error.
GROWTH, ERROR = 1.3, 20.0
CORES = 2

Rows = list[dict[str, Any]]


# ---- costs on the CPU


def measure_costs(folder: Path, smoke: bool) -> tuple[list[Target], dict[str, Any]]:
    """Every case's seconds, the fit, what it predicts for the cases it has not seen, and memory."""
    cases = costs.cases(smoke)
    seconds = costs.measured(cases, 1 if smoke else costs.ROUNDS)
    write_json(folder / "seconds.json", seconds)
    typical = costs.typical(seconds)
    jobs = {case.name: costs.job_of(case) for case in cases}
    machine = scaling.fit(
        [(jobs[case.name], typical[case.name]) for case in cases if not case.held_out], CORES
    )
    rows = []
    for case in cases:
        cost = scaling.predict(jobs[case.name], machine)
        rows.append(asdict(case) | {
            "seconds": typical[case.name],
            "predicted": cost.total_seconds,
            "error_percent": 100 * (cost.total_seconds / typical[case.name] - 1),
            "parts": cost.seconds,
        })  # fmt: skip
    memory = []
    for case in costs.memory_cases(smoke):
        phase, predicted = scaling.predict_memory(costs.job_of(case))
        held = costs.held(case)
        memory.append(asdict(case) | {
            "bytes": held, "predicted": predicted, "phase": phase,
            "error_percent": 100 * (predicted / held - 1),
        })  # fmt: skip
    draw(rows, folder)
    return targets(rows, memory), {"constants": scaling.constants(machine), "cases": rows, "memory": memory}


def targets(rows: Rows, memory: Rows) -> list[Target]:
    sampled = _series(rows, "retain set, sampled")
    held = [abs(row["error_percent"]) for row in rows if row["held_out"]]
    alone = [abs(row["error_percent"]) for row in rows if row["held_out"] and row["processes"] == 1]
    return [
        Target("cost at 10 times the retain set, sampled", _growth(sampled), GROWTH, at_least=False),
        Target("largest held-out error, one process, percent", max(alone), ERROR, at_least=False),
        Target("largest held-out error, all, percent", max(held), ERROR, at_least=False),
        Target("largest error of memory, percent", max(abs(r["error_percent"]) for r in memory), ERROR,
               at_least=False),
    ]  # fmt: skip


def quality_targets(rows: Rows) -> list[Target]:
    """With 10 times the retain set the gap is no larger than with the small one, but for chance."""
    small, large = rows
    grown = large["avg_gap"] - small["avg_gap"]
    floor = max(row["noise_floor"] for row in rows)
    return [Target("points of avg gap more at 10 times the retain set", grown, floor, at_least=False)]


def _series(rows: Rows, name: str) -> Rows:
    return [row for row in rows if row["series"] == name]


def _growth(series: Rows) -> float:
    return series[-1]["seconds"] / series[0]["seconds"]


def efficiency(series: Rows) -> list[float]:
    """Percent of perfect scaling on as many processors as processes, and there are only CORES."""
    alone = series[0]["seconds"]
    weak = series[0]["series"].startswith("weak")
    return [100 * alone / row["seconds"] / (1 if weak else row["processes"]) for row in series]


# ---- plots


def draw(rows: Rows, folder: Path) -> None:
    _growths(rows).savefig(folder / "growth.svg")
    _predictions(rows).savefig(folder / "predictions.svg")
    _processes(rows).savefig(folder / "processes.svg")


def _growths(rows: Rows) -> Figure:
    """Measured points, held-out ones hollow, and the model as a line."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    shown = {
        "forget set": "forget set, share of 3,000 images", "retain set": "retain set, images",
        "classes": "classes", "batch": "images of each set in a batch", "validation set": "validation images",
        "forget and validation set": "images of each of forget and validation set",
    }  # fmt: skip
    for axes, (name, label) in zip(figure.subplots(2, 3).flat, shown.items(), strict=False):
        names = (name, f"{name}, sampled") if name == "retain set" else (name,)
        for place, one in enumerate(names):
            series, colour = _series(rows, one), f"C{place}"
            axes.plot([r["x"] for r in series], [r["predicted"] for r in series], colour, label=one)
            for row in series:
                axes.plot(
                    row["x"], row["seconds"], colour, marker="o", mfc="none" if row["held_out"] else None
                )
        axes.set(xscale="log", xlabel=label, ylabel="seconds", ylim=(0, None))
        if len(names) > 1:
            axes.legend(frameon=False)
    figure.suptitle("points: measured, hollow ones not in the fit; lines: predicted")
    return figure


def _predictions(rows: Rows) -> Figure:
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    limits = [0.8 * min(r["seconds"] for r in rows), 1.25 * max(r["seconds"] for r in rows)]
    band = [[(1 + side * ERROR / 100) * end for end in limits] for side in (-1, 1)]
    axes.fill_between(limits, *band, color="0.9", label=f"within {ERROR:.0f} %")
    for held_out, label in ((False, "in the fit"), (True, "held out")):
        chosen = [row for row in rows if row["held_out"] == held_out]
        axes.plot([r["seconds"] for r in chosen], [r["predicted"] for r in chosen], "o",
                  mfc="none" if held_out else None, label=label)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="seconds, measured", ylabel="seconds, predicted", xlim=limits)
    axes.legend(frameon=False)
    return figure


def _processes(rows: Rows) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("strong", "weak"), strict=True):
        names = dict.fromkeys(row["series"] for row in rows if row["series"].startswith(kind))
        for name in names:
            series = _series(rows, name)
            axes.plot([r["processes"] for r in series], efficiency(series), marker="o",
                      label=name.partition(", ")[2])  # fmt: skip
        axes.axhline(100, color="0.8", zorder=0)
        axes.set(xlabel=f"processes on {CORES} cores", ylabel="efficiency, percent", title=f"{kind} scaling")
        axes.set_xticks(sorted({row["processes"] for row in rows}))
        axes.legend(frameon=False)
    return figure


# ---- docs


def write_docs(record: Path | None) -> None:
    """Replace what stands between the markers of docs/scaling.md: predictions, and a record's figures."""
    text = between(DOCS.read_text(), "predictions", tables())
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
    judged = [
        (t["what"], f"{t['value']:.3g}", f"{t['limit']:.3g}", "reached" if t["reached"] else "**missed**")
        for t in summary["targets"]
    ]
    held = [
        (f"{r['series']}, {r['x']:g}", f"{r['seconds']:.2f}", f"{r['predicted']:.2f}",
         f"{r['error_percent']:+.0f} %")
        for r in summary["cases"] if r["held_out"]
    ]  # fmt: skip
    memory = [
        (f"{r['forget']:,}", f"{r['validation']:,}", f"{r['classes']:,}", str(r["batch"]), r["phase"],
         f"{r['bytes'] / 1e6:.0f}", f"{r['predicted'] / 1e6:.0f}", f"{r['error_percent']:+.0f} %")
        for r in summary["memory"]
    ]  # fmt: skip
    scalings = []
    for kind in dict.fromkeys(r["series"] for r in summary["cases"] if "scaling" in r["series"]):
        series = _series(summary["cases"], kind)
        scalings.append((kind, *(f"{r['seconds']:.2f} s, {e:.0f} %" for r, e in
                                 zip(series, efficiency(series), strict=True))))  # fmt: skip
    counts = [str(r["processes"]) for r in series]
    parts = [
        f"Everything here is from [{name}]({link}).",
        markdown(("target", "value", "limit", ""), judged),
        f"![Seconds over sizes]({link}/growth.svg)",
        "Held-out cases, seconds:",
        markdown(("case", "measured", "predicted", "error"), held),
        f"![Predicted over measured seconds]({link}/predictions.svg)",
        "Constants, in seconds a unit:",
        markdown(("constant", "seconds"), [(k, f"{v:.2e}") for k, v in summary["constants"].items()]),
        f"Processes, seconds and efficiency; there are {CORES} cores, so three processes cannot reach more "
        "than 67 %:",
        markdown(("series", *(f"{count} processes" for count in counts)), scalings),
        f"![Efficiency]({link}/processes.svg)",
        "Memory, MB at the worst moment; nothing was fitted:",
        markdown(
            ("forget", "validation", "classes", "batch", "phase", "measured", "predicted", "error"), memory
        ),
    ]
    return "\n\n".join(parts)


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


# ---- the command


@click.command()
@click.option("--device", "device_name", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option(
    "--part",
    type=click.Choice(["costs", "steps", "quality"]),
    help="Default: costs on the CPU, steps on CUDA; quality too where --data is given.",
)
@click.option("--data", type=Path, help="Folder with train/ and test/: measures quality too.")
@click.option("--image-size", type=click.IntRange(4), default=8, show_default=True, help="Of --data, pixels.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Of --data.")
@click.option("--record", type=Path, help="Folder; default benchmarks/records/<date>-scaling-<device>.")
@click.option("--smoke", is_flag=True, help="Toy sizes.")
@click.option("--predict", is_flag=True, help="Print the tables of predictions, and nothing else.")
@click.option("--docs", type=Path, help="A record folder whose figures go into docs/scaling.md.")
def main(
    device_name: str, part: str | None, data: Path | None, image_size: int, seeds: int, record: Path | None,
    smoke: bool, predict: bool, docs: Path | None,
) -> None:  # fmt: skip
    """Run it and write the record."""
    if predict:
        print(tables())
        return
    if docs is not None:
        write_docs(docs)
        return
    if part == "quality" and data is None:
        raise click.UsageError("--part quality needs --data DIR, with train/<class>/ and test/<class>/")
    torch.set_flush_denormal(True)
    part = part or ("steps" if device_name == "cuda" else "costs")
    if part != "quality":
        folder, device = start("scaling", device_name, record)
        if part == "steps":
            finish(folder, [], {"steps": large_images.rows(device, smoke)})
        else:
            finish(folder, *measure_costs(folder, smoke))
    if data is not None:
        folder, _ = start("retain-sample", "cpu", record and record / "quality")
        rows = retain_quality.measure(data, image_size, seeds, smoke)
        finish(folder, quality_targets(rows), {"quality": rows})


def finish(folder: Path, judged: list[Target], found: Mapping[str, Any]) -> None:
    targets = [asdict(target) | {"reached": target.reached} for target in judged]
    write_json(folder / "summary.json", {"targets": targets, **found})
    for target in judged:
        print(target)


if __name__ == "__main__":
    main()
