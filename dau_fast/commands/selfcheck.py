"""`python -m dau_fast selfcheck`: is every op right on this machine, and which of its paths runs?"""

from __future__ import annotations

import time
from collections.abc import Sequence

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dau_fast.engine.runtime import choose_device
from dau_fast.ops._selfcheck import Finding, check_all
from dau_fast.report.facts import describe_hardware


def make_selfcheck() -> click.Command:
    """The command; it ends with exit code 1 where an op is wrong."""
    return click.Command(
        "selfcheck",
        params=[
            click.Option(["--device"], default="auto", type=click.Choice(["auto", "cpu", "cuda"])),
            click.Option(["--seed"], default=0, type=int, help="Of the numbers that ops are tried on."),
        ],
        callback=_selfcheck,
        help="Hold every op against its definition in float64 on the device at hand.",
        context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    )


def _selfcheck(device: str, seed: int) -> None:
    place = choose_device(device)
    began = time.perf_counter()
    findings = list(check_all(place, seed))
    console = Console()
    console.print(_table(findings))
    for line in _list_reasons(findings):
        console.print(Text(line), soft_wrap=True)
    wrong = [finding for finding in findings if not finding.right]
    for finding in wrong:
        what = finding.failed or f"error {finding.error:.1e}, expected {finding.case.limit:.0e} at most"
        console.print(Text(f"WRONG {finding.case.op} {finding.case.sizes}: {what}"), soft_wrap=True)
    verdict = f"{len(findings) - len(wrong)} of {len(findings)} are right on {describe_hardware(place)}"
    console.print(Text(f"{verdict}, {time.perf_counter() - began:.0f} s"), soft_wrap=True)
    if wrong:
        raise click.exceptions.Exit(1)


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for heading in ("op", "inputs", "path", "error", ""):
        table.add_column(heading, justify="right" if heading == "error" else "left")
    for finding in findings:
        case = finding.case
        error = "" if finding.failed else f"{finding.error:.0e}" if finding.error else "0"
        inputs = f"{case.sizes}, {str(case.dtype).removeprefix('torch.')}"
        verdict = "right" if finding.right else "WRONG"
        table.add_row(*map(Text, (case.op, inputs, finding.path, error, verdict)))
    return table


def _list_reasons(findings: Sequence[Finding]) -> list[str]:
    """Why ops take plain PyTorch where they do: a line a reason."""
    reasons: dict[str, dict[str, None]] = {}
    for finding in findings:
        if finding.why:
            reasons.setdefault(finding.why, {})[finding.case.op] = None
    return [f"plain PyTorch, as {why}: {', '.join(ops)}" for why, ops in reasons.items()]
