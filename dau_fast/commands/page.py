"""`dau_fast report`: the page of a report.json or audit.json again, which may be older than the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dau_fast.commands.help import GroupedCommand
from dau_fast.errors import UserError, exists
from dau_fast.report.audit_page import render_audit
from dau_fast.report.page import render
from dau_fast.report.record import SCHEMA


def make_report() -> click.Command:
    """The command."""
    return GroupedCommand(
        "report",
        params=[
            click.Argument(["report"], metavar="REPORT.JSON", type=Path),
            click.Option(["--out"], type=Path, help="The page to write; by default beside the report."),
        ],
        callback=_report,
        help="Make the page of a report.json or an audit.json.",
        context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    )


def _report(report: Path, out: Path | None) -> None:
    page = out or report.with_suffix(".html")
    try:
        content = _read(report)
        text = render_audit(content) if "audits" in content else render(content)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{report}' is no report of dau_fast, or a damaged one: it lacks {error}") from error
    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"'{page}' cannot be written: {error.strerror}: choose another `out`") from error
    click.echo(f"{page} shows the pictures.")


def _read(path: Path) -> dict[str, Any]:
    if not exists(path, "file"):
        raise UserError(f"'{path}' is not a file: name a report.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or not {"methods", "audits"} & found.keys():
        raise UserError(
            f"'{path}' is no report of dau_fast: name a report.json, an evaluation.json or an audit.json"
        )
    if found.get("schema") != SCHEMA:
        raise UserError(f"'{path}' is of schema {found.get('schema')}, and this version reads {SCHEMA}")
    return found
