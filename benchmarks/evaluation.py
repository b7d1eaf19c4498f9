"""The record of the membership attacks: seconds, and agreement with scikit-learn's exact machine.

    python benchmarks/evaluation.py               on the CPU; scikit-learn takes many minutes
    python benchmarks/evaluation.py --device cuda

Writes benchmarks/records/<date>-evaluation-<device>/: pytest-benchmark's raw numbers, a summary with ratios
of medians, hardware, versions and commit.
"""

from __future__ import annotations

import torch
from support.speed import Cases, Target, command, figure, largest


def targets(cases: Cases, _: torch.device) -> list[Target]:
    agreement = [figure(cases, case, "lowest_agreement_percent", 99.5) for case in cases]
    return [largest(cases, "seconds", 3), *agreement]


if __name__ == "__main__":
    command("evaluation", targets)()
