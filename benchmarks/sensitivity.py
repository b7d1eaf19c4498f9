"""The record of sensitivities and per-sample gradient norms: every implementation, and the targets.

    python benchmarks/sensitivity.py                    on the CPU, about ten minutes on 2 cores
    python benchmarks/sensitivity.py --device cuda

Writes benchmarks/records/<date>-sensitivity-<device>/: pytest-benchmark's raw numbers, a summary with ratios
of medians, hardware, versions and commit. BackPACK and Opacus take part where they are installed.
"""

from __future__ import annotations

import torch
from support.speed import OURS, Cases, Target, command, faster, figure, share

PASS = "forward and backward"


def targets(cases: Cases, device: torch.device) -> list[Target]:
    if device.type == "cuda":
        small, wide = "sensitivity 512x10x512", "sensitivity 512x131072x64"
        layer = "linear_sensitivity 512x131072x1024"
        return [
            faster(cases, small, "definition captured", 5),
            faster(cases, small, "definition compiled captured", 1.5),
            # What launches cost stands beside it, in the rows that are not captured.
            figure(cases, "sensitivity 64x50257x768", "percent_of_floor", 80, f"{OURS} captured"),
            figure(cases, wide, "percent_of_floor", 80, f"{OURS} captured"),
            share(cases, layer, "extra_memory_bytes", "definition", 0.1),
            faster(cases, "norms of resnet18, 256", "vmap(grad)", 10),
            share(cases, "norms of resnet18, 256", "median_seconds", PASS, 1.25),
            faster(cases, "norms of tokens, 256", "Opacus", 2),
            worst_norm(cases, "norms of resnet18, 256"),
        ]
    norms = "norms of resnet18, 32"
    return [
        faster(cases, "sensitivity 512x10x512", "definition", 1.5),
        faster(cases, "sensitivity 64x50257x768", "definition", 2),
        faster(cases, norms, "vmap(grad)", 3),
        share(cases, norms, "median_seconds", PASS, 2.5),
        beyond_a_pass(cases, norms),
        worst_norm(cases, norms),
    ]


def worst_norm(cases: Cases, case: str) -> Target:
    entry = cases.get(case, {}).get(OURS)
    return Target(f"largest relative error, {case}", entry and entry["error"], 1e-4, at_least=False)


def beyond_a_pass(cases: Cases, case: str) -> Target:
    """Memory beyond that of an ordinary pass, over torch.func's, at most a tenth."""
    what = f"memory beyond that of a pass, over vmap(grad)'s, {case}"
    held = {name: entry["extra_memory_bytes"] for name, entry in cases.get(case, {}).items()}
    if not {OURS, PASS, "vmap(grad)"} <= held.keys():
        return Target(what, None, 0.1, at_least=False)
    value = max(0, held[OURS] - held[PASS]) / (held["vmap(grad)"] - held[PASS])
    return Target(what, value, 0.1, at_least=False)


if __name__ == "__main__":
    command("sensitivity", targets)()
