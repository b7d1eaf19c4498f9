"""The record of masks and masked optimiser steps: every implementation, and the targets.

    python benchmarks/masks.py                    on the CPU, about two minutes on 2 cores
    python benchmarks/masks.py --device cuda

Writes benchmarks/records/<date>-masks-<device>/: pytest-benchmark's raw numbers, a summary with ratios
of medians, hardware, versions and commit.
"""

from __future__ import annotations

import torch
from support.speed import Cases, Target, command, faster, figure


def targets(cases: Cases, device: torch.device) -> list[Target]:
    apply, sgd = "apply, resnet18 at 95 %", "SGD step, resnet18 at 95 %"
    if device.type == "cuda":
        return [
            faster(cases, sgd, "ASP", 4),
            faster(cases, sgd, "torch.nn.utils.prune", 4),
            faster(cases, sgd, "foreach and foreach mask", 1),
            faster(cases, sgd, "fused and foreach mask", 1),
            faster(cases, sgd, "fused and foreach mask captured", 1.5),
            faster(cases, sgd, "compiled", 1.1),
        ]
    return [
        faster(cases, apply, "foreach multiplication", 1.4),
        figure(cases, apply, "percent_of_floor", 80),
        faster(cases, sgd, "foreach and foreach mask", 2.5),
        faster(cases, sgd, "fused and foreach mask", 1.3),
        figure(cases, sgd, "percent_of_floor", 80),
    ]


if __name__ == "__main__":
    command("masks", targets)()
