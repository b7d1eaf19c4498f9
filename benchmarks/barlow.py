"""The Barlow Twins record: every implementation at every size, both forms over N and D, and the targets.

    python benchmarks/barlow.py                    on the CPU, about ten minutes on 2 cores
    python benchmarks/barlow.py --device cuda

Writes benchmarks/records/<date>-barlow-<device>/: pytest-benchmark's raw numbers, a summary with ratios of
medians, a sweep, its picture, and hardware, versions and commit. Lightly takes part where it is installed.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from support.measuring import seconds
from support.recording import write_json
from support.speed import Cases, Target, command, faster, largest, share

from dau_fast.ops._barlow_twins_op import backward_op, forward_op
from dau_fast.ops.reference import barlow_twins_reference


def targets(cases: Cases, device: torch.device) -> list[Target]:
    wide, small, square = "256x8192", "512x128", "4096x2048"
    if device.type == "cuda":
        speed = [
            faster(cases, wide, "lightly", 15),
            faster(cases, wide, "lightly compiled", 5),
            faster(cases, wide, "definition captured", 15),
            faster(cases, square, "lightly", 2),
            faster(cases, square, "lightly compiled", 1.2),
        ]
    else:
        speed = [faster(cases, wide, "lightly", 10), faster(cases, small, "lightly", 1 / 1.2)]
    memory = share(cases, wide, "extra_memory_bytes", "lightly", 0.1)
    return [*speed, memory, largest(cases, "gradient_error", 1e-5)]


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


def crossovers(folder: Path, device: torch.device, smoke: bool) -> None:
    """Write the sweep and its picture."""
    points = sweep(device, smoke)
    write_json(folder / "sweep.json", {"points": points, "crossover_n_over_d": crossover(points)})
    picture(points).savefig(folder / "sweep.svg")


if __name__ == "__main__":
    command("barlow", targets, crossovers)()
