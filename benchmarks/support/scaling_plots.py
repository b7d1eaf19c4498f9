"""How cost grows, in pictures: measured seconds beside predicted ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Percent of error that predictions may have, and processors that processes share.
ERROR, CORES = 20.0, 2

Rows = list[dict[str, Any]]


def series_named(rows: Rows, name: str) -> Rows:
    return [row for row in rows if row["series"] == name]


def efficiency(series: Rows) -> list[float]:
    """Percent of perfect scaling on as many processors as processes, and there are only CORES."""
    alone = series[0]["seconds"]
    weak = series[0]["series"].startswith("weak")
    return [100 * alone / row["seconds"] / (1 if weak else row["processes"]) for row in series]


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
            series, colour = series_named(rows, one), f"C{place}"
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
            series = series_named(rows, name)
            axes.plot([r["processes"] for r in series], efficiency(series), marker="o",
                      label=name.partition(", ")[2])  # fmt: skip
        axes.axhline(100, color="0.8", zorder=0)
        axes.set(xlabel=f"processes on {CORES} cores", ylabel="efficiency, percent", title=f"{kind} scaling")
        axes.set_xticks(sorted({row["processes"] for row in rows}))
        axes.legend(frameon=False)
    return figure
