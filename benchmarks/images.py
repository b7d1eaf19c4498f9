"""The record of image batches: every implementation, and the targets.

    python benchmarks/images.py                    on the CPU, about two minutes on 2 cores
    python benchmarks/images.py --device cuda

Writes benchmarks/records/<date>-images-<device>/: pytest-benchmark's raw numbers, a summary with ratios
of medians, hardware, versions and commit.
"""

from __future__ import annotations

import torch
from support.speed import Cases, Target, command, faster


def targets(cases: Cases, device: torch.device) -> list[Target]:
    """No rival makes a batch sooner."""
    captured = " captured" if device.type == "cuda" else ""
    rivals = (f"PyTorch{captured}", f"PyTorch compiled{captured}", "torchvision")
    return [faster(cases, case, rival, 1) for case in cases for rival in rivals]


if __name__ == "__main__":
    command("images", targets)()
