"""The record of image batches: every implementation, and the targets.

    python benchmarks/images.py                    on the CPU, about two minutes on 2 cores
    python benchmarks/images.py --device cuda

Writes benchmarks/records/<date>-images-<device>/: pytest-benchmark's raw numbers, a summary with ratios
of medians, hardware, versions and commit.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from speed import Cases, Target, faster, finish, run_rows, start


def targets(cases: Cases, device: torch.device) -> list[Target]:
    """No rival makes a batch sooner."""
    captured = " captured" if device.type == "cuda" else ""
    rivals = (f"PyTorch{captured}", f"PyTorch compiled{captured}", "torchvision")
    return [faster(cases, case, rival, 1) for case in cases for rival in rivals]


@click.command()
@click.option("--device", "device_name", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--record", type=Path, help="Folder; default benchmarks/records/<date>-images-<device>.")
@click.option("--smoke", is_flag=True, help="Toy sizes.")
def main(device_name: str, record: Path | None, smoke: bool) -> None:
    """Run it and write the record."""
    folder, device = start("images", device_name, record)
    cases = run_rows("test_images_speed.py", folder, device, smoke)
    finish(folder, cases, targets(cases, device))


if __name__ == "__main__":
    main()
