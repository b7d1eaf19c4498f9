"""The record of the membership attacks: seconds, and agreement with scikit-learn's exact machine.

    python benchmarks/evaluation.py               on the CPU; scikit-learn takes many minutes
    python benchmarks/evaluation.py --device cuda

Writes benchmarks/records/<date>-evaluation-<device>/: pytest-benchmark's raw numbers, a summary with ratios
of medians, hardware, versions and commit.
"""

from __future__ import annotations

from pathlib import Path

import click
from speed import Cases, Target, figure, finish, largest, run_rows, start


def targets(cases: Cases) -> list[Target]:
    agreement = [figure(cases, case, "lowest_agreement_percent", 99.5) for case in cases]
    return [largest(cases, "seconds", 3), *agreement]


@click.command()
@click.option("--device", "device_name", default="cpu", type=click.Choice(["cpu", "cuda"]))
@click.option("--record", type=Path, help="Folder; default benchmarks/records/<date>-evaluation-<device>.")
@click.option("--smoke", is_flag=True, help="Toy sizes.")
def main(device_name: str, record: Path | None, smoke: bool) -> None:
    """Run it and write the record."""
    folder, device = start("evaluation", device_name, record)
    cases = run_rows("test_evaluation_speed.py", folder, device, smoke)
    finish(folder, cases, targets(cases))


if __name__ == "__main__":
    main()
