"""The record of BatchNorm with what follows it: every implementation, and the targets.

    python benchmarks/batch_norm.py --device cuda    some three minutes, most of them a compiler's
    python benchmarks/batch_norm.py                  on the CPU, about two minutes on 2 cores

On the CPU the op is PyTorch's own, one operation after the other: nothing is to be gained there, and there is
no target. Writes benchmarks/records/<date>-batch_norm-<device>/: pytest-benchmark's raw numbers, a summary
with ratios of medians, hardware, versions and commit.
"""

from __future__ import annotations

import torch
from support.speed import Cases, Target, command, faster

# Of ResNet-18's layers those that take most of its BatchNorms' time, with all that may follow them.
LARGEST = ("64x32, plain", "64x32, ReLU", "64x32, addition and ReLU")


def targets(cases: Cases, device: torch.device) -> list[Target]:
    """A pass over memory less is to be seen where there is most of it."""
    if device.type != "cuda":
        return []
    return [faster(cases, case, "PyTorch captured", 1.5) for case in LARGEST]


if __name__ == "__main__":
    command("batch_norm", targets)()
