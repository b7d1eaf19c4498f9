"""`python -m dau_fast attest`: a finished run as a signed statement, and a line in the ledger of requests."""

from __future__ import annotations

from pathlib import Path

import click

from dau_fast.errors import UserError, printable
from dau_fast.job.ledger import append_entry
from dau_fast.job.saving import write_synced
from dau_fast.report.envelope import canonical, seal
from dau_fast.report.manifest import ENVELOPE, OPENING
from dau_fast.report.statement import build_statement, describe_entry, draw_salt, open_report
from dau_fast.report.terminal import terminal


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("folder", type=Path)
@click.option("--key", type=Path, required=True, help="The private key that signs, a PEM file.")
@click.option("--request-id", required=True, help="What the request is called where it came in.")
@click.option("--method", default="dau", help="The model that is released, by its method.")
@click.option("--ledger", type=Path, help="A file of requests, to which a line is added.")
def attest(folder: Path, key: Path, request_id: str, method: str, ledger: Path | None) -> None:
    """State in a signed envelope what the run in FOLDER did."""
    envelope, opening = folder / ENVELOPE, folder / OPENING
    if envelope.exists() or opening.exists():
        raise UserError(f"'{folder}' has its evidence already: move {ENVELOPE} and {OPENING} elsewhere first")
    report, salt = open_report(folder), draw_salt()
    statement = build_statement(folder, report, method, request_id, salt)
    content = seal(statement, key)
    write_synced(opening, canonical({"indices": report["run"]["forget"]["indices"], "salt": salt.hex()}))
    write_synced(envelope, content)
    if ledger is not None:
        append_entry(ledger, describe_entry(statement, content))
    told = printable(f"{envelope} is for others; {opening} opens its commitment and is for auditors alone.")
    with terminal(folder) as console:
        console.print(told, markup=False, highlight=False, soft_wrap=True)
