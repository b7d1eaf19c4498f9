"""Fuzz the readers and ops: no traceback, no hang, no crash, nothing written elsewhere.

    python -m tests.fuzz --cases 100000

Sound files are damaged in many ways and given to the package's readers; its ops are called with tensors that
do not fit. A UserError, and for ops what PyTorch raises for wrong arguments, is a pass, and so is a result.
A case is repeated by its number: --only TARGET --first NUMBER --cases 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from .running import TARGETS, run_batch

BATCH = 200  # cases of one process


def main() -> None:
    """Share the cases out to the targets, tell what failed, and exit with 1 where something did."""
    parser = argparse.ArgumentParser(description="Fuzz the readers and ops of dau_fast.")
    parser.add_argument("--cases", type=int, default=10_000, help="in all")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each target")
    parser.add_argument("--only", choices=sorted(TARGETS), action="append", help="targets; left out, all")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    given = parser.parse_args()
    names = given.only or list(TARGETS)
    began, result = time.monotonic(), {}
    for place, name in enumerate(names):
        count = given.cases * (place + 1) // len(names) - given.cases * place // len(names)
        failures: list[tuple[int, str]] = []
        for first in range(given.first, given.first + count, BATCH):
            failures += run_batch(name, first, min(BATCH, given.first + count - first))
        result[name] = {"cases": count, "failures": failures}
        print(f"{name:12} {count:7,} cases, {len(failures)} failures", flush=True)
        for number, trouble in failures[:5]:
            print(f"  case {number}: {trouble.strip()}", flush=True)
    seconds = time.monotonic() - began
    total = sum(len(found["failures"]) for found in result.values())
    print(f"{given.cases:,} cases in {seconds:.0f} s, {total} failures")
    if given.out:
        facts = {"cases": given.cases, "seconds": seconds, "torch": torch.__version__, "targets": result}
        given.out.write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(total > 0)


if __name__ == "__main__":
    main()
