"""The Barlow Twins record: every implementation at every size, both forms over N and D, and the targets.

    python benchmarks/barlow.py                    on the CPU, about ten minutes on 2 cores
    python benchmarks/barlow.py --device cuda

Writes benchmarks/records/<date>-barlow-<device>/: pytest-benchmark's raw numbers, a summary with ratios of
medians, a sweep, its picture, and hardware, versions and commit. Lightly takes part where it is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from measuring import seconds
from recording import ROOT, environment, record_folder, write_json

from dau_fast.engine.runtime import choose_device
from dau_fast.ops.barlow_twins import backward_op, forward_op
from dau_fast.ops.reference import barlow_twins_reference

# (N, D) over the rival -> how many times as fast at least; by device.
FASTER = {
    "cpu": {("256x8192", "lightly"): 10, ("512x128", "lightly"): 1 / 1.2},
    "cuda": {
        ("256x8192", "lightly"): 15,
        ("256x8192", "lightly compiled"): 5,
        ("4096x2048", "lightly"): 2,
        ("4096x2048", "lightly compiled"): 1.2,
    },
}
LARGEST_ERROR = 1e-5
LARGEST_MEMORY = ("256x8192", 0.1)  # of lightly's


def summarise(raw: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Medians, ratios and the other figures by size and implementation, and the targets."""
    sizes: dict[str, dict[str, Any]] = {}
    for row in raw["benchmarks"]:
        info = row["extra_info"]
        size = sizes.setdefault(f"{info['n']}x{info['d']}", {})
        size[info["implementation"]] = {
            "median_seconds": row["stats"]["median"],
            **{key: info[key] for key in ("percent_of_floor", "extra_memory_bytes", "gradient_error")},
        }
    for rows in sizes.values():
        ours = rows["dau_fast"]
        for entry in rows.values():
            entry["dau_fast_is_faster"] = entry["median_seconds"] / ours["median_seconds"]
    return {"sizes": sizes, "targets": judge(sizes, device)}


def judge(sizes: dict[str, dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Each target as (value, limit, reached); None for a rival that did not run."""
    targets: dict[str, Any] = {}
    for (size, rival), limit in FASTER[device.type].items():
        entry = sizes.get(size, {}).get(rival)
        value = entry["dau_fast_is_faster"] if entry else None
        targets[f"times as fast as {rival} at {size}"] = (value, limit, value and value >= limit)
    error = max(rows["dau_fast"]["gradient_error"] for rows in sizes.values())
    targets["largest gradient error"] = (error, LARGEST_ERROR, error <= LARGEST_ERROR)
    size, limit = LARGEST_MEMORY
    rows = sizes.get(size, {})
    if "lightly" in rows:
        share = rows["dau_fast"]["extra_memory_bytes"] / rows["lightly"]["extra_memory_bytes"]
        targets[f"memory over lightly's at {size}"] = (share, limit, share <= limit)
    return targets


def sweep(device: torch.device, smoke: bool) -> list[dict[str, float]]:
    """Seconds of both forms and of the eager definition, over N at one D and over D at one N."""
    small = device.type == "cpu"
    many_n = [64, 128, 256, 384, 512, 640, 768, 896, 1024, 1536] + ([] if small else [2048, 4096])
    many_d = [64, 128, 256, 512, 1024, 2048] + ([4096] if small else [4096, 8192, 16384])
    sizes = [(n, 1024) for n in many_n] + [(256, d) for d in many_d if d != 1024]
    points = []
    for n, d in [(8, 6)] if smoke else sizes:
        a, b = (torch.randn(n, d, device=device) for _ in range(2))
        one = torch.ones((), device=device)

        def form(gram: bool, a: torch.Tensor = a, b: torch.Tensor = b, one: torch.Tensor = one) -> None:
            _, stats, products = forward_op(a, b, 5e-3, 1e-5, gram, "tf32x3")
            backward_op(one, a, b, stats, products, 5e-3, gram, "tf32x3", True, True)

        def definition(a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            views = a.clone().requires_grad_(), b.clone().requires_grad_()
            barlow_twins_reference(*views, 5e-3, 1e-5).backward()

        points.append(
            {
                "n": n,
                "d": d,
                "gram": seconds(lambda: form(True), device),
                "primal": seconds(lambda: form(False), device),
                "definition": seconds(definition, device),
            }
        )
    return points


def crossover(points: list[dict[str, float]]) -> float | None:
    """N / D up to which the Gram form was the faster one, at the D that N was varied over."""
    series = sorted((p["n"] / p["d"], p["gram"] / p["primal"]) for p in points if p["d"] == 1024)
    for (before, low), (after, high) in pairwise(series):
        if low <= 1 < high:
            return before + (after - before) * (1 - low) / (high - low)
    return None


def picture(points: list[dict[str, float]]) -> Figure:
    figure = Figure(figsize=(9.4, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, along, fixed, value in ((panels[0], "n", "d", 1024), (panels[1], "d", "n", 256)):
        series = sorted((p for p in points if p[fixed] == value), key=lambda p: p[along])
        for name, style in (("gram", "o-"), ("primal", "s-"), ("definition", "^:")):
            x = [p[along] for p in series]
            axes.loglog(x, [1e3 * p[name] for p in series], style, label=name, base=2)
        axes.set_xlabel(f"{along.upper()} at {fixed.upper()} = {value}")
        axes.set_ylabel("forward and backward (ms)")
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    return figure


@click.command()
@click.option("--device", "device_name", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--record", type=Path, help="Folder; default benchmarks/records/<date>-barlow-<device>.")
@click.option("--smoke", is_flag=True, help="Toy sizes.")
def main(device_name: str, record: Path | None, smoke: bool) -> None:
    """Run it and write the record."""
    device = choose_device(device_name)
    folder = (record or record_folder(f"barlow-{device_name}")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "environment.json", environment(device))
    raw = folder / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_barlow_speed.py", "--device", device_name]
    command += ["--benchmark-json", str(raw), "--benchmark-disable-gc", "-p", "no:cacheprovider", "-q"]
    subprocess.run([*command, *(["--smoke"] if smoke else [])], cwd=ROOT, check=True)
    measured = json.loads(raw.read_text())
    # Hardware and versions stand in environment.json; a host's name is nobody's business.
    write_json(raw, {"benchmarks": measured["benchmarks"]})
    points = sweep(device, smoke)
    write_json(folder / "sweep.json", {"points": points, "crossover_n_over_d": crossover(points)})
    picture(points).savefig(folder / "sweep.svg")
    summary = summarise(measured, device)
    write_json(folder / "summary.json", summary)
    for target, (value, limit, reached) in summary["targets"].items():
        shown = "not measured" if value is None else f"{value:.3g}"
        verdict = "reached" if reached else "MISSED"
        print(f"{target:45} {shown} (limit {limit:.3g}) {verdict}")


if __name__ == "__main__":
    main()
