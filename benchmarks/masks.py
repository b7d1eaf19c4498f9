"""The record of masks and masked optimiser steps: every implementation, and the targets.

    python benchmarks/masks.py                    on the CPU, about two minutes on 2 cores
    python benchmarks/masks.py --device cuda

Writes benchmarks/records/<date>-masks-<device>/: pytest-benchmark's raw numbers, a summary with ratios
of medians, hardware, versions and commit.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from speed import Cases, Target, faster, figure, finish, run_rows, start


def targets(cases: Cases, device: torch.device) -> list[Target]:
    apply, sgd = "apply, resnet18 at 95 %", "SGD step, resnet18 at 95 %"
    if device.type == "cuda":
        return [
            faster(cases, sgd, "ASP", 4),
            faster(cases, sgd, "torch.nn.utils.prune", 4),
            faster(cases, sgd, "fused and foreach mask", 1.5),
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


@click.command()
@click.option("--device", "device_name", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--record", type=Path, help="Folder; default benchmarks/records/<date>-masks-<device>.")
@click.option("--smoke", is_flag=True, help="Toy sizes.")
def main(device_name: str, record: Path | None, smoke: bool) -> None:
    """Run it and write the record."""
    folder, device = start("masks", device_name, record)
    cases = run_rows("test_masks_speed.py", folder, device, smoke)
    finish(folder, cases, targets(cases, device))


if __name__ == "__main__":
    main()
