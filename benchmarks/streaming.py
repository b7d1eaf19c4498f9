"""The record of reading images while training: files, Arrow and arrays, against torchvision's loader.

    python benchmarks/streaming.py                    on the CPU, a few minutes on 2 cores
    python benchmarks/streaming.py --device cuda

Writes benchmarks/records/<date>-streaming-<device>/: pytest-benchmark's raw numbers, a summary with ratios
of medians, hardware, versions and commit.
"""

from __future__ import annotations

import torch
from support.speed import Cases, Target, command, faster, figure


def targets(cases: Cases, _: torch.device) -> list[Target]:
    """No rival reads more images a second, and decoding keeps the cores busy."""
    rivals = [faster(cases, case, "torchvision", 1) for case in cases]
    return [*rivals, *(figure(cases, case, "percent_of_floor", 70) for case in ("files", "arrow"))]


if __name__ == "__main__":
    command("streaming", targets)()
