"""`python -m dau_fast audit`: is a checkpoint told apart from models that were retrained?"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from dau_fast import checkpoints
from dau_fast.commands.help import SHARED, GroupedCommand
from dau_fast.engine.launch import Launch
from dau_fast.engine.runtime import Runtime, choose_device, choose_precision
from dau_fast.errors import UserError, printable
from dau_fast.job.audit import AuditOutcome, AuditRequest, run_audit
from dau_fast.job.provenance import describe_origin
from dau_fast.job.request import Request
from dau_fast.report.audit import audit_table, describe_audit
from dau_fast.report.audit_page import render_audit
from dau_fast.report.manifest import describe_files
from dau_fast.report.output import OutputFolder
from dau_fast.report.progress import progress_bars
from dau_fast.report.terminal import terminal


class _Audit(GroupedCommand):
    examples = (
        "dau_fast audit out/dau.safetensors --original out/original.safetensors --train-references 8",
        "dau_fast audit out/dau.safetensors --original out/original.safetensors --references DIR",
    )


def make_audit(unlearning: Sequence[click.Parameter]) -> click.Command:
    """The command. unlearning: the options of the command that unlearns, of which it takes SHARED."""
    shared = [parameter for parameter in unlearning if parameter.name in SHARED["audit"]]
    own: list[click.Parameter] = [
        click.Argument(["audited"], metavar="CHECKPOINT...", nargs=-1, required=True, type=Path),
        click.Option(["--original"], type=Path, required=True, help="The model from before unlearning."),
        click.Option(["--references"], type=Path, help="A folder of retrained models' checkpoints."),
        click.Option(
            ["--train-references"],
            type=click.IntRange(min=1),
            help="Train so many retrained models, and keep them in --out.",
        ),
    ]
    return _Audit(
        "audit",
        params=[*own, *shared],
        callback=_audit,
        help="Say whether unlearned models can be told from retrained ones, and how sure that is.",
        context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    )


@click.pass_context
def _audit(
    context: click.Context,
    /,
    audited: tuple[Path, ...],
    original: Path,
    references: Path | None,
    train_references: int | None,
    out: Path,
    device: str,
    precision: str,
    **given: Any,
) -> None:
    launch: Launch = context.obj
    if launch.local_rank is not None:
        raise UserError("an audit is for one process: start it without torchrun")
    place = choose_device(device)
    runtime = Runtime(place, precision=choose_precision(precision, place))
    request = AuditRequest(audited, Request(checkpoint=original, **given), references, train_references)
    began, started = time.perf_counter(), datetime.now(UTC)
    with OutputFolder(out, "audit.json") as folder, progress_bars() as bars:
        outcome = run_audit(request, runtime, bars)
        report = describe_audit(request, outcome, started, time.perf_counter() - began)
        _write(folder, request, report, outcome)
    told = printable(f"{out / 'audit.html'} shows the picture, {out / 'audit.json'} has every number.")
    with terminal(out) as console:
        console.print(audit_table(report))
        console.print(told, markup=False, highlight=False, soft_wrap=True)


def _write(folder: Path, request: AuditRequest, report: dict[str, Any], outcome: AuditOutcome) -> None:
    """The report, its page, and the references that were trained, into `folder`."""
    run, task = request.run, outcome.task
    origin = describe_origin(run.dataset, run.arch_name, "retrain", outcome.roles, task)
    for name, model in zip(outcome.reference_files, outcome.trained, strict=False):
        checkpoints.save(folder / name, model.network, origin, task.masks)
    (folder / "audit.html").write_text(render_audit(report), encoding="utf-8")
    report["files"] = describe_files(folder)
    (folder / "audit.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
